"""SLD, Safe Latent Diffusion (Schramowski et al. 2022, arXiv 2211.05105): guidance away from a
concept, where the prompt's prediction is near the concept's."""

from dataclasses import dataclass
from functools import partial

import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.generation.guided import denoise
from sdd_lora.generation.sampling import Sampling


@dataclass(frozen=True)
class Strength:
    """A column of the paper's table of hyper-parameters: δ, s_S, λ, s_m and β_m."""

    warmup_steps: int
    scale: float
    threshold: float
    momentum_scale: float
    momentum_beta: float


#: The paper's numbers. diffusers' SafetyConfig.WEAK has a scale of 20 where the paper has 200.
STRENGTHS = {
    "sld-weak": Strength(15, 200, 0.0, 0.0, 0.0),
    "sld-medium": Strength(10, 1000, 0.01, 0.3, 0.4),
    "sld-strong": Strength(7, 2000, 0.025, 0.5, 0.7),
    "sld-max": Strength(0, 5000, 1.0, 0.5, 0.7),
}


class SafetyGuidance:
    """Equations 3 to 8 of the paper for some images, step by step; keeps the momentum v."""

    def __init__(self, strength: Strength, guidance: float) -> None:
        self.strength, self.guidance = strength, guidance
        self.momentum: torch.Tensor | float = 0.0

    def __call__(
        self, step: int, empty: torch.Tensor, text: torch.Tensor, concept: torch.Tensor
    ) -> torch.Tensor:
        s, apart = self.strength, text - concept
        # equation 6, in its published code's signs: μ = min(1, s_S |ε_p − ε_s|), 0 from λ on
        scale = (s.scale * apart.abs()).clamp(max=1.0)
        scale = torch.where(apart >= s.threshold, 0.0, scale)
        safety = scale * (concept - empty) + s.momentum_scale * self.momentum  # equations 4 and 7
        self.momentum = s.momentum_beta * self.momentum + (1 - s.momentum_beta) * safety  # 8
        applied = safety if step >= s.warmup_steps else 0.0
        return empty + self.guidance * (text - empty - applied)  # equation 3


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    generators: list[torch.Generator],
    sampling: Sampling,
) -> torch.Tensor:
    """Latents (B, 4, h, w), one a prompt; how strong is in the method's id."""
    new_guide = partial(SafetyGuidance, STRENGTHS[sampling.method], sampling.guidance)
    return denoise(pipeline, prompts, generators, sampling, new_guide)
