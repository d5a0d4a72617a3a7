"""The tensors that a config asks for, and the check of a file's tensor table before any tensor is read."""

import dataclasses
from collections.abc import Container, Iterator, Mapping

from absl import logging

from checkpoints_tools import interleave
from checkpoints_tools.ggml_types import IDS, TYPES
from checkpoints_tools.gguf_file import GGUFError, TensorInfo
from mla_jax import quant
from mla_jax.config import ModelConfig

PLAIN_TYPES = tuple(IDS[name] for name in ("f32", "f16", "bf16"))

_ADDED = ("bias", "scale")  # to a weight, the latter by llama.cpp to nvfp4

Shape = tuple[int, ...]


def _format_names() -> dict[int, str]:
    plain = {ggml_type: TYPES[ggml_type].name for ggml_type in PLAIN_TYPES}
    formats = {entry.ggml_type: entry.name for entry in quant.FORMATS.values()}
    bases = {IDS[name]: base.name for name, base in interleave.BASES.items()}
    known = {*plain.values(), *formats.values()}
    return plain | formats | {ggml_type: name for ggml_type, name in bases.items() if name in known}


FORMAT_NAMES = _format_names()
"""Types that can be decoded -> what their rows are in memory: a plain type, or a key of `quant.FORMATS`."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which tensors of a file the network reads.

    Attributes:
      shapes: GGUF name -> shape in the parameters, which for old files differs from the one in the table.
      unread: names of the other tensors; they are kept for saving.
    """

    shapes: dict[str, Shape]
    unread: tuple[str, ...]


def check_layout(config: ModelConfig, tensors: Mapping[str, TensorInfo], path: str) -> Layout:
    """Finds the tensors that a config asks for, each with its shape and a type that can be decoded.

    Args:
      config: the model.
      tensors: tensor table of the file.
      path: the file, for messages.

    Returns:
      The layout.

    Raises:
      GGUFError: for the first tensor that is missing, has another shape or an unsupported type, or that would
        change the result if it were read.
    """
    shapes = {}
    for name, shape in expected_shapes(config, tensors).items():
        if name not in tensors:
            raise GGUFError(f"{path}: tensor {name!r} of shape {shape} is missing.")
        _check_tensor(tensors[name], shape)
        shapes[name] = shape
    unread = tuple(name for name in tensors if name not in shapes)
    for name in unread:
        weight, _, kind = name.rpartition(".")
        if kind in _ADDED and f"{weight}.weight" in shapes:
            raise GGUFError(f"{path}: tensor {name!r} must not be there: no {kind} of a weight is supported.")
    _log_choices(path, config, tensors, unread)
    return Layout(shapes, unread)


def expected_shapes(config: ModelConfig, names: Container[str]) -> dict[str, Shape]:
    """Returns the tensors the network reads, in the order of new files.

    Args:
      config: the model.
      names: GGUF names at hand; they decide between forms of the same weights, kv_b and gate, up by default.

    Returns:
      GGUF name -> shape in the parameters.
    """
    return dict(_expected(config, names))


def check_type(info: TensorInfo) -> None:
    """Checks that the weights of a tensor can be decoded.

    Args:
      info: row of a tensor table.

    Raises:
      GGUFError: if they cannot.
    """
    what = f"{info.path}: tensor {info.name!r} has type {info.type_name} ({info.ggml_type})"
    if info.ggml_type not in FORMAT_NAMES:
        raise GGUFError(f"{what}, which cannot be decoded.")
    base = interleave.BASES.get(info.type_name)
    if base is not None and info.shape[-1] % base.block_size:
        raise GGUFError(f"{what}, so it must have rows of a multiple of {base.block_size}, got {info.shape}.")


def is_taken_apart(info: TensorInfo) -> bool:
    """Whether rows of a tensor that can be decoded are interleaved in the file, or have headers there."""
    entry = quant.FORMATS.get(FORMAT_NAMES[info.ggml_type])
    return info.type_name in interleave.BASES or (entry is not None and entry.header_bytes > 0)


def _check_tensor(info: TensorInfo, shape: Shape) -> None:
    allowed = [shape, (shape[0] * shape[1], shape[2])] if _may_be_flat(info.name) else [shape]
    if info.shape not in allowed:
        raise GGUFError(
            f"{info.path}: tensor {info.name!r} must have shape {' or '.join(map(str, allowed))}, "
            f"got {info.shape}."
        )
    if len(shape) == 1 and info.ggml_type not in PLAIN_TYPES:
        raise GGUFError(
            f"{info.path}: tensor {info.name!r} has type {info.type_name} ({info.ggml_type}), "
            f"supported for vectors are {', '.join(TYPES[ggml_type].name for ggml_type in PLAIN_TYPES)}."
        )
    check_type(info)


def _may_be_flat(name: str) -> bool:
    """Whether old files have the tensor as a matrix, with the same bytes."""
    return name.endswith((".attn_k_b.weight", ".attn_v_b.weight"))


def _expected(config: ModelConfig, names: Container[str]) -> Iterator[tuple[str, Shape]]:
    yield "token_embd.weight", (config.vocab_size, config.embed_dim)
    for layer in range(config.num_layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (config.embed_dim,)
        yield from _attention(config, block, names)
        yield block + "ffn_norm.weight", (config.embed_dim,)
        if config.is_dense(layer):
            yield from _swiglu(block, "", config.embed_dim, config.dense_hidden_dim)
        else:
            yield from _experts(config, block, names)
    yield "output_norm.weight", (config.embed_dim,)
    yield "output.weight", (config.vocab_size, config.embed_dim)


def _attention(config: ModelConfig, block: str, names: Container[str]) -> Iterator[tuple[str, Shape]]:
    mla, embed_dim = config.mla, config.embed_dim
    query_width = mla.num_heads * mla.qk_head_dim
    if mla.q_lora_rank is None:
        yield block + "attn_q.weight", (query_width, embed_dim)
    else:
        yield block + "attn_q_a.weight", (mla.q_lora_rank, embed_dim)
        yield block + "attn_q_a_norm.weight", (mla.q_lora_rank,)
        yield block + "attn_q_b.weight", (query_width, mla.q_lora_rank)
    yield block + "attn_kv_a_mqa.weight", (mla.kv_lora_rank + mla.qk_rope_head_dim, embed_dim)
    yield block + "attn_kv_a_norm.weight", (mla.kv_lora_rank,)
    split = (block + "attn_k_b.weight", block + "attn_v_b.weight")
    if block + "attn_kv_b.weight" in names or not any(name in names for name in split):
        width = mla.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        yield block + "attn_kv_b.weight", (width, mla.kv_lora_rank)
    else:
        yield split[0], (mla.num_heads, mla.kv_lora_rank, mla.qk_nope_head_dim)
        yield split[1], (mla.num_heads, mla.v_head_dim, mla.kv_lora_rank)
    yield block + "attn_output.weight", (embed_dim, mla.num_heads * mla.v_head_dim)


def _experts(config: ModelConfig, block: str, names: Container[str]) -> Iterator[tuple[str, Shape]]:
    moe, embed_dim = config.moe, config.embed_dim
    yield block + "ffn_gate_inp.weight", (moe.num_experts, embed_dim)
    if moe.has_selection_bias:
        yield block + "exp_probs_b.bias", (moe.num_experts,)
    if block + "ffn_gate_up_exps.weight" in names:
        yield block + "ffn_gate_up_exps.weight", (moe.num_experts, 2 * moe.expert_hidden_dim, embed_dim)
    else:
        for part in ("gate", "up"):
            yield f"{block}ffn_{part}_exps.weight", (moe.num_experts, moe.expert_hidden_dim, embed_dim)
    yield block + "ffn_down_exps.weight", (moe.num_experts, embed_dim, moe.expert_hidden_dim)
    if moe.num_shared_experts:
        yield from _swiglu(block, "_shexp", embed_dim, moe.expert_hidden_dim * moe.num_shared_experts)


def _swiglu(block: str, suffix: str, embed_dim: int, hidden_dim: int) -> Iterator[tuple[str, Shape]]:
    yield f"{block}ffn_gate{suffix}.weight", (hidden_dim, embed_dim)
    yield f"{block}ffn_up{suffix}.weight", (hidden_dim, embed_dim)
    yield f"{block}ffn_down{suffix}.weight", (embed_dim, hidden_dim)


def _log_choices(
    path: str, config: ModelConfig, tensors: Mapping[str, TensorInfo], unread: tuple[str, ...]
) -> None:
    num_joined = sum(f"blk.{layer}.attn_kv_b.weight" in tensors for layer in range(config.num_layers))
    split_too = any(_may_be_flat(name) for name in unread)
    if split_too or num_joined < config.num_layers:
        logging.info(
            "%s: attn_kv_b is read in %d of %d layers%s, attn_k_b and attn_v_b in the others; none derived.",
            path,
            num_joined,
            config.num_layers,
            " (their attn_k_b and attn_v_b are only kept for saving)" if split_too else "",
        )
    others = [name if name.isprintable() else repr(name) for name in unread if not _may_be_flat(name)]
    if others:
        logging.info("%s: not read, kept for saving: %s.", path, ", ".join(others))
