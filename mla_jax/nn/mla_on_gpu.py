"""Latent attention by the GPU kernels: the two ways of `mla`, and the append to the cache."""

import math

import jax
import jax.numpy as jnp

from mla_jax.cache import LatentRows, codec, rotate
from pallas_kernels import flash_mla_decode, flash_mla_prefill, latent_append

EXPANDED_SLOTS = 4096  # cached tokens whose keys and values are held at a time


def append(kv, norm, *places_and_parts, latent_type, rope_type, **settings):
    """Calls the kernel as `LatentRows.append_by` does; `settings` are its other ones."""
    latent, rope = jnp.split(kv, [norm.size], axis=-1)
    return latent_append.latent_append(
        *(latent, rope, norm, *places_and_parts),
        latent_type=latent_type,
        rope_type=rope_type,
        quantisers=tuple(map(codec.quantiser, (latent_type, rope_type))),
        **settings,
    )


def attend_absorbed(q, q_rope, rows: LatentRows, k_up, v_up, positions, *, sm_scale, rotation):
    """Attends in latent space, see `mla.attend_absorbed`."""
    q_BTNR = rotate(jnp.einsum("BTNH,NHR->BTNR", q, k_up), rotation)
    o_BTNR = flash_mla_decode.flash_mla_decode(
        q_BTNR,
        q_rope,
        codec.parts(rows.latent),
        codec.parts(rows.rope),
        rows.table(q.shape[0]),
        positions,
        latent_type=codec.type_of(rows.latent),
        rope_type=codec.type_of(rows.rope),
        sm_scale=sm_scale,
    )
    return jnp.einsum("BTNR,NVR->BTNV", rotate(o_BTNR, rotation), v_up)


def attend_expanded(q, q_rope, rows: LatentRows, k_up, v_up, positions, *, sm_scale, rotation):
    """Attends in bfloat16 to keys and values that are up-projected some slots at a time.

    Arguments and result as in `mla.attend_expanded`.
    """
    half = lambda part: part.astype(jnp.bfloat16)
    q_BTNH, qr_BTNP = half(q), half(q_rope)
    k_up, v_up = half(rotate(k_up, rotation)), half(rotate(v_up, rotation))
    start_B, length_B = positions[:, 0], positions[:, -1] + 1
    size = slots_at_a_time(rows)

    def fold(i, carry):
        first = jnp.int32(i * size)
        latent_BCR, rope_BCP = rows.read(first, size, length_B, jnp.bfloat16)
        k_BCNH = jnp.einsum("BCR,NHR->BCNH", latent_BCR, k_up)
        v_BCNV = jnp.einsum("BCR,NVR->BCNV", latent_BCR, v_up)
        part = flash_mla_prefill.flash_mla_prefill(
            *(q_BTNH, qr_BTNP, k_BCNH, rope_BCP, v_BCNV),
            start_B - first,
            jnp.clip(length_B - first, 0, size),
            num_queries=length_B - start_B,
            sm_scale=sm_scale,
        )
        return flash_mla_prefill.merge(*carry, *part)

    B, T, N, _ = q.shape
    nothing = jnp.zeros((B, T, N, v_up.shape[1]), jnp.float32), jnp.full((B, T, N), -jnp.inf)
    num_parts = (jnp.max(length_B) + (size - 1)) // size
    return jax.lax.fori_loop(0, num_parts, fold, nothing)[0].astype(q.dtype)


def slots_at_a_time(rows: LatentRows) -> int:
    """Returns how many slots `attend_expanded` visits at a time: whole pages, or what divides a page."""
    if rows.page_size <= EXPANDED_SLOTS:
        return min(EXPANDED_SLOTS // rows.page_size * rows.page_size, rows.num_slots)
    return math.gcd(EXPANDED_SLOTS, rows.page_size)
