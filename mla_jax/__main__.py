"""`python -m mla_jax`: the same as the command `mla-jax`."""

import sys

from mla_jax.cli import run

if __name__ == "__main__":
    sys.exit(run())
