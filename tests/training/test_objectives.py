"""The losses against a closed-form noise estimate."""

import pytest
import torch

from sdd_lora.recipe import Preserve
from sdd_lora.training.objectives import LECO, SDD, ESDx, preservation_loss, total_loss


def linear_estimate(weight):
    """ε(z, t, c) = weight · mean(c) · z + t, so that losses can be written down."""

    def estimate(z_t, t, prompt):
        return weight * prompt.mean(dim=(1, 2)).view(-1, 1, 1, 1) * z_t + t.view(-1, 1, 1, 1)

    return estimate


def sdd(student, *inputs):
    """SDD's loss, which needs no base."""
    return SDD(guidance_scale=3.0, t_in_bin=False).loss(student, None, *inputs)


def points():
    torch.manual_seed(0)
    z = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    return z, torch.tensor([1, 500, 981])


def prompts(value):
    return torch.full((3, 77, 6), float(value), dtype=torch.float64)


def test_sdd_is_the_squared_distance_to_the_unconditional_estimate():
    z, t = points()
    weight = torch.tensor(0.7, dtype=torch.float64)
    loss = sdd(linear_estimate(weight), z, t, prompts(2), prompts(5))
    expected = ((weight * (2 - 5) * z) ** 2).mean()
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_several_prompts_a_latent_are_the_mean_of_their_losses():
    z, t = points()
    estimate = linear_estimate(torch.tensor(0.7, dtype=torch.float64))
    both = torch.stack([prompts(5), prompts(9)], dim=1).flatten(0, 1)
    apart = [sdd(estimate, z, t, prompts(2), prompts(c)) for c in (5, 9)]
    assert torch.allclose(sdd(estimate, z, t, prompts(2), both), sum(apart) / 2)


def test_no_gradient_flows_through_the_target():
    z, t = points()
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    sdd(linear_estimate(weight), z, t, prompts(2), prompts(5)).backward()
    # d/dw mean((sg(2wz) − 5wz)²) = mean(2 · (2wz − 5wz) · (−5z)) = 30 · w · mean(z²)
    assert torch.allclose(weight.grad, 30 * 0.7 * (z**2).mean(), rtol=1e-4)


def test_preservation_is_the_distance_to_the_base():
    z, t = points()
    student = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    base = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    loss = preservation_loss(linear_estimate(student), linear_estimate(base), z, t, prompts(2))
    assert torch.allclose(loss, ((0.3 * 2 * z) ** 2).mean(), rtol=1e-5)
    loss.backward()
    assert student.grad is not None and base.grad is None


def test_a_recipes_loss_keeps_the_kept_prompts_and_the_empty_one():
    z, t = points()
    student, base = linear_estimate(0.7), linear_estimate(0.4)
    objective = SDD(guidance_scale=3.0, t_in_bin=False)
    loss = total_loss(
        objective, Preserve(weight=2.0), student, base, z, t, prompts(2), prompts(5), prompts(3)
    )
    kept = [preservation_loss(student, base, z, t, prompts(c)) for c in (3, 2)]
    expected = objective.loss(student, base, z, t, prompts(2), prompts(5)) + 2 * sum(kept)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("eta", [1.0, 3.0])
def test_esds_target_is_the_frozen_bases(eta):
    """With ε(z, t, c) = w · c · z + t, ∅ = 2 and c = 5 it is w* · (2 − 3η) · z + t."""
    z, t = points()
    student = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    base = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    objective = ESDx(guidance_scale=3.0, t_in_bin=False, eta=eta)
    loss = objective.loss(
        linear_estimate(student), linear_estimate(base), z, t, prompts(2), prompts(5)
    )
    residual = 0.7 * 5 - 0.4 * (2 - 3 * eta)
    assert torch.allclose(loss, ((residual * z) ** 2).mean(), rtol=1e-5)
    loss.backward()
    assert base.grad is None
    assert torch.allclose(student.grad, 2 * residual * 5 * (z**2).mean(), rtol=1e-4)


def test_lecos_loss_is_its_codes_computed_by_hand():
    """target = .7 · 5 z + t; neutral = unconditional = .4 · 2 z + t, positive = .4 · 5 z + t."""
    z = torch.tensor([1.0, -2.0]).double().view(1, 1, 1, 2)
    t = torch.tensor([7])
    c_0, c = (torch.full((1, 77, 6), x, dtype=torch.float64) for x in (2.0, 5.0))
    objective = LECO(guidance_scale=3.0, t_in_bin=False, eta=1.0)
    loss = objective.loss(linear_estimate(0.7), linear_estimate(0.4), z, t, c_0, c)
    target, neutral, positive = [3.5, -7.0], [0.8, -1.6], [2.0, -4.0]  # each without t
    goal = [n - 1.0 * (p - n) for n, p in zip(neutral, positive, strict=True)]
    expected = ((target[0] - goal[0]) ** 2 + (target[1] - goal[1]) ** 2) / 2
    assert expected == pytest.approx(38.025)
    assert float(loss) == pytest.approx(expected)
