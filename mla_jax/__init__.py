"""Multi-head Latent Attention in JAX: DeepSeek-style GGUF models as pytrees, run under jit."""

from mla_jax.cache import init_cache, init_pool
from mla_jax.config import MLAMode, ModelConfig, RunConfig
from mla_jax.generate import Model, load
from mla_jax.nn.transformer import apply
from mla_jax.sampler import SamplingParams

__all__ = [
    "MLAMode",
    "Model",
    "ModelConfig",
    "RunConfig",
    "SamplingParams",
    "apply",
    "init_cache",
    "init_pool",
    "load",
]
