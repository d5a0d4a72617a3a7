"""What a server answers once it has lost a process that its model needs."""

import time
from concurrent import futures

import pytest

REASON = "process 1 of 2 was lost: its connection has ended."
BODY = {"prompt": "hello", "n_predict": 400}


@pytest.fixture
def lost(serve, tmp_path):
    """A server that has lost a process; its engine stands still, with one request running and one waiting."""
    client, engine, service = serve(engine={"num_slots": 1}, slot_folder=tmp_path)
    engine.say("word " * 300, ends=False)
    engine.is_stuck = True
    with futures.ThreadPoolExecutor() as pool:
        asked = [
            pool.submit(client.post, "/completion", json=BODY | {"stream": stream})
            for stream in (False, True)
        ]
        while len(engine.submitted) < 2:
            assert not any(job.done() for job in asked)
            time.sleep(0.01)
        try:
            client.portal.call(service.lose, REASON)
            yield client, engine, [job.result(30) for job in asked]
        finally:
            engine.is_stuck = False


def test_all_who_wait_and_come_are_told(lost):
    client, engine, (whole, stream) = lost
    engine.is_stuck = False  # so that a request which is let in would be seen
    assert whole.status_code == 503 and whole.json()["error"]["message"] == REASON
    assert REASON in stream.text and '"error"' in stream.text
    for path, body in [("/completion", BODY), ("/v1/completions", {"model": "m", "prompt": "hello"})]:
        answer = client.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, REASON)
    assert len(engine.submitted) == 2
    saved = client.post("/slots/0?action=save", json={"filename": "a"})
    ready = client.get("/ready")
    assert (saved.status_code, ready.status_code) == (503, 503)
    assert ready.json()["error"]["message"] == REASON
    assert client.get("/health").status_code == 200
