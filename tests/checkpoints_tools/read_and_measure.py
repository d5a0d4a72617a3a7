"""Reads bad files in a process of its own and measures the time and memory that each takes.

    python tests/checkpoints_tools/read_and_measure.py NUM_MUTATIONS

reads every file of the table in `crafted` in every way there is, then mutations of the small model. Prints
one JSON object: file -> [seconds of CPU, bytes of memory]. Only Linux tells a process the most that it had.
"""

import contextlib
import json
import pathlib
import sys
import tempfile
import time

import crafted
import gguf_pieces as pieces
from mutations import Mutator

import checkpoints_tools
from checkpoints_tools import GGUFError, gguf_file, hparams, model_file
from checkpoints_tools import check as check_lib
from mla_jax.tokenizer import Tokenizer, Vocabulary


def _memory(name):
    """Returns a size in bytes from the process's status, for example "VmHWM", the most it had."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status must have {name}.")


def _read_vocabulary(path):
    file = gguf_file.open_gguf(path)
    with contextlib.suppress(ValueError):  # for the tokenizer is built also where the model is refused
        Tokenizer(Vocabulary.from_metadata(file.metadata))
    config, _ = model_file.check_model(file)
    hparams.vocabulary(file.metadata, config, file.path)


READERS = (checkpoints_tools.describe, checkpoints_tools.load_gguf, check_lib.check, _read_vocabulary)


def _measured(path, before):
    """Returns the CPU time of the slowest reader, and the memory that was taken beyond `before`."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the most there was
    seconds = []
    for read in READERS:
        start = time.process_time()
        with contextlib.suppress(GGUFError):
            read(path)
        seconds.append(time.process_time() - start)
    return max(seconds), max(0, _memory("VmHWM") - before)


def main(num_mutations):
    found, mutator = {}, Mutator("memory")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        path = folder / "any.gguf"
        path.write_bytes(pieces.model())
        _measured(path, 0)  # what is loaded or compiled but once is no part of a file's cost
        before = _memory("VmRSS")
        for number, (entry_name, entry) in enumerate(crafted.TABLE.items()):
            (folder / str(number)).mkdir()
            found[entry_name] = _measured(crafted.write(entry, folder / str(number)), before)
        for number in range(num_mutations):
            path.write_bytes(mutator())
            found[f"mutation {number}"] = _measured(path, before)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
