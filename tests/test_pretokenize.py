"""Pre-tokenizers: pieces found by hand; tests/test_tokenizer.py holds them to ik_llama.cpp's."""

import unicodedata

import pytest

from mla_jax import pretokenize


@pytest.mark.parametrize(
    "name, text, pieces",
    [
        (
            "deepseek-llm",
            "Don't 中国 1234  x\n",
            ["Don", "'", "t", " ", "中国", " ", "1234", " ", " x", "\n"],
        ),
        ("deepseek-coder", "ab12 中\r\nc", ["ab", "1", "2", " ", "中", "\r", "\n", "c"]),
        (
            "deepseek-v3",
            "x 12345 中ー _ab;\n\n y",
            ["x", " ", "123", "45", " ", "中ー", " _", "ab", ";\n\n", " y"],
        ),
        ("deepseek-v3", "a  b ~ é!", ["a", " ", " b", " ", "~", " é", "!"]),
        (
            "kimi-k2",
            "oneTwo's 中文ab 1234\n \nx",
            ["oneTwo's", " ", "中文", "ab", " ", "123", "4", "\n \n", "x"],
        ),
        ("glm4", "I'M it's 1234!?\n z", ["I", "'M", " it", "'s", " ", "123", "4", "!?\n", " z"]),
        ("chatglm-bpe", "ab12", ["ab", "12"]),
        ("gpt-2", "I'm I'M 1234  x", ["I", "'m", " I", "'", "M", " 1234", " ", " x"]),
        ("default", "a+b 12345 c", ["a", "+", "b", " ", "123", "45", " c"]),
    ],
)
def test_pre_tokenizer_cuts_the_pieces_found_by_hand(name, text, pieces):
    cut = pretokenize.pre_tokenizer(name).pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == pieces


def test_deepseek_llm_letters_are_the_cased_ones_but_small_armenian():
    split = pretokenize.pre_tokenizer("deepseek-llm")
    for code in range(0x80, 0x800):  # above, the class of CJK cuts them out again
        char = chr(code)
        category = unicodedata.category(char)
        if unicodedata.ucd_3_2_0.category(char) != "Cn" and category[0] in "LM":  # known to every Unicode
            is_letter = category in ("Lu", "Ll", "Lt") and not 0x561 <= code < 0x588
            assert (len(split.pre_tokenize_str("é" + char)) == 1) == is_letter, hex(code)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"must be one of deepseek-llm, .*got 'qwen2'"):
        pretokenize.pre_tokenizer("qwen2")
