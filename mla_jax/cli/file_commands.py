"""What each command on files does with its flags; no model is run."""

import sys

import checkpoints_tools
from checkpoints_tools import check as check_lib
from checkpoints_tools import quantize as quantize_lib
from mla_jax.cli import paths
from mla_jax.config import RunConfig


def inspect(values):
    """Prints metadata and tensors of a GGUF file, of any architecture."""
    _write(checkpoints_tools.describe(values.model))


def plan(values):
    """Prints what a model and its cache take in memory, without loading it."""
    run = RunConfig(mla=int(values.mla), cache_type_rope=values.cache_type_rope)
    _write(checkpoints_tools.plan(values.model, ctx_size=values.ctx_size, run=run))


def check(values):
    """Reads a whole file; prints what was checked, or on stderr what is wrong, which is exit code 2."""
    findings = check_lib.check(values.model)
    for problem in findings.problems:
        _tell(f"mla-jax: {problem}")
    if findings.problems:
        return 2
    _write(findings.checked)


def quantize(values):
    """Writes a file with its weights in another type, or prints the plan of it."""
    out = paths.output_file("OUT", values.out)
    rules = list(values.custom)
    for name, pattern in (("output_tensor_type", "output"), ("token_embedding_type", "token_embd")):
        if values[name].value is not None:
            rules.append(rf"^{pattern}\.weight$={values[name].value}")
    settings = dict(
        type=values.type, custom=rules, imatrix=values.imatrix, allow_requantize=values.allow_requantize
    )
    if values.dry_run:
        chosen = quantize_lib.plan(values.input, **settings)
        _write(f"{chosen.table()}\n\n{chosen.summary()}")
        return
    chosen = quantize_lib.quantize(values.input, out, **settings)
    _tell(f"{chosen.summary()}\nwrote {out}")


def _write(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _tell(text):
    print(text, file=sys.stderr, flush=True)
