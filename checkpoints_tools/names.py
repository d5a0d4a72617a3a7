"""The two-way table between GGUF tensor names and paths in the tree of parameters."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str, ...]

_MODEL = {
    "token_embd.weight": "embed/weight",
    "output_norm.weight": "output_norm/weight",
    "output.weight": "output/weight",
}
_LAYER = {
    "attn_norm.weight": "attn_norm/weight",
    "attn_q.weight": "attn/q/weight",
    "attn_q_a.weight": "attn/q_a/weight",
    "attn_q_a_norm.weight": "attn/q_a_norm/weight",
    "attn_q_b.weight": "attn/q_b/weight",
    "attn_kv_a_mqa.weight": "attn/kv_a/weight",
    "attn_kv_a_norm.weight": "attn/kv_a_norm/weight",
    "attn_kv_b.weight": "attn/kv_b/weight",
    "attn_k_b.weight": "attn/k_b/weight",
    "attn_v_b.weight": "attn/v_b/weight",
    "attn_output.weight": "attn/out/weight",
    "ffn_norm.weight": "ffn_norm/weight",
    "ffn_gate.weight": "ffn/gate/weight",
    "ffn_up.weight": "ffn/up/weight",
    "ffn_down.weight": "ffn/down/weight",
    "ffn_gate_inp.weight": "ffn/router/weight",
    "exp_probs_b.bias": "ffn/router/bias",
    "ffn_gate_exps.weight": "ffn/experts/gate/weight",
    "ffn_up_exps.weight": "ffn/experts/up/weight",
    "ffn_gate_up_exps.weight": "ffn/experts/gate_up/weight",
    "ffn_down_exps.weight": "ffn/experts/down/weight",
    "ffn_gate_shexp.weight": "ffn/shared/gate/weight",
    "ffn_up_shexp.weight": "ffn/shared/up/weight",
    "ffn_down_shexp.weight": "ffn/shared/down/weight",
}
_MODEL_NAMES = {path: name for name, path in _MODEL.items()}
_LAYER_NAMES = {path: name for name, path in _LAYER.items()}
_LAYER_NAME = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)")
_LAYER_PATH = re.compile(r"layers_(0|[1-9][0-9]{0,8})/(.+)")


def to_path(name: str) -> Path | None:
    """Returns where the tensor `name` lies in the parameters, or None if the network does not know it."""
    path = _MODEL.get(name)
    if path is None and (match := _LAYER_NAME.fullmatch(name)) and match[2] in _LAYER:
        path = f"layers_{match[1]}/{_LAYER[match[2]]}"
    return None if path is None else tuple(path.split("/"))


def to_name(path: Path) -> str:
    """Returns the GGUF name of the parameter at `path`.

    Raises:
      ValueError: if no tensor of a GGUF file belongs there.
    """
    joined = "/".join(path)
    if joined in _MODEL_NAMES:
        return _MODEL_NAMES[joined]
    if (match := _LAYER_PATH.fullmatch(joined)) and match[2] in _LAYER_NAMES:
        return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}"
    raise ValueError(f"a parameter must be one that GGUF files of deepseek2 models have, got {joined!r}.")


def unflatten(tensors: Mapping[str, Any]) -> dict:
    """Returns the tree of parameters of tensors by GGUF name, all of which must be in the table."""
    params: dict = {}
    for name, tensor in tensors.items():
        *parents, last = to_path(name)
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = tensor
    return params


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors of a tree of parameters by GGUF name: the way back from `unflatten`.

    Raises:
      ValueError: if a parameter has no GGUF name.
    """
    return {to_name(path): leaf for path, leaf in _walk(params, ())}


def _walk(node: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if not isinstance(node, Mapping):
        yield path, node
        return
    for key, child in node.items():
        yield from _walk(child, (*path, key))
