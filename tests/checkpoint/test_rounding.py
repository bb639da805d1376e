"""One sum, one rounding: within a unit in the last place of the fp64 result, in every dtype."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdd_lora.adapter.factors import Factors
from sdd_lora.checkpoint.rounding import BLOCK_WEIGHTS, Delta, Rounding, edit
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import NUMPY_DTYPES, TensorInfo
from sdd_lora.sd1 import same_shape

FLOATS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]


def factors(rng, out=24, wide=16, rank=3, size=0.01):
    down = rng.standard_normal((rank, wide)).astype(np.float32)
    up = (size * rng.standard_normal((out, rank))).astype(np.float32)
    return Factors(down, up, 2.0)


def run(weight, code, parts, rounding=None):
    stored = weight.astype(NUMPY_DTYPES[code])
    info = TensorInfo(code, stored.shape, 0, stored.nbytes)
    data, tally = edit("w", stored.tobytes(), info, Delta.of(parts, stored), rounding or Rounding())
    return stored, np.frombuffer(data, stored.dtype).reshape(stored.shape), tally


@pytest.mark.parametrize("code", FLOATS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.floats(1e-6, 1.0), n=st.integers(1, 3))
def test_within_one_unit_of_the_last_place_of_fp64(code, seed, size, n):
    rng = np.random.default_rng(seed)
    parts = [(factors(rng, size=size), float(rng.uniform(-2, 2))) for _ in range(n)]
    weight = rng.standard_normal((24, 16))
    weight[::3] = -sum(w * part.delta() for part, w in parts)[::3]  # cancels to almost nothing
    before, after, _ = run(weight, code, parts)
    change = sum(
        w * part.scale * (part.up.astype(np.float64) @ part.down.astype(np.float64))
        for part, w in parts
    )
    exact = before.astype(np.float64) + change
    nearest = exact.astype(after.dtype)
    end = ml_dtypes.finfo(after.dtype).max
    up = np.nextafter(nearest, end).astype(np.float64)
    down = np.nextafter(nearest, -end).astype(np.float64)
    slack = 1e-12  # the order of fp64 sums
    assert (after.astype(np.float64) <= up + slack).all()
    assert (after.astype(np.float64) >= down - slack).all()


def test_blocks_of_rows_cover_a_matrix_larger_than_a_block():
    rng = np.random.default_rng(0)
    part = factors(rng, out=3 * BLOCK_WEIGHTS // 512 + 7, wide=512)
    weight = rng.standard_normal((part.up.shape[0], 512))
    before, after, tally = run(weight, "F32", [(part, 1.0)])
    exact = before + part.scale * (part.up.astype(np.float64) @ part.down)
    np.testing.assert_allclose(after, exact, rtol=1e-6)
    assert tally.intended == pytest.approx(part.norm(), rel=1e-6)
    assert tally.realised == pytest.approx(1, abs=1e-4)


def test_convolutions_are_flattened():
    rng = np.random.default_rng(0)
    down = rng.standard_normal((2, 4 * 9)).astype(np.float32)
    part = Factors(down, rng.standard_normal((5, 2)).astype(np.float32), 2.0, (3, 3))
    weight = rng.standard_normal((5, 4, 3, 3))
    before, after, _ = run(weight, "F32", [(part, 1.0)])
    np.testing.assert_allclose(after - before, part.delta().reshape(5, 4, 3, 3), atol=1e-5)
    assert same_shape(part.weight_shape, (5, 4, 3, 3))
    assert not same_shape(part.weight_shape, (5, 36))
    assert same_shape((24, 16), (24, 16, 1, 1))


def test_bf16_swallows_a_small_edit_and_stochastic_rounding_keeps_it_on_average():
    rng = np.random.default_rng(0)
    part = factors(rng, out=256, wide=256, size=1e-5)
    weight = 0.03 * rng.standard_normal((256, 256))
    _, _, nearest = run(weight, "BF16", [(part, 1.0)])
    _, once, stochastic = run(weight, "BF16", [(part, 1.0)], Rounding("stochastic", 1))
    assert nearest.realised < 0.6
    assert stochastic.realised == pytest.approx(1, abs=0.15)
    _, again, _ = run(weight, "BF16", [(part, 1.0)], Rounding("stochastic", 1))
    _, other, _ = run(weight, "BF16", [(part, 1.0)], Rounding("stochastic", 2))
    assert np.array_equal(once, again) and not np.array_equal(once, other)


@pytest.mark.parametrize("code", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_stochastic_rounding_picks_one_of_the_two_neighbours(code):
    rng = np.random.default_rng(0)
    exact = rng.standard_normal(5000)
    rounded = Rounding("stochastic")(exact, NUMPY_DTYPES[code], rng).astype(np.float64)
    near = exact.astype(NUMPY_DTYPES[code])
    end = ml_dtypes.finfo(near.dtype).max
    outward = np.where(near.astype(np.float64) < exact, end, -end)
    other = np.nextafter(near, outward).astype(np.float64)
    assert ((rounded == near.astype(np.float64)) | (rounded == other)).all()
    assert (rounded == other).any()
    assert abs((rounded - exact).mean()) < 0.01


def test_exact_values_stay_under_stochastic_rounding():
    exact = np.array([1.0, 0.5, -2.0, 0.0])
    for dtype in (np.float16, ml_dtypes.bfloat16):
        kept = Rounding("stochastic")(exact, np.dtype(dtype), np.random.default_rng(0))
        assert np.array_equal(kept.astype(np.float64), exact)


@pytest.mark.parametrize("code", FLOATS)
@pytest.mark.parametrize("how", ["nearest", "stochastic"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_before_is_an_error_and_hides_no_overflow(code, how, value):
    weight = np.zeros((24, 16))
    weight[3, 5] = value
    for size in (0.01, 1e6):
        part = factors(np.random.default_rng(0), size=size)
        with pytest.raises(BadInput, match="NaN or infinite weights"):
            run(weight, code, [(part, 1.0)], Rounding(how))


def test_an_adapter_that_is_not_finite_is_an_error():
    part = factors(np.random.default_rng(0))
    part.up[0, 0] = np.nan
    with pytest.raises(BadInput, match="adapters' change"):
        run(np.zeros((24, 16)), "F32", [(part, 1.0)])


@pytest.mark.parametrize("code", ["F16", "F8_E4M3"])
@pytest.mark.parametrize("how", ["nearest", "stochastic"])
def test_overflow_is_an_error(code, how):
    part = factors(np.random.default_rng(0), size=1e6)
    with pytest.raises(BadInput, match="don't fit"):
        run(np.zeros((24, 16)), code, [(part, 1.0)], Rounding(how))
