"""Compiles grammars with llguidance; as a script, tries them where a crash or an endless one harms nobody.

llguidance bounds most of what a grammar may cost, but long chains of rules overflow its stack, which ends
the process, and some small schemas take minutes. So `grammar` has each text tried by this script first. It
reads lines of JSON, the vocabulary and then a grammar each, and answers each with a line: empty, or what is
wrong. It imports nothing of this package, so it starts without JAX.
"""

import json
import resource
import sys
import threading
from collections.abc import Sequence

import llguidance

STACK_BYTES = 1 << 20  # of a trial; every thread has more, so what passes here does not overflow there
_ADDRESS_SPACE = 4 << 30
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=20_000,  # about 2 KB each
    max_grammar_size=200_000,
    verbose_errors=False,
)


class _Vocabulary:
    """What `llguidance.LLTokenizer` reads of a tokenizer. It is never asked to encode: nothing is forced."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens, special, ends):
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, ends[0]

    def __call__(self, text):
        raise NotImplementedError("grammars must not force tokens.")


def build_tokenizer(
    tokens: Sequence[bytes], special: Sequence[int], ends: Sequence[int]
) -> llguidance.LLTokenizer:
    """Returns llguidance's form of a vocabulary.

    Args:
      tokens: bytes of each token, in the order of the ids.
      special: ids of tokens that are no text.
      ends: ids of tokens that end a text, at least one; they are special too.
    """
    vocabulary = _Vocabulary(list(tokens), list(special), list(ends))
    return llguidance.LLTokenizer(vocabulary, n_vocab=len(tokens), eos_token=list(ends))


def open_matcher(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """Compiles a grammar of llguidance and returns a matcher at the beginning of a text.

    Raises:
      ValueError: it is no grammar, or costs too much; with llguidance's own words.
    """
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def _try(tokenizer, grammar):
    """Returns what keeps a grammar from being used, up to the choice of the first token."""
    try:
        matcher = open_matcher(tokenizer, grammar)
    except ValueError as error:
        return str(error)
    matcher.compute_bitmask()
    return matcher.get_error()


def _serve():
    first = json.loads(sys.stdin.readline())
    tokens = [token.encode("latin-1") for token in first["tokens"]]
    tokenizer = build_tokenizer(tokens, first["special"], first["ends"])
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    for kind, amount in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 32)):
        resource.setrlimit(kind, (amount, amount))
    print(json.dumps(""), flush=True)
    for line in sys.stdin:
        print(json.dumps(_try(tokenizer, json.loads(line))[:1000]), flush=True)


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()
