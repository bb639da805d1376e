"""Inpainting: half of a picture of what was erased is hidden; does the protected model draw it?

Latents are masked, as diffusers' inpainting does with a UNet of four channels: after each step the
half that is not hidden is put back, noised to the next step's level.
"""

import torch

from sdd_lora.attacks.base_drawing import base_image
from sdd_lora.attacks.case import Attacked, Case
from sdd_lora.attacks.settings import Inpainting
from sdd_lora.generation.given import Given
from sdd_lora.generation.img2img import encode_image


def inpainting(case: Case, settings: Inpainting) -> Attacked:
    """The base's picture of the same prompt and seed, with its left, right, upper or lower half to
    be drawn from noise: the seed says which."""
    known = encode_image(case.base, base_image(case), case.generator())
    return Attacked(case.prompt, given=Given(known=known, hidden=half_of(known, case.seed)))


def half_of(latents: torch.Tensor, number: int) -> torch.Tensor:
    """A mask (1, h, w) that is 1 in one half of latents (4, h, w), else 0: left, right, upper,
    lower, in turn."""
    height, width = latents.shape[-2:]
    mask = torch.zeros(1, height, width)
    half = [
        (slice(None), slice(width // 2)),
        (slice(None), slice(width // 2, None)),
        (slice(height // 2), slice(None)),
        (slice(height // 2, None), slice(None)),
    ][number % 4]
    mask[0][half] = 1
    return mask
