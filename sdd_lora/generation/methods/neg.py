"""SD+NEG: the concept as negative prompt."""

from dataclasses import replace

import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.generation.methods import sd
from sdd_lora.generation.sampling import Sampling


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    generators: list[torch.Generator],
    sampling: Sampling,
) -> torch.Tensor:
    """Latents (B, 4, h, w), one a prompt."""
    own = replace(sampling, negative_prompt=negative_prompt(sampling))
    return sd.sample(pipeline, prompts, generators, own)


def negative_prompt(sampling: Sampling) -> str:
    """The concept, and what is guided away from besides."""
    return ", ".join(filter(None, (sampling.concept, sampling.negative_prompt)))
