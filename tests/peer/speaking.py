"""Random deepseek2 files that behave like trained ones as far as rounding goes.

In a random model the best token leads by a tenth of what separates a trained model's, and every layer adds as
much as the stream holds, so that the 8-bit activations of ik_llama.cpp alone change the best token at one
position in fifty. Here layers add what initialised networks add, and some token usually stands out.
"""

import dataclasses

import numpy as np
import synthetic

import checkpoints_tools
from checkpoints_tools import names
from mla_jax import quant

_BRANCH_ENDS = ("attn_output.weight", "ffn_down.weight", "ffn_down_exps.weight", "ffn_down_shexp.weight")


def write_speaking(path, *, layers: int = 3, lead: float = 0.4, **options) -> None:
    """Writes a file with heads of full size, reworked and saved by `save_gguf`.

    Args:
      path: the file.
      layers: L. What a layer adds to the stream is divided by sqrt(2 L), as when GPT-2 is initialised.
      lead: how much of the embedding of token t is added to the output row of token t + 1.
      **options: of `synthetic.write_deepseek2`.
    """
    synthetic.write_deepseek2(path, size="full", layers=layers, **options)
    checkpoint = checkpoints_tools.load_gguf(path)
    leaves = names.flatten(checkpoint.params)
    embed, output = _values(leaves["token_embd.weight"]), _values(leaves["output.weight"])
    next_token = np.roll(embed, 1, axis=0) / np.float32(embed.shape[1] ** 0.5)
    leaves["output.weight"] = _like(leaves["output.weight"], output + np.float32(lead) * next_token)
    for name in leaves:
        if name.endswith(_BRANCH_ENDS):
            leaves[name] = _like(leaves[name], _values(leaves[name]) * np.float32((2 * layers) ** -0.5))
    params = names.unflatten(leaves)
    checkpoints_tools.save_gguf(path, dataclasses.replace(checkpoint, params=params))


def _values(leaf):
    return np.asarray(quant.decode(leaf))


def _like(leaf, values):
    if isinstance(leaf, quant.QuantizedTensor):
        return quant.encode(values, leaf.format)
    return values.astype(leaf.dtype)
