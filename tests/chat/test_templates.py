"""Tools in templates: the built-in ones by hand, and every one read back by the parser of its format."""

import json

import pytest
from small_tokenizers import small_tokenizer

from mla_jax import chat

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
ARGUMENTS = '{"city": "Köln \\"x", "days": 3}'
MESSAGES = [
    {"role": "user", "content": "Hm?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "functions.weather:0", "function": {"name": "weather", "arguments": ARGUMENTS}},
            {"id": "functions.now:1", "function": {"name": "now", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "tool_call_id": "functions.weather:0", "content": "rain"},
    {"role": "tool", "tool_call_id": "functions.now:1", "content": "noon"},
]
CALLS_V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    f"{ARGUMENTS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n"
    "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
CALLS_V31 = (
    f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
CONVERSATIONS = {
    "deepseek2": "User: Hm?\n\nAssistant: <tool_call>\n"
    f'{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><E>'
    "User: <tool_response>\nrain\n</tool_response>\n\n"
    "User: <tool_response>\nnoon\n</tool_response>\n\nAssistant:",
    "deepseek3": f"<｜User｜>Hm?<｜Assistant｜>{CALLS_V3}<E>"
    "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>rain<｜tool▁output▁end｜>\n"
    "<｜tool▁output▁begin｜>noon<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
    "deepseek3.1": f"<｜User｜>Hm?<｜Assistant｜></think>{CALLS_V31}<E>"
    "<｜tool▁output▁begin｜>rain<｜tool▁output▁end｜><｜tool▁output▁begin｜>noon<｜tool▁output▁end｜>",
    "kimi-k2": "<|im_user|>user<|im_middle|>Hm?<|im_end|><|im_assistant|>assistant<|im_middle|>"
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    f"{ARGUMENTS}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>"
    "{}<|tool_call_end|><|tool_calls_section_end|><|im_end|>"
    "<|im_system|>tool<|im_middle|>## Return of functions.weather:0\nrain<|im_end|>"
    "<|im_system|>tool<|im_middle|>## Return of functions.now:1\nnoon<|im_end|>"
    "<|im_assistant|>assistant<|im_middle|>",
    "chatglm4": "[gMASK]<sop><|user|>\nHm?<|assistant|>\n<tool_call>weather\n"
    '<arg_key>city</arg_key>\n<arg_value>Köln "x</arg_value>\n<arg_key>days</arg_key>\n'
    "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>"
    "<|observation|>\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"
    "<|assistant|>",
}  # fmt: skip
DECLARATION = (
    "## Tools\n\nThese functions may be called:\n\n### weather\nTells it.\nArguments, as a JSON schema: "
    f"{json.dumps(SCHEMA)}\n\n### now\n\nArguments, as a JSON schema: {{}}\n\n"
    "To call one, write exactly this, with the function's name, and its arguments as JSON:\n"
)
# The manner of DeepSeek-V3.1's: text and calls are added up, and tools are left to the caller.
V31 = """\
{%- for m in messages -%}
  {%- if m['role'] == 'assistant' and m['tool_calls'] is defined -%}
    {%- for call in m['tool_calls'] -%}
      {{- '<C>' + call['function']['name'] + '<｜tool▁sep｜>' + call['function']['arguments'] + '</C>' -}}
    {%- endfor -%}
  {%- elif m['role'] == 'tool' -%}{{- '<O>' + m['content'] -}}
  {%- else -%}{{- m['content'] -}}
  {%- endif -%}
{%- endfor -%}"""


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_calls_and_results_are_those_written_by_hand(name):
    template = chat.BUILTIN_TEMPLATES[name]
    assert chat.render(MESSAGES, template, eos_token="<E>") == CONVERSATIONS[name]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_a_template_writes_is_what_the_answer_reads(name):
    template = chat.BUILTIN_TEMPLATES[name]
    start = chat.render(MESSAGES[:1], template, eos_token="<E>", kwargs={"enable_thinking": False})
    written = chat.render(MESSAGES[:2], template, eos_token="<E>", add_generation_prompt=False)
    start = start.removesuffix("\n<think></think>")
    assert written.startswith(start)
    answer = chat.Answer(chat.answer_format(template), tools=TOOLS)
    text = written.removeprefix(start).removesuffix("<|im_end|>").removesuffix("<E>")
    deltas = answer.feed(text) + answer.finish()
    assert "".join(delta.content for delta in deltas).strip() == ""
    calls = [delta.tool_call for delta in deltas if delta.tool_call]
    assert [call.name for call in calls if call.name] == ["weather", "now"]
    assert "".join(call.arguments for call in calls) == ARGUMENTS + "{}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deepseek2", DECLARATION),
        ("deepseek3", DECLARATION),
        ("deepseek3.1", DECLARATION),
        ("kimi-k2", "tool_declare<|im_middle|>" + json.dumps(TOOLS, separators=(",", ":")) + "<|im_end|>"),
        ("chatglm4", f"<tools>\n{json.dumps(TOOLS[0])}\n{json.dumps(TOOLS[1])}\n</tools>"),
    ],
)
def test_tools_are_declared_before_all_else(name, text):
    template = chat.BUILTIN_TEMPLATES[name]
    prompt = chat.render(MESSAGES, template, tools=TOOLS, eos_token="<E>")
    assert prompt.count(text) == 1 and prompt.endswith(CONVERSATIONS[name].removeprefix("[gMASK]<sop>"))
    system = {"role": "system", "content": "Be brief."}
    assert chat.render([system], template, tools=TOOLS).index(text) >= 0


def test_the_system_message_comes_before_the_declaration():
    system = {"role": "system", "content": "Be brief."}
    prompt = chat.render([system, *MESSAGES], V31, tools=TOOLS)
    called = f"<C>weather<｜tool▁sep｜>{ARGUMENTS}</C><C>now<｜tool▁sep｜>{{}}</C><O>rain<O>noon"
    assert prompt.startswith(f"Be brief.\n\n{DECLARATION}<｜tool▁calls▁begin｜>")
    assert prompt.endswith(f"Hm?{called}")


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("a", ARGUMENTS),
        ("a ~ ''", ARGUMENTS),
        ("'[' + a + ']'", f"[{ARGUMENTS}]"),
        ("a | tojson", ARGUMENTS),
        ("a | tojson(separators=(',', ':'))", '{"city":"Köln \\"x","days":3}'),
        ("a.city", 'Köln "x'),
        ("a | items | list | length", "2"),
        ("a is mapping and not a is string", "True"),
        ("messages[1].tool_calls[1].function.arguments or 'none'", "{}"),
        ("messages[1].tool_calls[0].function | tojson", f'{{"name": "weather", "arguments": {ARGUMENTS}}}'),
    ],
)
def test_arguments_are_text_and_mapping(expression, text):
    template = f"{{% set a = messages[1].tool_calls[0].function.arguments %}}{{{{ {expression} }}}}"
    assert chat.render(MESSAGES, template) == text


@pytest.mark.parametrize(("name", "thinking", "end"), [
    ("deepseek3", True, "<｜Assistant｜><think>\n"),
    ("deepseek3", False, "<｜Assistant｜>"),
    ("deepseek3.1", True, "<｜Assistant｜><think>"),
    ("deepseek3.1", False, "<｜Assistant｜></think>"),
    ("chatglm4", True, "<|assistant|>"),
    ("chatglm4", False, "<|assistant|>\n<think></think>"),
])  # fmt: skip
def test_thinking_is_asked_for(name, thinking, end):
    prompt = chat.render(MESSAGES[:1], chat.BUILTIN_TEMPLATES[name], kwargs={"enable_thinking": thinking})
    assert prompt.endswith(f"Hm?{end}")


def test_kimi_and_glm_take_names_and_reasoning():
    named = [{"role": "user", "name": "Ann", "content": "x"}]
    assert chat.render(named, chat.BUILTIN_TEMPLATES["kimi-k2"]).startswith("<|im_user|>Ann<|im_middle|>x")
    thought = [{"role": "assistant", "content": "x", "reasoning_content": "y"}]
    prompt = chat.render(thought, chat.BUILTIN_TEMPLATES["chatglm4"], add_generation_prompt=False)
    assert prompt == "[gMASK]<sop><|assistant|>\n<think>y</think>\nx"


def test_arguments_that_are_no_json_are_written_as_they_are():
    call = {"function": {"name": "f", "arguments": "[" * 9999}}
    prompt = chat.render([{"role": "assistant", "tool_calls": [call]}], chat.BUILTIN_TEMPLATES["chatglm4"])
    assert f"<tool_call>f\n{'[' * 9999}</tool_call>" in prompt


def test_a_template_is_chosen():
    tokenizer = small_tokenizer(chat_template="{{ own }}")
    assert chat.template_for(tokenizer) == "{{ own }}"
    assert chat.template_for(tokenizer, "kimi-k2") == chat.BUILTIN_TEMPLATES["kimi-k2"]
    assert chat.template_for(tokenizer, "{% if x %}{% endif %}") == "{% if x %}{% endif %}"
    assert chat.template_for(small_tokenizer()) == chat.BUILTIN_TEMPLATES["deepseek2"]
    with pytest.raises(ValueError, match=r"must be jinja2 or one of deepseek2, .*, got 'kimi'"):
        chat.template_for(tokenizer, "kimi")
