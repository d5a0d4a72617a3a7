"""KL to a base by its definition, live and from a file of saved logits, whose layout is that of llama.cpp."""

import dataclasses
import math
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import write_deepseek2

import mla_jax
from mla_jax import divergence, perplexity, saved_logits
from mla_jax.perplexity import Network
from mla_jax.saved_logits import SavedLogits

TEXT = "The latent of a token is small, and the cache with it. " * 12
SIZE, VOCAB = 32, 320
NUM_PREDICTED = 15


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "nano.gguf"
    write_deepseek2(path, layers=2)
    return mla_jax.load(path, ctx_size=64, cache_type="f32", compilation_cache=None)


@pytest.fixture(scope="module")
def windows(model):
    return perplexity.windows_of(model, TEXT, SIZE, limit=4)


@pytest.fixture(scope="module")
def other(model):
    return Network.of(model, expert_reduction=(1, 1.0))


@pytest.fixture(scope="module")
def live(model, other, windows):
    return divergence.measure(model, other, windows)


@pytest.fixture
def base(model, windows, tmp_path):
    divergence.save_base(tmp_path / "base", model, windows)
    return SavedLogits.open(tmp_path / "base")


def log_probs(network, window):
    """Returns f64[T, W] of one window, with experts as the network has them."""
    reduction = mla_jax.expert_reduction.arrays(network.expert_reduction)
    settings = dict(config=network.config, run=network.run, reduction=reduction)
    logits, _ = jax.jit(mla_jax.apply, static_argnames=("config", "run"))(
        network.params, jnp.asarray(window[None]), None, **settings
    )
    logits = np.asarray(logits[0], np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_it_is_the_definition(model, other, windows, live):
    p, q = log_probs(model, windows[2]), log_probs(other, windows[2])
    for i, place in enumerate(range(SIZE // 2, SIZE - 1)):
        kl = sum(math.exp(a) * (a - b) for a, b in zip(p[place], q[place], strict=True))
        assert live.kl[2, i] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert live.same_top[2, i] == (p[place].argmax() == q[place].argmax())
        next_id = windows[2, place + 1]
        assert live.nats[2, i] == pytest.approx(-q[place, next_id], rel=1e-4)
        assert live.base_nats[2, i] == pytest.approx(-p[place, next_id], rel=1e-4)
        change = math.exp(q[place, next_id]) - math.exp(p[place, next_id])
        assert live.delta_p[2, i] == pytest.approx(change, rel=1e-2, abs=1e-7)
    assert 0.001 < live.mean_kl.value < 1 and 0 < live.top1.value < 1


def test_nothing_is_no_distance(model, windows):
    found = divergence.measure(model, model, windows)
    assert found.mean_kl.value == pytest.approx(0, abs=1e-6)
    assert found.top1 == (1, 0) and found.rms_delta_p == (0, 0) and found.correlation == 1
    assert found.log_ratio == (0, 0) and found.ratio == (1, 0) and found.difference == (0, 0)


def test_numbers_that_are_all_the_same_have_no_correlation(live):
    first = {name: getattr(live, name)[:1, :1] for name in divergence._FIELDS}
    assert divergence.Divergence(window=3, **first).correlation is None
    same = np.full_like(live.nats, 0.1)
    assert dataclasses.replace(live, base_nats=same).correlation is None


def test_an_infinite_perplexity_is_no_error(live):
    infinite = dataclasses.replace(live, nats=live.nats + 800)
    assert infinite.ratio.value == infinite.difference.value == math.inf


def test_statistics_are_those_of_llama_cpp(live):
    """By sums, their squares and the covariance, as its program has them."""
    nats, bases = live.nats.ravel().astype(float), live.base_nats.ravel().astype(float)
    count = nats.size
    spread = lambda values: (values**2).mean() - values.mean() ** 2
    covariance = ((nats * bases).mean() - nats.mean() * bases.mean()) / (count - 1)
    error, base_error = (math.sqrt(spread(values) / (count - 1)) for values in (nats, bases))
    ratio_error = math.sqrt(error**2 + base_error**2 - 2 * covariance)
    assert live.log_ratio == pytest.approx((nats.mean() - bases.mean(), ratio_error))
    assert live.ratio[1] == pytest.approx(live.ratio[0] * ratio_error)
    assert live.correlation == pytest.approx(covariance / (error * base_error))
    value, base_value = math.exp(nats.mean()), math.exp(bases.mean())
    weighted = (value * error) ** 2 + (base_value * base_error) ** 2 - 2 * value * base_value * covariance
    assert live.difference == pytest.approx((value - base_value, math.sqrt(weighted)))
    squares = live.delta_p.ravel() ** 2
    root = math.sqrt(squares.mean())
    rms_error = 0.5 / root * math.sqrt(spread(squares) / (count - 1))
    assert live.rms_delta_p == pytest.approx((root, rms_error))
    share = live.same_top.mean()
    assert live.top1 == pytest.approx((share, math.sqrt(share * (1 - share) / (count - 1))))


def test_a_saved_base_says_what_it_said_live(model, other, windows, live, base):
    told = []
    found = divergence.measure_saved(base, other, report=told.append)
    np.testing.assert_allclose(found.kl, live.kl, atol=2e-5)
    np.testing.assert_allclose(found.base_nats, live.base_nats, atol=3e-4)
    np.testing.assert_allclose(found.nats, live.nats, rtol=1e-5)
    np.testing.assert_array_equal(found.same_top, live.same_top)
    assert [part.kl.shape for part in told] == [(i, NUM_PREDICTED) for i in range(1, 5)]
    own = divergence.measure_saved(base, model, windows)
    assert own.mean_kl.value < 1e-7 and own.top1.value == 1


def test_saving_tells_the_perplexity(model, windows, tmp_path):
    found = divergence.save_base(tmp_path / "base", model, windows)
    assert found.estimate == pytest.approx(perplexity.measure(model, windows).estimate)


def test_the_file_has_the_layout_of_llama_cpp(model, windows, base):
    """Read here by hand, byte by byte."""
    data = base.path.read_bytes()
    assert data[:8] == b"_logits_" and struct.unpack("<3i", data[8:20]) == (SIZE, VOCAB, 4)
    assert np.frombuffer(data, "<i4", 4 * SIZE, 20).reshape(4, SIZE).tolist() == windows.tolist()
    begin, width = 20 + 4 * windows.size, 8 + 2 * VOCAB
    assert len(data) == begin + 4 * NUM_PREDICTED * width
    p = log_probs(model, windows[3])
    for i in range(NUM_PREDICTED):
        row = data[begin + (3 * NUM_PREDICTED + i) * width :][:width]
        scale, lowest = struct.unpack("<2f", row[:8])
        codes = np.frombuffer(row, "<u2", VOCAB, 8)
        assert codes.max() == 65535 and codes.min() == 0
        np.testing.assert_allclose(scale * codes + lowest, p[SIZE // 2 + i], atol=2e-4)


def write_by_hand(path, windows, rows, vocab_size):
    """Writes what llama.cpp would: `rows` are f32 logits [windows, n, W]."""
    header = b"_logits_" + struct.pack("<3i", windows.shape[1], vocab_size, len(windows))
    parts = [header, windows.astype("<i4").tobytes()]
    for logits in rows.reshape(-1, vocab_size):
        top, bottom = logits.max(), max(logits.min(), logits.max() - 24)
        total, scale = math.log(np.exp(logits.astype(float) - top).sum()), (top - bottom) / 65535
        codes = [round((x - bottom) / scale) if scale and x > bottom else 0 for x in logits.tolist()]
        parts += [struct.pack("<2f", scale, bottom - top - total), np.array(codes, "<u2").tobytes()]
        parts.append(b"\0\0" * (vocab_size % 2))
    path.write_bytes(b"".join(parts))


def test_a_file_of_llama_cpp_is_read(tmp_path):
    """An odd vocabulary, a row of equal logits, and logits more than 24 below the best."""
    rows = np.random.default_rng(0).normal(size=(2, 2, 7)).astype(np.float32) * 8
    rows[0, 1] = 3.0
    rows[1, 1, 2:4] = rows[1, 1].max() - 100
    windows = np.arange(12, dtype=np.int32).reshape(2, 6) % 7
    write_by_hand(tmp_path / "base", windows, rows, 7)
    saved = SavedLogits.open(tmp_path / "base")
    assert saved.vocab_size == 7 and saved.windows.tolist() == windows.tolist()
    for logits, (scale, lowest, codes) in zip(rows, saved.rows(), strict=True):
        found, is_told, total = saved_logits.decode(*map(jnp.asarray, (scale, lowest, codes)))
        wanted = logits - np.log(np.exp(logits.astype(float)).sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(np.asarray(found)[is_told], wanted[is_told], atol=4e-4)
        np.testing.assert_allclose(total, 1, atol=1e-3)
        again = saved_logits.encode(jnp.asarray(logits))
        np.testing.assert_allclose(again[0], scale, rtol=1e-6)
        np.testing.assert_allclose(again[2].astype(int), codes, atol=1)
    assert not is_told[1, 2] and is_told[1].sum() >= 4


def test_a_token_that_the_base_left_out_does_not_make_it_infinite():
    """It is as unlikely as the file can say."""
    logits = jnp.asarray([[0.0, -100.0, -1.0]])
    base, is_told, _ = saved_logits.decode(*saved_logits.encode(logits))
    scores = divergence._scores(base, is_told, logits, jnp.asarray([1]))
    assert scores[0][0] == pytest.approx(100.3, abs=0.1) and scores[1][0] == pytest.approx(24.3, abs=0.1)
    assert scores[2][0] == pytest.approx(0, abs=1e-6) and bool(scores[3][0])


def test_what_the_base_left_out_is_no_distance():
    """A hundred thousand tokens at once would be: each has a share of e^-24 by its code."""
    unlikely = jnp.full((1, 100_000), -100.0)
    base, is_told, total = saved_logits.decode(*saved_logits.encode(jnp.insert(unlikely, 0, 0.0, axis=1)))
    network = jnp.insert(2 * unlikely, 0, 0.0, axis=1)
    kl = divergence._scores(base, is_told, network, jnp.asarray([0]))[2]
    assert abs(float(kl[0])) < 1e-6 and float(total[0]) == pytest.approx(1)
    assert divergence._scores(base, True, network, jnp.asarray([0]))[2][0] > 1e-4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"_Logits_" + data[8:], "must be a file of saved logits"),
        (lambda data: data[:10], "must be a file of saved logits"),
        (lambda data: data[:-1], "bytes that its sizes need, got"),
        (lambda data: data + b"\0", "bytes that its sizes need, got"),
        (lambda data: data[:8] + struct.pack("<3i", 2, VOCAB, 4) + data[20:], "must tell sizes that there"),
        (lambda data: data[:8] + struct.pack("<3i", SIZE, VOCAB, -1) + data[20:], "must tell sizes that"),
        (lambda data: data[:24] + struct.pack("<i", VOCAB) + data[28:], "it is damaged"),
    ],
    ids=["magic", "cut header", "cut", "longer", "no window", "no windows", "id"],
)
def test_a_damaged_file_is_not_opened(base, damage, message):
    base.path.write_bytes(damage(base.path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        SavedLogits.open(base.path)


@pytest.mark.parametrize("at", [4, 5, 11], ids=["lowest", "its sign", "code"])
def test_damaged_rows_are_found(model, base, at):
    data = bytearray(base.path.read_bytes())
    row = 20 + 4 * base.windows.size + (NUM_PREDICTED + 3) * (8 + 2 * VOCAB)
    data[row + at : row + at + 40] = b"\xff" * 40
    base.path.write_bytes(data)
    with pytest.raises(ValueError, match="probabilities of window 2 must sum to 1; the file is damaged"):
        divergence.measure_saved(SavedLogits.open(base.path), model)


def test_another_text_or_vocabulary_is_refused(model, windows, base, tmp_path):
    for changed in (windows[:3], windows[:, :-1], np.roll(windows, 1, axis=0)):
        with pytest.raises(ValueError, match="must be of the same text, cut into the same windows; it has 4"):
            divergence.measure_saved(base, model, changed)
    begun = perplexity.begun(windows, 5)
    assert divergence.measure_saved(base, model, begun).kl.shape == (4, NUM_PREDICTED)
    write_deepseek2(tmp_path / "wide.gguf", layers=1, vocab=330)
    wide = mla_jax.load(tmp_path / "wide.gguf", compilation_cache=None)
    for call in (
        lambda: divergence.measure_saved(base, wide),
        lambda: divergence.measure(model, wide, windows),
    ):
        with pytest.raises(ValueError, match="must have the 330 tokens of the model's vocabulary, got 320"):
            call()


def test_a_base_is_there_whole_or_not_at_all(model, windows, tmp_path):
    def stop(found):
        if len(found.nats) == 3:
            raise KeyboardInterrupt

    (tmp_path / "base").write_text("earlier")
    with pytest.raises(KeyboardInterrupt):
        divergence.save_base(tmp_path / "base", model, windows, report=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert (tmp_path / "base").read_text() == "earlier"


def test_logits_that_are_not_finite_are_refused(model, windows):
    weights = {**model.params, "output": {"weight": model.params["output"]["weight"] * jnp.inf}}
    broken = dataclasses.replace(Network.of(model), params=weights)
    with pytest.raises(ValueError, match="logits must be finite, but those of window 1 are not"):
        divergence.measure(model, broken, windows)
