"""The notebooks run from top to bottom, and what they keep is fit to be read."""

import itertools
import pathlib
import re
import time

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
MAX_SECONDS = 180
MAX_BYTES = 300_000
_PATH = re.compile(r"(?<![\w.~])/(?:home|root|tmp|Users|usr|opt|work|mnt)/|\b[A-Z]:\\\\")

each_notebook = pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)


def _outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def _has_plot(cell):
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def noise(notebook):
    """Lists what no reader should meet: errors, and whatever went to stderr."""
    errors = [output.ename for output in _outputs(notebook) if output.output_type == "error"]
    return errors + [output.text for output in _outputs(notebook) if output.get("name") == "stderr"]


def mistakes(notebook):
    """Lists where a notebook departs from the form that all have."""
    cells, found = notebook.cells, noise(notebook)
    code = [cell for cell in cells if cell.cell_type == "code"]
    opening = cells[0].source.partition("\n\n")[2].partition("\n\n")[0]
    if not cells[0].source.startswith("# ") or not 2 <= len(re.findall(r"[.:?](?:\s|$)", opening)) <= 5:
        found.append("it must open with a title and a few sentences on what it shows")
    if "XLA_PYTHON_CLIENT_PREALLOCATE" not in code[0].source or "mla_jax.load(" not in code[0].source:
        found.append("its first code must say how memory is taken, and load a model")
    if not cells[-1].source.startswith("## What to try\n"):
        found.append("it must end with what to try")
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("its outputs must be those of one run from top to bottom")
    if not any(map(_has_plot, cells)):
        found.append("it must have plots")
    found += [
        f"a plot must be followed by what is seen, got {after.source[:40]!r}"
        for cell, after in itertools.pairwise(cells)
        if _has_plot(cell) and (after.cell_type != "markdown" or after.source.startswith("#"))
    ]
    return found + _PATH.findall(nbformat.writes(notebook))


@pytest.mark.notebooks
@each_notebook
def test_notebook_runs(path):
    notebook, end = nbformat.read(path, as_version=4), time.monotonic() + MAX_SECONDS
    nbclient.NotebookClient(
        notebook,
        timeout_func=lambda cell: max(1, int(end - time.monotonic())),  # for all cells together
        resources={"metadata": {"path": path.parent}},
    ).execute()
    assert noise(notebook) == []


@each_notebook
def test_what_is_kept_is_fit_to_be_read(path):
    assert path.stat().st_size < MAX_BYTES
    assert mistakes(nbformat.read(path, as_version=4)) == []


def _with(change):
    notebook = nbformat.read(FOLDER / "01_quickstart.ipynb", as_version=4)
    change(notebook)
    return notebook


def _add_output(notebook, **output):
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.outputs.append(nbformat.v4.new_output(**output))


@pytest.mark.parametrize(
    ("change", "mistake"),
    [
        (lambda n: n.cells.pop(0), "open with a title"),
        (lambda n: n.cells[0].update(source="# Title\n\nIt shows."), "open with a title"),
        (lambda n: n.cells[2].update(source="import mla_jax"), "first code"),
        (lambda n: n.cells.pop(), "end with what to try"),
        (lambda n: n.cells[2].update(execution_count=7), "one run"),
        (lambda n: [cell.update(outputs=[]) for cell in n.cells if "outputs" in cell], "have plots"),
        (lambda n: n.cells.pop(next(filter(lambda i: _has_plot(n.cells[i - 1]), range(99)))), "what is seen"),
        (lambda n: _add_output(n, output_type="stream", name="stderr", text="noisy"), "noisy"),
        (lambda n: _add_output(n, output_type="error", ename="ValueError"), "ValueError"),
        (lambda n: _add_output(n, output_type="stream", name="stdout", text="at /home/me/x"), "/home/"),
    ],
    ids=["title", "opening", "set-up", "end", "order", "plots", "sentence", "stderr", "error", "path"],
)
def test_planted_mistake_is_found(change, mistake):
    assert any(mistake in found for found in mistakes(_with(change)))
