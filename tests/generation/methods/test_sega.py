"""SEGA: the update by hand, and whole images against diffusers' own pipeline while it has one."""

import pytest
import torch
from support.diffusers_images import require_images_of

from sdd_lora.generation.methods import sega


def test_the_update_by_hand():
    guide = sega.SemanticGuidance(2.0)
    empty = torch.ones(1, 1, 2, 5)
    text = torch.full((1, 1, 2, 5), 1.5)
    concept = empty + torch.arange(1, 11).view(1, 1, 2, 5) / 10
    # edits -0.5 … -5.0; their sizes' 0.9 quantile is 4.55, so that the last alone is left
    first = guide(0, empty, text, concept)
    assert torch.equal(first, torch.full((1, 1, 2, 5), 2.0))  # warming up: 1 + 2 · 0.5
    assert guide.momentum.flatten().tolist() == pytest.approx([0.0] * 9 + [-3.0])
    late = guide(sega.WARMUP_STEPS, empty, text, concept)
    assert late.flatten().tolist() == pytest.approx([2.0] * 9 + [2.0 - 5.3])  # -5 + 0.1 · -3
    assert guide.momentum.flatten().tolist() == pytest.approx([0.0] * 9 + [-4.38])


def test_the_threshold_is_each_images_and_channels_own():
    empty, text = torch.zeros(2, 2, 2, 5), torch.zeros(2, 2, 2, 5)
    concept = torch.randn(2, 2, 2, 5, generator=torch.Generator().manual_seed(0))
    concept[1] *= 100
    guided = sega.SemanticGuidance(2.0)(10, empty, text, concept)
    assert (guided != 0).flatten(2).sum(2).tolist() == [[1, 1], [1, 1]]
    alone = sega.SemanticGuidance(2.0)(10, empty[:1], text[:1], concept[:1])
    assert torch.equal(guided[:1], alone)


def test_images_are_those_of_diffusers_pipeline():
    try:
        from diffusers import SemanticStableDiffusionPipeline
    except ImportError:
        pytest.skip("this diffusers has no SEGA any more")
    settings = {
        "editing_prompt": ["bomb"],
        "reverse_editing_direction": True,
        "edit_guidance_scale": 5,
        "edit_warmup_steps": 10,
        "edit_threshold": 0.9,
        "edit_momentum_scale": 0.1,
        "edit_mom_beta": 0.4,
    }
    require_images_of(SemanticStableDiffusionPipeline, "sega", 14, settings)
