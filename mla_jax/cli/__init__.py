"""The command `mla-jax`. `flags` says what may be asked, `argv` reads it, `commands` does it."""

from mla_jax.cli.app import main, run

__all__ = ["main", "run"]
