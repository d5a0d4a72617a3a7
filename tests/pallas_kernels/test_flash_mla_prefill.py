"""flash_mla_prefill: the definition, the reference and the kernel against each other, and their gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from gpu_target import lowered_for_gpu, needs_gpu

from pallas_kernels import flash_mla_prefill as op
from pallas_kernels import flash_mla_prefill_gradient

SM_SCALE = 0.15
TILE = 16
SMALL = op.Config(block_t=TILE, block_s=TILE, num_warps=4, num_stages=2)
# (start, length): nothing, lengths around a tile, histories, no query, slots that begin after the queries
SEQUENCES = ((0, 0), (0, 1), (0, 15), (0, 16), (0, 17), (5, 38), (31, 64), (16, 16), (40, 41), (-3, 5))
NAMES = ("q", "q_rope", "k", "k_rope", "v")

run = functools.partial(op.flash_mla_prefill, sm_scale=SM_SCALE)
interpret = functools.partial(run, implementation="interpret", config=SMALL)
reference = functools.partial(run, implementation="reference")


def make_case(sequences=SEQUENCES, *, T=33, S=64, N=2, H=48, P=16, V=80, dtype=jnp.float32):
    """Operands in which every slot and query that is not there is NaN."""
    rng = np.random.default_rng(len(sequences))
    B = len(sequences)
    start, length = np.asarray(sequences, np.int32).T
    asked = np.arange(T) < (length - start)[:, None]
    there = np.arange(S) < length[:, None]

    def rows(kept, *shape):
        kept = kept.reshape(*kept.shape, *(1,) * len(shape))
        return jnp.asarray(np.where(kept, rng.normal(size=(*kept.shape[:2], *shape)), np.nan), dtype)

    case = dict(q=rows(asked, N, H), q_rope=rows(asked, N, P))
    case |= dict(k=rows(there, N, H), k_rope=rows(there, P), v=rows(there, N, V))
    return case | dict(start=jnp.asarray(start), length=jnp.asarray(length)), jnp.asarray(asked.reshape(B, T))


def by_definition(q, q_rope, k, k_rope, v, start, length):
    """One query after the other in float64."""
    q, q_rope, k, k_rope, v = (np.asarray(x, np.float64) for x in (q, q_rope, k, k_rope, v))
    (B, T, N, _), V = q.shape, v.shape[-1]
    out, lse = np.zeros((B, T, N, V)), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        seen = min(int(start[b]) + t + 1, int(length[b]))
        if seen <= 0 or t >= length[b] - start[b]:
            continue
        score = SM_SCALE * (k[b, :seen, n] @ q[b, t, n] + k_rope[b, :seen] @ q_rope[b, t, n])
        weight = np.exp(score - score.max())
        out[b, t, n] = weight @ v[b, :seen, n] / weight.sum()
        lse[b, t, n] = score.max() + np.log(weight.sum())
    return out, lse


def assert_close(got, expected, atol=2e-6, rtol=2e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), atol=atol, rtol=rtol)


@pytest.mark.parametrize("attend", [reference, interpret], ids=["reference", "interpret"])
def test_is_what_the_definition_says(attend):
    case, _ = make_case()
    assert_close(attend(**case), by_definition(**case))


@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        (dict(T=20, S=40, N=1, H=16, P=16, V=16), op.Config(block_t=16, block_s=32)),
        (dict(T=40, S=40, N=3, H=112, P=32, V=48), op.Config(block_t=32, block_s=16)),
        (dict(T=1, S=33, N=1, H=32, P=48, V=32), op.Config(block_t=16, block_s=16)),
    ],
    ids=["wide steps", "three planes", "one query"],
)
def test_tiles_change_nothing(sizes, config):
    case, _ = make_case([(0, sizes["T"]), (20, 33), (32, 33)], **sizes)
    got = run(**case, implementation="interpret", config=config)
    assert_close(got, reference(**case))


@pytest.mark.parametrize("dtype, atol", [(jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)], ids=str)
def test_kernel_takes_short_numbers(dtype, atol):
    """An `atol` of a rounding of the weights and one of the result: of values of up to 3."""
    case, _ = make_case([(0, 17), (20, 50)], N=1, dtype=dtype)
    (out, lse), (expected_out, expected_lse) = interpret(**case), by_definition(**case)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert_close(out, expected_out, atol=atol)
    assert_close(lse, expected_lse)


@pytest.mark.parametrize("attend", [reference, interpret], ids=["reference", "interpret"])
def test_easy_points(attend):
    case, asked = make_case()
    out, lse = attend(**case)
    assert_close(out[2, 0], case["v"][2, 0])  # the first query sees one slot
    assert not out[~asked].any() and np.isneginf(lse[~asked]).all()
    assert not out[9, :3].any() and out[9, 3:8].all()
    assert np.isneginf(lse[9, :3]).all()


def test_nan_of_a_query_stays_in_its_row():
    case, _ = make_case()
    got, expected = interpret(**case | dict(q=case["q"].at[5, 7].set(jnp.nan))), interpret(**case)
    is_other = np.ones(case["q"].shape[:2], bool)
    is_other[5, 7] = False
    for x, y in zip(got, expected, strict=True):
        assert np.isnan(x[5, 7]).all()
        np.testing.assert_array_equal(x[is_other], y[is_other])


def test_rows_do_not_depend_on_their_neighbours():
    case, _ = make_case()
    order = np.random.default_rng(0).permutation(len(SEQUENCES))
    moved = interpret(**{name: operand[order] for name, operand in case.items()})
    for x, y in zip(moved, interpret(**case), strict=True):
        np.testing.assert_array_equal(x, y[order])


def in_parts(attend, case, cuts):
    """Attends to slots [cuts[0], cuts[1]), and so on, and merges."""
    whole = None
    for first, end in itertools.pairwise(cuts):
        part = case | {name: case[name][:, first:end] for name in ("k", "k_rope", "v")}
        part["start"] = case["start"] - first
        part["length"] = jnp.clip(case["length"] - first, 0, end - first)
        result = attend(**part, num_queries=case["length"] - case["start"])
        whole = result if whole is None else op.merge(*whole, *result)
    return whole


@pytest.mark.parametrize("attend", [reference, interpret], ids=["reference", "interpret"])
def test_parts_merge_into_the_whole(attend):
    case, _ = make_case()
    assert_close(in_parts(attend, case, (0, 32, 64)), reference(**case))


def test_gradient_goes_through_merged_parts():
    case, asked = make_case()
    attend = lambda **operands: in_parts(reference, operands, (0, 30, 64))
    assert_close(gradients(attend, case, asked), gradients(reference, case, asked), atol=1e-5, rtol=1e-4)


def gradients(attend, case, asked):
    """Of a function of both results, with respect to every operand that has a gradient."""
    rng = np.random.default_rng(7)
    others = {name: case[name] for name in ("start", "length")}
    to_out = jnp.asarray(rng.normal(size=(*case["q"].shape[:3], case["v"].shape[-1])), jnp.float32)
    to_lse = jnp.asarray(rng.normal(size=case["q"].shape[:3]), jnp.float32)

    def loss(operands):
        out, lse = attend(**operands, **others)
        some = jnp.isfinite(lse) & asked[:, :, None]
        total = jnp.where(some[..., None], out.astype(jnp.float32) * to_out, 0.0).sum()
        return total + jnp.where(some, jnp.where(some, lse, 0.0) * to_lse, 0.0).sum()

    return jax.jit(jax.grad(loss))({name: case[name] for name in NAMES})


def test_gradient_is_that_of_the_reference():
    case, asked = make_case()
    expected = gradients(reference, case, asked)
    got = gradients(interpret, case, asked)
    assert set(got) == set(NAMES)
    for name in NAMES:
        assert np.abs(expected[name]).max() > 0.1
        assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("chunk", [24, 64])
def test_gradient_in_chunks(chunk):
    """Cotangents of queries that are not there are NaN."""
    case, asked = make_case()
    operands = (*case.values(), case["length"] - case["start"])
    results = reference(**case)
    ones = jax.tree.map(jnp.ones_like, results)
    from_outside = [jnp.where(asked.reshape(asked.shape + (1,) * (x.ndim - 2)), x, jnp.nan) for x in ones]
    by_chunks = functools.partial(flash_mla_prefill_gradient.gradient, sm_scale=SM_SCALE, chunk=chunk)
    pull = lambda x: jax.vjp(lambda *x: op.reference(*x, *operands[5:], sm_scale=SM_SCALE), *x)[1](ones)
    got, expected = jax.jit(by_chunks)(operands, results, from_outside), jax.jit(pull)(operands[:5])
    assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_gradient_is_the_slope():
    case, _ = make_case([(2, 5), (0, 3)], T=3, S=6, N=1, H=16, P=16, V=16)
    case = {name: jnp.nan_to_num(operand) for name, operand in case.items()}

    def results(*operands):
        return run(*operands, case["start"], case["length"])

    operands = [case[name] for name in NAMES]
    jax.test_util.check_grads(results, operands, order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_of_short_numbers(dtype):
    case, asked = make_case([(0, 17), (20, 50)], dtype=dtype)
    exact = {name: x.astype(jnp.float32) if name in NAMES else x for name, x in case.items()}
    expected = gradients(reference, exact, asked)
    got = gradients(run, case, asked)
    for name in NAMES:
        assert got[name].dtype == dtype
        spread = float(jnp.abs(expected[name]).max())
        assert_close(got[name], expected[name], atol=0.03 * spread, rtol=0)


SHAPES = {
    "V3": dict(N=128, H=128, P=64, V=128),
    "V2-Lite": dict(N=16, H=128, P=64, V=128),
    "GLM": dict(N=20, H=192, P=64, V=256),
}


def shapes(T, S, dtype, *, N, H, P, V, B=2):
    shaped = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    whole = jax.ShapeDtypeStruct((B,), jnp.int32)
    return (
        shaped(B, T, N, H),
        shaped(B, T, N, P),
        shaped(B, S, N, H),
        shaped(B, S, P),
        shaped(B, S, N, V),
        whole,
        whole,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("T, S", [(512, 4096), (130, 333)], ids=["whole tiles", "odd"])
def test_lowers_for_a_gpu(sizes, dtype, T, S):
    args = shapes(T, S, dtype, **sizes)
    assert "__gpu$xla.gpu.triton" in lowered_for_gpu(run, *args)
    assert "triton" not in jax.jit(run).trace(*args).lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_gradient_lowers_for_a_gpu(sizes, dtype):
    loss = lambda *args: sum(part.astype(jnp.float32).sum() for part in run(*args))
    text = lowered_for_gpu(jax.grad(loss, argnums=(0, 1, 2, 3, 4)), *shapes(512, 4096, dtype, **sizes))
    assert "__gpu$xla.gpu.triton" in text
    assert "512x4096" not in text  # no whole score matrix


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (128, ((0, 128),)),
        (192, ((0, 128), (128, 64))),
        (112, ((0, 64), (64, 32), (96, 16))),
        (240, None),
        (24, None),
        (0, None),
    ],
)
def test_planes(width, expected):
    assert op.planes(width) == expected


@pytest.mark.parametrize("shared_memory", [227 << 10, 163 << 10, 99 << 10, 64 << 10])
@pytest.mark.parametrize("widths", [(128, 64, 128), (192, 64, 256)], ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit(widths, shared_memory, itemsize):
    sizes = dict(widths=widths, itemsize=itemsize, shared_memory=shared_memory)
    config = op.Config.for_sizes(queries=4096, **sizes)
    least = itemsize * (config.block_t * sum(widths[:2]) + config.block_s * sum(widths))
    assert least <= shared_memory
    assert op.Config.for_sizes(queries=20, **sizes).block_t <= 32


def test_widths_without_a_kernel_go_to_the_reference():
    case, _ = make_case([(0, 5)], T=5, S=7, H=24)
    assert_close(run(**case), by_definition(**case))
    with pytest.raises(NotImplementedError, match=r"width of q must be a sum .* got 24"):
        interpret(**case)


@pytest.mark.parametrize("T, S", [(0, 4), (3, 0)])
def test_no_queries_or_no_slots(T, S):
    case, asked = make_case([(0, 0)], T=T, S=S)
    out, lse = run(**case)
    assert not out.any() and np.isneginf(lse).all()
    assert all(not gradient.any() for gradient in gradients(run, case, asked).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=jnp.zeros((1, 7, 2, 32))), r"k must be float32\[1, 7, 2, 48\], got float32\[1, 7, 2, 32\]"),
        (dict(v=jnp.zeros((1, 7, 2, 80), jnp.bfloat16)), r"v must be float32.* got bfloat16"),
        (dict(start=jnp.zeros((2,), jnp.int32)), r"start must be int32\[1\], got int32\[2\]"),
        (dict(num_queries=jnp.zeros((1,))), r"num_queries must be int32\[1\], got float32\[1\]"),
        (dict(sm_scale=0.0), "sm_scale must be above 0, got 0"),
        (dict(implementation="cuda"), "implementation must be None or one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_operands_are_told(change, message):
    case, _ = make_case([(0, 5)], T=5, S=7)
    with pytest.raises(ValueError, match=message):
        op.flash_mla_prefill(**case | dict(sm_scale=SM_SCALE) | change)


def test_cost_counts_what_is_seen():
    pairs = sum(3 + t + 1 for t in range(5)) * 2 * 4  # 2 sequences, 4 heads
    cost = op.cost(batch=2, queries=5, history=3, heads=4, widths=(32, 16, 48))
    assert cost.flops == 2 * pairs * (32 + 16 + 48) and cost.transcendentals == pairs
    numbers = 5 * 4 * (32 + 16 + 48) + 8 * (4 * 32 + 16 + 4 * 48)
    assert cost.bytes_accessed == 2 * (2 * numbers + 4 * 5 * 4)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype, atol", [("bfloat16", 2e-2), ("float16", 3e-3), ("float32", 1e-5)])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_compiled_kernel_is_the_reference(sizes, dtype, atol):
    case, _ = make_case([(0, 300), (211, 511), (512, 513), (0, 0)], T=300, S=520, dtype=dtype, **sizes)
    expected = reference(**case)
    got = run(**case, implementation="triton")
    assert_close(got[0], expected[0], atol=atol, rtol=0)
    assert_close(got[1], expected[1], atol=1e-3, rtol=0)
