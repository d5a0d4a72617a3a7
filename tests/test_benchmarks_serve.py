"""The client of the serving benchmark against a server by the clock, and what is made of its numbers."""

import json
import pathlib
import subprocess
import sys
import tempfile
import threading

import pytest

from benchmarks import serve_client, serve_measure, serve_process, serve_report, serve_stub

SCRIPT = pathlib.Path(serve_report.__file__)
BODY = dict(prompt=[1, 2], max_tokens=5)
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
EVENTS = [{"choices": [{"text": "a\n\nb", "finish_reason": None}]}, {"usage": {"completion_tokens": 1}}]


@pytest.fixture
def stub():
    with serve_stub.Stub(first_seconds=0.2, seconds=0.02) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_text_is_read_with_the_time_of_each_part(stub):
    found = serve_client.draw(*stub.server_address, [BODY], 1)
    (text,) = found["texts"]
    assert text["text"] == " 0 1 2 3 4"
    assert (text["num_tokens"], text["finish_reason"], text["num_cached"]) == (5, "length", None)
    assert len(text["times"]) == 5 and text["times"] == sorted(text["times"])
    assert 0 <= text["began"] <= text["times"][0] - 0.2
    assert text["times"][-1] >= text["began"] + 0.28  # four waits of 20 ms more
    assert text["times"][-1] <= found["seconds"] and found["cpu_seconds"] < found["seconds"]


@pytest.mark.parametrize("num_streams", [1, 2, 5])
def test_so_many_streams_are_open_until_all_texts_are_drawn(stub, num_streams):
    bodies = [BODY | dict(max_tokens=count) for count in (3, 1, 4, 2, 5)]
    texts = serve_client.draw(*stub.server_address, bodies, num_streams)["texts"]
    assert [text["num_tokens"] for text in texts] == [3, 1, 4, 2, 5]
    assert stub.most == num_streams


def test_a_refusal_is_told(stub):
    with pytest.raises(RuntimeError, match="200, got 400"):
        serve_client.draw(*stub.server_address, [BODY, dict(prompt=[])], 2)


def _answer(events):
    lines = [f"data: {json.dumps(event)}\n\n".encode() for event in events] + [b"data: [DONE]\n\n"]
    return HEAD + b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in lines) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, 50, 10_000])
def test_events_are_the_same_however_they_are_cut(size):
    answer = _answer(EVENTS)
    parts = [(float(start), answer[start : start + size]) for start in range(0, len(answer), size)]
    found = list(serve_client.events([*parts, (1e9, b"")]))
    assert [event for _, event in found] == EVENTS
    ends = [answer.index(json.dumps(event).encode()) + len(json.dumps(event)) + 1 for event in EVENTS]
    assert [when for when, _ in found] == [end // size * size for end in ends]


@pytest.mark.parametrize("cut", [-3, -40], ids=["last chunk", "event"])
def test_an_answer_that_is_cut_short_is_no_answer(cut):
    with pytest.raises(RuntimeError, match="must be whole"):
        list(serve_client.events([(0.0, _answer(EVENTS)[:cut]), (1.0, b"")]))


def test_an_error_within_the_events_is_told():
    with pytest.raises(RuntimeError, match=r"breaks off.*too slow"):
        serve_client._text([(0.0, _answer([{"error": {"message": "too slow"}}]))], 0.0)


def _work(**changes):
    sizes = dict(prompts=(4, 8), streams=(1, 2), predict=3, requests=2, rounds=2, prefix=16, tail=4)
    return serve_measure.Work(tokens=range(1000), **sizes | changes)


def test_prompts_are_of_their_length_and_of_one_round():
    work = _work()
    bodies = [body for round_ in range(2) for prompt in (4, 8) for body in work.bodies(round_, prompt)]
    assert [len(body["prompt"]) for body in bodies] == [4, 4, 8, 8] * 2
    assert len({tuple(body["prompt"]) for body in bodies}) == 8
    assert not any(body["cache_prompt"] for body in bodies)
    assert work.bodies(0, 4) == work.bodies(0, 4)


def test_prompts_of_a_pair_share_their_prefix_alone():
    first, second = (body["prompt"] for body in _work().pair(0))
    assert first[:16] == second[:16] and first[16] != second[16]
    assert len(first) == len(second) == 20
    assert all(body["cache_prompt"] for body in _work().pair(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [(dict(streams=(1, 4)), "requests must be at least 4"), (dict(prefix=600), "tokens must be at least")],
    ids=["requests", "prefix"],
)
def test_work_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _work(**changes)


def test_servers_take_turns_in_every_cell_of_every_round(stub, monkeypatch):
    monkeypatch.setattr(serve_process.Server, "_wait", lambda *_: None)
    servers = [serve_process.Server(name, *stub.server_address) for name in ("ours", "peer")]
    stub.first_seconds = 0.01
    runs = list(serve_measure.measure(servers, _work(prompts=(4,))))
    assert len(runs) == 2 * 2 * (2 + 1)
    assert stub.total == 3 * 2 * (2 + 1) * 2  # a round of three warms up; two requests in each run
    assert [run["engine"] for run in runs[::2]] != [run["engine"] for run in runs[1::2]]
    for one, other in zip(runs[::2], runs[1::2], strict=True):
        assert {one["engine"], other["engine"]} == {"ours", "peer"}
        assert one.get("streams") == other.get("streams") and one["round"] == other["round"]
    result = serve_report.summarise(runs)
    assert len(result["cells"]) == 4 and len(result["gains"]) == 2 and len(result["against"]) == 2
    cell = result["cells"][0]
    assert (cell["engine"], cell["prompt"], cell["streams"]) == ("ours", 4, 1)
    assert cell["ttft_ms"]["p50"] >= 10
    assert cell["events_per_token"] == 1 and 0 < cell["client_cpu_share"] < 1
    assert cell["server_cores"] is None
    for server in servers:
        server.close()


def test_a_server_that_draws_too_little_is_refused(stub, monkeypatch):
    monkeypatch.setattr(serve_process.Server, "_wait", lambda *_: None)
    with serve_process.Server("peer", *stub.server_address) as server:
        text = dict(num_tokens=2, finish_reason="stop", times=[0.1])
        with pytest.raises(RuntimeError, match=r"peer must draw 3 tokens of text, got \(2, 'stop'\)"):
            serve_measure._check(server, text, 3)


def test_a_process_that_ends_is_told_with_its_log():
    command = [sys.executable, "-c", "print('no such file'); raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match="ours ends with 3:\nno such file"):
        serve_process.Server("ours", "127.0.0.1", serve_process._free_port(), command)


def test_a_peer_that_ends_while_it_is_asked_is_told_with_its_log(tmp_path):
    program = tmp_path / "llama-server"
    serving = [
        "port = int(sys.argv[sys.argv.index('--port') + 1])",
        "listener = socket.create_server(('', port))",
    ]
    healthy = ["it = listener.accept()[0]", "it.recv(999)", "it.sendall(b'HTTP/1.1 200 OK\\r\\n\\r\\n')"]
    ending = ["it.close()", "listener.accept()", "print('aborted in', os.getcwd())", "os._exit(4)"]
    lines = [f"#!{sys.executable} -u", "import os, socket, sys", *serving, *healthy, *ending]
    program.write_text("\n".join(lines))
    program.chmod(0o755)
    with serve_process.peer("peer", str(program), "a.gguf", slots=1, ctx_size=9, more=[]) as server:
        with pytest.raises(RuntimeError, match=f"peer ends with 4:\naborted in {tempfile.gettempdir()}"):
            list(serve_measure.measure([server], _work()))


def test_the_client_alone_is_fast():
    assert serve_measure.client_alone(_work(predict=50)) > 100


def _run(engine, round_, streams, speed, **changes):
    run = dict(engine=engine, round=round_, prompt=64, streams=streams, tokens_per_second=speed)
    run |= dict(decode_tokens_per_second=2 * speed, first=[0.1], per_token=[1 / speed], gaps=[0.0, 0.01])
    run |= dict(events_per_token=1.0, client_cpu_share=0.01, server_cores=1.5, texts=["a"])
    return run | changes


def test_gains_are_medians_of_the_ratios_of_rounds():
    speeds = {1: (100.0, 50.0, 200.0), 16: (300.0, 200.0, 500.0)}  # ratios 3, 4, 2.5
    runs = [_run("ours", round_, n, found[round_]) for n, found in speeds.items() for round_ in range(3)]
    (gain,) = serve_report.summarise(runs)["gains"]
    assert (gain["streams"], gain["over"], gain["whole"], gain["decode"]) == (16, 1, 3.0, 3.0)
    assert gain["whole_runs"] == [3.0, 4.0, 2.5]


def test_ours_is_compared_with_the_peer_of_the_same_round():
    runs = [_run("ours", 0, 1, 100.0), _run("peer", 0, 1, 50.0)]
    runs += [_run("ours", 1, 1, 300.0), _run("peer", 1, 1, 100.0)]
    (against,) = serve_report.summarise(runs)["against"]
    assert (against["engine"], against["runs"], against["ratio"]) == ("peer", [2.0, 3.0], 2.5)


def test_percentiles_are_of_all_rounds_together():
    gaps = [[0.001] * 50, [0.001] * 40 + [0.1] * 10]
    runs = [_run("ours", round_, 1, 100.0, gaps=found) for round_, found in enumerate(gaps)]
    (cell,) = serve_report.summarise(runs)["cells"]
    assert (cell["itl_ms"]["p50"], cell["itl_ms"]["p99"]) == (1.0, 100.0)


def test_a_known_prefix_is_compared_with_the_new_one_of_its_round():
    pairs = [(1.0, 0.1), (2.0, 0.1), (1.0, 0.3)]
    runs = [dict(engine="ours", round=i, cold=c, warm=w, num_cached=9) for i, (c, w) in enumerate(pairs)]
    (row,) = serve_report.summarise(runs)["prefix"]
    assert (row["cold_ms"], row["warm_ms"], row["share"]) == (1000.0, 100.0, 0.1)


def test_texts_that_depend_on_the_number_of_streams_are_counted():
    runs = [_run("ours", 0, n, 100.0, texts=["a", "b", text]) for n, text in ((1, "c"), (4, "d"), (16, "c"))]
    runs += [_run("ours", 1, n, 100.0, texts=["e"]) for n in (1, 4, 16)]
    assert serve_report.summarise(runs)["texts_that_differ"] == {"ours": 1}


def test_tables_and_plot_are_made_again_from_a_file(tmp_path):
    runs = [_run(engine, 0, n, 100.0 * n) for engine in ("ours", "peer") for n in (1, 16)]
    runs.append(dict(engine="ours", round=0, cold=1.0, warm=0.1, num_cached=2048))
    about = dict(model="toy.gguf", cores=[0, 1], cpu="any", prefix_tokens=2048)
    result = about | dict(client_alone_tokens_per_second=10_000) | serve_report.summarise(runs)
    path = tmp_path / "x.json"
    path.write_text(json.dumps(result))
    done = subprocess.run([sys.executable, SCRIPT, path], capture_output=True, text=True, check=True)
    assert "16 streams over 1: 16.00 (16.00), decode 16.00   bar 3" in done.stdout
    assert "new 1000.0 ms, known 100.0 ms, 10.0%" in done.stdout
    assert path.with_suffix(".png").stat().st_size > 1000
