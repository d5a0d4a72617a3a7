"""Chat templates of our own, for files that carry none, and which template a conversation is written by.

Templates are given messages as `messages.normalised` returns them. Those that do not mention `tools` have
tools declared in the system message, see `tool_text`.
"""

from collections.abc import Container

from mla_jax.tokenizer import Tokenizer

_MESSAGES = "{% for m in messages %}"

_DEEPSEEK_2 = (
    _MESSAGES + "{% if m.role == 'user' %}User: {{ m.content }}\n\n"
    "{% elif m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}"
    "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

# After the results of tools an assistant goes on without a marker of its turn.
_DEEPSEEK_3 = (
    _MESSAGES + "{% set after_tool = loop.previtem is defined and loop.previtem.role == 'tool' %}"
    "{% if after_tool and m.role != 'tool' %}<｜tool▁outputs▁end｜>{% endif %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}{% if not after_tool %}<｜Assistant｜>{% endif %}{{ m.content or '' }}"
    "{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for call in m.tool_calls %}"
    "{% if not loop.first %}{{ '\n' }}{% endif %}"
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ call.function.name }}{{ '\n```json\n' }}"
    "{{ call.function.arguments }}{{ '\n' }}```<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>{% endif %}"
    "{{ eos_token }}"
    "{% elif m.role == 'tool' %}{% if after_tool %}{{ '\n' }}{% else %}<｜tool▁outputs▁begin｜>{% endif %}"
    "<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
    "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if messages[-1].role == 'tool' %}<｜tool▁outputs▁end｜>"
    "{% elif add_generation_prompt %}<｜Assistant｜>{% if thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"
)

_DEEPSEEK_3_1 = (
    _MESSAGES + "{% set after_tool = loop.previtem is defined and loop.previtem.role == 'tool' %}"
    "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' %}{% if not after_tool %}<｜Assistant｜></think>{% endif %}"
    "{{ m.content or '' }}"
    "{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for call in m.tool_calls %}"
    "<｜tool▁call▁begin｜>{{ call.function.name }}<｜tool▁sep｜>{{ call.function.arguments }}"
    "<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>{% endif %}{{ eos_token }}"
    "{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
    "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<｜Assistant｜>"
    "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)

_KIMI_K2 = (
    "{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}"
    "<|im_end|>{% endif %}" + _MESSAGES + "{% set marker = 'system' if m.role == 'tool' else m.role %}"
    "<|im_{{ marker }}|>{{ m.name or m.role }}<|im_middle|>"
    "{% if m.role == 'tool' and m.tool_call_id %}## Return of {{ m.tool_call_id }}\n{% endif %}"
    "{{ m.content or '' }}"
    "{% if m.tool_calls %}<|tool_calls_section_begin|>{% for call in m.tool_calls %}"
    "<|tool_call_begin|>{{ call.id or ('functions.' ~ call.function.name ~ ':' ~ loop.index0) }}"
    "<|tool_call_argument_begin|>{{ call.function.arguments }}<|tool_call_end|>"
    "{% endfor %}<|tool_calls_section_end|>{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)

_CHATGLM_4 = (
    "[gMASK]<sop>{% if tools %}<|system|>\n# Tools\n\nThese functions may be called, described in JSON:\n"
    "<tools>\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>\n\n"
    "A call is written as below; values that are no strings are written as JSON.\n"
    "<tool_call>FUNCTION_NAME\n<arg_key>NAME</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>"
    "{% endif %}" + _MESSAGES + "{% if m.role == 'tool' %}"
    "{% if loop.first or loop.previtem.role != 'tool' %}<|observation|>{% endif %}"
    "{{ '\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}{{ '\n' }}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.content %}{{ '\n' ~ m.content }}{% elif not m.tool_calls %}{{ '\n' }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '\n' }}<tool_call>{{ call.function.name }}\n"
    "{% if call.function.arguments is mapping %}{% for key, value in call.function.arguments | items %}"
    "<arg_key>{{ key }}</arg_key>\n<arg_value>{{ value if value is string else value | tojson }}"
    "</arg_value>\n{% endfor %}{% else %}{{ call.function.arguments }}{% endif %}</tool_call>{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if thinking is defined and not thinking %}{{ '\n' }}<think></think>{% endif %}{% endif %}"
)

BUILTIN_TEMPLATES = {  # jinja, by name
    "deepseek2": _DEEPSEEK_2,
    "deepseek3": _DEEPSEEK_3,
    "deepseek3.1": _DEEPSEEK_3_1,
    "kimi-k2": _KIMI_K2,
    "chatglm4": _CHATGLM_4,
}


def builtin_template(tokens: Container[str]) -> str:
    """Returns the built-in template whose markers are among `tokens`, else DeepSeek-V2's, in plain words."""
    if "<｜User｜>" in tokens and "<｜Assistant｜>" in tokens:
        is_hybrid = "<｜search▁begin｜>" in tokens and "<think>" in tokens  # both came with V3.1
        return BUILTIN_TEMPLATES["deepseek3.1" if is_hybrid else "deepseek3"]
    if "<|im_middle|>" in tokens:
        return BUILTIN_TEMPLATES["kimi-k2"]
    if "[gMASK]" in tokens and "<sop>" in tokens:
        return BUILTIN_TEMPLATES["chatglm4"]
    return BUILTIN_TEMPLATES["deepseek2"]


def template_for(tokenizer: Tokenizer, given: str | None = None) -> str:
    """Returns the chat template of a model.

    Args:
      tokenizer: the model's.
      given: name of a built-in template, or jinja2; None for the file's own, else the built-in one that fits.

    Raises:
      ValueError: `given` is neither.
    """
    vocabulary = tokenizer.vocabulary
    if given is None:
        return vocabulary.chat_template or builtin_template(vocabulary.tokens)
    if given in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[given]
    if "{{" not in given and "{%" not in given:
        names = ", ".join(BUILTIN_TEMPLATES)
        raise ValueError(f"the chat template must be jinja2 or one of {names}, got {given!r:.60}.")
    return given
