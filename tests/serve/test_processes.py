"""The processes that templates and grammars are given to, and the files that the server itself may open."""

import contextlib
import os
import pathlib
import resource
import subprocess
import sys

import pytest

from mla_jax.chat import renderer
from mla_jax.serve import grammar
from mla_jax.tokenizer import BYTE_CHARACTERS, CONTROL, NORMAL, Tokenizer, Vocabulary

TINY = Vocabulary(
    tokens=("<eos>", *BYTE_CHARACTERS),
    token_types=(CONTROL, *(NORMAL,) * 256),
    merges=(),
    pre="default",
    eos_id=0,
)
TEMPLATE = '{"template": "{{ 1 }}", "variables": {"messages": []}}'


@pytest.fixture
def many_files():
    """Has more files open than `select` can name."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != limits[1] < 2048:
        pytest.skip("needs 2048 open files")
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2048), limits[1]))
        for _ in range(1100):
            stack.enter_context(open(os.devnull))
        yield


def test_grammars_are_compiled_beside_many_open_files(many_files):
    assert grammar.Compiler(Tokenizer(TINY)).compile("regex", "ab").start().mask().any()


def test_they_are_told_no_secrets_and_write_no_files(monkeypatch):
    monkeypatch.setenv("MLA_API_KEY", "a-key-that-nobody-sees")
    monkeypatch.setenv("SOME_TOKEN", "a-token-that-nobody-sees")
    compiler = grammar.Compiler(Tokenizer(TINY))
    compiler.compile("regex", "a")
    with contextlib.closing(renderer.Renderer()) as templates:
        assert templates.render(TEMPLATE) == "1"
        for process in (templates._process, compiler._child._process):
            folder = pathlib.Path(f"/proc/{process.pid}")
            environment = (folder / "environ").read_bytes()
            assert b"PATH=" in environment and b"nobody-sees" not in environment
            limits = (folder / "limits").read_text()
            for name, most in (("Max file size", 0), ("Max open files", 32), ("Max core file size", 0)):
                (line,) = [line for line in limits.splitlines() if line.startswith(name)]
                assert int(line.removeprefix(name).split()[0]) <= most


@pytest.mark.parametrize(
    ("soft", "hard", "room", "soft_then"),
    [(256, 4096, 1024, 1152), (256, 512, 384, 512), (64, 64, 1, 64), (2048, 4096, 1024, 2048)],
    ids=["raised", "as far as it may", "hardly any", "enough"],
)
def test_connections_leave_room_for_other_files(soft, hard, room, soft_then):
    code = f"""
import resource
from mla_jax.serve.http import connections
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(connections.room_for(1024), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.split() == [str(room), str(soft_then), str(hard)]
