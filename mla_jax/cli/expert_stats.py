"""What `--expert-stats` prints: how many experts tokens keep, and which ones."""

import numpy as np

from checkpoints_tools.inspect import columns
from mla_jax.config import ModelConfig

_SHOWN = 4  # busiest experts of a layer


def describe(ids: np.ndarray, config: ModelConfig) -> str:
    """Returns a table of routed `ids` i32[L, T, K] by layer, as from `Model.routing`."""
    num_experts, most = config.moe.num_experts, config.moe.num_experts_per_token
    kept_LT = (ids < num_experts).sum(axis=-1)
    head = f"experts a token: {kept_LT.mean():.2f} of {most} kept, over {ids.shape[1]} tokens"
    rows = [("layer", "kept", f"tokens that keep 1 to {most}", "used", "busiest, share of all that are kept")]
    for layer, (kept_T, chosen) in enumerate(zip(kept_LT, ids, strict=True), start=config.num_dense_layers):
        histogram = np.bincount(kept_T, minlength=most + 1)[1:] / kept_T.size
        counts = np.bincount(chosen[chosen < num_experts], minlength=num_experts)
        busiest = np.argsort(-counts, kind="stable")[:_SHOWN]
        rows.append(
            (
                str(layer),
                f"{kept_T.mean():.2f}",
                " ".join(f"{share:4.0%}" for share in histogram),
                f"{np.count_nonzero(counts)} of {num_experts}",
                ", ".join(f"{expert} {counts[expert] / counts.sum():.0%}" for expert in busiest),
            )
        )
    return f"{head}\n{columns(rows)}"
