"""Products of tiles of tokens with quantised weights, each tile with the weight of its own expert.

Letters as in `mla_jax.nn`: Y tiles of M tokens, E experts, D columns and F rows of a weight. P planes and W
words in a row are those of `weight_tiles`. A lower-case letter is a tile of that axis; g is the words of a
group, G the groups of a tile.

One token in a tile is a matrix-vector product, in float32 and in registers, for which bytes count. More
tokens are products of tensor cores, whose operands have 16 bits: the weight is rounded once, to float16, and
so is x, scaled by a power of two for each row so that nothing overflows. Weights in bfloat16 make both
bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import dispatch, weight_tiles
from pallas_kernels.grouped_matmul_bodies import (
    LEAST,
    Config,
    combined,
    matrix_body,
    padded,
    plan_for,
    vector_body,
)

# --- 1. reference: defines the result ---------------------------------------------------------


def reference(x_YMD, weight, expert_Y, *, format):
    """Decodes the weight of one tile after the other and multiplies in float32.

    `jax.lax.ragged_dot` on the decoded stack computes the same where the tiles are in order of experts, as
    those of the network are, but would decode experts that no tile has.
    """
    num_experts, num_rows = weight[0].shape[:2]

    def multiply(expert, x_MD):
        decoded_FD = weight_tiles.decode(tuple(part[expert] for part in weight), format)
        return jnp.einsum("MD,FD->MF", x_MD.astype(jnp.float32), decoded_FD)

    def one_tile(operands):
        expert, x_MD = operands
        skip = lambda expert, x_MD: jnp.zeros((x_MD.shape[0], num_rows), jnp.float32)
        return jax.lax.cond((expert >= 0) & (expert < num_experts), multiply, skip, expert, x_MD)

    return jax.lax.map(one_tile, (expert_Y, x_YMD))


def _reference(x_YMD, weights, expert_Y, *, format, is_gated):
    products = [reference(x_YMD, weight, expert_Y, format=format) for weight in weights]
    if is_gated and len(weights) == 1:
        products = jnp.split(products[0], 2, axis=-1)
    return combined(products)


# --- 2. kernel: the same result tile by tile; its bodies are in `grouped_matmul_bodies` ------------


def _scaled(x_YMD, dtype):
    """Returns x as `dtype`, rows divided by a power of two near their largest number, and that, f32[Y, M]."""
    x_YMD = x_YMD.astype(jnp.float32)
    _, exponent_YM = jnp.frexp(jnp.abs(x_YMD).max(axis=-1))
    exponent_YM = jnp.clip(exponent_YM, -126, 126)  # both powers are finite
    power_YM = lambda sign: jnp.ldexp(jnp.float32(1), sign * exponent_YM)
    return (x_YMD * power_YM(-1)[:, :, None]).astype(dtype), power_YM(1)


def _call(x_YMD, weights, expert_Y, *, format, is_gated, config, interpret):
    Y, M, _ = x_YMD.shape
    plan = plan_for(M, weights, format, is_gated, config)
    operands = [array for weight in weights for array in weight]
    if plan.kind.table is not None:
        operands.append(jnp.asarray(plan.kind.table))
    if M == 1:
        body, name, x = vector_body, "grouped_matvec", [x_YMD]
    else:
        padding = (0, padded(M) - M)
        body, name = matrix_body, "grouped_matmul"
        x = _scaled(jnp.pad(x_YMD, ((0, 0), padding, (0, 0))), plan.operand)
    num_tokens = x[0].shape[1]
    out_YMF = dispatch.launch(
        functools.partial(body, plan=plan),
        expert_Y,
        weight_tiles.in_planes(x[0], format),
        *x[1:],
        *operands,
        name=name,
        grid=(Y * (num_tokens // plan.config.tokens), pl.cdiv(plan.num_rows, plan.config.rows)),
        out_shape=jax.ShapeDtypeStruct((Y, num_tokens, plan.num_rows), jnp.float32),
        config=plan.config,
        interpret=interpret,
    )
    return out_YMF[:, :M]


# --- 3. cost: what the roofline of the benchmark is drawn from ---------------------------------


def cost(
    *, tokens: int, rows: int, columns: int, format: str, num_experts: int = 1, num_weights: int = 1
) -> pl.CostEstimate:
    """FLOPs, bytes and exponentials of one call, x in float32.

    Args:
      tokens: rows of x, of all tiles that have an expert.
      rows: F of a weight.
      columns: D.
      format: that of the weights.
      num_experts: distinct ones among the tiles: the weight of each is read once.
      num_weights: 2 for `grouped_gated`.
    """
    weight_bytes = num_experts * num_weights * rows * weight_tiles.row_bytes(columns, format)
    return pl.CostEstimate(
        flops=2 * tokens * num_weights * rows * columns,
        bytes_accessed=weight_bytes + 4 * tokens * (rows + columns),
        transcendentals=tokens * rows if num_weights == 2 else 0,
    )


# --- 4. public ops -----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("format", "implementation", "config"))
def grouped_matmul(
    x: jax.Array,
    weight: tuple[jax.Array, ...],
    experts: jax.Array,
    *,
    format: str,
    implementation: str | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Returns `x @ weight.T` for each tile of tokens with the weight of its expert.

    A product with one weight has one expert, and zeros for `experts`.

    Args:
      x: float[Y, M, D] tiles of tokens. With one token in a tile products are those of float32. With more, x
        and the weight are rounded to 16 bits, as the head of this module says.
      weight: arrays [E, F, ...] from `weight_tiles.repack`. Experts that no tile has may hold anything.
      experts: i32[Y] in [0, E). Any other number is none: the tile is not read, its result is zeros. Tiles of
        one expert should be neighbours, which then read its weight from the cache of the GPU.
      format: name of the weight's type in GGUF.
      implementation: None (by platform), "reference", "triton" or "interpret".
      config: tile sizes, None for what was measured, or else `Config.for_shape`.

    Returns:
      f32[Y, M, F], sums in float32.

    Raises:
      ValueError: for an unknown `implementation` or `format` and for shapes that do not fit.
      NotImplementedError: if the kernel is asked for and cannot take these shapes.
    """
    return _run(x, (weight,), experts, format, False, implementation, config)


@functools.partial(jax.jit, static_argnames=("formats", "implementation", "config"))
def grouped_gated(
    x: jax.Array,
    gate: tuple[jax.Array, ...],
    up: tuple[jax.Array, ...] | None,
    experts: jax.Array,
    *,
    formats: tuple[str, str],
    implementation: str | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Returns `silu(x @ gate.T) * (x @ up.T)` for each tile of tokens with the weights of its expert.

    One kernel computes it for two weights of one format; those of two formats are multiplied one by one.

    Args:
      x: float[Y, M, D], as for `grouped_matmul`.
      gate: arrays [E, F, ...]; without `up` [E, 2F, ...], the rows of gate first.
      up: arrays [E, F, ...] or None.
      experts: i32[Y], as for `grouped_matmul`.
      formats: those of gate and up. Without `up` the second is not read.
      implementation: as for `grouped_matmul`.
      config: as for `grouped_matmul`.

    Returns:
      f32[Y, M, F].

    Raises:
      ValueError: as `grouped_matmul`.
      NotImplementedError: as `grouped_matmul`.
    """
    if up is None:
        return _run(x, (gate,), experts, formats[0], True, implementation, config)
    if formats[0] == formats[1]:
        return _run(x, (gate, up), experts, formats[0], True, implementation, config)
    pairs = zip((gate, up), formats, strict=True)
    return combined(
        [_run(x, (weight,), experts, name, False, implementation, config) for weight, name in pairs]
    )


def _run(x, weights, experts, format, is_gated, implementation, config):
    _check_shapes(x, weights, experts, format, is_gated)
    same = dict(format=format, is_gated=is_gated)
    return dispatch.run(
        implementation,
        x,
        weights,
        experts,
        unsupported=_unsupported(x, weights, format, is_gated),
        kernel=functools.partial(_call, config=config, **same),
        reference=functools.partial(_reference, **same),
    )


def _check_shapes(x, weights, experts, format, is_gated):
    shapes = [(*weight[0].shape[:2], weight_tiles.num_columns(weight, format)) for weight in weights]
    if x.ndim != 3 or any(shape[2] != x.shape[2] or shape != shapes[0] for shape in shapes):
        raise ValueError(f"x [Y, M, D] must fit weights [E, F, D], got {x.shape} and {shapes}.")
    if experts.shape != x.shape[:1]:
        raise ValueError(f"experts must be [Y] = {x.shape[:1]}, got {experts.shape}.")
    if is_gated and len(weights) == 1 and shapes[0][1] % 2:
        raise ValueError(f"a weight of gate and up must have an even number of rows, got {shapes[0][1]}.")


def _unsupported(x, weights, format, is_gated):
    """Says why the kernel cannot run, or returns None."""
    num_rows, size = weights[0][0].shape[1] // (1 + (is_gated and len(weights) == 1)), x.shape[2]
    if not x.size or not num_rows:
        return f"x and weights must not be empty, got {x.shape} and {num_rows} rows."
    least = LEAST * weight_tiles.layout(format).planes
    if x.shape[1] > 1 and (num_rows < LEAST or size < least):
        return (
            f"for tiles of tokens, weights in {format} must have at least {LEAST} rows and {least} columns, "
            f"got {num_rows} and {size}."
        )
    arrays = {f"array {i} of the weight": part for weight in weights for i, part in enumerate(weight)}
    return dispatch.unaddressable(**arrays)
