"""The change of embeddings that erases, against brute force at SD 1.x's width."""

import pytest
import torch

from sdd_lora.training.projection import Moments, Projection, moment

WIDTH, RANK = 768, 5


@pytest.fixture(scope="module")
def made():
    """Kept tokens in 300 directions; concepts are kept ones and something in 5 others."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw))[0]
    kept = torch.randn(40, 20, 300, generator=draw) @ basis[:, :300].T
    targets = torch.randn(10, 20, 300, generator=draw) @ basis[:, :300].T
    extra = torch.randn(10, 20, RANK, generator=draw) @ basis[:, 300 : 300 + RANK].T
    concepts = targets + 2 * extra
    return concepts, targets, kept, moments_of(concepts, targets, moment(kept, kept))


def moments_of(concepts, targets, kept):
    step = targets - concepts
    pairs = ((concepts, concepts), (step, concepts), (step, step))
    return Moments(*(moment(left, right) for left, right in pairs), kept, 1)


def change(projection):
    return (projection.up @ projection.down).float()


def test_moments_are_means_over_all_tokens(made):
    concepts, targets, kept, moments = made
    e, t, k = (x.reshape(-1, WIDTH).double() for x in (concepts, targets, kept))
    brute = {
        "concept": sum(torch.outer(a, a) for a in e) / len(e),
        "cross": sum(torch.outer(b - a, a) for a, b in zip(e, t, strict=True)) / len(e),
        "kept": sum(torch.outer(a, a) for a in k) / len(k),
    }
    for name, expected in brute.items():
        assert (getattr(moments, name) - expected).abs().max() < 1e-6


def test_weights_count_a_place_as_often(made):
    concepts, targets, *_ = made
    twice = torch.cat([concepts, concepts[:, :1]], dim=1), torch.cat([targets, targets[:, :1]], 1)
    weights = torch.tensor([2.0] + [1.0] * 19)
    assert (moment(concepts, targets, weights) - moment(*twice)).abs().max() < 1e-6


def test_it_finds_the_rank_sends_concepts_to_their_targets_and_leaves_kept_tokens(made):
    concepts, targets, kept, moments = made
    projection = Projection.solve(moments)
    assert len(projection.down) == RANK
    step = change(projection)
    left = (concepts + concepts @ step.T - targets).square().sum()
    assert left < 0.02 * (concepts - targets).square().sum()
    assert (kept @ step.T).norm(dim=-1).max() < 0.01 * kept.norm(dim=-1).min()


def test_towards_nothing_it_is_a_projection(made):
    concepts, _, _, moments = made
    erased = moments_of(concepts, torch.zeros_like(concepts), moments.kept)
    projection = Projection.solve(erased, RANK)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    matrix = eye + projection.up @ projection.down
    assert (matrix @ matrix - matrix).abs().max() < 1e-8
    assert (projection.down @ matrix).abs().max() < 1e-8 * projection.down.abs().max()


def test_no_other_b_leaves_less(made):
    concepts, targets, _, moments = made
    projection = Projection.solve(moments, 3)

    def left(up):
        moved = concepts.double() @ (up @ projection.down).T
        return float((concepts + moved - targets).square().sum())

    draw, least = torch.Generator().manual_seed(1), left(projection.up)
    for _ in range(3):
        noise = torch.randn(projection.up.shape, generator=draw, dtype=torch.float64)
        assert left(projection.up + 1e-3 * projection.up.abs().mean() * noise) > least


def test_the_table_tells_what_is_left_and_moved(made):
    concepts, targets, kept, moments = made
    for row in Projection.solve(moments, 4).ranks[:4]:
        step = change(Projection.solve(moments, row.rank))
        whole = (concepts - targets).square().sum() / concepts[..., 0].numel()
        left = (concepts + concepts @ step.T - targets).square().sum() / concepts[..., 0].numel()
        moved = (kept @ step.T).square().sum() / kept[..., 0].numel()
        assert row.left == pytest.approx(float(left / whole), rel=1e-3)
        assert row.moved == pytest.approx(float(moved / whole), rel=1e-2, abs=1e-6)


def test_power_is_one_for_concepts_on_the_mean(made):
    concepts, _, kept, moments = made
    projection = Projection.solve(moments)
    assert float(projection.power(concepts, moments).mean()) == pytest.approx(1, rel=1e-6)
    assert float(projection.power(kept, moments).max()) < 0.01


def test_directions_that_move_kept_tokens_too_far_are_not_taken(made, monkeypatch):
    moments = made[-1]
    whole = Projection.solve(moments)
    taken = whole.ranks[: len(whole.down)]
    limit = (taken[-2].moved + taken[-1].moved) / 2
    monkeypatch.setattr("sdd_lora.training.projection.MOST_MOVED", limit)
    assert len(Projection.solve(moments).down) == len(taken) - 1
    assert len(Projection.solve(moments, len(taken)).down) == len(taken)
    monkeypatch.setattr("sdd_lora.training.projection.MOST_MOVED", 0.0)
    assert len(Projection.solve(moments).down) == 1
