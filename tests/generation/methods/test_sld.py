"""SLD: the update by hand, and whole images against diffusers' own pipeline while it has one."""

import numpy as np
import pytest
import torch

from sdd_lora.generation.images import draw
from sdd_lora.generation.methods.sld import STRENGTHS, SafetyGuidance, Strength
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.sd.pipeline import load_pipeline
from sdd_lora.sd.schedulers import set_scheduler

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
    pipeline = load_pipeline("demo", device="cpu")
    jobs = [Job("a bomb, noto style", 1), Job("a cat", 2)]
    s = STRENGTHS[method]
    steps = max(s.warmup_steps + 2, 6)
    sampling = Sampling(steps, 5.0, method=method, concept="bomb")
    ours = np.stack([image for _, image in draw(pipeline, jobs, sampling, "test")])
    theirs = StableDiffusionPipelineSafe(
        **{key: part for key, part in pipeline.components.items() if key != "image_encoder"},
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    set_scheduler(theirs, "ddim")
    theirs.safety_concept = "bomb"
    images = np.concatenate(
        [
            theirs(
                [job.prompt],
                num_inference_steps=steps,
                guidance_scale=5.0,
                output_type="np",
                generator=torch.Generator().manual_seed(job.seed),
                sld_warmup_steps=s.warmup_steps,
                sld_guidance_scale=s.scale,
                sld_threshold=s.threshold,
                sld_momentum_scale=s.momentum_scale,
                sld_mom_beta=s.momentum_beta,
            ).images
            for job in jobs
        ]
    )
    assert np.abs(ours - images * 255).max() <= 2
    plain = [image for _, image in draw(pipeline, jobs, Sampling(steps, 5.0), "test")]
    assert np.abs(ours[0].astype(int) - plain[0]).max() > 20
