"""The norm before every product."""

import jax
import numpy as np

from cpu_kernels.library import call


def rms_norm(x: jax.Array, weight: jax.Array, *, epsilon: float) -> jax.Array:
    """Returns f32[..., n], x f32[..., n] over the root mean square of its last axis, times weight f32[n]."""
    return call("mla_rms_norm", x.shape)(x, weight, epsilon=np.float32(epsilon))
