"""The packaged model against ik_llama.cpp, on Python sources that it was never trained on."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from closeness import Closeness, network_logits

import mla_jax
from mla_jax import RunConfig, corpus, generate, quant, tokenizer

pytest.importorskip("ik_llama_cpp", reason="needs ik_llama.cpp: pip install '.[peers]'")
import ik

import checkpoints_tools
from checkpoints_tools import names

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        not generate.PACKAGED_MODEL.exists(), reason=f"the packaged model {generate.PACKAGED_MODEL} is absent"
    ),
]

NUM_TOKENS = 512
MAX_KL, MIN_TOP1 = 1e-3, 0.99
MAX_KL_FLOAT32 = 1e-4  # a near-tie of experts may fall either way by the rounding of the cache

PROMPT_TOKENS, PREDICT = 160, 64  # long enough for mla 3 to expand its prompt, where mla 1 absorbs
CLOSE_CALL = 0.2  # of logits: nearer runners-up may win by the peer's 8-bit activations

AWKWARD = [
    "def f(x):\n    return x  # 1234567\n",
    "\t\n \n   leading, trailing   \r\n",
    "naïve café ﬁ Straße Ωmega",
    "日本語のテキスト 中文 한국어",
    "👩‍👩‍👧 🎉🎉 é",
    "<｜begin▁of▁sentence｜> and <|im_end|>",
]


@pytest.fixture(scope="module")
def checkpoint():
    return checkpoints_tools.load_gguf(generate.PACKAGED_MODEL)


@pytest.fixture(scope="module")
def encode(checkpoint):
    return tokenizer.Tokenizer(tokenizer.Vocabulary.from_metadata(checkpoint.metadata)).encode


@pytest.fixture(scope="module")
def documents(encode):
    """The first 8 held-out documents of 512 tokens or more, as far as that."""
    encoded = map(encode, corpus.standard_library().held_out)
    return [ids[:NUM_TOKENS] for ids in itertools.islice((d for d in encoded if len(d) >= NUM_TOKENS), 8)]


@pytest.fixture(scope="module")
def tokens(documents):
    return documents[0]


@pytest.fixture(scope="module")
def float32_model(checkpoint, tmp_path_factory):
    """The packaged model with its weights decoded: the peer rounds activations for Q8_0 weights alone."""
    path = tmp_path_factory.mktemp("peer") / "float32.gguf"
    weights = names.flatten(checkpoint.params).items()
    params = names.unflatten({name: np.asarray(quant.decode(weight)) for name, weight in weights})
    checkpoints_tools.save_gguf(path, dataclasses.replace(checkpoint, params=params))
    return path


@pytest.mark.parametrize("mla", [1, 3])
def test_peer_has_the_same_logits_on_held_out_text(mla, checkpoint, tokens, float32_model):
    """In float32 the peer agrees. In Q8_0 it is as far from this network as it is from itself in float32."""
    ours = network_logits(checkpoint, tokens, RunConfig(mla=mla))
    in_float32 = ik.logits(float32_model, tokens, mla=mla)
    in_q8_0 = ik.logits(generate.PACKAGED_MODEL, tokens, mla=mla)
    found, rounded = Closeness.of(in_float32, ours), Closeness.of(in_q8_0, ours)
    own = Closeness.of(in_q8_0, in_float32)
    print(f"mla {mla}: float32 {found}, Q8_0 {rounded}, the peer's Q8_0 to its own float32 {own}")
    assert found.kl < MAX_KL_FLOAT32 and found.top1 >= MIN_TOP1
    assert rounded.kl < MAX_KL
    assert rounded.top1 >= min(MIN_TOP1, own.top1 - 0.005)


@pytest.mark.parametrize(("step", "count"), [(False, 8), (True, 1)], ids=["prefill", "decode"])
def test_kernels_are_as_near_to_float32_as_the_peer(step, count, checkpoint, documents):
    """Both round activations to 8 bits: of one document the order of sums alone moves the mean by 2 %."""
    run = RunConfig(mla=3)
    every = lambda logits: np.concatenate([logits(tokens) for tokens in documents[:count]])
    exact = every(lambda tokens: network_logits(checkpoint, tokens, run))
    with jax.default_matmul_precision("default"):
        ours = every(lambda tokens: network_logits(checkpoint, tokens, run, step=step))
    peer = every(lambda tokens: ik.logits(generate.PACKAGED_MODEL, tokens, mla=3, step=step))
    found, theirs = Closeness.of(exact, ours), Closeness.of(exact, peer)
    print(f"to float32: kernels {found}, the peer {theirs}")
    assert 0 < found.kl <= theirs.kl


def test_greedy_text_is_that_of_the_other_mode_and_of_the_peer(tokens):
    prompt = tokens[:PROMPT_TOKENS]
    completions = {}
    for mla in (1, 3):
        model = mla_jax.load(generate.PACKAGED_MODEL, mla=mla, ctx_size=NUM_TOKENS, compilation_cache=None)
        completions[mla] = model.generate(prompt, max_tokens=PREDICT, temperature=0.0)
    assert completions[1].tokens == completions[3].tokens and completions[1].text == completions[3].text

    with ik.Process(generate.PACKAGED_MODEL) as peer:
        answer = peer.ask("generate", tokens=prompt, predict=PREDICT)
    pairs = list(zip(completions[3].tokens, answer["tokens"], strict=False))
    split = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    print(f"{len(pairs)} tokens, parted at {split}, least lead {min(answer['leads'][: len(pairs)]):.3f}")
    assert split is None or answer["leads"][split] < CLOSE_CALL


def test_tokens_are_those_of_the_peer(encode):
    texts = [*AWKWARD, *corpus.standard_library().held_out[:8]]
    with ik.Process(generate.PACKAGED_MODEL) as peer:
        expected = [peer.ask("tokenize", text=text, special=True) for text in texts]
    assert [encode(text, add_special=False) for text in texts] == expected


def test_peer_loads_the_saved_model_to_identical_logits(checkpoint, tokens, tmp_path):
    checkpoints_tools.save_gguf(tmp_path / "saved.gguf", checkpoint)
    saved, packaged = (ik.logits(p, tokens) for p in (tmp_path / "saved.gguf", generate.PACKAGED_MODEL))
    np.testing.assert_array_equal(saved, packaged)
