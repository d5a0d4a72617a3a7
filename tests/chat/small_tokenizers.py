"""A tokenizer of bytes, a few merges and the special tokens that a test names."""

from mla_jax.tokenizer import BYTE_CHARACTERS, CONTROL, NORMAL, USER_DEFINED, Tokenizer, Vocabulary

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def small_tokenizer(control=(), user_defined=(), **fields):
    """Ids: BOS, EOS, 256 bytes, "he" and "ll", then the control tokens and the user-defined ones."""
    special = (*control, *user_defined)
    kinds = [CONTROL] * len(control) + [USER_DEFINED] * len(user_defined)
    vocabulary = Vocabulary(
        tokens=(BOS, EOS, *BYTE_CHARACTERS, "he", "ll", *special),
        token_types=(CONTROL, CONTROL, *(NORMAL,) * 258, *kinds),
        merges=(("h", "e"), ("l", "l")),
        pre="deepseek-v3",
        **dict(bos_id=0, eos_id=1, add_bos=True) | fields,
    )
    return Tokenizer(vocabulary)
