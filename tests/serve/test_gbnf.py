"""GBNF in Lark: what is refused, and how. What the grammars mean is tested in test_grammar.py."""

import pytest

from mla_jax.serve import gbnf


def test_rules_and_operators_are_written_one_to_one():
    lark = gbnf.to_lark('root ::= "hi" other? | # a comment\n  [^a-c\\]]{2,} # another\nother ::= (. | )+')
    assert lark.splitlines() == [
        "%llguidance {}",
        "start: r0",
        r"r0: (/[\x{68}]/ /[\x{69}]/) r1? | /[^\x{61}-\x{63}\x{5D}-\x{5D}]/{2,}",
        r'r1: ( /[\x{0}-\x{10FFFF}]/ | "" )+',
    ]


def test_a_rule_goes_on_in_the_next_line_and_may_be_used_before_it_is_defined():
    one = gbnf.to_lark('root ::= b | "x" b\nb ::= "y"')
    assert one == gbnf.to_lark('\n\n  root ::=\n b\n | "x"\r\n b\n\nb\n::= "y"\n')


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "define the rule 'root', got none"),
        ('start ::= "a"', "define the rule 'root', got none"),
        ("root ::= a", "define each rule that it uses, got no rule 'a'"),
        ('root ::= "a"\nroot ::= "b"', "one definition of rule 'root', got .* in line 2"),
        ('"a"', "have a rule, as in `root ::= ...`, got '\"a\"' in line 1"),
        ('root ::= ::= "a"', "a rule name, a literal, a character class or an operator"),
        ('root ::= ("a"', "a closing parenthesis, got '' in line 1"),
        ('root ::= "a")', "matching parentheses"),
        ("root ::= " + "(" * 25 + '"a"' + ")" * 25, "matching parentheses, at most 24 deep"),
        ('root ::= ("a"\nb ::= "c")', "a closed parenthesis before the next rule, got .* in line 2"),
        ("root ::= *", "something to repeat before the operator"),
        ('root ::= "a"**', "something to repeat before the operator"),
        ('root ::= ("a" | +)', "something to repeat before the operator"),
        ('root ::= "a"{3,2}', r"repetitions \{m,n\} with m <= n <= 2000"),
        ('root ::= "a"{2001}', r"repetitions \{m,n\} with m <= n <= 2000"),
        ('root ::= "a"{x}', "a rule name, a literal, a character class or an operator"),
        ('root ::= "a', "a rule name, a literal, a character class or an operator"),
        ("root ::= [a", "a rule name, a literal, a character class or an operator"),
        ("root ::= []", r"a character between \[ and \]"),
        ("root ::= [z-a]", "ranges of characters that ascend"),
        (r'root ::= "\q"', "one of the escapes"),
        (r'root ::= "\x4"', "one of the escapes"),
        (r'root ::= "\uD800"', "a Unicode character"),
        (r'root ::= "\U00110000"', "a Unicode character"),
        ("root ::= <think>", "a rule name, a literal, a character class or an operator"),
    ],
)
def test_what_is_no_gbnf_is_refused_with_its_line(text, sentence):
    with pytest.raises(ValueError, match=f"^grammar must .*{sentence}"):
        gbnf.to_lark(text)
