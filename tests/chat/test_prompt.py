"""Chat templates: built-in ones by hand and against ik_llama.cpp; others, hostile ones too, as they fail."""

import ctypes

import pytest

from mla_jax import chat

EOS = "<｜end▁of▁sentence｜>"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "日本 <b>&\n"},
]
PROMPTS = {
    "deepseek2": f"Be brief.\n\nUser: 1 + 1?\n\nAssistant: 2{EOS}User: 日本 <b>&\n\n\nAssistant:",
    "deepseek3": f"Be brief.\n\n<｜User｜>1 + 1?<｜Assistant｜>2{EOS}<｜User｜>日本 <b>&\n<｜Assistant｜>",
    "kimi-k2": "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
    "<|im_user|>user<|im_middle|>1 + 1?<|im_end|><|im_assistant|>assistant<|im_middle|>2<|im_end|>"
    "<|im_user|>user<|im_middle|>日本 <b>&\n<|im_end|>"
    "<|im_assistant|>assistant<|im_middle|>",
    "chatglm4": "[gMASK]<sop><|system|>\nBe brief.<|user|>\n1 + 1?<|assistant|>\n2"
    "<|user|>\n日本 <b>&\n<|assistant|>",
}

# The shape of DeepSeek-V3's: a namespace filled in one pass over the messages, read in another.
DEEPSEEK_V3 = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{% set ns = namespace(system='', first=true) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% set ns.system = ns.system + message['content'] %}{% endif %}
{%- endfor %}
{{- bos_token }}{{ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}
    {%- elif message['role'] == 'assistant' and message['content'] is not none %}
        {%- set content = message['content'].split('</think>')[-1] %}
        {{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""


@pytest.mark.parametrize("name", PROMPTS)
def test_builtin_templates_write_the_prompt_found_by_hand(name):
    template = chat.BUILTIN_TEMPLATES[name]
    assert chat.render(MESSAGES, template, eos_token=EOS) == PROMPTS[name]
    assert PROMPTS[name].startswith(
        chat.render(MESSAGES, template, eos_token=EOS, add_generation_prompt=False)
    )


@pytest.mark.peer
@pytest.mark.parametrize("name", ["deepseek2", "deepseek3", "chatglm4"])
def test_builtin_templates_equal_the_peer(name):
    """Not kimi-k2: ik_llama.cpp's built-in one has the markers of user and assistant swapped."""
    api = pytest.importorskip("ik_llama_cpp._ctypes_api", reason="needs the extra `peers`")

    class Message(ctypes.Structure):
        _fields_ = (("role", ctypes.c_char_p), ("content", ctypes.c_char_p))

    messages = [message | {"content": message["content"].strip()} for message in MESSAGES]
    entries = [Message(message["role"].encode(), message["content"].encode()) for message in messages]
    chat_entries = (Message * len(entries))(*entries)
    text = ctypes.create_string_buffer(1 << 12)
    count = api._lib.llama_chat_apply_template(
        ctypes.c_char_p(name.encode()), chat_entries, ctypes.c_size_t(len(entries)), True, text, len(text)
    )
    assert chat.render(messages, chat.BUILTIN_TEMPLATES[name], eos_token=EOS) == text.raw[:count].decode()


@pytest.mark.parametrize(
    "tokens, name",
    [
        ({"<｜User｜>", "<｜Assistant｜>", "a"}, "deepseek3"),
        ({"<|im_middle|>"}, "kimi-k2"),
        ({"[gMASK]", "<sop>"}, "chatglm4"),
        ({"<｜User｜>", "a"}, "deepseek2"),
        (set(), "deepseek2"),
    ],
)
def test_the_builtin_template_fits_the_tokens(tokens, name):
    assert chat.builtin_template(tokens) == chat.BUILTIN_TEMPLATES[name]


def test_a_template_of_the_v3_family():
    messages = [*MESSAGES[:2], {"role": "assistant", "content": "<think>hm</think>2"}, MESSAGES[3]]
    prompt = chat.render(messages, DEEPSEEK_V3, bos_token="<B>")
    assert prompt == f"<B>Be brief.<｜User｜>1 + 1?<｜Assistant｜>2{EOS}<｜User｜>日本 <b>&\n<｜Assistant｜>"


@pytest.mark.parametrize(
    "template, prompt",
    [
        ("{% for m in messages %}\n  {% if loop.first %}\n    {% continue %}\n  {% endif %}\n-{{ m.role }}\n"
         "{% endfor %}\n", "-user\n-assistant\n-user\n"),
        ("{{ things | tojson }}", '[{"name": "é<b>", "a": 1}]'),
        ("{{ things | tojson(indent=1) }}", '[\n {\n  "name": "é<b>",\n  "a": 1\n }\n]'),
        ("{{ strftime_now('%%') }}{{ missing }}{{ messages | length }}", "%4"),
        ("", ""),
    ],
)  # fmt: skip
def test_templates_find_what_hugging_face_gives_them(template, prompt):
    assert chat.render(MESSAGES, template, kwargs={"things": [{"name": "é<b>", "a": 1}]}) == prompt


@pytest.mark.parametrize(
    "template, sentence",
    [
        ("{{ ", "TemplateSyntaxError, line 1: unexpected 'end of template'"),
        ("{% frob %}", "TemplateSyntaxError, line 1"),
        ("{{ raise_exception('roles must alternate.') }}", "TemplateError: roles must alternate"),
        ("{{ messages[9].content }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "SecurityError"),
        ("{{ lipsum.__globals__['os'].popen('id').read() }}", "SecurityError"),
        ("{{ raise_exception.__globals__.jinja2 }}", "SecurityError"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError: no loader"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{{ 'A' * 10 ** 10 }}", "MemoryError"),
        ("{{ '%10000000000d' % 1 }}", "MemoryError"),
        ("{% set ns = namespace(x='a') %}" + "{% set ns.x = ns.x ~ ns.x %}" * 60, "MemoryError"),
        ("{% for i in range(99) %}{{ 'a' * 99999 }}{% endfor %}", "more than 1048576 characters"),
        ("{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2, "within 2 s and 512 MiB"),
        ("{{ 9 ** (9 ** 9) }}", "within 2 s and 512 MiB|MemoryError"),
        ("a" * (1 << 18) + "b", "at most 262144 characters, got 262145"),
    ],
)  # fmt: skip
def test_bad_templates_are_one_sentence(template, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        chat.render(MESSAGES, template)
    assert "chat template" in str(error.value) and "\n" not in str(error.value)


def test_what_a_template_is_given_must_be_json():
    with pytest.raises(ValueError, match="the chat template's input must be JSON values"):
        chat.render(MESSAGES, "{{ things }}", kwargs={"things": object()})
