"""SLD: the update by hand, and whole images against diffusers' own pipeline while it has one."""

import pytest
import torch
from support.diffusers_images import require_images_of

from sdd_lora.generation.methods.sld import STRENGTHS, SafetyGuidance, Strength

EMPTY = torch.zeros(1, 4, 1, 1)
TEXT = torch.tensor([0.1, 0.3, 1.0, -1.0]).view(1, 4, 1, 1)
CONCEPT = torch.tensor([0.3, 0.2, 0.2, 0.2]).view(1, 4, 1, 1)


def test_the_update_by_hand():
    guide = SafetyGuidance(Strength(1, 2.0, 0.5, 0.5, 0.25), 3.0)
    # apart (-.2, .1, .8, -1.2); μ (.4, .2, 0 beyond the threshold, 1 clamped)
    first = guide(0, EMPTY, TEXT, CONCEPT).flatten().tolist()
    assert first == pytest.approx([0.3, 0.9, 3.0, -3.0])  # warming up: plain guidance
    assert guide.momentum.flatten().tolist() == pytest.approx([0.09, 0.03, 0.0, 0.15])
    # γ (.12, .04, 0, .2) + half the momentum, subtracted inside guidance
    second = guide(1, EMPTY, TEXT, CONCEPT).flatten().tolist()
    assert second == pytest.approx([-0.195, 0.735, 3.0, -3.825])
    expected = [0.14625, 0.04875, 0.0, 0.24375]
    assert guide.momentum.flatten().tolist() == pytest.approx(expected)


def test_the_empty_prompts_prediction_is_what_guidance_starts_from():
    guide = SafetyGuidance(Strength(0, 100.0, 1.0, 0.0, 0.0), 2.0)
    # μ = 1: 1 + 2 (.5 - 1 - (.25 - 1)) = 1.5
    noise = guide(0, *(torch.full((1, 4, 1, 1), value) for value in (1.0, 0.5, 0.25)))
    assert noise.flatten().tolist() == pytest.approx([1.5] * 4)


@pytest.mark.parametrize("method", ["sld-weak", "sld-max"])
def test_images_are_those_of_diffusers_pipeline(method):
    try:
        from diffusers import StableDiffusionPipelineSafe
    except ImportError:
        pytest.skip("this diffusers has no SLD any more")
    s = STRENGTHS[method]
    settings = {
        "sld_warmup_steps": s.warmup_steps,
        "sld_guidance_scale": s.scale,
        "sld_threshold": s.threshold,
        "sld_momentum_scale": s.momentum_scale,
        "sld_mom_beta": s.momentum_beta,
    }
    steps = max(s.warmup_steps + 2, 6)
    concept = {"safety_concept": "bomb"}
    require_images_of(StableDiffusionPipelineSafe, method, steps, settings, concept)
