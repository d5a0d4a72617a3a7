"""Multi-head latent attention: keys and values of all heads come of one latent per token, which is cached.

Two ways to attend are equal up to rounding:
Expanded: up-project the latent to keys and values per head, then attend as usual. S * N * (H + V) numbers.
Absorbed: move W_uk onto the query and W_uv onto the output, and attend to the latent itself.

Each visits the cache in chunks and keeps a running softmax, so a score matrix is never larger than one
chunk; without flash attention the one chunk is the whole cache.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import cpu_kernels
from mla_jax.cache import HeadRows, LatentRows, rotate
from mla_jax.config import MLAMode, ModelConfig, RunConfig
from mla_jax.nn import collectives, mla_alone, mla_on_cpu, mla_on_gpu, mla_split
from mla_jax.nn import rope as rope_lib
from mla_jax.nn.layers import Linear, NormWeight, RMSNorm, Stored, rms_norm
from mla_jax.nn.taps import is_tapped, tap
from mla_jax.nn.up_projections import UpProjections
from mla_jax.quant import dispatch

FLASH_CHUNK = 256  # cached tokens per step of the running softmax
PREFILL_TOKENS = 32  # modes 2 and 3 expand from this many new tokens on, padding included

_MASKED = -1e30  # finite: a chunk that is masked throughout must not produce inf - inf


def attend_heads(q, q_rope, rows: HeadRows, positions, *, sm_scale, chunk, rotation=None, with_lse=False):
    """Attends to keys and values cached per head (mode 0).

    Args:
      q: [B, T, N, H] query part without position.
      q_rope: [B, T, N, P] rotated query part.
      rows: cached keys and values.
      positions: i32[B, T], ascending in T. A query sees the slots up to its own position.
      sm_scale: multiplies the scores, YaRN's squared temperature included.
      chunk: slots visited at a time; it divides the page size, or the page size divides it.
      rotation: block size of the Hadamard rotation that the cached keys have had, None for none.
      with_lse: whether to return the log of the sum of exponentials of each query's scores too.

    Returns:
      [B, T, N, V] in the dtype of `q`; with `with_lse` that and f32[B, T, N].
    """
    q_BTNA = rotate(jnp.concatenate([q, q_rope], axis=-1), rotation)
    read = lambda start: rows.read(start, chunk, positions[:, -1] + 1, q.dtype)
    settings = dict(sm_scale=sm_scale, chunk=chunk, with_lse=with_lse)
    return _attend_heads(q_BTNA, read, positions, rows.num_slots, **settings)


def attend_expanded(
    q, q_rope, rows: LatentRows, k_up, v_up, positions, *, sm_scale, chunk, rotation=None, with_lse=False
):
    """Attends with keys and values up-projected from the latent, a chunk at a time. Cheaper when T is large.

    Args:
      q: [B, T, N, H] query part without position.
      q_rope: [B, T, N, P] rotated query part.
      rows: cached latents.
      k_up: [N, H, R] `W_uk`.
      v_up: [N, V, R] `W_uv`.
      positions: i32[B, T], ascending in T. A query sees the slots up to its own position.
      sm_scale: multiplies the scores, YaRN's squared temperature included.
      chunk: slots visited at a time; it divides the page size, or the page size divides it.
      rotation: block size of the Hadamard rotation that the cached latents have had, None for none.
      with_lse: whether to return the log of the sum of exponentials of each query's scores too.

    Returns:
      [B, T, N, V] in the dtype of `q`; with `with_lse` that and f32[B, T, N].
    """
    q_BTNA = jnp.concatenate([q, q_rope], axis=-1)
    k_up, v_up = rotate(k_up, rotation), rotate(v_up, rotation)
    read = lambda start: expand(*rows.read(start, chunk, positions[:, -1] + 1, q.dtype), k_up, v_up)
    settings = dict(sm_scale=sm_scale, chunk=chunk, with_lse=with_lse)
    return _attend_heads(q_BTNA, read, positions, rows.num_slots, **settings)


def attend_absorbed(
    q, q_rope, rows: LatentRows, k_up, v_up, positions, *, sm_scale, chunk, rotation=None, with_lse=False
):
    """Attends in latent space: multi-query attention, one key head of width R + P. Cheaper when T is small.

    Arguments and result as in `attend_expanded`.
    """
    q_BTNR = rotate(jnp.einsum("BTNH,NHR->BTNR", q, k_up), rotation)
    o_BNTR, *sums = _attend_latent(q_BTNR, q_rope, rows, positions, sm_scale=sm_scale, chunk=chunk)
    o_BNTR = rotate(o_BNTR / sums[1][..., None], rotation).astype(q.dtype)
    o_BTNV = jnp.einsum("BNTR,NVR->BTNV", o_BNTR, v_up)
    return (o_BTNV, _log_sum_exp(*sums)) if with_lse else o_BTNV


def attend_split(q, q_rope, rows: LatentRows, up: UpProjections, positions, *, shard, rotation, **kwargs):
    """Attends in latent space to a cache that devices split, see `mla_split`."""
    k_up, v_up = up.decode()
    last = mla_split.last_own_slots(positions, rows, shard)
    own = lambda q_BTNR, qr_BTNP: _attend_latent(q_BTNR, qr_BTNP, rows, last, **kwargs)
    q_BTNR = rotate(jnp.einsum("BTNH,NHR->BTNR", q, k_up), rotation)
    o_BTNR = rotate(mla_split.attend(own, q_BTNR, q_rope), rotation)
    return jnp.einsum("BTNR,NVR->BTNV", o_BTNR, v_up)


def _attend_latent(q_BTNR, qr_BTNP, rows, positions, *, sm_scale, chunk):
    """Returns the sums of `_running_softmax` over the latents."""
    q_BNTR, qr_BNTP = q_BTNR.swapaxes(1, 2), qr_BTNP.swapaxes(1, 2)
    length_B = positions[:, -1] + 1

    def visit(start):
        latent_BCR, rope_BCP = rows.read(start, chunk, length_B, q_BTNR.dtype)
        score_BNTC = jnp.einsum("BNTR,BCR->BNTC", q_BNTR, latent_BCR, preferred_element_type=jnp.float32)
        score_BNTC += jnp.einsum("BNTP,BCP->BNTC", qr_BNTP, rope_BCP, preferred_element_type=jnp.float32)
        return score_BNTC, lambda prob_BNTC: jnp.einsum("BNTC,BCR->BNTR", prob_BNTC, latent_BCR)

    return _running_softmax(visit, positions, rows.num_slots, sm_scale=sm_scale, chunk=chunk)


def expand(latent, rope, k_up, v_up):
    """Up-projects latent [B, C, R] and rope [B, C, P] to keys [B, C, N, A] and values [B, C, N, V]."""
    latent_BCR = latent
    k_BCNH = jnp.einsum("BCR,NHR->BCNH", latent_BCR, k_up)
    v_BCNV = jnp.einsum("BCR,NVR->BCNV", latent_BCR, v_up)
    rope_BCNP = jnp.broadcast_to(rope[:, :, None], (*k_BCNH.shape[:3], rope.shape[-1]))
    return jnp.concatenate([k_BCNH, rope_BCNP], axis=-1), v_BCNV


def head_groups(num_heads: int, bytes_per_head: int, limit: int) -> int:
    """Returns the least number of equal groups of heads of which one takes at most `limit` MiB.

    A head is never cut: groups of one head may take more. A `limit` of 0 is none.
    """
    fits = lambda groups: num_heads // groups * bytes_per_head <= limit << 20
    divisors = (groups for groups in range(1, num_heads + 1) if num_heads % groups == 0)
    return 1 if limit == 0 else next(filter(fits, divisors), num_heads)


def _attend_heads(q_BTNA, read, positions, num_slots, *, sm_scale, chunk, with_lse):
    """Attends to whatever keys and values per head `read(start)` gives."""
    q_BNTA = q_BTNA.swapaxes(1, 2)

    def visit(start):
        k_BCNA, v_BCNV = read(start)
        score_BNTC = jnp.einsum("BNTA,BCNA->BNTC", q_BNTA, k_BCNA, preferred_element_type=jnp.float32)
        return score_BNTC, lambda prob_BNTC: jnp.einsum("BNTC,BCNV->BNTV", prob_BNTC, v_BCNV)

    o_BNTV, *sums = _running_softmax(visit, positions, num_slots, sm_scale=sm_scale, chunk=chunk)
    o_BTNV = (o_BNTV / sums[1][..., None]).swapaxes(1, 2).astype(q_BTNA.dtype)
    return (o_BTNV, _log_sum_exp(*sums)) if with_lse else o_BTNV


def _running_softmax(visit, positions_BT, num_slots, *, sm_scale, chunk):
    """Returns the weighted sum o of values, and m and l, of which o / l is softmax's; none seen: o = l = 0.

    `visit(start)` gives the scores of a chunk and their weighing.

    With m the largest score so far, l the sum of exp(score - m) and o the weighted sum, a new chunk only
    rescales l and o by exp(m - new m). Source: FlashAttention (arXiv:2205.14135), section 3.1.
    """

    def fold(i, carry):
        m_BNT, l_BNT, o_BNTU = carry
        start = jnp.int32(i * chunk)
        score_BNTC, weigh = visit(start)
        slots_C = start + jnp.arange(chunk, dtype=jnp.int32)
        seen_BNTC = (slots_C[None, None] <= positions_BT[:, :, None])[:, None]
        score_BNTC = jnp.where(seen_BNTC, score_BNTC * sm_scale, _MASKED)
        new_m_BNT = jnp.maximum(m_BNT, score_BNTC.max(axis=-1))
        new_m_BNT = jax.lax.stop_gradient(new_m_BNT)  # it cancels out of the result
        prob_BNTC = jnp.where(seen_BNTC, jnp.exp(score_BNTC - new_m_BNT[..., None]), 0.0)
        shrink_BNT = jnp.exp(m_BNT - new_m_BNT)
        o_BNTU = o_BNTU * shrink_BNT[..., None] + weigh(prob_BNTC)
        return new_m_BNT, l_BNT * shrink_BNT + prob_BNTC.sum(axis=-1), o_BNTU

    score, value = jax.eval_shape(lambda: _evaluate(visit))
    state = jnp.full(score.shape[:3], _MASKED), jnp.zeros(score.shape[:3]), jnp.zeros(value.shape)
    if chunk == num_slots:
        m_BNT, l_BNT, o_BNTU = fold(0, state)
    else:
        num_chunks = jnp.max(positions_BT) // chunk + 1
        m_BNT, l_BNT, o_BNTU = jax.lax.fori_loop(0, num_chunks, fold, state)
    return o_BNTU, m_BNT, l_BNT


def _log_sum_exp(m_BNT, l_BNT):
    return (m_BNT + jnp.log(l_BNT)).swapaxes(1, 2)


def _evaluate(visit):
    score, weigh = visit(jnp.int32(0))
    return score, weigh(score)


class MLAttention(nn.Module):
    """Projects to queries and latents, appends to the cache and attends in the mode of the run."""

    config: ModelConfig
    run: RunConfig

    @nn.compact
    def __call__(self, x, rows, positions, slots):
        """Returns the attention output and the rows with the new tokens in them.

        Args:
          x: [B, T, D] normalised input.
          rows: this layer's cache, or None: attend to `x` alone.
          positions: i32[B, T], ascending in T.
          slots: i32[B, T] where the new tokens go; the capacity S drops one. Not read without a cache.
        """
        mla = self.config.mla
        scale = rope_lib.softmax_scale(self.config.rope, mla.qk_head_dim)
        q_BTNH, qr_BTNP = self._queries(x, positions)
        raw = self._latents(x)
        up = self._up_projections()
        rotation = None if rows is None else self.run.latent_rotation
        kwargs = dict(sm_scale=scale, chunk=self._chunk(rows, x.shape[1]), rotation=rotation)
        is_cached = rows is not None
        if rows is None:
            latent_BTR, rope_BTP = self._finish(raw, positions)
            rows = LatentRows(latent=latent_BTR, rope=rope_BTP)
        elif isinstance(rows, LatentRows):
            qr_BTNP = rotate(qr_BTNP, self.run.rope_rotation)
            rows = self._append(rows, raw, positions, slots)
        else:
            k_BTNA, v_BTNV = expand(*self._finish(raw, positions), *up.decode())
            rows = rows.append(rotate(k_BTNA, rotation), v_BTNV, slots)
        if isinstance(rows, HeadRows):
            o_BTNV = attend_heads(q_BTNH, qr_BTNP, rows, positions, **kwargs)
        else:
            o_BTNV = self._attend_latents(q_BTNH, qr_BTNP, rows, up, positions, is_cached=is_cached, **kwargs)
        if is_tapped(self, "attn_lse"):
            parts = q_BTNH, qr_BTNP, rows, up, positions
            tap(self, "attn_lse", self._lse(*parts, is_cached=is_cached, **kwargs), positions)
        o_BTNV = tap(self, "attn_heads", o_BTNV, positions)
        out_scale = 0.5 / self.config.num_layers  # two residual branches a layer
        o_BTD = Linear(x.shape[-1], out_scale, name="out")(o_BTNV.reshape(*x.shape[:2], -1))
        return collectives.sum_over_group(o_BTD, self.run.shard), rows

    def _attend_latents(self, q_BTNH, qr_BTNP, rows, up, positions, *, is_cached, **kwargs):
        expands, shard = self._expands(q_BTNH.shape[1]), self.run.shard
        if is_cached and shard is not None and shard.splits_cache:
            return attend_split(q_BTNH, qr_BTNP, rows, up, positions, shard=shard, **kwargs)
        if expands and not is_cached:
            parts = q_BTNH, qr_BTNP, rows.latent, rows.rope, *up.decode(), positions
            for_gpu = self.run.flash and not dispatch.is_exact() and dispatch.for_gpu(self.run.gpu_kernels)
            return mla_alone.attend(*parts, sm_scale=kwargs["sm_scale"], for_gpu=for_gpu)[0]
        attend = attend_expanded if expands else attend_absorbed

        B, T, _, _ = q_BTNH.shape
        settings = dict(sm_scale=kwargs["sm_scale"], rotation=kwargs["rotation"])
        expanded = self.config.mla.qk_head_dim + self.config.mla.v_head_dim

        def default(q, q_rope, rows, up, positions):
            bytes_per_head = 4 * B * kwargs["chunk"] * (T + expanded if expands else T)
            return self._in_head_groups(
                functools.partial(attend, **kwargs), bytes_per_head, q, q_rope, rows, up, positions
            )

        def on_gpu(q, q_rope, rows, up, positions):
            attend = mla_on_gpu.attend_expanded if expands else mla_on_gpu.attend_absorbed
            bytes_per_head = 2 * B * mla_on_gpu.slots_at_a_time(rows) * expanded if expands else 0
            return self._in_head_groups(
                functools.partial(attend, **settings), bytes_per_head, q, q_rope, rows, up, positions
            )

        args = q_BTNH, qr_BTNP, rows, up, positions
        if not is_cached or not self.run.flash:
            return default(*args)
        on_cpu = mla_on_cpu.attend_expanded if expands else mla_on_cpu.attend_absorbed
        cuda = on_gpu if self._for_gpu(rows) else None
        return dispatch.run(*args, cpu=functools.partial(on_cpu, **settings), cuda=cuda, default=default)

    def _lse(self, q_BTNH, qr_BTNP, rows, up, positions, *, is_cached, **kwargs):
        """Computes the scores once more, in XLA: kernels go as ever, and to record changes no result."""
        if isinstance(rows, HeadRows):
            return attend_heads(q_BTNH, qr_BTNP, rows, positions, with_lse=True, **kwargs)[1]
        if not is_cached:
            parts = q_BTNH, qr_BTNP, rows.latent, rows.rope, *up.decode(), positions
            return mla_alone.attend(*parts, sm_scale=kwargs["sm_scale"], for_gpu=False)[1]
        B, T, _, _ = q_BTNH.shape
        way = lambda *args: attend_absorbed(*args, with_lse=True, **kwargs)[1]
        return self._in_head_groups(way, 4 * B * kwargs["chunk"] * T, q_BTNH, qr_BTNP, rows, up, positions)

    def _in_head_groups(self, attend, bytes_per_head, q_BTNH, qr_BTNP, rows, up, positions):
        """Attends some heads after the other, so that what is held at a time fits `attention_max_batch`."""
        N, (k_up, v_up) = q_BTNH.shape[2], up.decode()
        groups = head_groups(N, bytes_per_head, self.run.attention_max_batch)
        if groups == 1:
            return attend(q_BTNH, qr_BTNP, rows, k_up, v_up, positions)
        split = lambda part, axis: jnp.stack(jnp.split(part, groups, axis))
        parts = split(q_BTNH, 2), split(qr_BTNP, 2), split(k_up, 0), split(v_up, 0)
        one = lambda part: attend(part[0], part[1], rows, part[2], part[3], positions)
        return jnp.concatenate(jax.lax.map(one, parts), axis=2)

    def _queries(self, x, positions):
        mla = self.config.mla
        if mla.q_lora_rank is None:
            q = Linear(self._num_heads * mla.qk_head_dim, name="q")(x)
        else:
            q_BTQ = Linear(mla.q_lora_rank, name="q_a")(x)
            q_BTQ = RMSNorm(self.config.norm_epsilon, name="q_a_norm")(q_BTQ)
            q = Linear(self._num_heads * mla.qk_head_dim, name="q_b")(q_BTQ)
        q_BTNA = q.reshape(*x.shape[:2], self._num_heads, mla.qk_head_dim)
        q_BTNH, qr_BTNP = self._rotated(q_BTNA, positions)
        return tap(self, "q", q_BTNH, positions), tap(self, "q_rope", qr_BTNP, positions)

    def _rotated(self, x_BTNA, positions):
        """Returns the part without position, and the rest, rotated by it."""

        def default(x_BTNA, positions):
            x_BTNH, xr_BTNP = jnp.split(
                x_BTNA, [x_BTNA.shape[-1] - self.config.mla.qk_rope_head_dim], axis=-1
            )
            return x_BTNH, rope_lib.rotate(xr_BTNP, positions, self._frequencies())

        def on_cpu(x_BTNA, positions):
            return cpu_kernels.split_queries(x_BTNA, *rope_lib.cos_and_sin(positions, self._frequencies()))

        return dispatch.run(x_BTNA, positions, cpu=on_cpu, default=default)

    def _latents(self, x):
        """Returns raw latents and rotary parts of keys, [B, T, R + P], and the norm's weight."""
        mla = self.config.mla
        kv_a = Linear(mla.kv_lora_rank + mla.qk_rope_head_dim, name="kv_a")(x)
        return kv_a, NormWeight(mla.kv_lora_rank, name="kv_a_norm")()

    def _finish(self, raw, positions):
        kv_a, norm = raw
        latent_BT1R, rope_BT1P = self._rotated(kv_a[:, :, None], positions)
        latent_BTR, rope_BTP = latent_BT1R[:, :, 0], rope_BT1P[:, :, 0]
        latent_BTR = rms_norm(latent_BTR, norm, self.config.norm_epsilon)
        return tap(self, "latent", latent_BTR, positions), tap(self, "k_rope", rope_BTP, positions)

    def _append(self, rows, raw, positions, slots):
        def default(rows, raw, positions, slots):
            latent_BTR, rope_BTP = self._finish(raw, positions)
            latent_BTR = rotate(latent_BTR, self.run.latent_rotation)
            return rows.append(latent_BTR, rotate(rope_BTP, self.run.rope_rotation), slots)

        def by_kernel(kernel, rows, raw, positions, slots):
            angles = rope_lib.cos_and_sin(positions, self._frequencies())
            rotations = dict(latent_rotation=self.run.latent_rotation, rope_rotation=self.run.rope_rotation)
            settings = rotations | dict(epsilon=self.config.norm_epsilon)
            return rows.append_by(kernel, *raw, *angles, slots, **settings)

        ways = {}
        if not is_tapped(self, "latent", "k_rope"):
            ways["cpu"] = functools.partial(by_kernel, cpu_kernels.latent_append)
            if self._for_gpu(rows):
                ways["cuda"] = functools.partial(by_kernel, mla_on_gpu.append)
        return dispatch.run(rows, raw, positions, slots, **ways, default=default)

    @property
    def _num_heads(self):
        return self.run.sizes(self.config).num_heads

    def _for_gpu(self, rows):
        """Whether to trace kernels of GPUs, which take rows of 2**n numbers and pages of 16 * n slots."""
        mla = self.config.mla
        fits = all(size & (size - 1) == 0 for size in (mla.kv_lora_rank, mla.qk_rope_head_dim))
        return fits and rows.page_size % 16 == 0 and dispatch.for_gpu(self.run.gpu_kernels)

    def _frequencies(self):
        return rope_lib.inverse_frequencies(self.config.rope, self.config.mla.qk_rope_head_dim)

    def _up_projections(self):
        mla = self.config.mla
        N, H, V, R = self._num_heads, mla.qk_nope_head_dim, mla.v_head_dim, mla.kv_lora_rank
        if "k_b" in self.variables.get("params", {}):
            k, v = Stored((N, R, H), name="k_b")(), Stored((N, V, R), name="v_b")()
            return UpProjections(k=k, v=v, num_heads=N, value_size=V)
        return UpProjections(kv=Stored((N * (H + V), R), name="kv_b")(), num_heads=N, value_size=V)

    def _chunk(self, rows, num_tokens):
        if rows is None:
            return num_tokens  # in one piece: reverse mode cannot go through a loop of run-time length
        without_flash = self.run.mla == MLAMode.MIXED and not self._expands(num_tokens)
        is_whole_chunks = rows.page_size % FLASH_CHUNK == 0 or FLASH_CHUNK % rows.page_size == 0
        if not self.run.flash or without_flash or not is_whole_chunks:
            return rows.num_slots
        return min(FLASH_CHUNK, rows.num_slots)

    def _expands(self, num_tokens):
        if self.run.mla in (MLAMode.MIXED, MLAMode.FLASH_MIXED):
            return self.run.flash and num_tokens >= PREFILL_TOKENS
        return self.run.mla == MLAMode.EXPANDED
