"""Where reasoning ends: against all texts of a few tokens, some of which hold more than its end."""

import itertools

import numpy as np
import pytest

from mla_jax.serve import grammar
from mla_jax.serve.after_reasoning import AfterReasoning
from mla_jax.tokenizer import CONTROL, NORMAL, USER_DEFINED, Tokenizer, Vocabulary

END = "</think>"
WORDS = ("a", "b", "</", "think", ">", ">b", ">Ċ", "></", "</think>a", "a</think>Ġ", "<", "/think>")


def tokenizer_of(kind=None):
    """Of the words above, and of the end as one token of `kind` if there is one."""
    words = WORDS if kind is None else (*WORDS, END)
    kinds = (CONTROL, *(NORMAL,) * len(WORDS), *(() if kind is None else (kind,)))
    return tokenizer_with(words, kinds)


def tokenizer_with(words, kinds):
    fields = {"merges": (), "pre": "default", "eos_id": 0}
    return Tokenizer(Vocabulary(tokens=("<eos>", *words), token_types=kinds, **fields))


def allowed(matcher):
    mask = matcher.mask()
    assert mask.dtype == np.uint32 and not mask.flags.writeable
    return np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0].tolist()


@pytest.mark.parametrize("kind", [None, USER_DEFINED, CONTROL], ids=["no token", "user-defined", "control"])
def test_nothing_is_lost_where_reasoning_ends(kind):
    tokenizer = tokenizer_of(kind)
    compiled = AfterReasoning(grammar.compile("regex", "ab", tokenizer), tokenizer, END)
    end, num_closed = len(WORDS) + 1, 0
    for ids in itertools.product(range(1, len(tokenizer.vocabulary.tokens)), repeat=3):
        matcher, text = compiled.start(), b""
        for token in ids:
            more = text + tokenizer.token_bytes(token)
            if kind is None:
                _, found, after = more.partition(END.encode())
                is_refused, closes = bool(after.strip()), bool(found) and not after.strip()
            else:
                is_refused, closes = END.encode() in more and token != end, token == end
            assert (token in allowed(matcher)) != is_refused, (text, token)
            if is_refused:
                with pytest.raises(ValueError, match="token must be one that reasoning may hold"):
                    matcher.accept(token)
                break
            matcher.accept(token)
            text = more
            if closes:
                assert allowed(matcher) == [1]  # the answer begins at its beginning
                num_closed += 1
                break
        else:
            assert 0 not in allowed(matcher)
    assert num_closed > 100


def test_reasoning_ends_letter_by_letter_where_there_is_no_token():
    words = sorted(set(END + "abso"))
    tokenizer = tokenizer_with(words, (CONTROL, *(NORMAL,) * len(words)))
    matcher = AfterReasoning(grammar.compile("regex", "ab", tokenizer), tokenizer, END).start()
    for token in map(tokenizer.vocabulary.tokens.index, f"so{END}ab"):
        matcher.accept(token)
    assert allowed(matcher) == [0]
