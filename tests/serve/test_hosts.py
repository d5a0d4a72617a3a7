"""Lines between processes, how they gather, and that all of them do what the first one calls for."""

import contextlib
import json
import queue
import socket
import threading
from concurrent import futures

import jax
import numpy as np
import pytest
from flax import serialization
from small_model import CONFIG, draw_params

from mla_jax import expert_reduction as reduction_lib
from mla_jax import sampler, steps
from mla_jax.config import CACHE_TYPES, RunConfig
from mla_jax.serve.device import Device, Part, Row
from mla_jax.serve.hosts import calls, gathering, relay
from mla_jax.serve.hosts import line as line_lib
from mla_jax.serve.hosts.calls import Follower, Leader
from mla_jax.serve.hosts.gathering import NotGathered, Place
from mla_jax.serve.hosts.line import Line
from mla_jax.serve.request import Lost

SECONDS = 30  # that nothing here takes, on the busiest machine
ABOUT = {"--ctx-size": "512", "the model": "abc"}


def connection():
    """Returns two ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
        return near, far


@pytest.fixture
def ends():
    near, far = connection()
    with near, far:
        yield near, far


@pytest.fixture
def quick(monkeypatch):
    """Has processes told lost after half a second."""
    monkeypatch.setattr(line_lib, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(line_lib, "SILENT_SECONDS", 0.5)


def listening(end):
    """Returns a line that has begun to listen, and queues of what it hears and of how it is lost."""
    line, heard, lost = Line(end, 1), queue.SimpleQueue(), queue.SimpleQueue()
    line.start(heard.put, lost.put)
    return line, heard, lost


def test_messages_come_as_they_were(ends):
    (near, *_), (_, heard, _) = (listening(end) for end in ends)
    rows = np.arange(3_000_000, dtype=np.float32)
    near.send({"call": "a", "arguments": [rows, None, {"n": np.int32(7)}]})
    near.send({"ready": True})
    first = heard.get(timeout=SECONDS)
    np.testing.assert_array_equal(first["arguments"][0], rows)
    assert first["call"] == "a" and first["arguments"][1] is None and first["arguments"][2]["n"] == 7
    assert heard.get(timeout=SECONDS) == {"ready": True}


def test_a_silent_process_is_lost_and_an_idle_one_is_not(ends, quick):
    (_, _, lost), (_, _, lost_too) = (listening(end) for end in ends)
    with pytest.raises(queue.Empty):
        lost.get(timeout=1.5)
    assert lost_too.empty()
    near, far = connection()
    with near, far:
        _, _, lost = listening(near)
        assert lost.get(timeout=SECONDS) == "nothing was heard from it for 0.5 seconds"


@pytest.mark.parametrize(
    ("sent", "how"),
    [(b"", "its connection has ended"), (b"\xff" * 8, "it sent what is no message")],
    ids=["gone", "too large"],
)
def test_a_line_ends_for_a_reason(ends, sent, how):
    near, far = ends
    _, _, lost = listening(near)
    far.sendall(sent)
    far.shutdown(socket.SHUT_WR)
    assert lost.get(timeout=SECONDS) == how


@pytest.mark.parametrize(
    "sent", [b"\xc1 is no msgpack", b"\x07", b"\x81\x07\x07"], ids=["no msgpack", "a number", "no names"]
)
def test_what_is_no_message_is_told(ends, sent):
    near, far = ends
    _, _, lost = listening(near)
    line_lib.send(far, sent)
    assert lost.get(timeout=SECONDS) == "it sent what is no message"


def gather(*greetings, seconds=SECONDS, num_processes=2):
    """Gathers processes in threads; returns what each of `gather` and `come` gave or raised."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    at = lambda process_id: Place(
        host="127.0.0.1", port=port, num_processes=num_processes, process_id=process_id
    )
    with futures.ThreadPoolExecutor() as pool:
        jobs = [pool.submit(gathering.gather, at(0), ABOUT, seconds)]
        for process_id, about in greetings:
            jobs.append(pool.submit(gathering.come, at(process_id), ABOUT | about, seconds))
        return [job.exception() or job.result() for job in jobs]


def close(*gathered):
    for found in gathered:
        for line in found.lines:
            line.close()


def test_processes_find_each_other():
    first, *others = gather((2, {}), (1, {}), num_processes=3)
    assert [line.process_id for line in first.lines] == [1, 2]
    assert [line.process_id for other in others for line in other.lines] == [0, 0]
    heard = [listening(line._connection)[1] for other in others for line in other.lines]
    for line in first.lines:
        line.send({"to": line.process_id})
    assert [queue.get(timeout=SECONDS)["to"] for queue in heard] == [2, 1]
    service = socket.create_server(("127.0.0.1", int(first.coordinator.rpartition(":")[2])))
    host, _, port = others[0].coordinator.rpartition(":")
    with service, socket.create_connection((host, int(port))) as near:
        far, _ = service.accept()
        with far:
            near.sendall(b"there")
            assert far.recv(5) == b"there"
            far.sendall(b"back")
            assert near.recv(4) == b"back"
        near.settimeout(0.3)
        with pytest.raises(TimeoutError):  # JAX would end its process if this connection broke
            near.recv(1)
        near.sendall(b"beat")
    close(first, *others)


@pytest.mark.parametrize(
    ("about", "sentence"),
    [
        (
            {"--ctx-size": "256"},
            "--ctx-size must be the same in all processes, but process 1 has '256' and process 0 has '512'.",
        ),
        (
            {"the model": "def"},
            "the model must be the same in all processes, but process 1 has 'def' and process 0 has 'abc'.",
        ),
        (
            {"the model": "\x1b[2J" + "x" * 200},
            "the model must be the same in all processes, but process 1 has "
            f"'\\x1b[2J{'x' * 72} and process 0 has 'abc'.",
        ),
    ],
    ids=["a flag", "the model", "what is not for a terminal"],
)
def test_processes_that_differ_are_refused(about, sentence):
    found = gather((1, about))
    assert [type(error) for error in found] == [NotGathered] * 2
    assert [str(error) for error in found] == [sentence] * 2


def test_a_process_comes_once():
    sentence = "--process-id must be another one in each process, but two came with 1."
    assert [str(error) for error in gather((1, {}), (1, {}), num_processes=3)] == [sentence] * 3


def test_who_does_not_come_is_named():
    first, one = gather((1, {}), seconds=1, num_processes=4)
    assert str(first).endswith("within 1 seconds, but these did not: 2, 3.") and str(one) == str(first)


def test_a_leader_that_is_not_there_is_named():
    at = Place(host="127.0.0.1", port=relay.free_port(), num_processes=2, process_id=1)
    with pytest.raises(
        NotGathered, match=rf"^process 0 must be at {at.address} within 0.5 seconds, and was not"
    ):
        gathering.come(at, ABOUT, 0.5)


def test_an_address_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as server:
        at = Place(host="127.0.0.1", port=server.getsockname()[1], num_processes=2, process_id=0)
        with pytest.raises(NotGathered, match="--coordinator must be an address of the machine of process 0"):
            gathering.gather(at, ABOUT, 1)


def greeting(**words):
    text = json.dumps({"greeting": gathering._GREETING} | words).encode()
    return line_lib._LENGTH.pack(len(text)) + text


def test_strangers_are_sent_away():
    at = Place(host="127.0.0.1", port=relay.free_port(), num_processes=2, process_id=0)
    texts = [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        line_lib._LENGTH.pack(4) + b"[[[[",
        line_lib._LENGTH.pack(2) + b"{}",
        line_lib._LENGTH.pack(60_000) + b"[" * 60_000,
        greeting(),
        greeting(token="0" * 64),
        greeting(token=["0"]),
        greeting(process="1", about={}),
    ]
    with futures.ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        first = pool.submit(gathering.gather, at, ABOUT, SECONDS)
        reach = lambda: stack.enter_context(relay.reach(at.port))
        reach()  # who says nothing does not keep others waiting
        for text in texts:
            stranger = reach()
            stranger.settimeout(SECONDS)
            stranger.sendall(text)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b""
        one = Place(host="127.0.0.1", port=at.port, num_processes=2, process_id=1)
        close(gathering.come(one, ABOUT, SECONDS), first.result())


def at_free_port(*, num_processes=2):
    """Returns a function from process ids to places of one run."""
    where = dict(host="127.0.0.1", port=relay.free_port(), num_processes=num_processes)
    return lambda process_id: Place(**where, process_id=process_id)


def greeted(stack, at, sent):
    """Returns what process 0 answers, empty for a connection that it closes."""
    connection = stack.enter_context(relay.reach(at.port))
    connection.settimeout(SECONDS)
    connection.sendall(sent)
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(1000)
    return b""


@pytest.mark.parametrize("process", [0, 2, -1, 10**30], ids=["first", "beyond", "negative", "huge"])
def test_who_is_no_process_of_the_run_is_refused_and_does_not_end_it(process):
    at = at_free_port()
    with futures.ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        first = pool.submit(gathering.gather, at(0), ABOUT, SECONDS)
        assert b"--process-id must be in [1, 2)" in greeted(
            stack, at(0), greeting(process=process, about=ABOUT)
        )
        assert b"--ctx-size must be" in greeted(
            stack, at(0), greeting(process=process, about={"--ctx-size": "9"})
        )
        assert greeted(stack, at(0), greeting(process=True, about=ABOUT)) == b""
        assert greeted(stack, at(0), greeting(process=1, about={"--ctx-size": [9]})) == b""
        close(gathering.come(at(1), ABOUT, SECONDS), first.result())


def test_who_comes_too_late_is_told():
    at = at_free_port()
    with futures.ThreadPoolExecutor() as pool:
        first = pool.submit(gathering.gather, at(0), ABOUT, SECONDS)
        one = gathering.come(at(1), ABOUT, SECONDS)
        first.result()
        with pytest.raises(NotGathered, match=r"^the run has begun without this process\.$"):
            gathering.come(at(1), ABOUT, SECONDS)
        close(one, first.result())


def test_a_key_keeps_others_out():
    at = at_free_port()
    with futures.ThreadPoolExecutor() as pool, contextlib.ExitStack() as stack:
        first = pool.submit(gathering.gather, at(0), ABOUT, SECONDS, key=b"right")
        words = dict(process=1, about={"--ctx-size": "another"})
        assert greeted(stack, at(0), greeting(**words)) == b""
        for key in (b"wrong", b""):
            with pytest.raises(NotGathered, match=r"gave no answer, .* another MLA_JOIN_KEY"):
                gathering.come(at(1), ABOUT, 0.1, key=key)
        one = gathering.come(at(1), ABOUT, SECONDS, key=b"right")
        assert greeted(stack, at(0), greeting(process=1, about=ABOUT)) == b""
        close(one, first.result())


@pytest.mark.parametrize("host", ["a" * 64, "a..b"], ids=["long", "empty"])
@pytest.mark.parametrize("meet", [gathering.gather, gathering.come])
def test_a_host_that_cannot_be_is_told(meet, host):
    with pytest.raises(NotGathered, match=r"^--coordinator must have a host whose parts"):
        meet(Place(host=host, port=1, num_processes=2, process_id=0), ABOUT, 1)


@pytest.fixture(scope="module")
def params():
    return draw_params()


@contextlib.contextmanager
def led(params, run, *, follower_programs=steps, leader_programs=steps):
    """Yields a leader and its follower, which follows in a thread, and what each of them lost."""
    at = lambda process_id: Place(host="a", port=1, num_processes=2, process_id=process_id)
    lost, left = queue.SimpleQueue(), queue.SimpleQueue()
    near, far = connection()
    with near, far:
        follower = Follower(at(1), Line(far, 0), left.put, programs=follower_programs)
        leader = Leader(at(0), [Line(near, 1)], lost.put, programs=leader_programs)

        def follow():
            with contextlib.suppress(Exception):
                follower.follow(params, CONFIG, run)

        thread = threading.Thread(target=follow)
        thread.start()
        yield leader, follower, lost, left
        leader.end()
        thread.join(SECONDS)
        assert not thread.is_alive()


class Counted:
    """Steps that say when they are done."""

    def __init__(self):
        self.done = queue.SimpleQueue()

    def __getattr__(self, name):
        def step(*args, **settings):
            result = jax.block_until_ready(getattr(steps, name)(*args, **settings))
            self.done.put(name)
            return result

        return step


def test_followers_have_the_rows_of_the_leader(params):
    run, programs = RunConfig(cache_type="q8_0"), Counted()
    off = (reduction_lib.OFF,) * CONFIG.num_layers
    with led(params, run, follower_programs=programs) as (leader, follower, lost, left):
        sizes = dict(ctx_size=256, ubatch=32, max_rows=2, eog_ids=[1])
        device = Device(params, CONFIG, run, programs=leader, **sizes)
        device.prefill([Part(tokens=[3, 5, 7, 9], start=0, pages=[2, 1], reduction=off)], 32)
        sampling = sampler.SamplingParams(seed=5)
        rows = [
            Row(tokens=[3, 5, 7, 9, 11], pages=[2, 1], sampling=sampling, reduction=off, num_logprobs=2),
            Row(tokens=[4], pages=[0], sampling=sampling, reduction=((1, 0.5),) * CONFIG.num_layers),
        ]
        device.decode(rows, 3)
        device.draw(rows)
        device.copy([(2, 3)])
        device.put([1, 2], device.take([3, 0]))
        names = ["init_pool", "prefill", "decode", "draw", "copy_pages", "take_pages", "put_pages"]
        assert [programs.done.get(timeout=SECONDS) for _ in names] == names
        leader.end()
        assert left.get(timeout=SECONDS) is None and lost.empty()
    own, theirs = jax.device_get((device._layers, follower._layers))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(own))
    jax.tree.map(np.testing.assert_array_equal, own, theirs)


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
def test_rows_of_every_type_are_sent_as_they_are(cache_type):
    layers = steps.init_pool(
        CONFIG, RunConfig(cache_type=cache_type), batch=1, num_pages=2, page_size=64
    ).layers
    rng = np.random.default_rng(0)
    draw = lambda leaf: (
        rng.integers(256, size=leaf.nbytes, dtype=np.uint8).view(leaf.dtype).reshape(leaf.shape)
    )
    rows = jax.tree.map(draw, layers)
    sent = serialization.msgpack_restore(line_lib.pack({"rows": calls._packed(calls._LAYERS, rows)}))
    came = calls._unpacked(calls._LAYERS, sent["rows"], None, layers)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8)), rows, came)
    assert jax.tree.map(lambda a: a.dtype, rows) == jax.tree.map(lambda a: a.dtype, came)


class Broken:
    """Steps that fail."""

    def init_pool(self, config, run, **sizes):
        raise ArithmeticError("a pool broke.\nmore of it")


def test_a_follower_that_fails_ends_the_run(params, monkeypatch):
    monkeypatch.setattr(calls, "_VERDICT_SECONDS", 0.1)
    run = RunConfig()
    with led(params, run, follower_programs=Broken()) as (leader, _, lost, left):
        sentence = "process 1 of 2 failed: ArithmeticError: a pool broke."
        leader.init_pool(CONFIG, run, batch=1, num_pages=2, page_size=64)
        assert lost.get(timeout=SECONDS) == left.get(timeout=SECONDS) == sentence
        with pytest.raises(Lost, match=sentence):
            leader.init_pool(CONFIG, run, batch=1, num_pages=2, page_size=64)


def test_a_leader_that_fails_ends_the_run(params, monkeypatch):
    monkeypatch.setattr(calls, "_VERDICT_SECONDS", 0.1)
    run = RunConfig()
    with led(params, run, leader_programs=Broken()) as (leader, _, lost, left):
        with pytest.raises(ArithmeticError):
            leader.init_pool(CONFIG, run, batch=1, num_pages=2, page_size=64)
        sentence = "process 0 of 2 failed: ArithmeticError: a pool broke."
        assert lost.get(timeout=SECONDS) == left.get(timeout=SECONDS) == sentence


def test_who_watches_later_is_told_what_was_lost(params):
    with led(params, RunConfig()) as (leader, follower, lost, left):
        follower.tell(RuntimeError("no memory"))
        sentence = lost.get(timeout=SECONDS)
        assert sentence == left.get(timeout=SECONDS) == "process 1 of 2 failed: RuntimeError: no memory."
        told = []
        leader.watch(told.append)
        assert told == [sentence]


def test_nobody_waits_for_who_cannot_be_told(params):
    def fail(sentence):
        raise ArithmeticError(sentence)

    with led(params, RunConfig()) as (leader, follower, _, _):
        leader.watch(fail)
        follower._left = fail
        with pytest.raises(ArithmeticError):
            leader._lose("it is gone.")
        assert leader._verdict.is_set()
        with pytest.raises(Lost):
            leader.init_pool(CONFIG, RunConfig(), batch=1, num_pages=2, page_size=64)
