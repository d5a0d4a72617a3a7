"""Examples of the pages run, but those marked `py`, which take a server or long to compile."""

import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted(DOCS.glob("*.md")) if BLOCK.search(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page):
    """Those of a page go on from one another, as a reader would run them."""
    names = {"__name__": "__main__"}
    with (  # as users have it: kernels compute, and arrays are promoted
        jax.default_matmul_precision("default"),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        for block in BLOCK.findall(page.read_text()):
            exec(compile(block, str(page), "exec"), names)
