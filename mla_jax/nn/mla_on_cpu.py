"""Latent attention by the CPU kernels: the two ways of `mla`, the up-projection left in its blocks."""

import cpu_kernels
from mla_jax.cache import LatentRows, codec, rotate
from mla_jax.nn.up_projections import UpProjections
from mla_jax.quant import dispatch


def attend_absorbed(q, q_rope, rows: LatentRows, up: UpProjections, positions, *, sm_scale, rotation):
    """Attends in latent space, see `mla.attend_absorbed`."""
    B, T, N, H = q.shape
    q_XNR = _absorb(q.reshape(B * T, N, H), up)
    q_BTNR = rotate(q_XNR.reshape(B, T, N, up.rank), rotation)
    o_BTNR = cpu_kernels.latent_attention(q_BTNR, q_rope, **_cache(rows, positions), scale=sm_scale)
    o_XNR = rotate(o_BTNR, rotation).reshape(B * T, N, up.rank)
    return _to_values(o_XNR, up).reshape(B, T, N, up.value_size)


def attend_expanded(q, q_rope, rows: LatentRows, up: UpProjections, positions, *, sm_scale, rotation):
    """Attends to keys and values that are decompressed a tile at a time, see `mla.attend_expanded`."""
    V = up.value_size
    if up.kv is not None and rotation is None:
        keys = values = dispatch.operands(up.kv)
        layout = dict(key_stride=up.key_size + V, value_stride=up.key_size + V, value_first=up.key_size)
    else:
        keys, values = (dispatch.operands(rotate(part, rotation)) for part in up.decode())
        layout = dict(key_stride=up.key_size, value_stride=V, value_first=0)
    return cpu_kernels.latent_prefill(
        q,
        q_rope,
        keys[0],
        values[0],
        **_cache(rows, positions),
        **layout,
        formats=(keys[1], values[1]),
        value_size=V,
        scale=sm_scale,
    )


def _absorb(q_XNH, up):
    """Moves W_uk onto the queries: [X, N, R]."""
    if up.kv is None:
        arrays, name = dispatch.operands(up.k)
        return cpu_kernels.head_matmul(q_XNH, *arrays, format=name, out=up.rank, stride=up.rank, first=0)
    arrays, name = dispatch.operands(up.kv)
    stride = up.key_size + up.value_size
    return cpu_kernels.head_transposed(q_XNH, *arrays, format=name, size=up.rank, stride=stride)


def _to_values(o_XNR, up):
    """Applies W_uv: [X, N, V]."""
    V = up.value_size
    weight, stride, first = (up.v, V, 0) if up.kv is None else (up.kv, up.key_size + V, up.key_size)
    arrays, name = dispatch.operands(weight)
    return cpu_kernels.head_matmul(o_XNR, *arrays, format=name, out=V, stride=stride, first=first)


def _cache(rows, positions):
    return dict(
        latent=codec.parts(rows.latent),
        rope=codec.parts(rows.rope),
        latent_type=codec.type_of(rows.latent),
        rope_type=codec.type_of(rows.rope),
        pages=rows.table(positions.shape[0]),
        positions=positions,
    )
