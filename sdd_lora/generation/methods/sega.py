"""SEGA, semantic guidance (Brack et al. 2023, arXiv 2301.12247), away from the concept, with the
numbers that the SDD paper used it with."""

from functools import partial

import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.generation.guided import denoise
from sdd_lora.generation.sampling import Sampling

SCALE = 5.0  # s_e
WARMUP_STEPS = 10  # δ
THRESHOLD = 0.9  # λ, as a quantile
MOMENTUM_SCALE = 0.1  # s_m
MOMENTUM_BETA = 0.4  # β


class SemanticGuidance:
    """The paper's edit term γ for some images, step by step; keeps the momentum v."""

    def __init__(self, guidance: float) -> None:
        self.guidance = guidance
        self.momentum: torch.Tensor | float = 0.0

    def __call__(
        self, step: int, empty: torch.Tensor, text: torch.Tensor, concept: torch.Tensor
    ) -> torch.Tensor:
        edit = -SCALE * (concept - empty)  # negative: away from the concept
        size = edit.abs()
        # the top tenth of each channel, as diffusers takes it; quantile knows no fp16
        least = torch.quantile(size.flatten(2).float(), THRESHOLD, dim=2).to(size.dtype)  # (B, 4)
        edit = torch.where(size >= least[:, :, None, None], edit, 0.0)
        edit = edit + MOMENTUM_SCALE * self.momentum
        self.momentum = MOMENTUM_BETA * self.momentum + (1 - MOMENTUM_BETA) * edit
        guided = empty + self.guidance * (text - empty)
        return guided + edit if step >= WARMUP_STEPS else guided


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    generators: list[torch.Generator],
    sampling: Sampling,
) -> torch.Tensor:
    """Latents (B, 4, h, w), one a prompt."""
    new_guide = partial(SemanticGuidance, sampling.guidance)
    return denoise(pipeline, prompts, generators, sampling, new_guide)
