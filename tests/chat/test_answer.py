"""What a model writes, taken apart: written by hand, written by a writer per format, and cut anywhere."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_jax import chat
from mla_jax.chat.formats import FORMATS

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer"},
        "what": True,
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "now"}},
]


def parse(form, cuts, **options):
    """Returns (reasoning, content, calls) of an answer in cuts, calls as [id, name, arguments]."""
    names = (f"id{index}" for index in range(99))
    answer = chat.Answer(form, new_id=lambda: next(names), **{"tools": TOOLS} | options)
    deltas = [delta for cut in cuts for delta in answer.feed(cut)] + answer.finish()
    assert answer.finish() == []
    reasoning, content, calls = "", "", []
    for delta in deltas:
        reasoning, content, call = reasoning + delta.reasoning, content + delta.content, delta.tool_call
        assert [bool(delta.reasoning), bool(delta.content), call is not None].count(True) == 1
        if call and call.name is not None:
            assert call.index == len(calls)
            calls.append([call.id, call.name, ""])
        if call:
            assert call.index == len(calls) - 1
            calls[-1][2] += call.arguments
    assert answer.num_tool_calls == len(calls)
    return reasoning, content, calls


V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{}\n```<｜tool▁call▁end｜>"
V31 = "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
KIMI = "<|tool_call_begin|>functions.weather:7<|tool_call_argument_begin|>{}<|tool_call_end|>"
JSON = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        ("deepseek-v3", f"a <｜tool▁calls▁begin｜>{V3}\n{V3}<｜tool▁calls▁end｜>\n b", "a b", ["{}", "{}"]),
        ("deepseek-v3", f"{V3}", "", ["{}"]),
        ("deepseek-v3", V3.replace("```json\n", "").replace("\n```", ""), "", ["{}"]),
        ("deepseek-v3", V3.replace("{}\n```", '{"city": "```"}\n```'), "", ['{"city": "```"}']),
        ("deepseek-v3", V3[: V3.index("{")] + '{"city', "", ['{"city']),
        ("deepseek-v3.1", f"<｜tool▁calls▁begin｜> {V31}{V31}\n<｜tool▁calls▁end｜>", "", ["{}", "{}"]),
        ("deepseek-v3.1", V31.replace("{}", ' not "json" '), "", ['not "json"']),
        ("deepseek-v3.1", V31.replace("{}", ""), "", ["{}"]),
        ("deepseek-v3.1", V31.replace("<｜tool▁call▁end｜>", "") + V31, "", ["{}", "{}"]),
        ("kimi-k2", f"x<|tool_calls_section_begin|>{KIMI} <|tool_calls_section_end|>", "x", ["{}"]),
        ("glm-4.5", "<tool_call>now</tool_call>\n<tool_call>\nnow\n</tool_call>\n", "", ["{}", "{}"]),
        (
            "glm-4.5",
            '<tool_call>weather<arg_key>city</arg_key><arg_value>12 "\n</arg_value>\n<arg_key>unit</arg_key>'
            "<arg_value>3</arg_value><arg_key>days</arg_key>\n<arg_value> 3</arg_value>"
            '<arg_key>what</arg_key><arg_value>[1, "a"]</arg_value>'
            "<arg_key>who</arg_key><arg_value>NaN</arg_value></tool_call>",
            "",
            ['{"city": "12 \\"\\n", "unit": "3", "days": 3, "what": [1, "a"], "who": "NaN"}'],
        ),
        ("glm-4.5", "<tool_call>weather <arg_key>city</arg_key> <arg_value>a", "", ['{"city": "a']),
        ("glm-4.5", "<tool_call>now\n", "", ["{}"]),
        ("glm-4.5", "<tool_call> \n now \n</tool_call>", "", ["{}"]),
        ("glm-4.5", "<tool_call>now\nfoo</tool_call>", "foo</tool_call>", ["{}"]),
        ("json", f"a\n{JSON}\n{JSON} b", "a\n b", ["{}", "{}"]),
        ("json", '<tool_call>\n{"name": "now"}\n</tool_call>', "", ["{}"]),
        ("json", JSON.replace("{}", '{"city": "é", "days": 1.5}'), "", ['{"city": "é", "days": 1.5}']),
    ],
)  # fmt: skip
def test_calls_by_hand(form, text, content, calls):
    for cuts in ([text], list(text)):
        reasoning, found, found_calls = parse(form, cuts)
        assert (reasoning, found, [call[2] for call in found_calls]) == ("", content, calls)


def test_the_id_of_a_call_is_that_of_the_model_or_made():
    assert parse("kimi-k2", [KIMI, KIMI.replace("functions.", "")])[2] == [
        ["functions.weather:7", "weather", "{}"],
        ["weather:7", "weather", "{}"],
    ]
    assert parse("deepseek-v3.1", [V31, V31])[2] == [["id0", "weather", "{}"], ["id1", "weather", "{}"]]
    ids = {chat.Answer("json", tools=TOOLS).feed(JSON)[0].tool_call.id for _ in range(20)}
    assert len(ids) == 20 and all(made.startswith("call_") for made in ids)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("deepseek-v3", "<｜tool▁calls▁begin｜>nothing of the kind"),
        ("deepseek-v3", V3.replace("weather", "unknown")),
        ("deepseek-v3", V3.replace("weather\n", "weather")),
        ("deepseek-v3.1", V31.replace("<｜tool▁sep｜>", "")),
        ("deepseek-v3.1", V31.replace("weather", "w" * 300)),
        ("deepseek-v3.1", "<｜tool▁calls▁begin｜>  "),
        ("deepseek-v3.1", "<｜tool▁calls▁begin｜>\n<｜tool▁calls▁end｜>"),
        ("deepseek-v3.1", "<｜tool▁call▁begin｜>weather"),
        ("kimi-k2", KIMI.replace("weather", "no<b>")),
        ("kimi-k2", "<|tool_calls_section_begin|>\n\nfoo<|tool_calls_section_end|>"),
        ("glm-4.5", "the tag <tool_call> begins a call"),
        ("glm-4.5", "<tool_call>"),
        ("json", JSON.replace('"name"', "name")),
        ("json", JSON.replace("{}", "[]")),
        ("json", JSON.replace("{}", '{"a": NaN}')),
        ("json", "<tool_call>[1]</tool_call>"),
        ("json", "<tool_call>" + "[" * 99999 + "</tool_call>"),
        ("json", JSON.removesuffix("</tool_call>")),
    ],
)
def test_what_is_no_call_stays_content(form, text):
    for cuts in ([text], list(text)):
        assert parse(form, cuts) == ("", text, [])


@pytest.mark.parametrize("form", FORMATS)
def test_without_tools_there_are_no_calls(form):
    text = f"{V3}{V31}{KIMI}{JSON}"
    assert parse(form, [text], tools=()) == ("", text, [])


@pytest.mark.parametrize(
    ("text", "starts", "reasoning_format", "expected"),
    [
        ("<think>\na b\n</think>\n\nc\n", False, "auto", ("a b", "c\n")),
        ("\n<think>a</think>c", False, "deepseek", ("a", "c")),
        ("<think>\na b\n</think>\n\nc", False, "none", ("", "<think>\na b\n</think>\n\nc")),
        ("a\n</think>\n\nc", True, "auto", ("a", "c")),
        ("<think>a</think>c", True, "auto", ("a", "c")),
        ("</think>c", True, "auto", ("", "c")),
        ("a", True, "auto", ("a", "")),
        ("a</think>c", True, "none", ("", "a</think>c")),
        (" c <think>a</think>", False, "auto", ("", " c <think>a</think>")),
        ("<think>a</think>b</think><think>c", False, "auto", ("a", "b</think><think>c")),
        ("<think>a <b> </thin", False, "auto", ("a <b> </thin", "")),
        ("<thin", False, "auto", ("", "<thin")),
        (" ", False, "auto", ("", " ")),
        ("", True, "auto", ("", "")),
    ],
)
def test_reasoning_by_hand(text, starts, reasoning_format, expected):
    options = dict(starts_in_reasoning=starts, reasoning_format=reasoning_format)
    for cuts in ([text], list(text)):
        assert parse("json", cuts, **options)[:2] == expected


def test_calls_in_a_section_end_reasoning():
    text = f"<think>hm <tool_call>\n<｜tool▁calls▁begin｜>{V31}"
    assert parse("deepseek-v3.1", [text]) == ("hm <tool_call>", "", [["id0", "weather", "{}"]])


def test_text_is_held_back_only_while_it_may_be_a_marker():
    answer = chat.Answer("deepseek-v3.1", tools=TOOLS)
    contents = lambda deltas: [delta.content for delta in deltas]
    assert contents(answer.feed("a<")) == ["a"]
    assert contents(answer.feed("b")) == ["<b"]
    assert contents(answer.feed("<｜tool▁c")) == []
    assert contents(answer.feed("ode")) == ["<｜tool▁code"]
    call = answer.feed('<｜tool▁call▁begin｜>now<｜tool▁sep｜>{"a"')
    assert [(delta.tool_call.name, delta.tool_call.arguments) for delta in call] == [
        ("now", ""),
        (None, '{"a"'),
    ]
    assert [delta.tool_call.arguments for delta in answer.feed(": 1")] == [": 1"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "unit", "days", "a_b"]), JSON_VALUES, max_size=3)
CALLS = st.lists(st.tuples(st.sampled_from(["weather", "now"]), ARGUMENTS), min_size=1, max_size=3)


def write(form, calls):
    """Writes calls as a model of the format should."""
    text = lambda arguments: json.dumps(arguments, ensure_ascii=False)
    if form == "json":
        made = [f'<tool_call>{{"name": "{name}", "arguments": {text(a)}}}</tool_call>' for name, a in calls]
    elif form == "glm-4.5":
        made = []
        for name, arguments in calls:
            pairs = (
                f"<arg_key>{key}</arg_key>\n<arg_value>"
                f"{value if isinstance(value, str) else text(value)}</arg_value>\n"
                for key, value in arguments.items()
            )
            made.append(f"<tool_call>{name}\n{''.join(pairs)}</tool_call>")
    else:
        markers = FORMATS[form]
        before = {"deepseek-v3": "function<｜tool▁sep｜>{}\n```json\n", "deepseek-v3.1": "{}<｜tool▁sep｜>"}
        before = before.get(form, "functions.{}:0<|tool_call_argument_begin|>")
        after = "\n```" if form == "deepseek-v3" else ""
        made = [
            f"{markers.call_begin}{before.format(name)}{text(a)}{after}{markers.call_end}"
            for name, a in calls
        ]
        return markers.calls_begin + "\n".join(made) + markers.calls_end
    return "\n".join(made)


def expected(form, name, arguments):
    """GLM writes strings without quotes: without a schema, those that are JSON are read as such."""
    if form != "glm-4.5":
        return arguments
    written = {
        k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in arguments.items()
    }
    texts = ("city", "unit") if name == "weather" else ()
    return {key: value if key in texts else read_json(value) for key, value in written.items()}


def read_json(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.mark.parametrize("form", FORMATS)
@given(calls=CALLS, content=st.text("ab <\n", max_size=9), data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_a_format_writes_is_read(form, calls, content, data):
    reasoning, found, found_calls = parse(form, cut(content + write(form, calls), data))
    assert (reasoning, found) == ("", content)
    assert [name for _, name, _ in found_calls] == [name for name, _ in calls]
    for (_, name, text), (_, arguments) in zip(found_calls, calls, strict=True):
        assert json.loads(text) == expected(form, name, arguments)


def cut(text, data):
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("form", FORMATS)
@given(data=st.data(), starts=st.booleans(), every=st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_the_parts_do_not_depend_on_the_cuts(form, data, starts, every):
    markers = sorted(FORMATS[form].markers)
    words = (
        "weather|now|functions.now:1|function|\n| |```json|```|<think>|</think>|<arg_key>city</arg_key>|é|<"
    )
    pieces = [*markers, *words.split("|"), '{"city": 1}', '{"name": "now"}', "x" * 260]
    drawn = data.draw(st.lists(st.sampled_from(pieces), max_size=14))
    text = "".join(drawn)[: data.draw(st.none() | st.integers(0, 200))]
    whole = parse(form, [text], starts_in_reasoning=starts)
    assert parse(form, cut(text, data), starts_in_reasoning=starts) == whole
    even = [text[start : start + every] for start in range(0, len(text), every)]
    assert parse(form, even, starts_in_reasoning=starts) == whole
    if not whole[2] and "think>" not in text and not starts:
        assert whole == ("", text, [])


@pytest.mark.parametrize(
    ("source", "form"),
    [
        (chat.BUILTIN_TEMPLATES["deepseek2"], "json"),
        (chat.BUILTIN_TEMPLATES["deepseek3"], "deepseek-v3"),
        (chat.BUILTIN_TEMPLATES["deepseek3.1"], "deepseek-v3.1"),
        (chat.BUILTIN_TEMPLATES["kimi-k2"], "kimi-k2"),
        (chat.BUILTIN_TEMPLATES["chatglm4"], "glm-4.5"),
        ({"<｜User｜>", "<｜Assistant｜>"}, "deepseek-v3"),
        (["<｜User｜>", "<｜Assistant｜>", "<think>", "<｜search▁begin｜>"], "deepseek-v3.1"),
        (("[gMASK]", "<sop>"), "glm-4.5"),
        ((), "json"),
    ],
)  # fmt: skip
def test_the_format_is_that_of_the_template(source, form):
    assert chat.answer_format(source) == form


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(form="xml"), "the format of tool calls must be one of deepseek-v3, .*, got 'xml'"),
        (
            dict(form="json", reasoning_format="all"),
            "the reasoning format must be one of auto, .*, got 'all'",
        ),
    ],
)
def test_unknown_formats_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        chat.Answer(**arguments)
