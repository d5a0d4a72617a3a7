"""A run of several processes of the packaged model on this machine: what it answers, and how it ends."""

import contextlib
import dataclasses
import pathlib
import queue
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from mla_jax.serve.hosts import relay

PROMPT = "def read_lines(path):\n"
START_SECONDS = 240  # programs that no earlier run has compiled, on a busy machine
END_SECONDS = 30  # that a run may take to end once a process is lost
LONG = {"prompt": PROMPT, "n_predict": -1, "ignore_eos": True}


@dataclasses.dataclass
class Run:
    """Processes of one run; what each writes is in files of `folder`."""

    folder: pathlib.Path
    processes: list[subprocess.Popen]

    def told(self, process_id):
        return (self.folder / f"{process_id}.err").read_text()

    def text(self):
        return (self.folder / "0.out").read_text()

    def await_line(self, process_id, pattern):
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(pattern, self.told(process_id), re.MULTILINE)):
            assert time.monotonic() < deadline and self.processes[0].poll() is None, self.told(process_id)
            time.sleep(0.05)
        return found

    def codes(self, *process_ids, seconds=END_SECONDS):
        deadline = time.monotonic() + seconds
        return [self.processes[i].wait(max(deadline - time.monotonic(), 0.01)) for i in process_ids]


@pytest.fixture
def start(tmp_path):
    """Returns a function that starts a run, whose processes are gone after the test."""
    with contextlib.ExitStack() as stack:

        def start(num_processes, *args, of_leader=(), of_others=()):
            where = ["--coordinator", f"127.0.0.1:{relay.free_port()}", "--num-processes", str(num_processes)]
            processes = []
            for process_id in range(num_processes):
                own = of_others if process_id else of_leader
                command = [sys.executable, "-m", "mla_jax", *args, *own, *where]
                out = stack.enter_context(open(tmp_path / f"{process_id}.out", "w"))
                err = stack.enter_context(open(tmp_path / f"{process_id}.err", "w"))
                command += ["--process-id", str(process_id)]
                processes.append(subprocess.Popen(command, stdout=out, stderr=err))
                stack.callback(processes[-1].wait)
                stack.callback(processes[-1].kill)
            return Run(tmp_path, processes)

        yield start


@pytest.fixture
def serve(start):
    """Returns a function that starts a server with one slot: the run, and a client of it."""
    with contextlib.ExitStack() as stack:

        def serve(num_processes, *flags):
            flags = ["serve", *flags, "-c", "32768", "-np", "1", "--no-warmup"]
            run = start(num_processes, *flags, of_leader=["--port", "0"])
            url = run.await_line(0, r"^serving \S+ at (http://\S+)$")[1]
            return run, stack.enter_context(httpx.Client(base_url=url, timeout=60))

        yield serve


@pytest.fixture(scope="module")
def alone():
    """What one process draws."""
    command = [sys.executable, "-m", "mla_jax", "generate", "-p", PROMPT, "-n", "12", "--temp", "0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("num_processes", "flags"),
    [(2, ["--mesh", "model=2"]), (4, ["--mesh", "data=2,expert=2"])],
    ids=["two parts", "four parts"],
)
def test_the_text_is_that_of_one_process(start, alone, num_processes, flags):
    run = start(num_processes, "generate", *flags, of_leader=["-p", PROMPT, "-n", "12", "--temp", "0"])
    assert run.codes(*range(num_processes), seconds=START_SECONDS) == [0] * num_processes
    assert run.text() == alone
    for process_id in range(1, num_processes):
        assert (run.folder / f"{process_id}.out").read_text() == ""
        assert f"process {process_id} of {num_processes} follows 127.0.0.1:" in run.told(process_id)
        assert "has ended the run" in run.told(process_id) and "failed" not in run.told(process_id)


def test_it_serves_until_it_is_told_to_end(serve):
    run, client = serve(2)
    body = {"prompt": PROMPT, "n_predict": 12, "temperature": 0, "cache_prompt": False}
    texts = [client.post("/completion", json=body).json()["content"] for _ in range(2)]
    assert texts[0] == texts[1] and texts[0]
    biased = client.post("/completion", json=body | {"grammar": 'root ::= "yes" | "no"'}).json()
    assert biased["content"] in ("yes", "no")
    run.processes[0].send_signal(signal.SIGTERM)
    assert run.codes(0, 1) == [0, 0]
    assert "goodbye" in run.told(0) and "has ended the run" in run.told(1)


class Asking:
    """Two requests in threads of their own: one is streamed, the other waits for its slot."""

    def __init__(self, client):
        self.client, self.streamed, self.ended = client, queue.SimpleQueue(), queue.SimpleQueue()
        threading.Thread(target=self._stream).start()
        self.streamed.get(timeout=START_SECONDS)
        threading.Thread(target=self._wait).start()
        while "mla_jax_num_waiting 1.0" not in client.get("/metrics").text:
            time.sleep(0.02)

    def _stream(self):
        last = ""
        with self.client.stream("POST", "/completion", json=LONG | {"stream": True}) as answer:
            for line in answer.iter_lines():
                self.streamed.put(line)
                last = line or last
        self.ended.put(("stream", last))

    def _wait(self):
        answer = self.client.post("/completion", json=LONG)
        self.ended.put((answer.status_code, answer.text))


@pytest.mark.parametrize(
    ("num_processes", "flags", "sent", "how"),
    [
        (3, [], signal.SIGKILL, "its connection has ended"),
        (2, ["--mesh", "model=2"], signal.SIGSTOP, "nothing was heard from it for 10 seconds"),
    ],
    ids=["killed", "stopped"],
)
def test_a_lost_process_ends_the_run(serve, num_processes, flags, sent, how):
    run, client = serve(num_processes, *flags)
    asking = Asking(client)
    run.processes[1].send_signal(sent)
    began = time.monotonic()
    answers = dict(asking.ended.get(timeout=END_SECONDS) for _ in range(2))
    seconds = time.monotonic() - began
    sentence = f"process 1 of {num_processes} was lost: {how}."
    assert sentence in answers["stream"] and '"error"' in answers["stream"]
    assert sentence in answers[503]
    ready, late = client.get("/ready"), client.post("/completion", json=LONG)
    assert (ready.status_code, late.status_code) == (503, 503) and sentence in late.text
    others = [i for i in range(num_processes) if i != 1]
    assert run.codes(*others) == [1] * len(others)
    print(f"503 after {seconds:.1f} s, ended after {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < END_SECONDS
    for process_id in others:
        assert run.told(process_id).count(sentence) == 1
        assert "Traceback" not in run.told(process_id) and "Check failure" not in run.told(process_id)


def test_followers_end_when_the_leader_is_killed(serve):
    run, _ = serve(2)
    run.await_line(1, "^cache: ")  # the last line that loading tells
    run.processes[0].kill()
    assert run.codes(1) == [1]
    assert run.told(1).endswith("mla-jax: process 0 of 2 was lost: its connection has ended.\n")


def test_processes_that_differ_do_not_run(start):
    run = start(2, "generate", of_leader=["-p", PROMPT, "-c", "512"], of_others=["-c", "256"])
    assert run.codes(0, 1, seconds=START_SECONDS) == [2, 2]
    sentence = (
        "--ctx-size must be the same in all processes, but process 1 has '256' and process 0 has '512'."
    )
    assert run.told(0).endswith(f"mla-jax: {sentence}\n") and run.told(1) == f"mla-jax: {sentence}\n"
    assert run.text() == ""
