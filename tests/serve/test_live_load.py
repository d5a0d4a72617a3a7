"""The server over the real engine, both in this process, under more clients than it can serve."""

import concurrent.futures
import json
import random
import socket
import struct
import threading
import time

import httpx
import pytest
from synthetic import write_deepseek2

import cpu_kernels
import mla_jax
from mla_jax.serve.http import server as server_lib
from mla_jax.serve.http.service import Service, Settings

PATH = "/v1/completions"
NUM_LEAVING = 500
SLOTS, MAX_WAITING = 4, 8
OVERLOAD = 10 * (SLOTS + MAX_WAITING)


class Served:
    """A server in a thread of this process."""

    def __init__(self, model):
        self.engine = model.engine
        self.service = Service(model, Settings(alias="nano", file_name="nano.gguf"))
        bound, is_up = server_lib.bind("127.0.0.1", 0), threading.Event()
        self.url, self.address = server_lib.url(bound), bound.getsockname()
        about = dict(drain_seconds=5.0, started=is_up.set, stopping=lambda: None)
        self._thread = threading.Thread(target=server_lib.run, args=(self.service, bound), kwargs=about)
        self._thread.start()
        assert is_up.wait(30)

    def ask(self, body):
        return httpx.post(self.url + PATH, json=body, timeout=60)

    def text(self, body):
        return self.ask(body).json()["choices"][0]["text"]

    def join(self, seconds):
        self._thread.join(seconds)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2)
    return path


@pytest.fixture
def serve(path, monkeypatch):
    """Returns a function that serves the tiny model; the keywords are the engine's."""
    running, made = [], []
    original = server_lib._Server

    def remember(*args):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(server_lib, "_Server", remember)

    def serve(**settings):
        sizes = dict(ctx_size=1024, ubatch=128, parallel=SLOTS, keep_drawn=False, compilation_cache=None)
        model = mla_jax.load(path, progress=lambda *_: None, **sizes | settings)
        model.engine.warm_up(lambda *_: None)
        running.append(Served(model))
        return running[-1]

    yield serve
    for server in made:
        server.should_exit = True
    for served in running:
        served.join(20)


def _body(number, max_tokens=12, stream=False):
    chance = random.Random(number % 30)
    prompt = [3 + (7 * i) % 300 for i in range(chance.randrange(1, 200))] + [3 + number % 30]
    drawing = dict(max_tokens=max_tokens, temperature=0, ignore_eos=True, stream=stream)
    return dict(model="nano", prompt=prompt) | drawing


def _wait_until_idle(engine):
    deadline = time.monotonic() + 30
    while (stats := engine.stats()).num_running or stats.num_waiting:
        assert time.monotonic() < deadline, stats
        time.sleep(0.01)


def _leave(address, number):
    """Sends a request, or a part of one, and leaves at some moment, with or without a farewell."""
    chance, is_stream = random.Random(number), number % 3 > 0
    body = json.dumps(_body(number, max_tokens=400, stream=is_stream)).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(address, timeout=30) as sock:
        is_partial = chance.random() < 0.1
        sock.sendall((head + body)[: chance.randrange(len(head + body)) if is_partial else None])
        if is_stream and not is_partial and chance.random() < 0.3:
            sock.recv(1 << chance.randrange(4, 12))
        else:
            time.sleep(chance.random() * 0.2)
        if chance.random() < 0.5:  # a reset, not an end
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_all_pages_of_clients_that_leave_come_back(serve):
    served = serve(max_waiting=1000)
    engine, bodies = served.engine, [_body(number) for number in range(3)]
    expected, compiles = [served.text(body) for body in bodies], engine.stats().compiles
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        list(pool.map(lambda number: _leave(served.address, number), range(NUM_LEAVING)))
    _wait_until_idle(engine)
    stats = engine.stats()
    assert stats.finished["cancel"] > NUM_LEAVING / 5, "most have left before they were heard"
    assert stats.failed == 0 and stats.compiles == compiles
    texts = [served.text(body) for body in bodies]
    assert [len(text) for text in texts] == [len(text) for text in expected]
    if cpu_kernels.available():  # else texts are alike up to rounding
        assert texts == expected
    engine.forget()
    assert engine.stats().pages_free == engine.stats().pages_total


def test_ten_times_what_can_be_served_is_served_or_refused(serve):
    served = serve(max_waiting=MAX_WAITING)
    bodies = [_body(number, max_tokens=40) for number in range(OVERLOAD)]
    with concurrent.futures.ThreadPoolExecutor(OVERLOAD) as pool:
        answers = list(pool.map(served.ask, bodies))
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429} and codes.count(200) >= SLOTS + MAX_WAITING
    for answer in answers:
        if answer.status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == 40
        else:
            assert float(answer.headers["retry-after"]) > 0 and answer.json()["error"]["message"]
    served.engine.forget()
    stats = served.engine.stats()
    assert stats.pages_free == stats.pages_total and stats.failed == 0
    assert stats.rejected == codes.count(429) and stats.finished == {"length": codes.count(200)}


def test_overload_while_the_server_is_about_to_stop(serve):
    served = serve(max_waiting=MAX_WAITING)
    is_drained = []

    def ask(number):
        if number == OVERLOAD // 2:
            served.service.is_draining = True
            is_drained.append(served.engine.drain(30.0))
        return served.ask(_body(number, max_tokens=40)).status_code

    with concurrent.futures.ThreadPoolExecutor(3 * SLOTS) as pool:
        codes = list(pool.map(ask, range(OVERLOAD)))
    assert set(codes) <= {200, 429, 503} and is_drained == [True]
    assert codes.count(200) > SLOTS and codes.count(503) >= OVERLOAD // 3
    assert served.ask(_body(0)).headers["retry-after"]
    served.engine.forget()
    assert served.engine.stats().pages_free == served.engine.stats().pages_total
