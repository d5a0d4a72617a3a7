"""`mla-jax serve` as a process with the packaged model, asked by the `openai` client and by curl."""

import concurrent.futures
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import httpx
import openai
import pytest

KEY = "a-key-for-the-tests-alone"
PROMPT = "def read_lines(path):\n"
MESSAGES = [{"role": "user", "content": "Write a function that reads the lines of a file."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
START_SECONDS = 240  # programs that no earlier run has compiled


class Server:
    """A running server; `told` is what it has written so far."""

    def __init__(self, *flags):
        command = [sys.executable, "-m", "mla_jax", *flags, "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.told, self.url, self.clients = [], None, []
        deadline = time.monotonic() + START_SECONDS
        for line in self.process.stderr:
            self.told.append(line.rstrip("\n"))
            if found := re.match(r"serving (\S+) at (http://\S+)$", line):
                self.name, self.url = found.groups()
                return
            assert time.monotonic() < deadline
        raise AssertionError(self.told)

    def client(self, key=KEY):
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)
        self.clients.append(client)
        return client

    def get(self, path):
        return httpx.get(self.url + path, headers={"authorization": f"Bearer {KEY}"}, timeout=30)

    def post(self, path, body):
        return httpx.post(self.url + path, json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60)

    def metric(self, name):
        return float(re.search(rf"^mla_jax_{name} (\S+)$", self.get("/metrics").text, re.MULTILINE)[1])

    def close(self):
        for client in self.clients:
            client.close()
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def running(*flags):
    server = Server(*flags)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slots")
    flags = ["serve", "--api-key", KEY, "--slot-save-path", str(folder), "--ctx-size", "2048", "-np", "4"]
    with running(*flags) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def ask(client, **more):
    return client.chat.completions.create(
        **{"model": "any", "messages": MESSAGES, "temperature": 0, "max_tokens": 24} | more
    )


def test_it_tells_what_it_does(server):
    assert server.name == "python-stdlib-15m-q8_0"
    assert sum(line.startswith("compiling ") for line in server.told) >= 3
    assert not any(KEY in line for line in server.told)


def test_a_chat_and_its_stream_are_the_same(client):
    whole = ask(client)
    assert whole.usage.completion_tokens == 24 and whole.choices[0].finish_reason == "length"
    parts = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content and text
    assert parts[-1].usage.total_tokens == whole.usage.total_tokens


def test_a_long_stream_flows(client):
    parts = list(ask(client, stream=True, max_tokens=1000))
    assert sum(bool(part.choices and part.choices[0].delta.content) for part in parts) > 5


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_tool_must_be_called(client, stream):
    city = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
    city["additionalProperties"] = False
    function = {"name": "weather", "parameters": city}
    answer = ask(
        client,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=200,
        stream=stream,
    )
    choices = [part.choices[0] for part in (answer if stream else [answer])]
    told = [choice.delta if stream else choice.message for choice in choices]
    calls = [call.function for part in told for call in part.tool_calls or []]
    assert choices[-1].finish_reason == "tool_calls" and not any(part.content for part in told)
    assert calls[0].name == "weather"
    assert json.loads("".join(call.arguments for call in calls))["city"] in ("Oslo", "Rome")


def test_a_prompt_that_was_there_is_taken_from_the_cache(server, client):
    long = [{"role": "user", "content": "import os\n" * 200}]
    first, second = ask(client, messages=long), ask(client, messages=long)
    assert second.usage.prompt_tokens_details.cached_tokens > 0.8 * second.usage.prompt_tokens
    assert first.choices[0].message.content == second.choices[0].message.content
    off = ask(client, messages=long, extra_body={"cache_prompt": False})
    assert off.usage.prompt_tokens_details.cached_tokens == 0
    assert off.choices[0].message.content == first.choices[0].message.content


def test_seeds_decide_texts(client):
    draw = lambda **more: [c.message.content for c in ask(client, temperature=1.0, **more).choices]
    assert draw(seed=5, n=3) == draw(seed=5, n=3)
    assert len(set(draw(seed=5, n=3))) == 3
    assert draw(seed=5, n=2)[1] == draw(seed=6)[0]


def test_texts_do_not_depend_on_who_else_is_served(client):
    bodies = [dict(seed=seed, temperature=0.9, max_tokens=12 + seed) for seed in range(12)]
    alone = [ask(client, **body).choices[0].message.content for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda body: ask(client, **body).choices[0].message.content, bodies))
    assert together == alone


def test_logprobs_stops_and_echo(client):
    told = client.completions.create(model="m", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=3)
    logprobs = told.choices[0].logprobs
    assert "".join(logprobs.tokens) == told.choices[0].text
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert logprob == pytest.approx(max(top.values())) and token in top
    whole = client.completions.create(model="m", prompt=PROMPT, max_tokens=40, temperature=0, echo=True)
    text = whole.choices[0].text.removeprefix(PROMPT)
    stop = text[10:14]
    cut = client.completions.create(model="m", prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (text[: text.index(stop)], "stop")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_follows_its_schema(client, stream):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
    answer = ask(client, response_format=form, max_tokens=200, temperature=0.7, seed=1, stream=stream)
    if stream:
        text = "".join(part.choices[0].delta.content or "" for part in answer)
    else:
        text = answer.choices[0].message.content
    person = json.loads(text)
    assert set(person) == {"name", "age"} and type(person["age"]) is int and person["age"] <= 150


def test_tools_are_told_and_need_not_be_called(client):
    tool = {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
    }
    plain, with_tool = ask(client), ask(client, tools=[tool])
    assert with_tool.usage.prompt_tokens > plain.usage.prompt_tokens
    assert with_tool.choices[0].message.tool_calls is None
    call = {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    history = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]
    assert ask(client, messages=history, tools=[tool]).choices[0].finish_reason


def test_a_grammar_of_llama_server(server):
    body = {"prompt": "x = ", "grammar": 'root ::= "yes" | "no"', "n_predict": 16, "ser": "2,1"}
    answer = server.post("/completion", body).json()
    assert answer["content"] in ("yes", "no") and answer["stop_type"] == "eos"


def test_whoever_leaves_is_given_up(server, client):
    stream = ask(client, stream=True, max_tokens=1500, extra_body={"ignore_eos": True})
    next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while server.metric("num_running"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert server.metric("disconnects_total") >= 1


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, "messages"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"extra_body": {"chat_template": "x"}}, "chat_template"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}},
            "response_format",
        ),
    ],
    ids=["range", "empty", "too long", "stops", "template", "schema"],
)
def test_errors_are_those_of_the_client(client, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **more)
    assert caught.value.param == param and caught.value.body["message"].endswith(".")


def test_other_errors_too(server):
    with pytest.raises(openai.AuthenticationError):
        ask(server.client("wrong"))
    with pytest.raises(openai.NotFoundError):
        server.client().embeddings.create(model="m", input="a")
    assert [model.id for model in server.client().models.list()] == [server.name]


def test_a_slot_is_saved_and_read(server, client):
    long = [{"role": "user", "content": "import sys\n" * 100}]
    first = ask(client, messages=long)
    slot = max(server.get("/slots").json(), key=lambda slot: slot["n_kept"])
    assert slot["n_kept"] > 100
    saved = server.post(f"/slots/{slot['id']}?action=save", {"filename": "one.bin"}).json()
    for number in range(4):
        assert server.post(f"/slots/{number}?action=erase", {}).status_code == 200
    restored = server.post("/slots/0?action=restore", {"filename": "one.bin"}).json()
    assert restored["n_restored"] == saved["n_saved"] > 100
    again = ask(client, messages=long)
    assert again.usage.prompt_tokens_details.cached_tokens > 100
    assert again.choices[0].message.content == first.choices[0].message.content


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server):
    run = lambda *args: (
        subprocess.run(["curl", "-s", "-m", "30", *args], capture_output=True, text=True).stdout
    )
    assert json.loads(run(f"{server.url}/health")) == {"status": "ok"}
    assert json.loads(run(f"{server.url}/ready")) == {"status": "ready"}
    assert "invalid_api_key" in run(f"{server.url}/props")
    key = ["-H", f"Authorization: Bearer {KEY}"]
    body = json.dumps({"messages": MESSAGES, "max_tokens": 4, "stream": True})
    lines = run(*key, "-N", f"{server.url}/v1/chat/completions", "-d", body).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[:-1])
    assert run(*key, f"{server.url}/").startswith("<!doctype html>")


def test_nothing_was_compiled_for_requests(server, client):
    before = server.metric("compiles_total")
    for length in (3, 40, 200, 900):
        ask(client, messages=[{"role": "user", "content": "word " * length}], max_tokens=2)
    assert server.metric("compiles_total") == before


COMMANDS = {
    "q8_0": "-mla 3 -fa -ngl 999 --ctx-size 8192 -ctk q8_0",
    "q4_0": "-mla 3 -fa -ngl 999 --ctx-size 8192 -ctk q4_0 --k-cache-hadamard",
    "f16": "-mla 3 -fa -ngl 999 --ctx-size 8192",
    "CPU": "-mla 3 -fa --ctx-size 8192",
    "SER": "-mla 3 -fa -ngl 999 --ctx-size 8192 -ser 6,1",
}


@pytest.mark.parametrize("flags", COMMANDS.values(), ids=COMMANDS)
def test_command_lines_of_the_reference(flags):
    with running("llama-server", *flags.split(), "--no-warmup") as server:
        answer = ask(server.client(), max_tokens=4)
        assert answer.usage.completion_tokens == 4 and answer.choices[0].message.content
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert re.match("stopping: requests have .* s to end; a second signal", server.process.stderr.read())
