"""Which messages, tools and variables there may be, and what templates get."""

import pytest

from mla_jax import chat
from mla_jax.chat import messages as messages_lib

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "a\nb"},
        ),
        ({"role": "user", "content": "x", "name": None}, {"role": "user", "content": "x"}),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ),
        ({"role": "assistant", "tool_calls": [], "content": ""}, {"role": "assistant", "content": ""}),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "é"}}}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}],
            },
        ),
        (
            {"role": "tool", "content": "x", "tool_call_id": "c1", "other": 1},
            {"role": "tool", "content": "x", "tool_call_id": "c1", "other": 1},
        ),
    ],
)
def test_messages_are_put_in_one_form(message, expected):
    assert messages_lib.normalised([message]) == [expected]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages must not be empty"),
        ("hi", "messages must not be empty, and must be a list"),
        (["hi"], r"messages\[0\] must have a string 'role', got 'hi'"),
        ([{"role": "user", "content": "a"}, {"role": "user"}], r"messages\[1\] must have a string 'content'"),
        ([{"role": None, "content": "x"}], r"messages\[0\] must have a string 'role'"),
        ([{"role": "god", "content": "x"}], r"messages\[0\].role must be one of system, .*, got 'god'"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\] must have a string 'content'"),
        ([{"role": "user", "content": []}], r"messages\[0\] must have a string 'content'"),
        ([{"role": "user", "content": [{"type": "image_url", "text": ""}]}], "list of parts of type 'text'"),
        ([{"role": "assistant", "content": None}], r"messages\[0\] must have a string 'content'"),
        ([{"role": "user", "content": "", "name": 1}], r"messages\[0\].name must be a string, got 1"),
        ([{"role": "user", "content": "", "tool_calls": [CALL]}], r"tool_calls must be of an assistant"),
        ([{"role": "assistant", "tool_calls": CALL}], r"messages\[0\].tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [1]}], r"tool_calls\[0\] must be of type 'function'"),
        ([{"role": "assistant", "tool_calls": [CALL | {"type": "x"}]}], r"must be of type 'function'"),
        ([{"role": "assistant", "tool_calls": [CALL | {"id": 1}]}], r"tool_calls\[0\].id must be a string"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "a b"}}]}],
            r"tool_calls\[0\].function.name must match .*, got 'a b'",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}],
            r"function.arguments must be a string of JSON, got \[1\]",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": b""}}}]}],
            r"function.arguments must be JSON values",
        ),
    ],
)
def test_bad_messages_are_refused(messages, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        chat.render(messages, "{{ messages }}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tools", "sentence"),
    [
        (TOOL, "tools must be a list"),
        ([TOOL["function"]], r"tools\[0\] must be of type 'function'"),
        ([TOOL, TOOL], r"tools\[1\].function.name must match .* and be given once, got 'f'"),
        ([{"type": "function", "function": {"name": "f" * 65}}], r"tools\[0\].function.name must match"),
        ([{"type": "function", "function": {"name": "f", "description": 1}}], "description must be a string"),
        ([{"type": "function", "function": {"name": "f", "parameters": "x"}}], "must be a JSON schema"),
    ],
)  # fmt: skip
def test_bad_tools_are_refused(tools, sentence):
    with pytest.raises(ValueError, match=sentence):
        chat.render([{"role": "user", "content": ""}], "{{ tools }}", tools=tools)


@pytest.mark.parametrize(
    "key",
    ["chat_template", "tokenize", "messages", "tools", "bos_token", "eos_token", "add_generation_prompt",
     "range", "raise_exception", "self", "_x", "Ä", "a b", "", "x" * 65, 1],
)  # fmt: skip
def test_variables_that_are_not_to_be_given_are_refused(key):
    with pytest.raises(ValueError, match="chat_template_kwargs must not hold the key"):
        chat.render([{"role": "user", "content": ""}], "{{ x }}", kwargs={key: "x"})


def test_thinking_has_two_names():
    both = {"enable_thinking": False, "thinking": False}
    assert messages_lib.checked_kwargs({"enable_thinking": False}) == both
    assert messages_lib.checked_kwargs({"thinking": False}) == both
    assert messages_lib.checked_kwargs(both | {"thinking": True}) == both | {"thinking": True}
    assert messages_lib.checked_kwargs(None) == {}
    message = {"role": "user", "content": ""}
    assert chat.render([message], "{{ x }}{{ y }}", kwargs={"x": 1, "y": 2, "template": 3}) == "12"
    with pytest.raises(ValueError, match="chat_template_kwargs must be an object"):
        messages_lib.checked_kwargs([1])


@pytest.mark.parametrize(
    "value",
    [["<"] * 4096, {str(key): 1 for key in range(4096)}, [[["a", "b"]] * 2048]],
    ids=["list", "keys", "nested"],
)
def test_further_variables_hold_few_strings(value):
    with pytest.raises(ValueError, match="chat_template_kwargs must hold at most 4096 strings"):
        messages_lib.checked_kwargs({"a": value})  # 4096, and the key
    few = {"a": ["<"] * 4094, "b": [1] * 10000}
    assert messages_lib.checked_kwargs(few)["a"] == few["a"]
