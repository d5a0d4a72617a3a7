"""A process that saves slots is killed while it does: the file is the old one or the new one."""

import json
import pathlib
import random
import subprocess
import sys
import time

import slot_saver
from synthetic import write_deepseek2

import cpu_kernels

SAVER = pathlib.Path(slot_saver.__file__)
NUM_KILLS = 10
SECONDS = 0.3  # within which a process is killed after its first save: time for some more


def _life(arguments, seconds):
    """Returns what a process says until it is killed, `seconds` after it first saved."""
    command = [sys.executable, str(SAVER), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        told = []
        for line in process.stdout:
            told.append(json.loads(line))
            if "saved" in told[-1]:
                break
        time.sleep(seconds)
        process.kill()
    assert told and "saved" in told[-1], "it ended by itself"
    return told


def test_a_file_that_was_being_saved_is_old_or_new(tmp_path):
    model, path, compiled = tmp_path / "nano.gguf", tmp_path / "slots" / "one.bin", tmp_path / "xla"
    path.parent.mkdir()
    write_deepseek2(model, layers=2)
    chance = random.Random(0)
    told = _life((model, path, compiled), chance.random() * SECONDS)
    cold = {len(it["cold"]): it for it in told if "cold" in it}
    assert sorted(cold) == [1499, 2999]
    litter = len([*path.parent.iterdir()]) - 1
    assert litter in (0, 1)
    for _ in range(NUM_KILLS):
        told, *_ = _life((model, path, compiled), chance.random() * SECONDS)
        expected = cold[len(told["restored"])]
        assert told["restored"] == expected["cold"] and told["num_cached"] == len(told["restored"])
        if cpu_kernels.available():  # else texts are alike up to rounding
            assert told["text"] == expected["text"]
        others = [it for it in path.parent.iterdir() if it != path]
        assert len(others) - litter in (0, 1), "a kill leaves one file at most"
        litter = len(others)
    assert path.stat().st_mode & 0o777 == 0o600
