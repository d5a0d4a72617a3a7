"""The small parts of every layer. `read_weight` is the only way from a module to a stored weight."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mla_jax import quant


def read_weight(module: nn.Module, name: str, init, shape):
    """Returns the parameter `name` of `module`, plain or quantised; creates it when initialising.

    `Module.param` compares leaf shapes and refuses a quantised leaf, so stored weights are read as variables.

    Raises:
      ValueError: when the stored weight does not have `shape`.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    weight = module.get_variable("params", name)
    if weight.shape != shape:
        path = "/".join((*module.path, name))
        raise ValueError(f"{path}: weight must be {shape} for this config, got {weight.shape}.")
    return weight


class Linear(nn.Module):
    """`x @ weight.T`, weight [features, in], plain or in GGUF blocks; float32 result."""

    features: int
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "normal", in_axis=-1, out_axis=-2)
        return quant.matmul(x, read_weight(self, "weight", init, (self.features, x.shape[-1])))


class RMSNorm(nn.Module):
    """Divides by the root mean square of the last axis and multiplies by `weight`."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        weight = read_weight(self, "weight", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return x * jnp.broadcast_to(weight.astype(jnp.float32), x.shape)


class SwiGLU(nn.Module):
    """The gated FFN of dense layers and of the shared experts: `down(silu(gate(x)) * up(x))`."""

    hidden_dim: int
    out_init_scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        gate = Linear(self.hidden_dim, name="gate")(x)
        up = Linear(self.hidden_dim, name="up")(x)
        return Linear(x.shape[-1], self.out_init_scale, name="down")(jax.nn.silu(gate) * up)
