import pytest

from mla_jax.cli import main


@pytest.fixture
def run(capsys):
    """Returns a function that runs the command in this process: (exit code, stdout, stderr)."""

    def run(*args):
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
