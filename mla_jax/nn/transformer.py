"""The deepseek2 transformer: layers of MLA and of a dense or mixture-of-experts FFN."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mla_jax import quant, sharding
from mla_jax.cache import Cache
from mla_jax.config import ModelConfig, RunConfig, Shard
from mla_jax.nn import collectives, mla_split
from mla_jax.nn import taps as taps_lib
from mla_jax.nn.layers import Linear, RMSNorm, SwiGLU, read_weight
from mla_jax.nn.mla import MLAttention
from mla_jax.nn.moe import ExpertReduction, MoE
from mla_jax.nn.taps import tap
from mla_jax.quant import dispatch


class Layer(nn.Module):
    """`h = x + attention(norm(x))`, then `h + ffn(norm(h))`."""

    config: ModelConfig
    run: RunConfig
    is_dense: bool

    def setup(self):
        config = self.config
        self.attn_norm, self.ffn_norm = RMSNorm(config.norm_epsilon), RMSNorm(config.norm_epsilon)
        self.attn = MLAttention(config, self.run)
        if self.is_dense:
            self.ffn = SwiGLU(self.run.sizes(config).dense_hidden_dim, 0.5 / config.num_layers)
        else:
            self.ffn = MoE(config, self.run)

    def __call__(self, x, rows, positions, slots, reduction):
        x, normed, rows = self.attend(x, rows, positions, slots)
        if self.is_dense:
            ffn = collectives.sum_over_group(self.ffn(normed), self.run.shard)
        else:
            ffn = self.ffn(normed, positions, reduction)
        return self.add(x, ffn, positions), rows

    def attend(self, x, rows, positions, slots):
        """Returns `h` and `norm(h)`, each [B, T, D], and the rows with the new tokens in them."""
        attention, rows = self.attn(self.attn_norm(x), rows, positions, slots)
        x = x + tap(self, "attn_out", attention, positions)
        return x, self.ffn_norm(x), rows

    def add(self, x, ffn, positions):
        """Returns `h + ffn(norm(h))` of `h` and what the FFN gave."""
        return x + tap(self, "ffn_out", ffn, positions)


class Embedding(nn.Module):
    """A row per token id."""

    vocab_size: int
    embed_dim: int
    shard: Shard | None = None

    @nn.compact
    def __call__(self, tokens):
        weight = read_weight(self, "weight", nn.initializers.normal(0.5), (self.vocab_size, self.embed_dim))
        take = functools.partial(quant.take_rows, weight)
        return collectives.of_group_rows(take, tokens, self.vocab_size, self.shard)


class Transformer(nn.Module):
    """Tokens and a cache in, hidden states and the longer cache out; `unembed` makes logits of them."""

    config: ModelConfig
    run: RunConfig

    def setup(self):
        config = self.config
        vocab_size = self.run.sizes(config).vocab_size
        self.embed = Embedding(vocab_size, config.embed_dim, self.run.shard)
        layer = nn.remat(Layer) if self.run.remat else Layer
        if self.run.taps is None and not self.is_initializing():  # both go by the names of layers
            layer = nn.jit(layer)  # so that those that are alike are traced once
        self.layers = [layer(config, self.run, config.is_dense(i)) for i in range(config.num_layers)]
        self.output_norm = RMSNorm(config.norm_epsilon)
        self.output = Linear(vocab_size, keeps_rest=True)  # what is rounded here, nothing evens out

    def hidden(
        self,
        tokens,
        cache: Cache | None,
        num_tokens=None,
        pages=None,
        reduction: ExpertReduction | None = None,
    ):
        """Returns hidden states f32[B, T, D] after the last layer, and the cache with the tokens in it.

        Args:
          tokens: i32[B, T].
          cache: rows so far, or None for a sequence on its own.
          num_tokens: i32[B] how many of the T tokens count; None is all. The rest is padding: it enters no
            cache, and its hidden states mean nothing.
          pages: i32[B, M] pages of each sequence in a paged cache; None for a contiguous one.
          reduction: which experts to leave out, of each sequence; None for none.
        """
        return self._hidden(tokens, cache, num_tokens, pages, reduction)[:2]

    def _hidden(self, tokens, cache, num_tokens, pages, reduction):
        taps_lib.check(self.config, self.run.taps)
        B, T = tokens.shape
        if pages is not None and (pages.ndim != 2 or pages.shape[0] != B):
            raise ValueError(f"pages must be [{B}, M], a row for each sequence, got {pages.shape}.")
        length = jnp.zeros((B,), jnp.int32) if cache is None else cache.length
        num_tokens = jnp.full((B,), T, jnp.int32) if num_tokens is None else num_tokens
        positions, is_padding = places(length, num_tokens, T)
        x, layers = self.embed(tokens), []
        for i, layer in enumerate(self.layers):
            rows = None if cache is None else cache.layers[i].at(pages)
            slots = None if rows is None else self.slots(rows, is_padding, positions)
            of_layer = None if reduction is None else reduction.of_layer(i)
            x = tap(self, f"resid.{i}", x, positions)
            x, rows = layer(x, rows, positions, slots, of_layer)
            layers.append(rows)
        if cache is not None:
            cache = Cache(layers=tuple(rows.at(None) for rows in layers), length=length + num_tokens)
        return tap(self, f"resid.{self.config.num_layers}", x, positions), cache, positions

    def slots(self, rows, is_padding, positions):
        """Returns where the tokens go, i32[B, T]; the capacity for one that goes nowhere, or elsewhere."""
        slots, shard = positions, self.run.shard
        if shard is not None and shard.splits_cache:
            slots = mla_split.own_slots(positions, rows, shard)
        return jnp.where(is_padding, rows.num_slots, slots)

    def unembed(self, x):
        """Returns logits f32[..., W] of hidden states [..., D]."""
        logits = collectives.gather_over_group(self.output(self.output_norm(x)), self.run.shard)
        return logits[..., : self.config.vocab_size]

    def __call__(self, tokens, cache: Cache | None = None, num_tokens=None, pages=None, reduction=None):
        """Returns logits f32[B, T, W] and the cache, see `hidden`."""
        x, cache, positions = self._hidden(tokens, cache, num_tokens, pages, reduction)
        return tap(self, "logits", self.unembed(x), positions), cache


def places(length: jax.Array, num_tokens: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns positions i32[B, T] of T = `size` tokens after `length` i32[B] others, and which pad.

    The first `num_tokens` i32[B] of each sequence count; the rest has the position of the last of them.
    """
    offsets = jnp.arange(size, dtype=jnp.int32)[None]
    is_padding = offsets >= num_tokens[:, None]
    return length[:, None] + jnp.minimum(offsets, num_tokens[:, None] - 1), is_padding


def apply(
    params,
    tokens: jax.Array,
    cache: Cache | None,
    config: ModelConfig,
    run: RunConfig,
    pages: jax.Array | None = None,
    reduction: ExpertReduction | None = None,
):
    """Runs the model: the function that everything else calls. Use it under jit and vmap;
    outside of jit each call compiles its layers anew.

    Under grad use it without a cache: the loop over a cache has no reverse mode. Weights in arrays and what
    adapters add have a gradient, weights in blocks are held fixed.

    Args:
      params: nested dict of arrays, `QuantizedTensor`s and `PanelTensor`s, as from
        `checkpoints_tools.load_gguf`, and what `lay_out` makes of it, which the GPU kernels of quantised
        products need.
      tokens: i32[B, T], ids in [0, vocab_size).
      cache: from `init_cache`, `init_pool` or an earlier call, or None to run a sequence on its own.
      config: the model; static under jit.
      run: mode, cache type and the like; static under jit.
      pages: i32[B, M] pages of each sequence in the pool, for a cache from `init_pool`.
      reduction: which experts to leave out, of each sequence; None for none.

    Returns:
      logits f32[B, T, W], and the cache with the tokens appended (None for None). A token that would lie past
      the capacity is not stored: callers keep `length + T` within it.
    """

    def whole(params, tokens, cache, pages, reduction):
        return Transformer(config, run).apply({"params": params}, tokens, cache, None, pages, reduction)

    cache_spec = None if cache is None else sharding.cache_specs(run)
    args = params, tokens, cache, pages, reduction
    return sharding.run_on_mesh(whole, run, args, (sharding.PER_SEQUENCE, cache_spec))


def lay_out(params, run: RunConfig):
    """Returns the weights as the run reads them: for a GPU the same numbers in planes, else as they are.

    Embeddings, of which rows are read, and up-projections, which are applied in two ways, stay in blocks.
    What is in planes already stays so.
    """
    if not dispatch.for_gpu(run.gpu_kernels):
        return params
    kept = {"embed", "kv_b", "k_b", "v_b"}

    def one(path, weight):
        if kept.intersection(path.split("/")):
            return weight
        return sharding.of_parts(quant.to_planes, path, weight, run)

    return sharding.map_weights(one, params)


def init_params(key: jax.Array, config: ModelConfig):
    """Returns random float32 parameters, in the tree that `apply` takes."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(lambda key: Transformer(config, RunConfig()).init(key, tokens)["params"])(key)
