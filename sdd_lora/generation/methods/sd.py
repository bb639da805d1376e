"""SD: the model as it is, with whatever adapters it carries."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.generation.guided import size_of, to_uint8

if TYPE_CHECKING:
    from sdd_lora.generation.sampling import Sampling


def draw(
    pipeline: StableDiffusionPipeline, prompts: list[str], generators: list[torch.Generator],
    sampling: "Sampling", negative_prompt: str | None = None,
) -> np.ndarray:  # fmt: skip
    """Images (B, H, W, 3) uint8, one a prompt."""
    # left out where nothing is said: an image-to-image pipeline takes its picture's size
    size = {}
    if sampling.width or sampling.height:  # the pipeline would drop one without the other
        size = dict(zip(("width", "height"), size_of(pipeline, sampling), strict=True))
    images = pipeline(
        prompts,
        negative_prompt=None if negative_prompt is None else [negative_prompt] * len(prompts),
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance,
        generator=generators,
        output_type="np",
        **size,
    ).images
    return to_uint8(images)
