"""CPU kernels of MLA in C++ behind `jax.ffi`: plain arrays in, arrays out, under jit on the CPU alone.

Weights stay in their GGUF blocks, or lie in `panels` of the same bytes. Products with them take activations
in 8 bits (32 neighbours share a scale), those with float weights are in float32. `available` says whether the
library was built with the package; who calls an op has asked it.
"""

from cpu_kernels.experts import expert_ffn, select_experts
from cpu_kernels.latent_append import latent_append
from cpu_kernels.latent_attention import latent_attention, latent_prefill, split_queries
from cpu_kernels.library import (
    available,
    formats,
    instruction_sets,
    panel_formats,
    set_codebook,
    unavailable_because,
    use_instruction_set,
)
from cpu_kernels.matmul import head_matmul, head_transposed, matmul
from cpu_kernels.norm import rms_norm

__all__ = [
    "available",
    "expert_ffn",
    "formats",
    "head_matmul",
    "head_transposed",
    "instruction_sets",
    "latent_append",
    "latent_attention",
    "latent_prefill",
    "matmul",
    "panel_formats",
    "rms_norm",
    "select_experts",
    "set_codebook",
    "split_queries",
    "unavailable_because",
    "use_instruction_set",
]
