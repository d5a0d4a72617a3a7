"""Writes a GGUF file of random weights with the shapes of a model, for benchmarks to read.

    python benchmarks/random_model.py bench-q8_0.gguf    # 3.3 GB, the large model of docs/speed.md
    python benchmarks/random_model.py bench-iq4_ks.gguf --type iq4_ks
    python benchmarks/random_model.py v2-lite.gguf --preset deepseek-v2-lite --type q4_K --num_layers 4

Speed does not depend on what the weights are, so a few random rows are encoded and repeated: memory does not
grow with the file. Rows that are no whole blocks of the type get another, as from `mla-jax quantize`. The
vocabulary is that of the packaged model with names for the tokens it lacks. Prints the size.
"""

import dataclasses
import functools
import os
import pathlib
import sys

import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoints_tools  # noqa: E402
from checkpoints_tools import gguf_writer, hparams, layout, recipe, save  # noqa: E402
from checkpoints_tools.ggml_types import IDS, TYPES  # noqa: E402
from mla_jax import presets, quant  # noqa: E402
from mla_jax.config import ModelConfig, RopeConfig  # noqa: E402
from mla_jax.generate import PACKAGED_MODEL  # noqa: E402

_BASE = presets.PRESETS["moonlight-16b-a3b"]
BENCH = dataclasses.replace(
    _BASE,
    vocab_size=32000,
    context_length=32768,
    num_layers=6,
    dense_hidden_dim=10944,
    norm_epsilon=1e-6,
    mla=dataclasses.replace(_BASE.mla, q_lora_rank=1536),
    moe=dataclasses.replace(_BASE.moe, weights_scale=2.5),
    rope=RopeConfig(base=10000.0),
)
_CONFIGS = presets.PRESETS | {"bench": BENCH}
_UNUSED = 5  # type of a token
_ROWS = 256  # random ones, repeated as often as is needed; more than a router has experts in most models

_PRESET = flags.DEFINE_enum("preset", "bench", sorted(_CONFIGS), "shapes.")
_TYPE = flags.DEFINE_enum("type", "q8_0", quant.ENCODABLE, "type of the matrices; routers stay float32.")
_LAYERS = flags.DEFINE_integer("num_layers", None, "of the model, the first ones. [all]", lower_bound=1)


def write(path: str | os.PathLike, config: ModelConfig, weight_type: str) -> None:
    """Writes the file.

    Raises:
      OSError: if the file cannot be written.
    """
    encoded = functools.cache(functools.partial(_rows, np.random.default_rng(0)))
    shapes = layout.expected_shapes(config, ())
    tensors = [_tensor(name, shape, encoded, weight_type) for name, shape in shapes.items()]
    gguf_writer.write_gguf(path, hparams.metadata(config) | _vocabulary(config.vocab_size), tensors)


def _rows(rng, size, scale, type_name):
    """Returns the bytes that a file has of `_ROWS` random rows."""
    values = rng.standard_normal((_ROWS, size), dtype=np.float32) * np.float32(scale)
    rows = np.ascontiguousarray(save.file_rows(quant.encode(values, type_name)))
    return rows.reshape(-1).view(np.uint8)


def _tensor(name, shape, encoded, weight_type):
    is_matrix = len(shape) > 1 and "ffn_gate_inp" not in name
    type_name = recipe.fitting(weight_type, shape[-1]) if is_matrix else "f32"
    num_bytes = TYPES[IDS[type_name]].num_bytes(shape)
    if name.endswith("norm.weight"):
        data = np.ones(shape, np.float32)
    else:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1

        def data():
            rows = encoded(shape[-1], scale, type_name)
            for start in range(0, num_bytes, rows.size):
                yield rows[: num_bytes - start]

    return gguf_writer.TensorData(name, shape, IDS[type_name], data)


def _vocabulary(size):
    """Returns the key-values of the packaged model's vocabulary, longer by tokens that no text has."""
    fields = checkpoints_tools.open_gguf(PACKAGED_MODEL).metadata.fields
    found = {key: field for key, field in fields.items() if key.startswith("tokenizer.ggml.")}
    tokens, types = (found[f"tokenizer.ggml.{key}"].value() for key in ("tokens", "token_type"))
    unused = [f"<unused {i}>" for i in range(len(tokens), size)]
    return found | {
        "tokenizer.ggml.tokens": [*tokens, *unused],
        "tokenizer.ggml.token_type": [*types, *(_UNUSED for _ in unused)],
    }


def main(argv):
    """Writes the file that is named."""
    if len(argv) != 2:
        raise app.UsageError(f"there must be one file to write, got {len(argv) - 1}.")
    config = _CONFIGS[_PRESET.value]
    if _LAYERS.value is not None:
        dense = min(config.num_dense_layers, _LAYERS.value)
        config = dataclasses.replace(config, num_layers=_LAYERS.value, num_dense_layers=dense)
    if os.path.isdir(argv[1]):
        raise app.UsageError(f"the file to write must be no folder, got {argv[1]}.")
    try:
        write(argv[1], config, _TYPE.value)
    except OSError as error:
        sys.exit(f"{argv[1]}: cannot be written: {error.strerror}.")
    print(f"{argv[1]}: {os.path.getsize(argv[1]) / 1e9:.2f} GB")


if __name__ == "__main__":
    app.run(main)
