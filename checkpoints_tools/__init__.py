"""GGUF files of the deepseek2 family: reading, checking, writing and describing them.

`load_gguf` turns a file into a `Checkpoint`, `save_gguf` turns it back byte by byte, `export_gguf` writes a
model that was trained here. Below them lie the container (`gguf_file`, `gguf_metadata`, `gguf_writer`), which
knows no model, and the model's side of it (`names`, `hparams`, `layout`). What is done to whole files are
modules of their own: `check`, `convert`, `diff`, `export`, `orbax_files`, `quantize` and `split`.
"""

from checkpoints_tools.gguf_file import GGUFError, open_gguf
from checkpoints_tools.gguf_writer import TensorData, write_gguf
from checkpoints_tools.inspect import describe
from checkpoints_tools.load import Checkpoint, load_gguf
from checkpoints_tools.load_mesh import load_on_mesh
from checkpoints_tools.plan import plan
from checkpoints_tools.save import export_gguf, save_gguf

__all__ = [
    "Checkpoint",
    "GGUFError",
    "TensorData",
    "describe",
    "export_gguf",
    "load_gguf",
    "load_on_mesh",
    "open_gguf",
    "plan",
    "save_gguf",
    "write_gguf",
]
