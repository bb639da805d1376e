"""Stacks are sums, resizing costs the spectrum's tail, and interference is told without a sum."""

import io
import json
import logging
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapter_making import KINDS, TO_K, random_adapter, random_factors, shapes
from threadpoolctl import threadpool_info, threadpool_limits

from sdd_lora import sd1 as names
from sdd_lora import stack
from sdd_lora.adapter.adapter import Adapter, Factors
from sdd_lora.adapter.algebra import resize
from sdd_lora.adapter.factors import inner
from sdd_lora.adapter.interference import draw_heat_map, interference
from sdd_lora.errors import BadInput

quick = settings(max_examples=15, deadline=None)


@st.composite
def parts(draw):
    """Adapters on different modules, of any ranks, alphas and weights."""
    count = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    found = []
    for n in range(count):
        modules = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True))
        factors = {
            name: random_factors(
                shapes()[name], draw(st.integers(1, 5)), draw(st.floats(0.25, 8)), rng
            )
            for name in modules
        }
        found.append((Adapter(factors, {"name": f"p{n}"}), draw(st.floats(-2, 2))))
    return found


def dense_sum(found, name):
    """Σ wᵢ ΔWᵢ in fp64."""
    return sum(
        weight * adapter.factors[name].delta().astype(np.float64)
        for adapter, weight in found
        if name in adapter.factors
    )


@quick
@given(parts())
def test_a_stack_is_the_sum(found):
    total = stack(found)
    assert total.factors.keys() == {name for adapter, _ in found for name in adapter.factors}
    for name, factors in total.factors.items():
        np.testing.assert_allclose(factors.delta(), dense_sum(found, name), atol=2e-6, rtol=1e-5)


@quick
@given(parts())
def test_interference_agrees_with_dense_matrices(found):
    report = interference(found)
    modules = stack(found).factors
    dense = {name: dense_sum(found, name) for name in modules}
    assert report.norm == pytest.approx(
        math.sqrt(sum((d**2).sum() for d in dense.values())), abs=1e-4, rel=1e-4
    )
    for module in report.modules:
        assert module.norm == pytest.approx(
            np.linalg.norm(dense[module.module]), abs=1e-4, rel=1e-4
        )
        gain = math.sqrt(np.linalg.eigvalsh(dense[module.module] @ dense[module.module].T)[-1])
        assert module.gain == pytest.approx(gain, abs=1e-4, rel=1e-4)
    for row, (a, _) in enumerate(found):
        for column, (b, _) in enumerate(found):
            dot = sum(
                float((a.factors[n].delta().astype(np.float64) * b.factors[n].delta()).sum())
                for n in a.factors.keys() & b.factors.keys()
            )
            assert report.cosine[row, column] == pytest.approx(
                dot / (a.norm() * b.norm()), abs=1e-5
            )


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_resizing_costs_the_tail_of_the_spectrum(rank, kept, seed):
    adapter = random_adapter(seed, rank, modules=(TO_K, KINDS[5], KINDS[7]), alpha=0.7)
    result = resize(adapter, rank=kept)
    lost = whole = 0.0
    for name, factors in adapter.factors.items():
        delta = factors.delta().astype(np.float64)
        values = np.sqrt(np.linalg.eigvalsh(delta @ delta.T)[::-1][:rank])
        tail = np.linalg.norm(values[kept:])
        assert result.error_of_module[name] == pytest.approx(
            tail / np.linalg.norm(values), abs=1e-6
        )
        small = result.adapter.factors[name]
        assert small.rank == min(rank, kept)
        assert small.weight_shape == factors.weight_shape
        assert np.linalg.norm(delta - small.delta()) == pytest.approx(tail, abs=1e-5)
        lost, whole = lost + tail**2, whole + (values**2).sum()
    assert result.error == pytest.approx(math.sqrt(lost / whole), abs=1e-6)
    source = result.adapter.metadata["resized_from"]
    assert source["identity"] == adapter.identity != result.adapter.identity


def test_resizing_to_energy_takes_the_smallest_rank_that_keeps_it():
    up, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((32, 4)))
    down, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((128, 4)))
    values = np.array([4.0, 3.0, 2.0, 1.0])  # squares 16, 9, 4, 1 of 30
    factors = Factors((values[:, None] * down.T).astype("f4"), up.astype("f4"), 4.0)
    for energy, rank in ((0.5, 1), (0.8, 2), (0.84, 3), (0.97, 4), (1.0, 4)):
        assert resize(Adapter({TO_K: factors}), energy=energy).adapter.factors[TO_K].rank == rank


def test_truncating_an_exact_stack_gives_the_parts_back():
    """Two copies at half weight are one adapter: rank 8 falls back to 4 without an error."""
    adapter = random_adapter(rank=4)
    double = stack([(adapter, 0.5), (adapter, 0.5)])
    assert double.rank == 8
    result = resize(double, rank=4)
    assert result.error < 1e-6
    for name, factors in adapter.factors.items():
        np.testing.assert_allclose(result.adapter.factors[name].delta(), factors.delta(), atol=1e-6)


def test_an_adapter_of_nothing_can_be_resized():
    nothing = random_adapter(modules=(TO_K,)).scaled(0)
    result = resize(nothing, energy=0.9)
    assert result.error == 0
    assert result.adapter.rank == 1


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({}, "either a rank or an energy"),
        ({"rank": 1, "energy": 0.5}, "either a rank or an energy"),
        ({"rank": 0}, "rank 0: expected at least 1"),
        ({"energy": 0.0}, "expected a share"),
        ({"energy": 1.5}, "expected a share"),
        ({"energy": math.nan}, "expected a share"),
    ],
)
def test_sizes_that_make_no_sense(size, message):
    with pytest.raises(BadInput, match=message):
        resize(random_adapter(modules=(TO_K,)), **size)


def test_what_cannot_be_stacked():
    small, large = random_adapter(), random_adapter(widths=names.SD15)
    with pytest.raises(BadInput, match="nothing to stack"):
        stack([])
    with pytest.raises(BadInput, match=r"different models: .* is .32, 128. and .320, 768."):
        stack([(small, 1.0), (large, 1.0)])
    with pytest.raises(BadInput, match="different models"):
        interference([(small, 1.0), (large, 1.0)])
    with pytest.raises(BadInput, match="random-0: expected a finite weight, found nan"):
        stack([(small, math.nan)])


def test_a_stack_says_where_it_comes_from():
    base = {"model": "demo"}
    a = random_adapter(1, concepts=["bomb", "axe"], base=base)
    b = random_adapter(2, concepts=["axe", "wine"], base=base)
    c = random_adapter(3, concepts=["rain"], base=base)
    metadata = stack([(a, 1.0), (b, 0.5), (c, -1.0)]).metadata
    assert metadata["name"] == "random-1+random-2+random-3"
    assert metadata["concepts"] == ["bomb", "axe", "wine"]  # what is added, not what is taken away
    assert metadata["base"] == base
    assert metadata["merged_from"][1] == {
        "name": "random-2",
        "identity": b.identity,
        "lineage": [],
        "weight": 0.5,
        "concepts": ["axe", "wine"],
    }
    other = random_adapter(4, base={"model": "other"})
    assert "base" not in stack([(a, 1.0), (other, 1.0)]).metadata


def test_what_an_adapter_was_made_from_is_told_at_any_depth(tmp_path):
    a, b, c = (random_adapter(n, modules=(TO_K,)) for n in (1, 2, 3))
    ab = stack([(a, 1.0), (b, 1.0)])
    small = resize(ab, rank=5).adapter
    smaller = resize(small, rank=3).adapter
    half = smaller.scaled(0.5)
    last = Adapter.load(stack([(half, 1.0), (c, 1.0)]).save(tmp_path / "last.safetensors"))
    assert a.lineage == ()
    assert ab.lineage == (a.identity, b.identity)
    assert set(small.lineage) == {a.identity, b.identity, ab.identity}
    assert set(smaller.lineage) == {*small.lineage, small.identity}
    assert set(half.lineage) == {*smaller.lineage, smaller.identity}
    assert set(last.lineage) == {*half.lineage, half.identity, c.identity}
    (part, _) = last.metadata["merged_from"]
    assert set(part["lineage"]) == set(half.lineage)


def test_overdrive_is_told_where_a_sum_is_stronger_than_its_parts_were():
    a, b = random_adapter(1), random_adapter(2)
    assert not interference([(a, 1.0)]).overdriven
    doubled = interference([(a, 1.0), (a, 1.0)])
    assert len(doubled.overdriven) == len(a.factors)
    assert all(module.drive == pytest.approx(2) for module in doubled.overdriven)
    assert doubled.cosine[0, 1] == pytest.approx(1)
    assert interference([(a, 1.0), (b, 1.0), (a, -1.0)]).norm == pytest.approx(b.norm(), rel=1e-5)
    disjoint = random_adapter(3, modules=(KINDS[2],))
    assert interference([(a, 1.0), (disjoint, 1.0)]).cosine[0, 1] == 0


def test_inner_product():
    a, b = (random_adapter(n, modules=(TO_K,), alpha=n + 0.5).factors[TO_K] for n in (1, 2))
    assert inner(a, b) == pytest.approx(float((a.delta() * b.delta()).sum()), rel=1e-4)


def test_a_heat_map_takes_any_name():
    """What foreign files are called is no formula, and may be long or of several lines."""
    called = [r"a$\frac{$", "two\nlines\x1b[31m", "x" * 3000]
    report = interference([(random_adapter(n, name=name), 1.0) for n, name in enumerate(called)])
    draw_heat_map(report, io.BytesIO())
    assert report.labels == [called[0], "two lines [31m", "x" * 39 + "…"]
    assert report.as_json()["adapters"] == called


def test_small_matrices_are_left_to_one_thread(monkeypatch):
    """Where other programs hold the cores, BLAS's own threads took a minute to a stack of 100."""
    with threadpool_limits(2, user_api="blas"):
        if max(pool["num_threads"] for pool in threadpool_info()) < 2:
            pytest.skip("a BLAS of one thread")
        seen = set()

        def count(*_, **__):
            seen.update(p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas")
            return 1.0

        monkeypatch.setattr("sdd_lora.adapter.interference._spectral_norm", count)
        interference([(random_adapter(modules=(TO_K,)), 1.0)])
    assert seen == {1}


def test_heat_map_is_a_picture():
    from PIL import Image

    report = interference([(random_adapter(n), 1.0) for n in range(3)])
    first, second = io.BytesIO(), io.BytesIO()
    draw_heat_map(report, first)
    draw_heat_map(report, second)
    assert first.getvalue() == second.getvalue()
    with Image.open(first) as picture:
        assert picture.width > 200
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_a_stack_keeps_trigger_words_and_tags():
    headers = [
        {"modelspec.trigger_phrase": "ink style", "ss_tag_frequency": '{"ink": {"cat": 3}}'},
        {"modelspec.trigger_phrase": "oil style", "ss_tag_frequency": '{"oil": {"dog": 2}}'},
    ]
    parts = [(random_adapter(n, header=header), 1.0) for n, header in enumerate(headers)]
    header = stack(parts).metadata.header
    assert header["modelspec.trigger_phrase"] == "ink style, oil style"
    assert json.loads(header["ss_tag_frequency"]) == {"ink": {"cat": 3}, "oil": {"dog": 2}}


def test_a_part_that_changes_nothing_is_named(caplog):
    empty = random_adapter(3, size=0.0, name="blank")
    with caplog.at_level(logging.WARNING):
        stack([(random_adapter(), 1.0), (empty, 1.0)])
    assert "blank" in caplog.text
