"""The server as a process, over an engine by script: limits, clients that leave, overload, and the end."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse

import httpx
import pytest

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}]}
LONG = "one two three four five six seven eight nine ten " * 40
SCRIPT = pathlib.Path(__file__).parent / "fake_server.py"


@pytest.fixture(scope="module")
def start():
    """Returns a function that starts a server: (process, address)."""
    with contextlib.ExitStack() as stack:

        def start(**told):
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, SCRIPT, json.dumps(told)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process, process.stdout.readline().strip()

        yield start


@pytest.fixture(scope="module")
def strict(start):
    """A server that waits for nobody: (process, address)."""
    return start(head_seconds=0.5, settings={"body_seconds": 0.5})


def metric(url, name):
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith(f"mla_jax_{name} "):
            return float(line.split()[1])
    return None


def wait_for(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come about"
        time.sleep(0.01)


def connect(url):
    address = urllib.parse.urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=10)


def post(body, *, path=CHAT, length=None, extra=b""):
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n".encode()
    return head + extra + b"\r\n" + body


def reply(sock):
    """Returns (status, body) of an answer; (None, b"") if the connection ends before it."""
    sock.settimeout(10)
    with contextlib.suppress(ConnectionError):
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        return answer.status, answer.read()
    return None, b""


def memory(process):
    """Returns the bytes that a process has in memory."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def processor_seconds(process):
    """Returns the time that a process has had of all cores, however busy others kept them."""
    fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_bodies_and_heads_have_limits(strict):
    process, url = strict
    before = memory(process)
    huge = b'{"messages": "' + b"a" * (10 << 20)
    answers = {
        "10 MiB": (post(huge), 413),
        "said to be 10 MiB": (post(b"{", length=10 << 20), 413),
        "wrong length": (post(b"{}", length=50), 408),
        "negative length": (post(b"{}", length=-5), 400),
        "two lengths": (post(b"{}", extra=b"Content-Length: 7\r\n"), 400),
        "depth": (post(b'{"a":' + b"[" * 100_000), 400),
        "long head": (
            b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * (20 << 10) + b"\r\n\r\n",
            431,
        ),
        "endless head": (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * (1 << 20), 400),
        "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
    }
    for name, (sent, status) in answers.items():
        with connect(url) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(sent)
            got, text = reply(sock)
            assert got in (status, None), (name, text)
            assert got == status or name in ("10 MiB", "endless head"), name  # cut off before it reads
            if got in (408, 413):
                assert json.loads(text)["error"]["message"].startswith("the body must")
    assert memory(process) - before < 64 << 20
    assert httpx.post(url + CHAT, json=BODY).status_code == 200


def test_an_endless_body_is_cut_off(strict):
    process, url = strict
    before = memory(process)
    with connect(url) as sock:
        sock.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        with contextlib.suppress(ConnectionError):
            for _ in range(4000):
                sock.sendall(b"10000\r\n" + b"a" * 0x10000 + b"\r\n")
    assert memory(process) - before < 64 << 20
    assert httpx.post(url + CHAT, json=BODY).status_code == 200


_UNREAD = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [b"GET /health HT", b"", post(b"{", length=100), _UNREAD],
    ids=["head", "nothing", "body", "body that nobody reads"],
)
def test_a_slow_client_is_cut_off(strict, head):
    _, url = strict
    with connect(url) as sock:
        sock.sendall(head)
        began, sent = time.monotonic(), 0
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 5 and not _is_closed(sock):
                if head:
                    sock.sendall(b"x")
                sent += 1
                time.sleep(0.05)
        assert time.monotonic() - began < 2
    assert httpx.get(f"{url}/health").status_code == 200


def _is_closed(sock):
    sock.settimeout(0.01)
    try:
        return not sock.recv(65536)
    except TimeoutError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads processor time as Linux tells it")
def test_a_long_text_is_tokenised_beside_the_others(start):
    process, url = start(settings={"body_bytes": 8 << 20})
    num_answers, is_over = 0, threading.Event()

    def watch():
        nonlocal num_answers
        with httpx.Client() as client:
            while not is_over.wait(0.01):
                assert client.get(f"{url}/health").status_code == 200
                num_answers += 1

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for text in ("a" * 10**6, "_" * 10**6, " " * 10**6, "漢" * 10**6):
            began, answers_before = processor_seconds(process), num_answers
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": text}, timeout=60)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "context_length_exceeded"
            tokens = httpx.post(f"{url}/tokenize", json={"content": text}, timeout=60).json()["tokens"]
            assert len(tokens) > 1000
            assert processor_seconds(process) - began < 4  # hours, were it not linear
            assert num_answers - answers_before > 4
    finally:
        is_over.set()
        watcher.join()


def test_it_speaks_https_with_a_certificate(start, tmp_path):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the program openssl, which makes the certificate")
    certificate, key = str(tmp_path / "certificate.pem"), str(tmp_path / "key.pem")
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, *named]
    subprocess.run([openssl, *made], check=True, capture_output=True)
    process, url = start(secure={"ssl_certificate": certificate, "ssl_key": key})
    assert url.startswith("https://127.0.0.1:")
    with httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=certificate)) as client:
        assert client.post(CHAT, json=BODY).status_code == 200
        with client.stream("POST", CHAT, json=BODY | {"stream": True}) as answer:
            assert [*answer.iter_lines()][-2:] == ["data: [DONE]", ""]
    with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
        httpx.get(f"{url}/health")
    with connect(url) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(post(b"{}"))
        assert reply(sock)[0] is None  # plain HTTP is answered by nothing
    process.terminate()
    assert process.wait(10) == 0 and process.stderr.read() == ""


def test_whoever_leaves_is_given_up(start):
    _process, url = start(engine={"step_seconds": 0.002, "num_slots": 2, "max_waiting": 1000}, text=LONG)
    rng = random.Random(0)

    def leave(number):
        stream = {"stream": bool(number % 2)}
        data = json.dumps(BODY | stream).encode()
        with connect(url) as sock:
            sock.sendall(post(data)[: rng.randrange(60, 400)])
            time.sleep(rng.random() * 0.03)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, range(500)))
    wait_for(lambda: metric(url, "num_running") == 0 == metric(url, "num_waiting"))
    assert metric(url, "disconnects_total") > 5
    answer = httpx.post(url + CHAT, json=BODY, timeout=30).json()
    assert answer["choices"][0]["message"]["content"] == LONG.strip() or answer["usage"]["completion_tokens"]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_ends_the_drawing_at_once(start, stream):
    _, url = start(engine={"step_seconds": 0.02}, text=LONG)
    with connect(url) as sock:
        sock.sendall(post(json.dumps(BODY | {"stream": stream}).encode()))
        wait_for(lambda: metric(url, "num_running") == 1)
    began = time.monotonic()
    wait_for(lambda: metric(url, "num_running") == 0)
    assert time.monotonic() - began < 0.5
    assert metric(url, "disconnects_total") == 1


def test_overload_is_answered_by_429_alone(start):
    _, url = start(engine={"step_seconds": 0.002, "num_slots": 4, "max_waiting": 16}, text="a b c d e f g h")
    wanted = httpx.post(url + CHAT, json=BODY).json()["choices"][0]["message"]

    def ask(_):
        answer = client.post(url + CHAT, json=BODY)
        return answer.status_code, answer.json(), answer.headers.get("retry-after")

    limits = httpx.Limits(max_connections=None)
    with (
        httpx.Client(limits=limits, timeout=30) as client,
        concurrent.futures.ThreadPoolExecutor(200) as pool,
    ):
        answers = list(pool.map(ask, range(400)))
    for status, body, retry_after in answers:
        assert status in (200, 429, 503)
        if status == 200:
            assert body["choices"][0]["message"] == wanted
        else:
            assert int(retry_after) >= 1 and body["error"]["code"] == "queue_full"
    statuses = [status for status, _, _ in answers]
    assert statuses.count(200) >= 20 and statuses.count(429) >= 20
    assert metric(url, "rejected_total") == statuses.count(429)
    assert metric(url, "num_waiting") == metric(url, "num_running") == 0


def _stream(url, found):
    with httpx.stream("POST", url + CHAT, json=BODY | {"stream": True}, timeout=30) as answer:
        found.extend(answer.iter_lines())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_at_the_end_requests_are_finished(start, number):
    process, url = start(engine={"step_seconds": 0.2}, text="one two three four five six")
    found = []
    reader = threading.Thread(target=_stream, args=(url, found))
    reader.start()
    wait_for(lambda: metric(url, "num_running") == 1)
    process.send_signal(number)
    wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
    late = httpx.post(url + CHAT, json=BODY)
    assert late.status_code == 503 and int(late.headers["retry-after"]) >= 1
    assert httpx.get(f"{url}/health").status_code == 200
    assert process.wait(20) == 0
    reader.join()
    values = [json.loads(line[6:]) for line in found if line and line != "data: [DONE]"]
    text = "".join(value["choices"][0]["delta"].get("content", "") for value in values)
    assert text == "one two three four five six" and found[-2] == "data: [DONE]"


def test_what_is_not_finished_by_the_deadline_is_cut_off_with_an_error(start):
    process, url = start(engine={"step_seconds": 0.05}, text=LONG, drain_seconds=0.5)
    found = []
    reader = threading.Thread(target=_stream, args=(url, found))
    reader.start()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        whole = pool.submit(httpx.post, url + CHAT, json=BODY, timeout=30)
        wait_for(lambda: metric(url, "num_running") == 2)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        assert time.monotonic() - began < 0.5 + 5
        assert whole.result().status_code == 503 and "stop" in whole.result().json()["error"]["message"]
    reader.join()
    *_, error, _, done, _ = found
    assert "stop" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert done == "data: [DONE]"


def test_a_second_signal_ends_it_now(start):
    process, url = start(engine={"step_seconds": 0.05}, text=LONG, drain_seconds=60)
    found = []
    reader = threading.Thread(target=_try, args=(url, found))
    reader.start()
    wait_for(lambda: metric(url, "num_running") == 1)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: httpx.get(f"{url}/ready").status_code == 503)
    process.send_signal(signal.SIGTERM)
    assert process.wait(8) == 128 + signal.SIGTERM
    reader.join()


def _try(url, found):
    with contextlib.suppress(httpx.HTTPError):
        _stream(url, found)


def test_an_engine_that_stands_still_is_left_behind(start):
    process, _ = start(is_wedged=True, drain_seconds=0.2)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 1
    assert time.monotonic() - began < 5


def test_nothing_of_prompts_or_keys_is_logged(start):
    process, url = start(settings={"api_keys": ["the-key-of-the-house"]}, engine={})
    headers = {"authorization": "Bearer the-key-of-the-house"}
    secret = {"messages": [{"role": "user", "content": "a most secret prompt"}]}
    assert httpx.post(url + CHAT, json=secret, headers=headers).status_code == 200
    assert httpx.post(url + CHAT, json=secret | {"top_k": "secret"}, headers=headers).status_code == 400
    assert (
        httpx.post(url + CHAT, json=secret, headers={"authorization": "Bearer wrong-secret"}).status_code
        == 401
    )
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=5)
    assert "secret" not in out + err and "the-key" not in out + err
