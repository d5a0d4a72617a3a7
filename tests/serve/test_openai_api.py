"""Chat completions and completions over an engine by script: shapes, streams, and how they fail."""

import itertools
import json

import fake_engine
import pytest

from mla_jax.serve.request import Failure, GrammarFailed

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/completion"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.fixture(params=[1, 100], ids=["one at a time", "many at once"])
def serve(request, serve):
    """Texts are the same whether their tokens are drawn one at a time or in one call."""
    return lambda engine=(), **more: serve(engine=dict(engine, tokens_per_step=request.param), **more)


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def events(answer):
    """Returns the values of a stream, read strictly: nothing but data events."""
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.split("\n\n")
    assert blocks.pop() == "" and all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


def chunks(answer):
    *values, done = events(answer)
    assert done == "[DONE]"
    return [json.loads(value) for value in values]


def joined(values, index=0):
    """Returns the message that the deltas of a stream make."""
    message = {}
    for value in values:
        for choice in value["choices"]:
            if choice["index"] != index:
                continue
            for key, part in choice["delta"].items():
                if key == "tool_calls":
                    _add_call(message.setdefault(key, []), part[0])
                else:
                    message[key] = message.get(key, "") + part
    return message


def _add_call(calls, part):
    if "id" in part:
        assert part["index"] == len(calls)
        calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})
    else:
        calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]


def test_a_chat_is_answered(serve):
    client, engine, _ = serve()
    answer = client.post(CHAT, json={"messages": MESSAGES, "seed": 3}).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there."}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert (answer["object"], answer["model"]) == ("chat.completion", "toy")
    (ticket,) = engine.submitted
    num_prompt = len(ticket.request.prompt)
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": len(ticket.tokens),
        "total_tokens": num_prompt + len(ticket.tokens),
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    timings = answer["timings"]
    assert (timings["prompt_n"], timings["prompt_ms"], timings["predicted_ms"]) == (num_prompt, 250, 500)
    assert timings["predicted_per_second"] == pytest.approx((len(ticket.tokens) - 1) / 0.5)
    assert ticket.request.sampling.seed == 3 and ticket.request.max_tokens is None


@pytest.mark.parametrize("text", ["Hello.", "né 漢字 🙂!", "", "a\n\ndata: b\r\n"], ids=range(4))
@pytest.mark.parametrize("ends", [True, False], ids=["stop", "length"])
def test_a_stream_is_the_answer_in_pieces(serve, text, ends):
    client, engine, _ = serve()
    engine.say(text, ends=ends or not text)
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1}
    whole = client.post(CHAT, json=body).json()
    values = chunks(
        client.post(CHAT, json=body | {"stream": True, "stream_options": {"include_usage": True}})
    )
    assert joined(values) == whole["choices"][0]["message"]
    *parts, last, usage = values
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert all(part["choices"][0]["finish_reason"] is None for part in parts)
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert last["timings"]["predicted_n"] == whole["usage"]["completion_tokens"]
    told = [part["choices"][0]["logprobs"] for part in [*parts, last]]
    assert flat(one["content"] for one in told if one) == whole["choices"][0]["logprobs"]["content"]


def test_logprobs_are_tokens_and_bytes(serve):
    client, _engine, _ = serve()
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "max_tokens": 1}
    (told,) = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    assert (told["token"], told["bytes"], told["logprob"]) == ("H", [72], -0.5)
    assert [top["logprob"] for top in told["top_logprobs"]] == [-0.5, -9999.0]


def test_choices_have_seeds_of_their_own(serve):
    client, engine, _ = serve()
    engine.script = lambda request: [40 + request.sampling.seed % 10] * 3
    body = {"messages": MESSAGES, "n": 3, "seed": 2**32 - 1}
    whole = client.post(CHAT, json=body).json()["choices"]
    assert [choice["index"] for choice in whole] == [0, 1, 2]
    assert [ticket.request.sampling.seed for ticket in engine.submitted] == [2**32 - 1, 0, 1]
    values = chunks(client.post(CHAT, json=body | {"stream": True}))
    assert [joined(values, index) for index in range(3)] == [choice["message"] for choice in whole]
    assert len({choice["message"]["content"] for choice in whole}) == 3


def test_a_tool_call_streams_as_json_text(serve):
    client, engine, _ = serve()
    engine.say(f"Let me see. {CALL}")
    body = {"messages": MESSAGES, "tools": [WEATHER]}
    (choice,) = client.post(CHAT, json=body).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    values = chunks(client.post(CHAT, json=body | {"stream": True}))
    message = joined(values)
    assert message["content"] == choice["message"]["content"]
    assert message["tool_calls"][0]["function"] == call["function"]
    assert values[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_no_tools_no_calls(serve):
    client, engine, _ = serve()
    engine.say(CALL)
    for body in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        (choice,) = client.post(CHAT, json={"messages": MESSAGES} | body).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_one_call_at_a_time_ends_the_answer_at_the_second(serve, stream):
    client, engine, _ = serve(answer_seconds=60)
    engine.say(f"{CALL}\n{CALL} and more" + " and more" * 100)
    engine.stalls_after = len(engine.script(None)) - 1  # whoever waits for the end waits in vain
    body = {"messages": MESSAGES, "tools": [WEATHER], "parallel_tool_calls": False, "stream": stream}
    answer = client.post(CHAT, json=body)
    if stream:
        values = chunks(answer)
        message, reason = joined(values), values[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = answer.json()["choices"]
        message, reason = choice["message"], choice["finish_reason"]
    assert (len(message["tool_calls"]), reason) == (1, "tool_calls")
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "Oslo"}
    assert engine.submitted[0].is_cancelled


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, {"content": "Yes.", "reasoning_content": "Hm?"}),
        ({"reasoning_format": "none"}, {"content": "<think>Hm?</think>Yes."}),
    ],
    ids=["auto", "none"],
)
def test_reasoning_is_told_apart(serve, fields, message):
    client, engine, _ = serve()
    engine.say("<think>Hm?</think>Yes.")
    body = {"messages": MESSAGES} | fields
    assert client.post(CHAT, json=body).json()["choices"][0]["message"] == {"role": "assistant"} | message
    assert joined(chunks(client.post(CHAT, json=body | {"stream": True}))) == {"role": "assistant"} | message


def test_what_a_request_says_reaches_the_engine(serve):
    client, engine, service = serve()
    body = {
        "messages": MESSAGES,
        "max_tokens": 3,
        "temperature": 0,
        "stop": ["\n", "end"],
        "logit_bias": {"9": 5},
        "ser": "2,0.5",
        "ignore_eos": True,
        "cache_prompt": False,
    }
    assert client.post(CHAT, json=body).status_code == 200
    request = engine.submitted[0].request
    assert (request.max_tokens, request.stop, request.logit_bias) == (3, ("\n", "end"), ((9, 5.0),))
    assert (request.ignore_eos, request.reuse_prefix, request.num_logprobs) == (True, False, None)
    assert request.sampling.temperature == 0 and set(request.expert_reduction) == {(1, 0.0), (2, 0.5)}
    assert list(request.prompt) == service.model.encode_chat(MESSAGES)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (
            {"messages": [{"role": "user", "content": "a" * 9000}]},
            "messages",
            "messages must fit the context",
        ),
        ({"messages": MESSAGES, "logit_bias": {"4096": 1}}, "logit_bias", "the token ids of logit_bias"),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "messages[0].content",
            "messages[0].content",
        ),
        ({"messages": MESSAGES, "grammar": "root ::= ("}, "grammar", ""),
    ],
    ids=["too long", "no such token", "nothing said", "no grammar"],
)
def test_what_only_the_model_can_refuse(serve, body, param, words):
    client, engine, _ = serve()
    answer = client.post(CHAT, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and error["message"].startswith(words)
    assert not engine.submitted


def test_a_json_schema_becomes_a_grammar(serve):
    client, engine, _ = serve()
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
    for route, start in ((CHAT, {"messages": MESSAGES}), (TEXT, {"prompt": "a"}), (NATIVE, {"prompt": "a"})):
        assert client.post(route, json=start | {"response_format": form}).status_code == 200
        assert engine.submitted[-1].request.grammar.start().mask().any()


def test_completions_of_several_prompts(serve):
    client, engine, _ = serve()
    engine.script = lambda request: [request.prompt[-1]] * 2
    body = {"prompt": ["a", [5, 6], "né"], "n": 2, "echo": True}
    mixed = client.post(TEXT, json=body).json()
    assert len(mixed["choices"]) == 6
    body["prompt"] = [[5, 6], [7]]
    whole = client.post(TEXT, json=body).json()
    decode = lambda *ids: client.post("/detokenize", json={"tokens": ids}).json()["content"]
    assert [choice["text"] for choice in whole["choices"]] == [decode(5, 6, 6, 6)] * 2 + [decode(7, 7, 7)] * 2
    assert whole["usage"]["prompt_tokens"] == 3 and whole["usage"]["completion_tokens"] == 8
    texts = [""] * 4
    for value in chunks(client.post(TEXT, json=body | {"stream": True})):
        for choice in value["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]


def test_completions_tell_logprobs_with_offsets(serve):
    client, _engine, _ = serve()
    body = {"prompt": "a", "logprobs": 1, "max_tokens": 3}
    told = client.post(TEXT, json=body).json()["choices"][0]["logprobs"]
    assert (told["tokens"], told["text_offset"]) == (["H", "el", "lo"], [0, 1, 3])
    assert told["top_logprobs"][1] == {"el": -0.5}
    values = chunks(client.post(TEXT, json=body | {"stream": True}))
    parts = [value["choices"][0]["logprobs"] for value in values if value["choices"][0]["logprobs"]]
    assert {key: flat(part[key] for part in parts) for key in told} == told


def test_the_native_completion(serve):
    client, _engine, _ = serve()
    body = {"prompt": [5, 6], "n_predict": 3, "n_probs": 1, "temperature": 0.5}
    whole = client.post(NATIVE, json=body).json()
    assert (whole["content"], whole["stop"], whole["stop_type"]) == ("Hello", True, "limit")
    assert (whole["tokens_evaluated"], whole["tokens_predicted"], whole["prompt"]) == (2, 3, [5, 6])
    assert whole["generation_settings"]["temperature"] == 0.5
    values = [json.loads(value) for value in events(client.post(NATIVE, json=body | {"stream": True}))]
    assert "".join(value["content"] for value in values) == "Hello"
    assert flat(value["tokens"] for value in values) == whole["tokens"] and len(whole["tokens"]) == 3
    assert [value["stop"] for value in values] == [False] * (len(values) - 1) + [True]
    probabilities = flat(value["completion_probabilities"] for value in values)
    assert probabilities == whole["completion_probabilities"]


def test_tokens_and_text(serve):
    client, _, service = serve()
    words = service.model.tokenizer
    ids = client.post("/tokenize", json={"content": "né <｜end▁of▁sentence｜>"}).json()["tokens"]
    assert ids == words.encode("né <｜end▁of▁sentence｜>", add_special=False) and 1 in ids
    plain = client.post("/tokenize", json={"content": "<｜end▁of▁sentence｜>", "parse_special": False}).json()
    assert 1 not in plain["tokens"]
    assert client.post("/tokenize", json={"content": "", "add_special": True}).json()["tokens"] == [0]
    assert client.post("/detokenize", json={"tokens": ids}).json()["content"] == "né <｜end▁of▁sentence｜>"
    pieces = client.post("/tokenize", json={"content": "漢", "with_pieces": True}).json()["tokens"]
    raw = b"".join(bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode() for p in pieces)
    assert raw.decode() == "漢"


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(("route", "start"), [(CHAT, {"messages": MESSAGES}), (TEXT, {"prompt": "a"})])
def test_a_failed_text_is_an_error_and_the_others_are_cancelled(serve, stream, route, start):
    client, engine, _service = serve()
    engine.fails_after = 2
    answer = client.post(route, json=start | {"n": 2, "stream": stream})
    if stream:
        *_, error, done = events(answer)
        assert done == "[DONE]"
        error = json.loads(error)["error"]
    else:
        assert answer.status_code == 500
        error = answer.json()["error"]
    assert (error["message"], error["type"]) == ("the step failed.", "server_error")
    engine.fails_after = None
    assert client.post(route, json=start).status_code == 200


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("route", [CHAT, TEXT, NATIVE])
def test_a_grammar_that_leads_nowhere_is_the_fault_of_the_request(serve, monkeypatch, stream, route):
    sentence = "grammar must leave a token of the vocabulary to go on with, got none."
    failure = Failure(message="the request failed.", error=GrammarFailed(sentence))
    monkeypatch.setattr(fake_engine, "Failure", lambda **_: failure)
    client, engine, _service = serve()
    engine.fails_after = 2
    answer = client.post(route, json={"messages": MESSAGES, "prompt": "a", "stream": stream})
    assert answer.status_code == (200 if stream else 400)
    body = json.loads(events(answer)[-1 if route == NATIVE else -2]) if stream else answer.json()
    told = {"message": sentence, "type": "invalid_request_error", "param": None, "code": "grammar_failed"}
    assert body == {"error": told}


def test_a_full_queue_takes_none_of_the_choices(serve):
    client, engine, _ = serve(engine={"num_slots": 1, "max_waiting": 2})
    engine.is_stuck = True
    answer = client.post(CHAT, json={"messages": MESSAGES, "n": 5})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    assert answer.json()["error"]["type"] == "rate_limit_error"
    engine.is_stuck = False
    assert all(ticket.is_cancelled for ticket in engine.submitted)


def test_a_server_about_to_stop_sends_requests_away(serve):
    client, engine, service = serve()
    assert client.get("/ready").status_code == 200
    service.is_draining = engine.is_draining = True
    answer = client.post(CHAT, json={"messages": MESSAGES})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200


def test_a_request_may_not_take_for_ever(serve):
    client, engine, _ = serve(answer_seconds=0.05)
    engine.is_stuck = True
    answer = client.post(CHAT, json={"messages": MESSAGES})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timeout")
    assert engine.submitted[0].is_cancelled


def test_an_engine_that_stands_still_is_not_ready(serve):
    client, engine, _ = serve(stall_seconds=2.0)
    for age, status in ((None, 200), (1.0, 200), (3.0, 503)):
        engine.age = age
        assert client.get("/ready").status_code == status
        assert client.get("/health").status_code == 200


def test_metrics_add_up(serve):
    client, engine, _ = serve()
    for _ in range(3):
        client.post(CHAT, json={"messages": MESSAGES})
    client.post(CHAT, json={})
    answer = client.get("/metrics")
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert float(lines["mla_jax_requests_total"]) == 3
    assert float(lines["mla_jax_first_token_seconds_count"]) == 3
    assert float(lines["mla_jax_inter_token_seconds_count"]) == 3 * (len(engine.submitted[0].tokens) - 1)
    assert float(lines['mla_jax_finished_total{reason="stop"}']) == 3
    assert float(lines['mla_jax_responses_total{route="/v1/chat/completions",status="200"}']) == 3
    assert float(lines['mla_jax_responses_total{route="/v1/chat/completions",status="400"}']) == 1
    assert float(lines["mla_jax_compiles_total"]) == 3
    assert {
        float(lines[f'mla_jax_experts_per_token{{bound="{bound}"}}']) for bound in ("lower", "upper")
    } == {6}


def test_the_server_tells_of_itself(serve):
    client, _, service = serve()
    assert client.get("/v1/models").json()["data"][0]["id"] == "toy"
    props = client.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == props["n_ctx"] == service.model.ctx_size
    assert (props["num_experts"], props["num_experts_per_token"], props["total_slots"]) == (16, 6, 4)
    assert [slot["id"] for slot in client.get("/slots").json()] == [0, 1, 2, 3]
