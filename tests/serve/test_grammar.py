"""Grammars: masks against the set of texts, random texts that must parse, and grammars that mean harm."""

import itertools
import json
import random
import re
import threading
import time

import numpy as np
import pytest

import checkpoints_tools
from checkpoints_tools import hparams
from mla_jax.generate import PACKAGED_MODEL
from mla_jax.serve import grammar, request
from mla_jax.tokenizer import BYTE_CHARACTERS, CONTROL, NORMAL, UNUSED, USER_DEFINED, Tokenizer, Vocabulary

WORDS = ("ab", "abc", "bc", "bca", "cab", '{"', '":', "true", "ĠĠ", '"}')
TINY = Vocabulary(
    tokens=("<bos>", "<eos>", "<eot>", *BYTE_CHARACTERS, *WORDS, "<think>", "<unused>", "<call>"),
    token_types=(*(CONTROL,) * 3, *(NORMAL,) * (256 + len(WORDS)), USER_DEFINED, UNUSED, CONTROL),
    merges=(),
    pre="default",
    bos_id=0,
    eos_id=1,
    eot_id=2,
)
JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "age", "next"],
    "additionalProperties": False,
    "$defs": {
        "point": {"type": "array", "prefixItems": [{"type": "number"}] * 2, "items": False, "minItems": 2}
    },
}


@pytest.fixture(scope="module")
def tiny():
    return Tokenizer(TINY)


@pytest.fixture(scope="module")
def packaged():
    checkpoint = checkpoints_tools.load_gguf(PACKAGED_MODEL, progress=lambda *_: None)
    return Tokenizer(hparams.vocabulary(checkpoint.metadata, checkpoint.config, checkpoint.path))


def allowed(matcher):
    """Ids in the mask, which must be of whole words."""
    mask = matcher.mask()
    assert mask.dtype == np.uint32 and not mask.flags.writeable
    return np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0].tolist()


def follows(compiled, tokenizer, text):
    """Whether `text`, byte by byte, may come and may end there."""
    matcher, first_byte = compiled.start(), tokenizer.vocabulary.tokens.index(BYTE_CHARACTERS[0])
    for byte in text.encode():
        if first_byte + byte not in allowed(matcher):
            return False
        matcher.accept(first_byte + byte)
    return tokenizer.vocabulary.eos_id in allowed(matcher)


def draw(compiled, tokenizer, seed, limit=3000):
    """Draws a text by random tokens, every other time one of those that bring it to its end."""
    matcher, rng, ids = compiled.start(), random.Random(seed), []
    while len(ids) < limit:
        choices = allowed(matcher)
        closing = [
            i for i in choices if i in tokenizer.eog_ids or tokenizer.token_bytes(i) in (b'"', b"}", b"]")
        ]
        token = rng.choice(closing if closing and rng.random() < 0.5 else choices)
        matcher.accept(token)
        if token in tokenizer.eog_ids:
            return tokenizer.decode(ids)
        ids.append(token)
    raise AssertionError(f"no end after {limit} tokens: {tokenizer.decode(ids)[:200]}")


@pytest.mark.parametrize(
    ("kind", "text", "texts"),
    [
        ("regex", "abc", {"abc"}),
        ("regex", "(ab|abc|b)c?", {"ab", "abc", "abcc", "b", "bc"}),
        ("regex", "^a{1,3}$", {"a", "aa", "aaa"}),
        ("regex", "é|è", {"é", "è"}),
        ("regex", "(<think>)?<bos>a", {"<bos>a", "<think><bos>a"}),
        ("grammar", 'root ::= "abc"', {"abc"}),
        ("grammar", 'root ::= ("a" | "ab") "bc"', {"abc", "abbc"}),
        (
            "grammar",
            'root ::= word "c"\nword ::= [a-b]{1,2} | "bca"',
            {"ac", "bc", "aac", "abc", "bac", "bbc", "bcac"},
        ),
        ("grammar", 'root ::= | "a" [\\u00e8-\\u00e9]? "b"', {"", "ab", "aèb", "aéb"}),
        ("grammar", '%llguidance {}\nstart: "ab" | "abca"', {"ab", "abca"}),
        ("grammar", '%llguidance {"no_forcing": false}\nstart: "abc"', {"abc"}),
        ("json_schema", '{"enum": ["ab", true, "abc", null]}', {'"ab"', "true", '"abc"', "null"}),
        ("json_schema", '{"const": "é<think>"}', {'"é<think>"'}),
    ],
)
def test_mask_is_that_of_the_texts(tiny, kind, text, texts):
    """From every beginning that can be reached: a token is allowed if with it some text begins."""
    compiled = grammar.compile(kind, text, tiny)
    texts = {one.encode() for one in texts}
    tokens = [tiny.token_bytes(i) for i in range(len(TINY.tokens))]
    waiting, met = [(b"", ())], set()
    while waiting:
        prefix, ids = waiting.pop()
        matcher = compiled.start()
        for token in ids:
            matcher.accept(token)
        mask = set(allowed(matcher))
        want = {
            i
            for i, token in enumerate(tokens)
            if TINY.token_types[i] in (NORMAL, USER_DEFINED)
            and any(one.startswith(prefix + token) for one in texts)
        }
        assert mask == want | ({1, 2} if prefix in texts else set()), prefix
        for token in want:
            if prefix + tokens[token] not in met:
                met.add(prefix + tokens[token])
                waiting.append((prefix + tokens[token], (*ids, token)))
    assert texts <= met | {b""}


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ('root ::= [a-z]+ "bc"', "[a-z]+bc"),
        ('root ::= word "bc"\nword ::= [a-z]+', "[a-z]+bc"),
        ('root ::= root "a" | "b"', "ba*"),
        ('root ::= "a" root | [^ab]', "a*[^ab]"),
        ('root ::= ("a" | "ab" | "abc")* "c"', "(a|ab|abc)*c"),
        ('root ::= a b a\na ::= "a"?\nb ::= ("b" | )+ .', "a?b*.a?"),
        ('root ::= ("a"{2}){0,2} "b"{1,}', "(aa){0,2}b+"),
        ("root ::= [-a] [c-]", "[-a][c-]"),
    ],
)
def test_gbnf_means_what_the_expression_does(tiny, text, expression):
    compiled = grammar.compile("grammar", text, tiny)
    for length in range(6):
        for chars in itertools.product("abc", repeat=length):
            one = "".join(chars)
            assert follows(compiled, tiny, one) == bool(re.fullmatch(expression, one)), one


def test_json_has_little_white_space(tiny):
    compiled = grammar.compile("json_object", "", tiny)
    good = ('{"a":1}', '{ "a" : [ ] }', '{\n\t\t"a":1\n}', '{"a":\n' + " " * 20 + "{}}")
    bad = (' {"a":1}', '{"a":1} ', '{  "a":1}', '{\n\n"a":1}', '{"a":\n' + " " * 21 + "{}}", '{"a":1,}', "[]")
    assert [follows(compiled, tiny, text) for text in good] == [True] * len(good)
    assert [follows(compiled, tiny, text) for text in bad] == [False] * len(bad)


@pytest.mark.parametrize("seed", range(8))
def test_random_objects_parse(packaged, seed):
    assert isinstance(json.loads(draw(grammar.compile("json_object", "", packaged), packaged, seed)), dict)
    assert isinstance(json.loads(draw(grammar.compile("grammar", JSON, packaged), packaged, seed)), dict)


@pytest.mark.parametrize("seed", range(8))
def test_random_objects_are_of_the_schema(packaged, seed):
    person = json.loads(draw(grammar.compile("json_schema", json.dumps(PERSON), packaged), packaged, seed))
    assert list(person) == [name for name in PERSON["properties"] if name in person]
    assert {"name", "age", "next"} <= set(person)
    assert 1 <= len(person["name"]) <= 8
    assert type(person["age"]) is int and 0 <= person["age"] <= 120
    assert len(person.get("tags", [])) <= 3 and set(person.get("tags", [])) <= {"a", "b"}
    assert person["next"] is None or [isinstance(x, int | float) for x in person["next"]] == [True, True]


@pytest.mark.parametrize("expression", [r"(GET|PUT) /[a-z]{1,9}(\?[a-z]=\d)?", r"[^x]{3}x", "(a+)+$"])
def test_random_texts_match_the_expression(packaged, expression):
    for seed in range(5):
        text = draw(grammar.compile("regex", expression, packaged), packaged, seed)
        assert re.fullmatch(expression, text)


@pytest.mark.parametrize("text", ["<[0]>", '<[5-300]> "a"', "<[*]>", "<bos>"])
def test_control_tokens_are_not_to_be_had_by_their_ids(tiny, text):
    hidden = [i for i, kind in enumerate(TINY.token_types) if kind in (CONTROL, UNUSED) and i not in (1, 2)]
    try:
        compiled = grammar.compile("grammar", f"%llguidance {{}}\nstart: {text}", tiny)
        assert not set(allowed(compiled.start())) & set(hidden)
    except (ValueError, RuntimeError) as error:
        assert re.match("grammar must ", str(error))


@pytest.mark.parametrize("token", [3, 0, 1, -1, 4096, 2**40])
def test_a_token_that_is_not_allowed_is_refused_and_changes_nothing(tiny, token):
    matcher = grammar.compile("regex", "ab", tiny).start()
    before = allowed(matcher)
    with pytest.raises(ValueError, match=f"must be one that the grammar allows, got {token}"):
        matcher.accept(token)
    assert allowed(matcher) == before
    matcher.accept(np.int32(before[-1]))


def test_matchers_of_one_grammar_are_apart_also_in_threads(packaged):
    compiled = grammar.compile("json_schema", json.dumps(PERSON), packaged)
    alone = [draw(compiled, packaged, seed) for seed in range(4)]
    together = [None] * 4

    def run(seed):
        together[seed] = draw(compiled, packaged, seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def _chain(rule, last, count):
    return "\n".join([*(rule.format(i, i + 1) for i in range(count)), last.format(count)])


def _definitions(count, definition, last):
    return json.dumps({"$ref": "#/$defs/d0", "$defs": {f"d{i}": definition(i) for i in range(count)} | last})


HOSTILE = {
    "nested repeats": ("regex", "(a+)+$"),
    "double star": ("regex", "foo**"),
    "repeats of repeats": ("regex", "((a{1000}){1000}){1000}"),
    "deep": ("regex", "(" * 20_000 + "a" + ")" * 20_000),
    "many options": ("regex", "a?" * 16_000 + "a" * 5000),
    "exponential automaton": ("regex", "(a|b)*a(a|b){2000}"),
    "look-ahead": ("regex", "(?=a)b"),
    "no regex": ("regex", "("),
    "surrogate": ("regex", "\ud800"),
    "ambiguous": ("grammar", 'root ::= root root | root root root | "a" | ""'),
    "circle": ("grammar", "root ::= a\na ::= b\nb ::= a"),
    "chain": ("grammar", "root ::= r0\n" + _chain("r{} ::= r{}?", 'r{} ::= "a"', 3000)),
    "lark chain": ("grammar", "%llguidance {}\nstart: r0\n" + _chain("r{}: r{}", 'r{}: "a"', 3000)),
    "lark doubling": ("grammar", "%llguidance {}\nstart: R0\n" + _chain("R{0}: R{1} R{1}", 'R{}: "a"', 40)),
    "lark deep": ("grammar", "%llguidance {}\nstart: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    "repeats": ("grammar", 'root ::= ((("a"{2000}){2000}){2000}){2000}'),
    "options": ("grammar", "root ::= " + "[a-z]? " * 9000 + '"end"'),
    "1 MB": ("json_schema", json.dumps({"enum": ["x" * 100] * 10_000})),
    "no JSON": ("json_schema", "{"),
    "not a number": ("json_schema", '{"minimum": NaN}'),
    "infinity": ("json_schema", '{"minimum": 1e400}'),
    "no object": ("json_schema", "true"),
    "deep JSON": ("json_schema", '{"items":' * 6000 + "{}" + "}" * 6000),
    "loop": ("json_schema", '{"$ref": "#"}'),
    "loop of two": ("json_schema", json.dumps({"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}]})),
    "a file": ("json_schema", '{"$ref": "file:///etc/passwd"}'),
    "a host": ("json_schema", '{"$ref": "http://127.0.0.1:1/schema.json"}'),
    "chain of references": (
        "json_schema",
        _definitions(1500, lambda i: {"$ref": f"#/$defs/d{i + 1}"}, {"d1500": {"type": "null"}}),
    ),
    "doubling": (
        "json_schema",
        _definitions(40, lambda i: {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2}, {"d40": {"type": "null"}}),
    ),
    "2^24 cases": (
        "json_schema",
        json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"k{i}": {"const": j}}} for j in (0, 1)]} for i in range(24)
                ]
            }
        ),
    ),
    "many properties": (
        "json_schema",
        json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(2000)}}),
    ),
    "long arrays": ("json_schema", '{"type": "array", "minItems": 1000000000}'),
    "multiples": (
        "json_schema",
        json.dumps({"allOf": [{"type": "integer", "multipleOf": x} for x in (1_000_003, 999_983, 7919)]}),
    ),
    "settings": ("json_schema", '{"type": "object", "x-guidance": {"whitespace_pattern": "(("}}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_grammar_that_means_harm_works_or_is_refused_in_time(packaged, name):
    good = grammar.compile("json_object", "", packaged)  # the process that tries grammars is there
    start = time.monotonic()
    try:
        matcher = grammar.compile(*HOSTILE[name], packaged).start()
        rng = random.Random(0)
        for _ in range(20):
            choices = [i for i in allowed(matcher) if i not in packaged.eog_ids]
            if not choices:
                break
            matcher.accept(rng.choice(choices))
    except (ValueError, RuntimeError) as error:
        assert re.fullmatch(r"(regex|grammar|json_schema) must [^\n]{1,400}\.", str(error))
    assert time.monotonic() - start < 2.5  # a trial has 1 s
    assert allowed(good.start())


@pytest.mark.parametrize(
    ("kind", "text", "sentence"),
    [
        ("xml", "", "kind of a grammar must be one of json_object, .*, got 'xml'"),
        ("regex", "a" * 65_537, "regex must have at most 65536 bytes, got 65537"),
        ("regex", "é" * 32_769, "regex must have at most 65536 bytes, got 65538"),
        ("json_schema", "[]", r"json_schema must be an object, got '\[\]'"),
        ("json_schema", "{", "json_schema must be JSON: "),
        ("json_schema", '{"not": {}}', r"json_schema must be one that can be followed: Unimplemented keys"),
        ("json_schema", '{"$ref": "#"}', "json_schema must be one that can be followed: no text matches it"),
        ("regex", r"(a)\1", "regex must be one that can be followed: backreferences are not supported"),
        ("grammar", "root ::= a", "grammar must define each rule that it uses, got no rule 'a'"),
        ("grammar", "%llguidance {}\nstart: <[0]>", "grammar must leave a token of the vocabulary to go on"),
    ],
)
def test_refused_with_a_sentence(tiny, kind, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        grammar.compile(kind, text, tiny)


def test_a_grammar_that_leads_nowhere_later_on_fails_there(tiny):
    matcher = grammar.compile("grammar", '%llguidance {}\nstart: "a" <[0]> "b"', tiny).start()
    with pytest.raises(request.GrammarFailed, match="grammar must leave a token of the vocabulary"):
        matcher.accept(TINY.tokens.index("a"))
        matcher.mask()


def test_a_vocabulary_must_have_an_end():
    vocabulary = Vocabulary(tokens=tuple(BYTE_CHARACTERS), token_types=(1,) * 256, merges=(), pre="default")
    grammar.prepare(Tokenizer(vocabulary))
    with pytest.raises(ValueError, match="must have an end-of-generation token"):
        grammar.compile("json_object", "", Tokenizer(vocabulary))


def test_compiled_grammars_are_kept_and_the_oldest_dropped(tiny, monkeypatch):
    monkeypatch.setattr(grammar, "_KEPT", 2)
    compiler = grammar.Compiler(tiny)
    first, second = compiler.compile("regex", "a"), compiler.compile("regex", "b")
    assert compiler.compile("regex", "a") is first
    compiler.compile("regex", "c")
    assert compiler.compile("regex", "a") is first
    assert compiler.compile("regex", "b") is not second


def test_a_kept_grammar_waits_for_nobody(tiny):
    assert grammar.kept("regex", "kept", Tokenizer(TINY)) is None
    compiler, compiled = grammar.Compiler(tiny), grammar.compile("regex", "kept", tiny)
    found = compiler.compile("regex", "kept")
    with compiler._lock:
        assert compiler.compile("regex", "kept") is found is compiler.kept("regex", "kept")
    assert grammar.kept("regex", "kept", tiny) is compiled and grammar.kept("regex", "other", tiny) is None


def test_what_is_prepared_is_not_built_again(monkeypatch):
    tokenizer = Tokenizer(TINY)
    grammar.prepare(tokenizer)
    monkeypatch.setattr(grammar, "Compiler", None)
    assert grammar.compile("json_object", "", tokenizer) is grammar.kept("json_object", "", tokenizer)


def test_too_many_at_once_are_told_to_come_back(tiny, monkeypatch):
    monkeypatch.setattr(grammar, "_QUEUE_SECONDS", 0.01)
    compiler = grammar.Compiler(tiny)
    with compiler._lock, pytest.raises(request.QueueFull):
        compiler.compile("regex", "a")
    compiler.compile("regex", "a")


def test_a_text_that_takes_too_long_fails_alone(tiny, monkeypatch):
    slow = grammar.compile("grammar", HOSTILE["ambiguous"][1], tiny).start()
    fast = grammar.compile("regex", "a*", tiny).start()
    monkeypatch.setattr(grammar, "_SECONDS_PER_TOKEN", 0.001)
    token = TINY.tokens.index("a")
    with pytest.raises(RuntimeError, match=r"must take at most 0\.001 s a token to follow"):
        for _ in range(1000):
            slow.accept(token)
    for _ in range(100):
        fast.accept(token)
