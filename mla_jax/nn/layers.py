"""The small parts of every layer. `read_weight` is the only way from a module to a stored weight."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import cpu_kernels
from mla_jax import quant
from mla_jax.quant import dispatch
from pallas_kernels import grouped_matmul


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
    """`x @ weight.T`, weight [features, in], plain or in GGUF blocks; float32 result, see `quant.matmul`."""

    features: int
    init_scale: float = 1.0
    keeps_rest: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.variance_scaling(self.init_scale, "fan_in", "normal", in_axis=-1, out_axis=-2)
        weight = read_weight(self, "weight", init, (self.features, x.shape[-1]))
        return quant.matmul(x, weight, keeps_rest=self.keeps_rest)


class NormWeight(nn.Module):
    """The weight f32[size] of a norm, for who normalises otherwise than by `RMSNorm`."""

    size: int

    @nn.compact
    def __call__(self):
        return read_weight(self, "weight", nn.initializers.ones, (self.size,)).astype(jnp.float32)


def rms_norm(x, weight, epsilon: float):
    """Divides x [..., n] by the root mean square of its last axis and multiplies by `weight` f32[n]."""

    def default(x, weight):
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
        return x * jnp.broadcast_to(weight, x.shape)

    cpu = functools.partial(cpu_kernels.rms_norm, epsilon=epsilon)
    return dispatch.run(x.astype(jnp.float32), weight, cpu=cpu, default=default)


class RMSNorm(nn.Module):
    """Normalises by `rms_norm` with a weight of its own."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        weight = read_weight(self, "weight", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, weight.astype(jnp.float32), self.epsilon)


class Stored(nn.Module):
    """A weight as the file has it, for who reads more than a product of it."""

    shape: tuple[int, ...]
    init_scale: float = 1.0
    num_batch_axes: int = 0

    @nn.compact
    def __call__(self):
        batch_axis = tuple(range(self.num_batch_axes))
        init = nn.initializers.variance_scaling(
            self.init_scale, "fan_in", "normal", in_axis=-1, out_axis=-2, batch_axis=batch_axis
        )
        return read_weight(self, "weight", init, self.shape)


def gated_ffn(x, weights):
    """Returns `down(silu(gate(x)) * up(x))` of x [X, D]; gate and up may be one weight, gate_up [2F, D]."""
    if "gate_up" in weights:
        gate, up = jnp.split(quant.matmul(x, weights["gate_up"]), 2, axis=-1)
    else:
        gate, up = quant.matmul(x, weights["gate"]), quant.matmul(x, weights["up"])
    return quant.matmul(jax.nn.silu(gate) * up, weights["down"])


def gated_ffn_on_gpu(x, experts, weights):
    """`gated_ffn` of tiles x [Y, M, D], each by the weights [E, ...] of its expert i32[Y], in two kernels."""
    gate, down = weights.get("gate_up", weights.get("gate")), weights["down"]
    up = weights.get("up", gate)
    middle = grouped_matmul.grouped_gated(
        x,
        gate.planes,
        None if "gate_up" in weights else up.planes,
        experts,
        formats=(gate.format, up.format),
    )
    return grouped_matmul.grouped_matmul(middle, down.planes, experts, format=down.format)


def _one_expert_on_gpu(x, weights):
    experts = jax.tree.map(lambda leaf: leaf[None], weights)
    return gated_ffn_on_gpu(x[None], jnp.zeros((1,), jnp.int32), experts)[0]


def experts_on_cpu(x, ids, weights, experts):
    """Calls the kernel of `moe.grouped_ffn`."""
    pairs = {name: dispatch.operands(weight) for name, weight in experts.items()}
    arrays, formats = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    return cpu_kernels.expert_ffn(x.astype(jnp.float32), ids, weights, arrays, formats=formats)


def _one_expert_on_cpu(x, weights):
    experts = jax.tree.map(lambda leaf: leaf[None], weights)
    ids, ones = jnp.zeros((x.shape[0], 1), jnp.int32), jnp.ones((x.shape[0], 1), jnp.float32)
    return experts_on_cpu(x, ids, ones, experts)


class SwiGLU(nn.Module):
    """The gated FFN of dense layers and of the shared experts: `down(silu(gate(x)) * up(x))`."""

    hidden_dim: int
    out_init_scale: float = 1.0

    @nn.compact
    def __call__(self, x):
        F, D = self.hidden_dim, x.shape[-1]
        weights = {
            "gate": Stored((F, D), name="gate")(),
            "up": Stored((F, D), name="up")(),
            "down": Stored((D, F), self.out_init_scale, name="down")(),
        }
        x_XD = x.reshape(-1, D)
        is_planar = all(isinstance(weight, quant.PlanarTensor) for weight in weights.values())
        ways = dict(cpu=_one_expert_on_cpu, cuda=_one_expert_on_gpu if is_planar else None, default=gated_ffn)
        return dispatch.run(x_XD, weights, weights=weights.values(), **ways).reshape(x.shape)
