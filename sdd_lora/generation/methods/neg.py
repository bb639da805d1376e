"""SD+NEG: the concept as negative prompt."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.generation.methods import sd

if TYPE_CHECKING:
    from sdd_lora.generation.sampling import Sampling


def draw(
    pipeline: StableDiffusionPipeline, prompts: list[str], generators: list[torch.Generator],
    sampling: "Sampling",
) -> np.ndarray:  # fmt: skip
    """Images (B, H, W, 3) uint8, one a prompt."""
    return sd.draw(pipeline, prompts, generators, sampling, negative_prompt=sampling.concept)
