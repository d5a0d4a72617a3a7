"""Perplexity of the packaged model on held-out sources against ik_llama.cpp, in the same windows."""

import pathlib

import jax
import numpy as np
import pytest

import mla_jax
from mla_jax import corpus, generate, perplexity

pytest.importorskip("ik_llama_cpp", reason="needs ik_llama.cpp: pip install '.[peers]'")
import ik

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not generate.PACKAGED_MODEL.exists(), reason=f"the packaged model {generate.PACKAGED_MODEL} is absent"
    ),
]

WINDOW, NUM_WINDOWS = 512, 8
MAX_DISTANCE = 0.005  # of the perplexity


def peer_nats(windows, cache_type, folder):
    """Returns the cross-entropy of what follows the middles of windows, by the peer's logits in float64."""
    nats, out = [], pathlib.Path(folder) / "logits.npy"
    settings = dict(ctx_size=WINDOW, cache_type=cache_type, threads=2)
    with ik.Process(generate.PACKAGED_MODEL, **settings) as peer:
        for window, ids in zip(windows, perplexity.following(windows), strict=True):
            peer.ask("logits", tokens=window.tolist(), step=False, out=str(out))
            logits = np.load(out)[WINDOW // 2 : -1].astype(np.float64)
            total = np.log(np.exp(logits - logits.max(axis=-1, keepdims=True)).sum(axis=-1))
            nats.append(total + logits.max(axis=-1) - logits[np.arange(len(ids)), ids])
    return np.stack(nats)


@pytest.mark.parametrize(
    ("cache_type", "precision"),
    [("f16", "default"), ("q4_0", "default"), ("f16", "highest")],
    ids=["f16", "q4_0", "f16 without kernels"],
)
def test_perplexity_is_that_of_the_peer(cache_type, precision, tmp_path):
    model = mla_jax.load(cache_type=cache_type, compilation_cache=None)
    text = "".join(corpus.standard_library().held_out)
    windows = perplexity.windows_of(model, text, WINDOW, limit=NUM_WINDOWS)
    with jax.default_matmul_precision(precision):
        ours = perplexity.measure(model, windows)
    peer = perplexity.Perplexity(window=WINDOW, nats=peer_nats(windows, cache_type, tmp_path))
    ratio = ours.estimate.value / peer.estimate.value - 1
    print(f"{cache_type} {precision}: ours {ours.estimate}, the peer {peer.estimate}, apart by {ratio:.3%}")
    assert abs(ratio) < MAX_DISTANCE
    assert ours.estimate.error == pytest.approx(peer.estimate.error, rel=0.01)
