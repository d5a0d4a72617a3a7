"""What `mla-jax autotune` does with its flags."""

import pathlib
import sys

import jax

from mla_jax.cli.argv import UsageError
from mla_jax.config import RunConfig
from pallas_kernels import tuning, weight_tiles


def autotune(values):
    """Prints the tile sizes that are fastest on this GPU, and keeps them for the runs to come."""
    folder = pathlib.Path(values.out or tuning.USER_FOLDER).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out must be a folder, got {values.out!r}.")
    if values.type not in weight_tiles.LAYOUTS:
        raise UsageError(f"--type must be one of {', '.join(weight_tiles.LAYOUTS)}, got {values.type!r}.")
    kind = tuning.device_kind()
    if kind is None:
        raise UsageError(f"autotune must run on an NVIDIA GPU that JAX can use, got {jax.default_backend()}.")
    from mla_jax import autotune as autotune_lib  # not for other commands, which do not need the kernels
    from mla_jax import autotune_cases

    config, weights = autotune_cases.weights_of(values.model, values.type)
    run = RunConfig(cache_type=values.cache_type_k, cache_type_rope=values.cache_type_rope)
    cases = autotune_cases.cases(
        config, weights, run, ctx_size=values.ctx_size or config.context_length, ubatch=values.ubatch_size
    )
    results = autotune_lib.tune(cases, report=_tell)
    if not results:
        raise UsageError(f"no kernel runs on this GPU, {kind}: the kernels need Ampere or newer.")
    path = autotune_lib.write(folder, kind, results)
    sys.stdout.write(autotune_lib.table(results) + "\n")
    _tell(f"wrote {path}")


def _tell(text):
    print(text, file=sys.stderr, flush=True)
