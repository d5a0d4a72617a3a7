"""Mixture of experts: a router, and one grouped product for prefill, decode and training alike.

The (token, expert) pairs are sorted by expert and laid out in tiles of M rows, every tile of one expert.
A tile reads its expert's weights once, decodes them and multiplies; rows that no pair owns are never read
back, so neither padding nor the weights of an unselected expert can reach the result. Tiles that no pair
needs are skipped, so a pair that is dropped takes no time.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import cpu_kernels
from mla_jax import quant
from mla_jax.config import ModelConfig, MoEConfig, RunConfig
from mla_jax.nn import collectives
from mla_jax.nn.layers import Stored, SwiGLU, experts_on_cpu, gated_ffn, gated_ffn_on_gpu, read_weight
from mla_jax.nn.taps import tap
from mla_jax.quant import dispatch

_MAX_TILE = 128
_TINY = 1e-20  # as in DeepSeek-V3's code: sigmoids may all be 0 in float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertReduction:
    """Smart Expert Reduction: of a token's K experts those that score well below the best are left out.

    Values of a step, not of its compilation: another setting compiles nothing, and a batch may mix them.

    Attributes:
      minimum: i32[B], or i32[L, B] for a value per layer, or L times i32[B] (`by_layer`): experts that are
        kept whatever they score.
      threshold: f32 like `minimum`: the others are kept from this share of the best score on, the bias of the
        router in both. 1 keeps `minimum` and exact ties with the best, 0 keeps all, infinity `minimum` alone.
      temperature: None drops; a float32[] above 0 keeps all and multiplies the weights beyond `minimum` by
        sigmoid((score - threshold * best score) / temperature), which has a gradient in `threshold`.

    Source: `-ser Kmin,t` of ik_llama.cpp, pull request 239.
    """

    minimum: jax.Array | tuple[jax.Array, ...]
    threshold: jax.Array | tuple[jax.Array, ...]
    temperature: jax.Array | None = None

    def of_layer(self, layer: int) -> "ExpertReduction":
        """Returns the setting of one layer, i32[B] and f32[B]."""
        is_whole = lambda values: not isinstance(values, tuple) and values.ndim == 1
        part = lambda values: values if is_whole(values) else values[layer]
        return dataclasses.replace(self, minimum=part(self.minimum), threshold=part(self.threshold))

    def by_layer(self, num_layers: int) -> "ExpertReduction":
        """Returns the same taken apart, for loops: XLA would slice it in every step of one."""
        layers = [self.of_layer(layer) for layer in range(num_layers)]
        minimum, threshold = zip(*((one.minimum, one.threshold) for one in layers), strict=True)
        return dataclasses.replace(self, minimum=minimum, threshold=threshold)

    def of_tokens(self, num_tokens: int) -> "ExpertReduction":
        """Returns the setting of each token, [B * T], of one that is [B]."""
        part = lambda values: jnp.repeat(values, num_tokens)
        return dataclasses.replace(self, minimum=part(self.minimum), threshold=part(self.threshold))


def _share_kept(score_XK, reduction):
    """Returns f32[X, K]: 1 for an expert that is kept, 0 for one that is dropped."""
    threshold_X1 = reduction.threshold[:, None]
    bar_X1 = jnp.where(jnp.isinf(threshold_X1), jnp.inf, threshold_X1 * score_XK[:, :1])
    is_safe_XK = jnp.arange(score_XK.shape[1], dtype=jnp.int32)[None] < reduction.minimum[:, None]
    is_safe_XK |= (reduction.threshold <= 0)[:, None]
    if reduction.temperature is None:
        return (is_safe_XK | (score_XK >= bar_X1)).astype(jnp.float32)
    return jnp.where(is_safe_XK, 1.0, jax.nn.sigmoid((score_XK - bar_X1) / reduction.temperature))


def select_experts(
    probs,
    bias,
    config: MoEConfig,
    *,
    group_routing: bool = True,
    reduction: ExpertReduction | None = None,
    choose=lambda ids: ids,
):
    """Selects K experts per token and their weights.

    Args:
      probs: f32[X, E] affinity scores, softmax or sigmoid of the router's logits.
      bias: f32[E] added to the scores that select, or None.
      config: sizes and rule; with softmax the groups of V2 ("group_limited_greedy"), with sigmoid those of V3
        ("noaux_tc").
      group_routing: False ignores expert groups.
      reduction: which of the K to leave out, of the kept groups, a value per token; None for none.
      choose: from the ids that would be returned to those that are; the weights are of the latter.

    Returns:
      ids i32[X, K], best first, ties to the lowest id, E for one that is left out; and weights f32[X, K].

    Source: DeepSeek-V2 (arXiv:2405.04434) section 2.2.2, a group scores as its best expert; DeepSeek-V3
    (arXiv:2412.19437) section 2.1.2, a group scores as the sum of its two best biased experts.
    """
    score_XE = probs if bias is None else probs + bias[None]
    kept_XE = score_XE
    if group_routing and config.num_groups > 1:
        kept_XE = _keep_best_groups(score_XE, config)
    best_XK, ids_XK = jax.lax.top_k(kept_XE, config.num_experts_per_token)
    if reduction is not None:
        ids_XK = jnp.where(_share_kept(best_XK, reduction) > 0, ids_XK, config.num_experts)
    ids_XK = choose(ids_XK)
    of_chosen = lambda values_XE: jnp.take_along_axis(values_XE, ids_XK, axis=-1, mode="fill", fill_value=0)
    weight_XK = of_chosen(probs)
    if reduction is not None and reduction.temperature is not None:
        weight_XK = weight_XK * _share_kept(of_chosen(score_XE), reduction)
    if config.normalize_weights:
        weight_XK = weight_XK / (_join_halves(weight_XK, jnp.add, 0.0) + _TINY)
    return ids_XK, weight_XK * config.weights_scale


def _select_by_xla(logits, bias, reduction, *, config, **kwargs):
    gate = softmax if config.gating == "softmax" else jax.nn.sigmoid
    return select_experts(gate(logits), bias, config, reduction=reduction, **kwargs)


def _select_on_cpu(logits, bias, reduction, *, config, group_routing):
    minimum, threshold = (None, None) if reduction is None else (reduction.minimum, reduction.threshold)
    return cpu_kernels.select_experts(
        *(logits, bias, minimum, threshold),
        num_chosen=config.num_experts_per_token,
        gating=config.gating,
        num_groups=config.num_groups if group_routing else 1,
        num_groups_used=config.num_groups_used if group_routing else 1,
        normalize=config.normalize_weights,
        scale=config.weights_scale,
    )


def _keep_best_groups(score_XE, config):
    grouped = score_XE.reshape(score_XE.shape[0], config.num_groups, -1)
    best_of_group = 1 if config.gating == "softmax" else min(2, grouped.shape[-1])
    group_score = jax.lax.top_k(grouped, best_of_group)[0].sum(axis=-1)
    _, kept = jax.lax.top_k(group_score, config.num_groups_used)
    is_kept = jax.nn.one_hot(kept, config.num_groups, dtype=jnp.bool).any(axis=-2)
    return jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(score_XE.shape)


def softmax(logits: jax.Array) -> jax.Array:
    """Returns `jax.nn.softmax` of f32[X, E], a row of which is the same to the last bit whatever X is."""
    largest_X1 = _join_halves(jax.lax.stop_gradient(logits), jnp.maximum, -jnp.inf)
    power_XE = jnp.exp(logits - largest_X1)
    return power_XE / _join_halves(power_XE, jnp.add, 0.0)


def _join_halves(values, join, nothing):
    """Reduces rows [X, n] to [X, 1], halves at a time: XLA chooses the order of a reduction by its shape."""
    size = 1 << (values.shape[1] - 1).bit_length()
    joined = jnp.pad(values, ((0, 0), (0, size - values.shape[1])), constant_values=nothing)
    while size > 1:
        size //= 2
        joined = join(joined[:, :size], joined[:, size:])
    return joined


def tile_size(num_pairs: int, num_experts: int) -> int:
    """Returns the rows M per tile: a power of two near the mean number of pairs per expert, at most 128."""
    mean = max(1, num_pairs // num_experts)
    return min(_MAX_TILE, 1 << (mean.bit_length() - 1))


def assign_tiles(ids, num_experts: int, tile: int):
    """Lays pairs out in tiles of one expert each.

    Args:
      ids: i32[X, K] expert of each pair; E for none.
      num_experts: E.
      tile: rows M per tile.

    Returns:
      expert i32[Y] of each tile, slot i32[X, K], the row in [0, Y * M) of each pair and Y * M for a pair of
      no expert, and the number of tiles that are needed, the first ones. Y is the static bound of tiles that
      any routing can need.
    """
    flat = ids.reshape(-1)
    num_tiles = min(flat.size, flat.size // tile + num_experts)
    count_E = jnp.zeros((num_experts,), jnp.int32).at[flat].add(1, mode="drop")
    end_tile_E = jnp.cumsum(-(-count_E // tile))
    first_E = jnp.cumsum(count_E) - count_E
    order = jnp.argsort(flat, stable=True)
    rank = jnp.zeros_like(flat).at[order].set(jnp.arange(flat.size, dtype=jnp.int32))
    start_E = (end_tile_E - (-(-count_E // tile))) * tile
    offset = jnp.take(start_E - first_E, flat, mode="clip")
    slot = jnp.where(flat < num_experts, offset + rank, num_tiles * tile)
    tiles = jnp.arange(num_tiles, dtype=jnp.int32)
    expert_Y = jnp.searchsorted(end_tile_E, tiles, side="right").astype(jnp.int32)
    return expert_Y, slot.reshape(ids.shape), end_tile_E[-1]


def grouped_ffn(x, ids, weights, experts, *, num_experts: int):
    """Applies each token's experts and sums them by weight.

    Args:
      x: [X, D] tokens.
      ids: i32[X, K] experts of each token; E for none.
      weights: f32[X, K].
      experts: weights by name, plain or quantised: gate, up [E, F, D], or gate_up [E, 2F, D]; down [E, D, F].
      num_experts: E.

    Returns:
      f32[X, D].
    """
    grouped = lambda multiply: functools.partial(_grouped_ffn, num_experts=num_experts, multiply=multiply)
    ways = dict(cpu=experts_on_cpu, cuda=None, default=grouped(_tiles_in_turn))
    if all(isinstance(weight, quant.PlanarTensor) for weight in experts.values()):
        ways["cuda"] = grouped(_tiles_on_gpu)
    return dispatch.run(x, ids, weights, experts, weights=experts.values(), **ways)


def _grouped_ffn(x, ids, weights, experts, *, num_experts, multiply):
    x_XD = x
    tile = tile_size(ids.size, num_experts)
    expert_Y, slot_XK, num_needed = assign_tiles(ids, num_experts, tile)
    token_XK = jnp.broadcast_to(jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None], ids.shape)
    source = jnp.full((expert_Y.size * tile,), ids.shape[0], jnp.int32)
    source = source.at[slot_XK].set(token_XK, mode="drop")
    tiles_YMD = x_XD.at[source].get(mode="fill", fill_value=0).reshape(expert_Y.size, tile, -1)
    out_YMD = multiply(tiles_YMD, expert_Y, num_needed, experts)
    out_XKD = out_YMD.reshape(-1, x.shape[-1]).at[slot_XK].get(mode="fill", fill_value=0)
    return jnp.einsum("XKD,XK->XD", out_XKD, weights)


def _tiles_in_turn(tiles_YMD, expert_Y, num_needed, experts):
    def multiply(expert, tile_MD):
        return gated_ffn(tile_MD, {name: weight[expert] for name, weight in experts.items()})

    def one_tile(index, expert_and_tile):
        skip = lambda expert, tile_MD: jnp.zeros(tile_MD.shape, jnp.float32)
        return index + 1, jax.lax.cond(index < num_needed, multiply, skip, *expert_and_tile)

    # The backward pass computes a tile again: it would hold the weights of every tile's expert otherwise.
    return jax.lax.scan(jax.checkpoint(one_tile), jnp.int32(0), (expert_Y, tiles_YMD))[1]


def _tiles_on_gpu(tiles_YMD, expert_Y, num_needed, experts):
    """All tiles at once: those that are not needed have no expert, and their programs end at once."""
    return gated_ffn_on_gpu(tiles_YMD, expert_Y, experts)


class Router(nn.Module):
    """Scores every expert for every token and selects."""

    config: MoEConfig
    run: RunConfig

    @nn.compact
    def __call__(self, x, positions, reduction=None):
        moe = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
        weight = read_weight(self, "weight", init, (moe.num_experts, x.shape[-1]))
        bias = None
        if moe.has_selection_bias:
            bias = read_weight(self, "bias", nn.initializers.zeros, (moe.num_experts,)).astype(jnp.float32)
        logits_XE = tap(self, "router", quant.matmul(x, weight), positions)
        ids_XK, weight_XK = self._select(logits_XE, bias, reduction, positions)
        return ids_XK, tap(self, "expert_weights", weight_XK, positions)

    def _select(self, logits_XE, bias, reduction, positions):
        kwargs = dict(config=self.config, group_routing=self.run.group_routing)
        default = functools.partial(_select_by_xla, **kwargs)
        is_soft = reduction is not None and reduction.temperature is not None
        cpu = None if is_soft else functools.partial(_select_on_cpu, **kwargs)
        ids_XK, weight_XK = dispatch.run(logits_XE, bias, reduction, cpu=cpu, default=default)
        chosen_XK = self._chosen(ids_XK, positions)
        if chosen_XK is ids_XK:
            return ids_XK, weight_XK
        edited_XK = default(logits_XE, bias, reduction, choose=lambda _: chosen_XK)[1]
        is_same_X1 = jnp.all(chosen_XK == ids_XK, axis=-1, keepdims=True)
        return chosen_XK, jnp.where(is_same_X1, weight_XK, edited_XK)

    def _chosen(self, ids_XK, positions):
        """Returns the ids as edits make them; what is no expert is none."""
        edited_XK, E = tap(self, "expert_ids", ids_XK, positions), self.config.num_experts
        if edited_XK is ids_XK:
            return ids_XK
        return jnp.where((edited_XK >= 0) & (edited_XK < E), edited_XK, E)


class Experts(nn.Module):
    """Holds the stacked expert weights, gate and up apart or merged as the file has them."""

    num_experts: int
    hidden_dim: int
    out_init_scale: float

    @nn.compact
    def __call__(self, x, ids, weights):
        E, F, D = self.num_experts, self.hidden_dim, x.shape[-1]
        shapes = {"gate": (E, F, D), "up": (E, F, D), "down": (E, D, F)}
        if "gate_up" in self.variables.get("params", {}):
            shapes = {"gate_up": (E, 2 * F, D), "down": (E, D, F)}
        experts = {
            name: Stored(shape, self.out_init_scale if name == "down" else 1.0, 1, name=name)()
            for name, shape in shapes.items()
        }
        return grouped_ffn(x, ids, weights, experts, num_experts=E)


class MoE(nn.Module):
    """Routed experts plus the shared expert, on the same normalised input."""

    config: ModelConfig
    run: RunConfig

    def setup(self):
        config, sizes = self.config, self.run.sizes(self.config)
        out_scale = 0.5 / config.num_layers
        self.router = Router(config.moe, self.run)
        self.experts = Experts(sizes.num_experts, sizes.expert_hidden_dim, out_scale)
        if config.moe.num_shared_experts:
            self.shared = SwiGLU(sizes.shared_hidden_dim, out_scale)

    def __call__(self, x, positions, reduction=None):
        shard, (ids_XK, weight_XK) = self.run.shard, self.route(x, positions, reduction)
        x_XD = x.reshape(-1, x.shape[-1])
        num_experts = self.experts.num_experts
        out_XD = collectives.by_experts(self.experts, x_XD, ids_XK, weight_XK, num_experts, shard)
        if self.config.moe.num_shared_experts:
            out_XD += self.shared(x_XD)
        return collectives.sum_over_group(out_XD, shard).reshape(x.shape)

    def route(self, x, positions, reduction=None):
        """Returns the experts i32[B * T, K] of tokens [B, T, D], and their weights."""
        reduction = None if reduction is None else reduction.of_tokens(x.shape[1])
        return self.router(x.reshape(-1, x.shape[-1]), positions, reduction)
