"""A tiny UNet with SD 1.x's structure: four levels, cross-attention in the same 16 places."""

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from sdd_lora.training.embeddings import Embeddings


def small_unet() -> UNet2DConditionModel:
    """Random weights, always the same; latents 4×8×8, prompts 77×16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8, 16, 16),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        ).eval()


def ddim() -> DDIMScheduler:
    """SD 1.x's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def embeddings(concepts: int = 3, kept: int = 2) -> Embeddings:
    generator = torch.Generator().manual_seed(5)

    def prompts(count: int) -> torch.Tensor:
        return torch.randn(count, 77, 16, generator=generator)

    return Embeddings(prompts(1), prompts(concepts), prompts(1), prompts(kept) if kept else None)
