"""What the reference adds to docstrings: tables stay tables, and comments beside fields are read as well."""

import io
import re
import tokenize

import griffe

_COLUMNS = re.compile(r"\S {2,}\S")


class HouseDocstrings(griffe.Extension):
    """Reads the docstrings of this project as they were meant."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Indents tables, so that Markdown keeps their columns."""
        if obj.docstring is not None:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(map(_as_table, paragraphs))

    def on_class_members(self, *, cls: griffe.Class, **_) -> None:
        """Tells fields by the comments beside them, where the docstring does not."""
        if cls.docstring is None or "\nAttributes:\n" in cls.docstring.value:
            return
        texts = {name: _comment(field) for name, field in cls.attributes.items() if name[0] != "_"}
        lines = [f"  {name}: {text}" for name, text in texts.items() if text]
        if lines:
            cls.docstring.value += "\n".join(["\n\nAttributes:", *lines])

    def on_module(self, *, mod: griffe.Module, **_) -> None:
        """Shows what a package exports under the name of one of its modules, as `quant.matmul`."""
        for name in mod.exports or ():
            module = mod.members[name]
            if not module.is_alias and module.is_module:
                mod.set_member(name, module.members[name])

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_) -> None:
        """Takes the comment beside a constant for its docstring."""
        text = _comment(attr) if attr.parent.is_module and attr.docstring is None else ""
        if text:
            attr.docstring = griffe.Docstring(text, parent=attr)


def _as_table(paragraph):
    first, *_ = paragraph.split("\n")
    is_table = _COLUMNS.search(first) and not first.startswith(" ")
    return re.sub("^", "    ", paragraph, flags=re.MULTILINE) if is_table else paragraph


def _comment(attr):
    """Returns the comment in the statement of a field or constant, as a sentence."""
    if attr.lineno is None or "property" in attr.labels:
        return ""
    statement = "\n".join(attr.lines).strip() + "\n"
    tokens = tokenize.generate_tokens(io.StringIO(statement).readline)
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    return f"{comments[-1]}." if comments else ""
