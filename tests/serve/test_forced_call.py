"""Answers that must call a tool: random texts of each grammar, read by what reads the answers of models."""

import json
import random
import re

import numpy as np
import pytest

from mla_jax import chat
from mla_jax.chat import forced_call
from mla_jax.chat.formats import FORMATS
from mla_jax.serve import grammar
from mla_jax.serve.after_reasoning import AfterReasoning
from mla_jax.tokenizer import BYTE_CHARACTERS, CONTROL, NORMAL, USER_DEFINED, Tokenizer, Vocabulary

EOS = "<｜end▁of▁sentence｜>"
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", 'a"b', "漢"]}}, "required": ["city"]}
TOOLS = [
    {"function": {"name": "weather", "parameters": CITY | {"additionalProperties": False, "title": "x"}}},
    {"function": {"name": "now"}},
    {
        "function": {
            "name": "round.it-2",
            "strict": True,
            "parameters": {
                "properties": {"by": {"$ref": "#/$defs/count"}},
                "required": ["by"],
                "additionalProperties": False,
                "$defs": {"count": {"type": "integer", "minimum": 0, "maximum": 9}},
            },
        }
    },
]
VALID = {
    "weather": lambda arguments: set(arguments) == {"city"} and arguments["city"] in ("Oslo", 'a"b', "漢"),
    "now": lambda arguments: arguments == {},
    "round.it-2": lambda arguments: set(arguments) == {"by"} and arguments["by"] in range(10),
}


def tokenizer_of(form, kind):
    markers = sorted(FORMATS[form].markers | {"</think>"})
    kinds = (CONTROL, *(NORMAL,) * 256, *(kind,) * len(markers))
    return Tokenizer(
        Vocabulary(
            tokens=(EOS, *BYTE_CHARACTERS, *markers), token_types=kinds, merges=(), pre="default", eos_id=0
        )
    )


def compiled_of(form, tokenizer, tools=TOOLS, *, is_single=False):
    control = {tokenizer.vocabulary.tokens[token]: token for token in chat.shown_tokens(tokenizer)}
    text = forced_call.grammar(tools, form, control, is_single=is_single)
    return grammar.compile("tool_choice", text, tokenizer)


def allowed(matcher):
    return np.nonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little"))[0].tolist()


def draw(compiled, tokenizer, rng):
    """Returns a random text; where it may end it does with the odds of the other tokens."""
    matcher, ids = compiled.start(), []
    while (token := rng.choice(allowed(matcher))) not in tokenizer.eog_ids:
        matcher.accept(token)
        ids.append(token)
    return tokenizer.decode(ids, skip_special=False)


def calls_of(text, form, **more):
    answer = chat.Answer(form, tools=TOOLS, **more)
    calls, content = [], ""
    for delta in answer.feed(text) + answer.finish():
        content += delta.content
        if call := delta.tool_call:
            if call.name:
                calls.append([call.name, ""])
            calls[-1][1] += call.arguments
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED], ids=["control", "user-defined"])
@pytest.mark.parametrize("form", forced_call.FORMS)
def test_every_text_is_calls_and_nothing_else(form, kind):
    tokenizer, rng, seen, most = tokenizer_of(form, kind), random.Random(0), set(), 0
    compiled = compiled_of(form, tokenizer)
    for _ in range(30):
        text = draw(compiled, tokenizer, rng)
        content, calls = calls_of(text, form)
        assert calls and not content.strip(), text
        assert all(VALID[name](arguments) for name, arguments in calls), text
        seen.update(name for name, _ in calls)
        most = max(most, len(calls))
    assert seen == set(VALID) and most > 1


@pytest.mark.parametrize("form", forced_call.FORMS)
def test_a_single_call_of_one_tool(form):
    tokenizer, rng = tokenizer_of(form, CONTROL), random.Random(0)
    compiled = compiled_of(form, tokenizer, TOOLS[:1], is_single=True)
    for _ in range(5):
        content, ((name, _),) = calls_of(draw(compiled, tokenizer, rng), form)
        assert (name, content) == ("weather", "")


def test_what_can_not_be_followed_is_left_out_of_schemas_that_are_not_strict():
    tokenizer = tokenizer_of("json", CONTROL)
    parameters = {"properties": {"x": {"type": "array", "uniqueItems": True}}}
    tool = lambda **more: [{"function": {"name": "f", "parameters": parameters} | more}]
    assert compiled_of("json", tokenizer, tool()).start().mask().any()
    with pytest.raises(ValueError, match=r"tool_choice must be one that can be followed: .*uniqueItems"):
        compiled_of("json", tokenizer, tool(strict=True))


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED], ids=["control", "user-defined"])
def test_reasoning_is_free_until_it_ends(kind):
    form = "deepseek-v3.1"
    tokenizer, rng = tokenizer_of(form, kind), random.Random(0)
    matcher = AfterReasoning(compiled_of(form, tokenizer), tokenizer, "</think>").start()
    vocabulary = tokenizer.vocabulary.tokens
    end = vocabulary.index("</think>")
    free = {*range(1, 257), end} | (set() if kind == CONTROL else set(range(257, len(vocabulary))))
    for token in tokenizer.encode("I </thin", add_special=False):
        assert set(allowed(matcher)) == free
        matcher.accept(token)
    for token in (0, len(vocabulary), -1):
        with pytest.raises(ValueError, match="token must be one that reasoning may hold"):
            matcher.accept(token)
    matcher.accept(end)
    begin = vocabulary.index(FORMATS[form].calls_begin)
    assert begin in allowed(matcher) and len(allowed(matcher)) <= 2
    ids = [begin]
    while ids[-1] != 0:
        matcher.accept(ids[-1])
        ids.append(rng.choice(allowed(matcher)))
    text = tokenizer.decode(ids[:-1], skip_special=False)
    content, calls = calls_of(f"I </thin</think>{text}", form, starts_in_reasoning=True)
    assert calls and not content


def test_every_format_but_that_of_tags_has_a_grammar():
    assert {*forced_call.FORMS, "glm-4.5"} == set(FORMATS)
    kimi = forced_call.grammar(TOOLS, "kimi-k2", {}, is_single=True)
    assert re.search(r"/:\[0-9\]\{1,3\}/", json.loads(kimi)["lark"])


CHAT = "/v1/chat/completions"
ASKED = {
    "messages": [{"role": "user", "content": "hi"}],
    "tools": [{"type": "function"} | tool for tool in TOOLS],
}
NAMED = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("parallel", [True, False])
def test_the_engine_is_given_the_grammar_of_the_choice(serve, choice, parallel):
    client, engine, service = serve()
    engine.say('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    answer = client.post(CHAT, json=ASKED | {"tool_choice": choice, "parallel_tool_calls": parallel})
    (told,) = answer.json()["choices"]
    assert (told["finish_reason"], told["message"]["content"]) == ("tool_calls", None)
    assert [call["function"]["name"] for call in told["message"]["tool_calls"]] == ["now"]
    compiled, rng = engine.submitted[0].request.grammar, random.Random(0)
    found = [calls_of(draw(compiled, service.model.tokenizer, rng), "json")[1] for _ in range(10)]
    assert {name for calls in found for name, _ in calls} == ({"now"} if choice == NAMED else set(VALID))
    assert (max(map(len, found)) > 1) == (parallel and choice == "required")


def test_a_grammar_waits_for_the_end_of_reasoning(serve):
    client, engine, _ = serve(chat_template="{{ messages[0].content }}<think>")
    engine.say('so</think>{"a": 1}')
    form = {"response_format": {"type": "json_object"}}
    for more in (form, {"tool_choice": "required"}):
        (told,) = client.post(CHAT, json=ASKED | more).json()["choices"]
        assert (told["message"]["reasoning_content"], told["message"]["content"]) == ("so", '{"a": 1}')
        assert isinstance(engine.submitted[-1].request.grammar, AfterReasoning)
    client.post("/v1/completions", json={"prompt": "<think>"} | form)
    assert not isinstance(engine.submitted[-1].request.grammar, AfterReasoning)


@pytest.mark.parametrize(
    ("more", "template", "param", "words"),
    [
        ({"response_format": {"type": "json_object"}}, "{{ 1 }}", "tool_choice", "where a grammar"),
        ({"grammar": 'root ::= "a"'}, "{{ 1 }}", "tool_choice", "where a grammar"),
        ({}, "{{ '<arg_key>' }}", "tool_choice", "the tool calls of this model (glm-4.5)"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/nowhere"}}}]},
            "{{ 1 }}",
            "tools",
            "tool_choice must be one that can be followed",
        ),
    ],
    ids=["format", "grammar", "glm", "schema"],
)
def test_choices_that_no_grammar_is_made_of(serve, more, template, param, words):
    client, engine, _ = serve(chat_template=template)
    answer = client.post(CHAT, json=ASKED | {"tool_choice": "required"} | more)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and words in error["message"]
    assert error["message"].endswith(".") and not engine.submitted
