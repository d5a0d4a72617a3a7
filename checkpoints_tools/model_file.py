"""The model in an opened container: what it is, and that its tensors are those it needs."""

from checkpoints_tools import hparams, layout
from checkpoints_tools.gguf_file import GGUFFile
from checkpoints_tools.layout import Layout
from mla_jax.config import ModelConfig


def check_model(file: GGUFFile) -> tuple[ModelConfig, Layout]:
    """Returns the config and the layout of a model whose container has been opened; no weight is read.

    Raises:
      GGUFError: for a file that is no sound deepseek2 GGUF of supported types.
    """
    config = hparams.model_config(file.metadata, file.tensors, file.path)
    return config, layout.check_layout(config, file.tensors, file.path)
