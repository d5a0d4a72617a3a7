"""Reads grammars as llama.cpp's users write them (GBNF) and writes them in llguidance's Lark syntax.

A GBNF grammar is over characters: any of its alternatives may go on at any character. llguidance first cuts
the text into the longest lexemes it can, and what a lexeme has taken is not given back: `("a" | "ab") "bc"`
would not match "abc". Here each character is a lexeme of its own, so both mean the same texts.

Unlike in llama.cpp a rule may begin with itself, may go on in the next line with `|`, and must not be defined
twice; tokens by name or id (`<think>`, `<[1000]>`) are not to be had.
"""

import re
from collections.abc import Iterator

_MAX_DEPTH = 24  # of parentheses; llguidance takes a few more
_MAX_TIMES = 2000  # in {m,n}, llama.cpp's own limit
_LEXEME = re.compile(
    r"""(?P<space> [ \t\r\n]+ | \#[^\r\n]*)
      | (?P<rule> [A-Za-z0-9_-]+) [ \t\r\n]* ::=
      | (?P<name> [A-Za-z0-9_-]+)
      | "(?P<literal> (?: [^"\\] | \\. )*) "
      | \[(?P<chars> (?: [^\]\\] | \\. )*) \]
      | \{ [ \t]* (?P<least> [0-9]{1,9}) [ \t]* (?P<comma> ,)? [ \t]* (?P<most> [0-9]{1,9})? [ \t]* \}
      | (?P<sign> [*+?|().])""",
    re.VERBOSE | re.DOTALL,
)
_CHAR = re.compile(
    r"""\\x(?P<x>[0-9A-Fa-f]{2}) | \\u(?P<u>[0-9A-Fa-f]{4}) | \\U(?P<U>[0-9A-Fa-f]{8})
      | \\(?P<escape>[nrt"\\\[\]]) | (?P<plain>[^\\])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


def to_lark(text: str) -> str:
    """Returns a Lark grammar of llguidance for the same texts as the GBNF grammar `text`, its `root` `start`.

    Raises:
      ValueError: `text` is no GBNF grammar; the sentence names the line.
    """
    names: dict[str, str] = {}  # of rules, in the order in which they are met
    defined: dict[str, list[str]] = {}
    depth, body = 0, None
    for match in _lexemes(text):
        if match["rule"]:
            if depth:
                raise _error(text, match.start(), "a closed parenthesis before the next rule")
            if match["rule"] in defined:
                raise _error(text, match.start(), f"one definition of rule {match['rule']!r:.60}")
            body = defined[match["rule"]] = []
            names.setdefault(match["rule"], f"r{len(names)}")
        elif body is None:
            raise _error(text, match.start(), "a rule, as in `root ::= ...`")
        else:
            depth += {"(": 1, ")": -1}.get(match["sign"], 0)
            if not 0 <= depth <= _MAX_DEPTH:
                raise _error(text, match.start(), f"matching parentheses, at most {_MAX_DEPTH} deep")
            body.append(_element(text, match, names, body[-1] if body else "|"))
    if depth:
        raise _error(text, len(text), "a closing parenthesis")
    for name in names:
        if name not in defined:
            raise ValueError(f"grammar must define each rule that it uses, got no rule {name!r:.60}.")
    if "root" not in defined:
        raise ValueError("grammar must define the rule 'root', got none of that name.")
    rules = [f"start: {names['root']}"]
    rules += [f"{names[name]}: {_filled(body)}" for name, body in defined.items()]
    return "\n".join(["%llguidance {}", *rules])


def _lexemes(text) -> Iterator[re.Match]:
    position = 0
    while position < len(text):
        match = _LEXEME.match(text, position)
        if match is None:
            raise _error(text, position, "a rule name, a literal, a character class or an operator")
        position = match.end()
        if match.lastgroup != "space":
            yield match


def _element(text, match, names, before):
    """Returns what stands in Lark for one lexeme of a rule's body that comes after `before`."""
    if match["name"]:
        return names.setdefault(match["name"], f"r{len(names)}")
    if match["literal"] is not None:
        points = _code_points(text, match.start("literal"), match["literal"])
        return "(" + " ".join(f"/[{_in_class(point)}]/" for point, _ in points) + ")" if points else '""'
    if match["chars"] is not None:
        return _char_class(text, match)
    if match["sign"] == ".":
        return "/[" + _in_class(0) + "-" + _in_class(0x10FFFF) + "]/"
    if match["sign"] in ("(", ")", "|"):
        return match["sign"]
    if before in ("(", "|") or before[0] in "*+?{":
        raise _error(text, match.start(), "something to repeat before the operator")
    if match["sign"]:
        return match["sign"]
    least = int(match["least"])
    most = int(match["most"]) if match["most"] else None if match["comma"] else least
    if max(least, most or 0) > _MAX_TIMES or (most is not None and most < least):
        raise _error(text, match.start(), f"repetitions {{m,n}} with m <= n <= {_MAX_TIMES}")
    return f"{{{least},{'' if most is None else most}}}"


def _char_class(text, match):
    chars, start = match["chars"], match.start("chars")
    is_negated = chars.startswith("^")
    points = _code_points(text, start + is_negated, chars[is_negated:])
    ranges, index = [], 0
    while index < len(points):
        low = high = points[index][0]
        if index + 2 < len(points) and points[index + 1] == (ord("-"), False):
            high = points[index + 2][0]
            index += 2
        if high < low:
            raise _error(text, start, "ranges of characters that ascend")
        ranges.append(f"{_in_class(low)}-{_in_class(high)}")
        index += 1
    if not ranges:
        raise _error(text, start, "a character between [ and ]")
    return f"/[{'^' * is_negated}{''.join(ranges)}]/"


def _code_points(text, start, chars):
    """Returns (code point, whether it is written with a backslash) of each character."""
    points, position = [], 0
    while position < len(chars):
        match = _CHAR.match(chars, position)
        if match is None:
            raise _error(text, start + position, r"one of the escapes \n \r \t \" \\ \[ \] \x \u \U")
        digits = match["x"] or match["u"] or match["U"]
        plain = match["plain"] or _ESCAPES.get(match["escape"], match["escape"])
        point = int(digits, 16) if digits else ord(plain)
        if point > 0x10FFFF or 0xD800 <= point < 0xE000:
            raise _error(text, start + position, "a Unicode character")
        points.append((point, match["plain"] is None))
        position = match.end()
    return points


def _in_class(point):
    return f"\\x{{{point:X}}}"


def _filled(body):
    """Joins the elements of a body; an alternative with nothing in it becomes an empty text."""
    filled = []
    for before, element in zip(["|", *body], [*body, "|"], strict=True):
        if before in ("(", "|") and element in (")", "|"):
            filled.append('""')
        if element[0] in "*+?{":
            filled[-1] += element
        else:
            filled.append(element)
    return " ".join(filled[:-1])


def _error(text, position, expected):
    line = text.count("\n", 0, position) + 1
    return ValueError(f"grammar must have {expected}, got {text[position : position + 20]!r} in line {line}.")
