"""Writes into the pages what the program itself knows, whenever they are built, so that it stays true.

A line `<!-- write NAME -->` of a page becomes what `_WRITERS[NAME]` returns. The README and the notebooks
become pages of their own. A site whose reference lacks a public name is no site.
"""

import contextlib
import io
import pathlib
import re
import zlib

import cached_row
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

import checkpoints_tools
import cpu_kernels
import mla_jax
from mla_jax import cache, chat, cli, quant, taps
from mla_jax.cli import flags, measure_flags, serve_flags
from pallas_kernels import weight_tiles

_ROOT = pathlib.Path(__file__).parent.parent
_PACKAGES = (mla_jax, cache, chat, quant, checkpoints_tools, cpu_kernels)
_NOTEBOOKS = sorted(_ROOT.glob("notebooks/*.ipynb"))
_PLOTS = sorted(_ROOT.glob("benchmarks/results/*.png"))
_WRITE = re.compile(r"^<!-- write (.+) -->$", re.MULTILINE)
_COMMAND = re.compile(r"^  (\S+) +(.+)$", re.MULTILINE)
_FLAG = re.compile(r"  (?:(-\w+),)? +(--\S+(?: \S+)?)  +(.*)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the notebooks into the table of contents."""
    section = next(entry for entry in config.nav if "Notebooks" in entry)
    section["Notebooks"] = [f"notebooks/{path.stem}.md" for path in _NOTEBOOKS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the README, the plots, and the notebooks with their pictures."""
    text = (_ROOT / "README.md").read_text().replace("](docs/", "](")
    text = re.sub(r"\]\((notebooks/\w+)\.ipynb\)", r"](\1.md)", text)
    for path in _PLOTS:
        name = str(path.relative_to(_ROOT))
        files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "readme.md", content=text))
    for path in _NOTEBOOKS:
        settings = {"output_files_dir": f"{path.stem}_files"}
        text, resources = MarkdownExporter().from_filename(str(path), settings)
        text += f"\n\n*This page is `notebooks/{path.name}`, to be run and changed.*\n"
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, data in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    """Writes what the lines `<!-- write NAME -->` of a page ask for, and finds plots in the site."""

    def written(match):
        if match[1] not in _WRITERS:
            raise PluginError(f"{page.file.src_uri} must ask for one of {list(_WRITERS)}, got {match[1]!r}.")
        return _WRITERS[match[1]]()

    return _WRITE.sub(written, markdown).replace("](../benchmarks/", "](benchmarks/")


def on_post_build(config: MkDocsConfig) -> None:
    """Looks whether the reference has every public name."""
    *_, packed = pathlib.Path(config.site_dir, "objects.inv").read_bytes().split(b"\n", 4)
    told = {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}
    wanted = {f"{package.__name__}.{name}" for package in _PACKAGES for name in package.__all__}
    if wanted - told:
        lacking = ", ".join(sorted(wanted - told))
        raise PluginError(f"the reference must have every public name, but lacks {lacking}: no docstring?")


def _commands():
    return "\n\n".join(_command(name, text) for name, text in _COMMAND.findall(_said("help")))


def _command(name, text):
    twin = text.removeprefix("the same as ")
    if twin != text:
        return f"## {name}\n\nThe same as [{twin}](#{twin})."
    usage, _, *lines = _said(name, "--help").strip("\n").split("\n")
    rows = [_FLAG.fullmatch(line) for line in lines]
    if None in rows:
        raise PluginError(f"{name} --help must have a flag in each line, got {lines[rows.index(None)]!r}.")
    usage = usage.removeprefix("usage: ").removesuffix(f": {text}")
    cells = [(" ".join(f"`{spelling}`" for spelling in row.group(1, 2) if spelling), row[3]) for row in rows]
    parts = [f"## {name}", f"{text[0].upper()}{text[1:]}.", f"```\n{usage}\n```", _table(("flag", ""), cells)]
    return "\n\n".join(parts)


def _said(*args):
    """Returns what `mla-jax ARGS` prints, with the home of its reader."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if cli.main(args) != 0:
            raise PluginError(f"mla-jax {' '.join(args)} must print its help, but fails.")
    return out.getvalue().replace(str(pathlib.Path.home()), "~")


def _spellings():
    others = flags.ALIASES | serve_flags.ALIASES
    rows = [(_flag(alias), _flag(name)) for alias, name in sorted(others.items()) if len(alias) > 3]
    return _table(("instead of", "one may write"), [(name, alias) for alias, name in rows])


def _refused(module):
    known = {} if module is flags else flags.REFUSED
    return _table(
        ("flag", "why"),
        [(_flag(name), why) for name, why in sorted(module.REFUSED.items()) if known.get(name) != why],
    )


def _formats():
    head = "type", "id", "weights in a block", "bytes", "and of a row", "bits a weight", "written", "on a GPU"
    mark = lambda is_so: "yes" if is_so else ""
    rows = [
        (
            f"`{entry.name}`",
            entry.ggml_type,
            entry.block_size,
            entry.block_bytes,
            entry.header_bytes or "",
            f"{8 * entry.block_bytes / entry.block_size:.4g}",
            mark(entry.name in quant.ENCODABLE),
            mark(entry.name in weight_tiles.LAYOUTS),
        )
        for entry in sorted(quant.FORMATS.values(), key=lambda entry: -entry.block_bytes / entry.block_size)
    ]
    return _table(head, rows)


def _taps():
    rows = [
        (
            f"`{name}`" if place.where == "model" else f"`{name}.N`",
            place.axes,
            place.meaning,
            "" if place.is_read_only else "yes",
            place.where,
        )
        for name, place in taps.PLACES.items()
    ]
    return _table(("name", "axes", "what it is", "editable", "where"), rows)


def _table(head, rows):
    line = lambda cells: f"| {' | '.join(_cell(str(cell)) for cell in cells)} |"
    return "\n".join([line(head), line("---" for _ in head), *map(line, rows)])


def _cell(text):
    return text if text.startswith("`") else re.sub(r"([|<*_])", r"\\\1", text)


def _flag(name):
    return f"`--{name.replace('_', '-')}`"


_WRITERS = {
    "commands": _commands,
    "spellings": _spellings,
    "flags that all refuse": lambda: _refused(flags),
    "flags that serve refuses": lambda: _refused(serve_flags),
    "flags that measures refuse": lambda: _refused(measure_flags),
    "formats": _formats,
    "cached row": cached_row.figure,
    "taps": _taps,
}
