"""Threads for slow work: never more than there may be, whoever leaves; also by the routes that use them."""

import asyncio
import concurrent.futures
import json
import threading
import time

import pytest
from fake_engine import fake_model
from starlette.requests import ClientDisconnect

from mla_jax.serve import grammar
from mla_jax.serve.http.api_error import ApiError
from mla_jax.serve.http.application import application
from mla_jax.serve.http.body_reader import while_connected
from mla_jax.serve.http.service import Service, Settings
from mla_jax.serve.http.workers import Workers


class Meter:
    """Work that counts how often it is done, and how often at once."""

    def __init__(self, seconds):
        self.seconds, self.num_now, self.most, self.num_done = seconds, 0, 0, 0
        self._lock = threading.Lock()

    def __call__(self, *args, **kwargs):
        with self._lock:
            self.num_now += 1
            self.most = max(self.most, self.num_now)
        time.sleep(self.seconds)
        with self._lock:
            self.num_now -= 1
            self.num_done += 1
        return [7]


class Leaver:
    """A request whose client leaves at once."""

    async def receive(self):
        await asyncio.sleep(0.005)
        return {"type": "http.disconnect"}


async def leave(workers, work):
    with pytest.raises(ClientDisconnect):
        await while_connected(Leaver(), lambda: workers.run(work))


def test_work_is_returned_or_raised():
    async def main():
        workers = Workers(2)
        assert await workers.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await workers.run(divmod, 7, 0)

    asyncio.run(main())


def test_whoever_leaves_leaves_no_thread_and_no_work_behind():
    async def main():
        workers, meter = Workers(2), Meter(0.1)
        await asyncio.gather(*[leave(workers, meter) for _ in range(20)])
        assert meter.num_now == 2 and meter.num_done == 0
        assert await workers.run(divmod, 7, 2) == (3, 1)
        while meter.num_now:
            await asyncio.sleep(0.01)
        assert meter.most == 2 == meter.num_done

    asyncio.run(main())


def test_more_than_may_wait_are_told_to_come_back():
    async def main():
        workers, meter = Workers(1), Meter(0.005)
        told = await asyncio.gather(*[workers.run(meter) for _ in range(20)], return_exceptions=True)
        refused = [error for error in told if error != [7]]
        assert meter.num_done == 17 and len(refused) == 3
        for error in refused:
            assert isinstance(error, ApiError) and error.status == 429 and error.retry_after

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"content": "a"}),
        ("/tokenize", {"content": "a" * 20000}),
        ("/v1/completions", {"prompt": "a"}),
        ("/completion", {"prompt": "a"}),
    ],
    ids=["tokenize", "long", "completions", "completion"],
)
def test_requests_that_are_given_up_take_no_more_threads(path, body):
    async def ask(app):
        async def receive():
            if messages:
                return messages.pop()
            await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        raw = {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""}
        about = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "headers": []}
        await app(about | raw, receive, send)

    async def main():
        model, meter = fake_model(), Meter(0.1)
        model.tokenizer.encode = meter
        app = application(Service(model, Settings(alias="toy", file_name="toy.gguf", num_threads=2)))
        for _ in range(4):
            await asyncio.gather(*[ask(app) for _ in range(3)])
        assert meter.most == 2
        while meter.num_now:
            await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_slow_grammar_is_waited_for_by_grammars_alone(serve, monkeypatch):
    began, is_over = threading.Event(), threading.Event()

    def compile(kind, text, tokenizer):
        began.set()
        is_over.wait(5)
        raise ValueError("grammar must be another.")

    monkeypatch.setattr(grammar, "compile", compile)
    client, _, _ = serve(num_threads=1)
    slow = {"prompt": "a", "grammar": 'root ::= "a"'}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(client.post, "/v1/completions", json=slow)
        assert began.wait(5)
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        is_over.set()
        assert answer.result().json()["error"]["message"] == "grammar must be another."
