"""SD: the model as it is, with whatever adapters it carries."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.generation.denoise import to_uint8

if TYPE_CHECKING:
    from sdd_lora.generation.images import Sampling


def draw(
    pipeline: StableDiffusionPipeline, prompts: list[str], generators: list[torch.Generator],
    sampling: "Sampling", negative_prompt: str | None = None,
) -> np.ndarray:  # fmt: skip
    """Images (B, H, W, 3) uint8, one a prompt."""
    # left out where nothing is said: an image-to-image pipeline takes its picture's size
    size = {"width": sampling.width, "height": sampling.height}
    images = pipeline(
        prompts,
        negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        generator=generators,
        output_type="np",
        **{side: pixels for side, pixels in size.items() if pixels is not None},
    ).images
    return to_uint8(images)
