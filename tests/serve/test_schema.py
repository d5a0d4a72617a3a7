"""Fields of requests: what each kind refuses, by the tables themselves, and what good values become."""

import inspect
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions

from mla_jax.sampler import SamplingParams
from mla_jax.serve.http import bodies, json_body, schema
from mla_jax.serve.http.api_error import ApiError

MESSAGES = [{"role": "user", "content": "hi"}]
ROUTES = {
    "chat": ("/v1/chat/completions", bodies.CHAT_TABLE, {"messages": MESSAGES}),
    "completions": ("/v1/completions", bodies.TEXT_TABLE, {"prompt": "hi"}),
    "completion": ("/completion", bodies.COMPLETION_TABLE, {"prompt": "hi"}),
    "tokenize": ("/tokenize", bodies.TOKENIZE_TABLE, {"content": "hi"}),
    "detokenize": ("/detokenize", bodies.DETOKENIZE_TABLE, {"tokens": [5]}),
    "apply-template": ("/apply-template", bodies.TEMPLATE_TABLE, {"messages": MESSAGES}),
}
HUGE = [2**63, -(2**63) - 1, 10**300]
_NO_NUMBERS = ["1", "", "NaN", True, False, [], [1], {}, {"a": 1}]


def bad_values(kind):
    """Lists values that a kind has to refuse."""
    match kind:
        case schema.Integer():
            return [kind.lower - 1, kind.upper + 1, 0.5, 1.0, *HUGE, *_NO_NUMBERS]
        case schema.Number():
            ends = [kind.lower] * kind.above_lower + [kind.upper] * kind.below_upper
            return [*ends, kind.lower - 0.5, kind.upper + 0.5, *HUGE, *_NO_NUMBERS]
        case schema.Boolean():
            return [0, 1, "true", "", [], {}, 0.0, *HUGE]
        case schema.Text():
            long = ["a" * (kind.max_chars + 1)] if kind.max_chars else []
            return [*long, *[""] * (kind.min_chars > 0), 5, 0.5, True, [], ["a"], {}, *HUGE]
        case schema.Choice():
            return ["nonsense", "", 5, True, [], {}, *HUGE]
        case schema.ListOf():
            return [5, "a", {}, True, [kind.kind], *HUGE][:4] + [[bad] for bad in bad_values(kind.kind)]
        case schema.Object():
            return [5, "a", [], True, [1], *HUGE]
        case schema.Neutral():
            return ["nonsense", 17, [17], {"a": 1}, *HUGE]
        case schema.Special():
            return [*kind.bad, *HUGE]
    raise AssertionError(kind)


BAD = [
    (route, name, value)
    for route, (_, table, _) in ROUTES.items()
    for name, kind in table.items()
    for value in bad_values(kind)
]


def test_there_are_bad_values_of_every_field():
    assert len(BAD) >= 500
    assert {(route, name) for route, name, _ in BAD} == {
        (route, name) for route, (_, table, _) in ROUTES.items() for name in table
    }


def test_every_bad_value_is_refused_by_name_and_good_requests_go_on(serve):
    client, engine, _ = serve()
    wanted = client.post("/v1/completions", json={"prompt": "hi"}).json()["choices"]
    for route, name, value in BAD:
        path, _, good = ROUTES[route]
        answer = client.post(path, content=json.dumps(good | {name: value}))
        assert answer.status_code == 400, (route, name, value, answer.text)
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error" and error["message"].endswith((".", "?"))
        assert error["param"].startswith(name), (route, name, error)
    assert client.post("/v1/completions", json={"prompt": "hi"}).json()["choices"] == wanted
    assert len(engine.submitted) == 2


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def _requests(draw):
    """A route with a body of its own fields, most of them of the wrong kind, in bytes that may be cut."""
    path, table, good = draw(st.sampled_from(list(ROUTES.values())))
    names = draw(st.lists(st.sampled_from(sorted(table)), max_size=4, unique=True))
    body = json.dumps(good | {name: draw(_JSON) for name in names}).encode()
    return path, body[: draw(st.integers(0, len(body)))] if draw(st.integers(0, 9)) == 0 else body


def test_no_request_makes_the_server_fail(serve):
    client, engine, _ = serve(engine={"step_seconds": 0.0})
    engine.say("ok")
    wanted = client.post("/completion", json={"prompt": "hi"}).json()["content"]
    statuses = []

    @settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(_requests())
    def ask(request):
        path, body = request
        answer = client.post(path, content=body)
        statuses.append(answer.status_code)
        assert answer.status_code in (200, 400, 429), (path, body, answer.text)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    ask()
    assert statuses.count(400) > 200
    assert client.post("/completion", json={"prompt": "hi"}).json()["content"] == wanted
    assert not engine.running and not engine.waiting


@pytest.mark.parametrize(
    ("body", "words"),
    {
        "no JSON": (b"{", "the body must be JSON, but at character 1"),
        "empty": (b"", "the body must be JSON"),
        "no UTF-8": (b'{"a": "\xff"}', "the body must be UTF-8, but byte 7"),
        "UTF-16": ('{"a": 1}'.encode("utf-16"), "the body must be UTF-8"),
        "no object": (b"[1]", "the body must be a JSON object"),
        "NaN": (b'{"a": NaN}', "numbers must be finite, got NaN"),
        "infinity": (b'{"a": [-Infinity]}', "numbers must be finite, got -Infinity"),
        "1e400": (b'{"a": 1e400}', "numbers must be finite as 64-bit floats, got 1e400"),
        "long float": (b'{"a": 1.' + b"0" * 400 + b"}", "numbers must be finite as 64-bit"),
        "long integer": (b'{"a": ' + b"1" * 5000 + b"}", "numbers must have at most 400 digits"),
        "key twice": (b'{"a": {"b": 1, "b": 2}}', "keys of the body must not repeat"),
        "lone surrogate": (b'{"a": ["\\ud800"]}', "the body must be valid Unicode"),
        "lone surrogate as key": (b'{"a": {"\\udfff": 1}}', "the body must be valid Unicode"),
        "depth 65": (b'{"a":' * 65 + b"1" + b"}" * 65, "the body must nest at most 64"),
        "depth 100000": (b'{"a":' + b"[" * 100000, "the body must nest at most 64"),
    }.values(),
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_is_no_body(body, words):
    with pytest.raises(ApiError) as caught:
        json_body.parse(body)
    assert caught.value.message.startswith(words) and caught.value.status == 400


def test_depth_64_is_taken():
    assert json_body.parse(b'{"a":' * 64 + b"1" + b"}" * 64)


@pytest.mark.parametrize("name", ["temprature", "max_token", "messagess", "responseformat", "cacheprompt"])
def test_a_misspelt_field_is_told(name):
    with pytest.raises(ApiError, match=f"there is no field {name}. Did you mean"):
        schema.read(bodies.CHAT_TABLE, {"messages": MESSAGES, name: 1})


@pytest.mark.parametrize("name", ["store", "metadata", "service_tier", "prompt_cache_key", "verbosity", "x"])
def test_a_field_of_other_servers_is_ignored(name):
    assert schema.read(bodies.CHAT_TABLE, {name: object()}) == {}


@pytest.mark.parametrize(
    ("table", "method"),
    [(bodies.CHAT_TABLE, ChatCompletions.create), (bodies.TEXT_TABLE, Completions.create)],
    ids=["chat", "completions"],
)
def test_no_field_of_the_client_of_openai_is_called_a_misspelling(table, method):
    fields = [name for name in inspect.signature(method).parameters if name != "self"]
    assert len(fields) > 15
    for name in fields:
        if name not in table:
            assert schema.read(table, {name: object()}) == {}


def test_a_misspelt_null_is_nothing():
    assert schema.read(bodies.CHAT_TABLE, {"temprature": None}) == {}


def test_null_is_as_if_it_were_not_there():
    fields = dict.fromkeys(bodies.CHAT_TABLE) | {"messages": MESSAGES}
    assert bodies.chat(fields, SamplingParams(), 7) == bodies.chat(
        {"messages": MESSAGES}, SamplingParams(), 7
    )


def test_fields_of_both_families_of_clients():
    asked = bodies.chat(
        {
            "messages": MESSAGES,
            "max_completion_tokens": 9,
            "temperature": 0,
            "top_k": -1,
            "seed": 2**32 - 1,
            "stop": "x",
            "logit_bias": {"5": -100},
            "ser": "6,1",
            "logprobs": True,
            "top_logprobs": 3,
            "repeat_last_n": 8,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "null"}},
            },
        },
        SamplingParams(min_p=0.25),
        None,
    )
    draw = asked.drawing
    assert draw.sampling == SamplingParams(
        temperature=0.0, top_k=0, seed=2**32 - 1, penalty_last_n=8, min_p=0.25
    )
    assert (draw.max_tokens, draw.stop, draw.logit_bias) == (9, ("x",), ((5, -100.0),))
    assert draw.expert_reduction == (6, 1.0) and asked.num_logprobs == 3
    assert draw.grammar == ("json_schema", '{"type": "null"}')


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 5, "n_predict": 6}, "max_tokens"),
        ({"grammar": 'root ::= "a"', "json_schema": {}}, "json_schema"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({f"field{i}": 1 for i in range(300)}, None),
    ],
    ids=["two limits", "two grammars", "top alone", "no tools", "no such tool", "template", "300 fields"],
)
def test_fields_that_do_not_go_together(fields, param):
    with pytest.raises(ApiError) as caught:
        bodies.chat({"messages": MESSAGES} | fields, SamplingParams(), None)
    assert caught.value.param == param
