"""Attacks that take part in the drawing: each starts where it says, on the embedded model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from support.adapters import random_adapter

from sdd_lora.attacks.base_drawing import drawn_latents
from sdd_lora.attacks.case import Case
from sdd_lora.attacks.completion import completion
from sdd_lora.attacks.emphasis import emphasis, places_of
from sdd_lora.attacks.img2img_attack import image_to_image
from sdd_lora.attacks.inpainting import half_of, inpainting
from sdd_lora.attacks.noise import denoising_loss, frozen, random_points
from sdd_lora.attacks.noise_search import noise_search
from sdd_lora.attacks.null_text import null_text
from sdd_lora.attacks.relearning import OWN_SEEDS, relearning
from sdd_lora.attacks.settings import (
    Completion,
    Emphasis,
    Img2Img,
    Inpainting,
    NoiseSearch,
    NullText,
    Relearning,
)
from sdd_lora.attacks.tokens import encoded, token_ids
from sdd_lora.errors import BadInput
from sdd_lora.generation.given import Given, from_given
from sdd_lora.generation.sampling import Sampling
from sdd_lora.sd.pipeline import load_pipeline
from sdd_lora.sd.schedulers import set_scheduler

PROMPT = "a drawing of an axe, pencil sketch"
SAMPLING = Sampling(4, 3.0)


def protected_model():
    return frozen(load_pipeline("demo", [(random_adapter(0.6), 0.5)], device="cpu"))


@pytest.fixture(scope="module")
def case():
    base = frozen(load_pipeline("demo", device="cpu"))
    return Case(protected_model(), base, ["axe", "bomb"], PROMPT, 7, SAMPLING)


def drawn_from(pipeline, given, case, **changes):
    """Latents (4, h, w) of the case's picture, drawn from what is given."""
    options = {"num_inference_steps": 4, "guidance_scale": 3.0} | changes
    drawing = from_given(pipeline, lambda job: given)
    return drawing([case.prompt], [case.generator()], negative_prompt=[""], **options).images[0]


def usual(pipeline, case):
    return drawn_latents(pipeline, case, [case.prompt], [case.seed])[0]


def test_nothing_given_is_drawn_as_always(case):
    torch.testing.assert_close(drawn_from(case.base, Given(), case), usual(case.base, case))


def test_a_completion_by_the_base_itself_is_its_own_picture(case):
    given = completion(case, Completion(steps=2)).given
    assert int(given.step) == 2
    torch.testing.assert_close(drawn_from(case.base, given, case), usual(case.base, case))
    other = drawn_from(case.protected, given, case)
    assert not torch.isclose(other, usual(case.base, case)).all(0).any()
    # nearer to the base's picture than what the protected model draws alone
    apart = [(z - usual(case.base, case)).norm() for z in (other, usual(case.protected, case))]
    assert apart[0] < apart[1]


def test_given_tensors_come_back_from_their_file(case, tmp_path):
    given = completion(case, Completion(steps=1)).given
    given.save(tmp_path / "g.safetensors")
    found = Given.load(tmp_path / "g.safetensors")
    assert torch.equal(found.latents, given.latents) and int(found.step) == 1
    assert found.known is None and found.each_step is None


def test_image_to_image_keeps_the_more_the_less_is_redrawn(case):
    picture = usual(case.base, case)
    apart = []
    for share in (0.25, 1.0):
        given = image_to_image(case, Img2Img(share=share)).given
        assert int(given.step) == 4 - 4 * share
        apart.append((drawn_from(case.protected, given, case) - picture).norm())
    assert apart[0] < apart[1]


def test_inpainting_is_diffusers_own(case):
    given = inpainting(case, Inpainting()).given
    mask = given.hidden[0]
    assert mask.sum() == mask.numel() / 2 and mask[8:].all()  # seed 7: the lower half
    theirs = StableDiffusionInpaintPipeline(
        **case.protected.components, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        case.prompt,
        image=given.known[None],
        masked_image_latents=given.known[None],  # of no use to a UNet of four channels
        mask_image=Image.fromarray(np.uint8(mask * 255)).resize((64, 64), Image.Resampling.NEAREST),
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=case.generator(),
        output_type="latent",
        height=64,
        width=64,
        strength=1.0,
    ).images[0]
    found = drawn_from(case.protected, given, case)
    torch.testing.assert_close(found[:, :8], given.known[:, :8])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_hidden_half_goes_round():
    sides = [half_of(torch.zeros(4, 2, 2), n)[0].flatten().tolist() for n in range(5)]
    assert sides == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]]


def test_emphasis_lengthens_the_concepts_words_alone(case):
    plain = encoded(case.protected, token_ids(case.protected, [PROMPT]))[0]
    weighted = emphasis(case, Emphasis(weight=2.0)).given.prompt
    ratio = weighted.norm(dim=1) / plain.norm(dim=1)
    ((start, end),) = places_of(
        token_ids(case.base, [PROMPT])[0].tolist(), case.base.tokenizer("axe").input_ids[1:-1]
    )
    others = torch.cat([ratio[:start], ratio[end:]])
    torch.testing.assert_close(others, others[:1].expand_as(others))
    torch.testing.assert_close(ratio[start:end], 2 * others[: end - start])
    torch.testing.assert_close(weighted.mean(), plain.mean())
    unchanged = emphasis(case, Emphasis(weight=1.0)).given
    torch.testing.assert_close(
        drawn_from(case.protected, unchanged, case), usual(case.protected, case)
    )


def test_a_noise_search_takes_a_noise_that_the_base_finds_no_worse(case):
    found = noise_search(case, NoiseSearch(tries=3, points=1))
    assert found.after <= found.before
    again = noise_search(case, NoiseSearch(tries=3, points=1))
    assert torch.equal(found.given.latents, again.given.latents)


def test_null_text_inversion_leads_to_the_picture_without_a_word(case):
    found = null_text(case, NullText(steps=4, learning_rate=0.05))
    assert found.after < found.before and found.given.each_step.shape == (4, 77, 128)
    drawn = drawn_from(case.protected, found.given, case)
    missed = torch.nn.functional.mse_loss(drawn, usual(case.base, case))
    assert missed.item() == pytest.approx(found.after, rel=1e-3)
    assert all(p.grad is None for p in case.protected.unet.parameters())


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_null_text_inversion_goes_by_the_models_own_timesteps(case, spacing):
    spaced = replace(case, protected=protected_model())
    scheduler = spaced.protected.scheduler
    spaced.protected.scheduler = type(scheduler).from_config(
        scheduler.config, timestep_spacing=spacing
    )
    found = null_text(spaced, NullText(steps=2, learning_rate=0.05))
    assert found.after < found.before


def test_the_loss_is_the_same_whatever_sampler_draws(case):
    pipeline = frozen(load_pipeline("demo", device="cpu"))
    latents = drawn_latents(pipeline, case, [PROMPT], [1])
    points = random_points(pipeline, latents, torch.Generator().manual_seed(5))
    text = encoded(pipeline, token_ids(pipeline, [PROMPT]))
    found = []
    for name in ("ddim", "dpm++", "euler", "unipc"):
        set_scheduler(pipeline, name)
        found.append(denoising_loss(pipeline, latents, text, points).item())
    assert found == [pytest.approx(found[0], rel=1e-5)] * 4


def test_a_model_that_predicts_something_else_is_refused(case):
    pipeline = frozen(load_pipeline("demo", device="cpu"))
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")
    latents = torch.zeros(1, 4, 16, 16)
    points = random_points(pipeline, latents, torch.Generator().manual_seed(5))
    with pytest.raises(BadInput, match="predicts v_prediction; expected epsilon"):
        denoising_loss(pipeline, latents, torch.zeros(1, 77, 128), points)


def test_relearning_finds_an_adapter_under_which_the_pictures_are_likelier(case):
    settings = Relearning(
        prompts=[PROMPT], pictures=1, iterations=6, batch=1, rank=2, learning_rate=0.01
    )
    fresh = replace(case, protected=protected_model())
    found = relearning(fresh, settings)
    assert found.adapter.rank == 2 and found.prompt == PROMPT
    both = load_pipeline("demo", [(random_adapter(0.6), 0.5), (found.adapter, 1.0)], device="cpu")
    latents = drawn_latents(case.base, case, [PROMPT], [case.seed + OWN_SEEDS])
    points = random_points(both, latents, torch.Generator().manual_seed(5))  # no iteration saw them
    losses = []
    for pipeline in (case.protected, both, fresh.protected):
        with torch.no_grad():
            text = encoded(pipeline, token_ids(pipeline, [PROMPT]))
            losses.append(denoising_loss(pipeline, latents, text, points).item())
    assert losses[1] < losses[0]
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)  # what is kept is what was learnt
