"""How text is cut into pieces before byte-pair merging: one list of regular expressions per name.

The pieces are those of ik_llama.cpp for the same name. Where it departs from the tokenizer that a model was
published with, so do these:
  deepseek-v3                   "~" is not among the symbols (the published class `\\p{S}` holds it)
  deepseek-llm, deepseek-coder  white space is in no class but `\\s` (the published CJK class spans some)
  kimi-k2                       words do not end where lower case turns to upper, but at a combining
                                mark; contractions are of lower case alone
  default                       not the pattern of GPT-2, which is "gpt-2", but four of llama.cpp's own
"""

import tokenizers
from tokenizers import pre_tokenizers

# The cased letters as deepseek-llm's published tokenizer lists them: ranges of code points, in hexadecimal.
_CASED_LETTERS = """
41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C 38E-3A1
3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77
1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE
1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124
2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3
A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A
10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""

# Chinese characters as ik_llama.cpp's Kimi-K2 splitter knows them.
_HAN = """
4E00-9FFF 3400-4DBF 20000-2A6DF 2A700-2B73F 2B740-2B81F 2B820-2CEAF 2CEB0-2EBEF
F900-FAFF 2F800-2FA1F
"""


def _ranges(text):
    """Writes "41-5A B5" as the inside of a character class, `\\x{41}-\\x{5A}\\x{B5}`."""
    return "".join("-".join(rf"\x{{{end}}}" for end in word.split("-")) for word in text.split())


_CJK = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}&&[^\s]]+"
_HAN_CLASS = _ranges(_HAN)
_CONTRACTION = r"'(?:[sS]|[tT]|[mM]|[dD]|[rR][eE]|[vV][eE]|[lL][lL])"
_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_DEEPSEEK_V3_WORDS = (
    r"[!-/:-~&&[^A-Za-z]][A-Za-z]+|(?:~|[^\r\n\p{L}\p{P}\p{S}])?[\p{L}\p{M}]+| ?[\p{P}\p{S}&&[^~]]+[\r\n]*"
    rf"|\s*[\r\n]+|{_SPACES}"
)
_GLM4 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
    rf"|{_SPACES}"
)
_KIMI_K2 = (
    rf"[{_HAN_CLASS}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN_CLASS}]]+(?:'(?:[stmd]|re|ve|ll))?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
)

_PATTERNS = {
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_ranges(_CASED_LETTERS)}]+",
        r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3001}\x{3002}]+",
        r"(?<!\s)\s++\z",  # the look-behind keeps a long run of spaces from being tried at each of its places
        _CJK,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
        _DEEPSEEK_V3_WORDS,
    ),
    "kimi-k2": (_KIMI_K2,),
    "glm4": (_GLM4,),
    "chatglm-bpe": (_GLM4,),
    "gpt-2": (_GPT2,),
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}"),
}

NAMES = tuple(_PATTERNS)


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """Builds the pre-tokenizer that a GGUF file names in `tokenizer.ggml.pre`.

    Each expression cuts every piece left by the one before into its matches and the gaps between them; then
    the bytes of each piece are written in GPT-2's printable alphabet.

    Raises:
      ValueError: `name` is not in `NAMES`.
    """
    if name not in _PATTERNS:
        raise ValueError(f"pre-tokenizer must be one of {', '.join(NAMES)}, got {name!r}.")
    splits = [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated") for regex in _PATTERNS[name]]
    return pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
