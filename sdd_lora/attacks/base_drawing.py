"""The unprotected model's drawing of an attacked prompt: what attacks start from or learn from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.attacks.case import Case
from sdd_lora.generation.decoding import decode_latents
from sdd_lora.generation.guided import size_of
from sdd_lora.generation.sampling import Job
from sdd_lora.sd.schedulers import set_scheduler

_OWN_SEEDS = 1_000_000_000  # beyond those of any table


def drawings(case: Case, count: int) -> torch.Tensor:
    """Latents (count, 4, h, w) that the base draws of the case's prompt, from seeds of their own.

    The autoencoder is left out: encoding the pictures would give these latents back, but for its
    loss.
    """
    seeds = [case.seed + _OWN_SEEDS * (1 + k) for k in range(count)]
    return drawn_latents(case.base, case, [case.prompt] * count, seeds)


@torch.no_grad()
def drawn_latents(
    pipeline: StableDiffusionPipeline,
    case: Case,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int | None = None,
) -> torch.Tensor:
    """Latents (B, 4, h, w) that a pipeline draws as the case's sampling says; those before the
    sampler's step of index `steps` where it is to stop there."""

    def stop(pipeline: Any, step: int, t: torch.Tensor, found: dict[str, Any]) -> dict[str, Any]:
        pipeline._interrupt = step + 1 == steps  # as diffusers' own examples do
        return found

    set_scheduler(pipeline, case.sampling.scheduler)
    width, height = size_of(pipeline, case.sampling)
    return pipeline(
        list(prompts),
        num_inference_steps=case.sampling.steps,
        guidance_scale=case.sampling.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        width=width,
        height=height,
        callback_on_step_end=None if steps is None else stop,
    ).images


def base_image(case: Case) -> np.ndarray:
    """What the base draws of the case's prompt and seed, (H, W, 3) uint8."""
    latents = drawn_latents(case.base, case, [case.prompt], [case.seed])
    images, _ = decode_latents(case.base, latents, [Job(case.prompt, case.seed)])
    return np.asarray(images[0])
