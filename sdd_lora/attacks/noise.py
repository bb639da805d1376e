"""The denoising loss that attacks lower, on what the unprotected model draws."""

import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.attacks.case import Case
from sdd_lora.generation.guided import size_of
from sdd_lora.sd.schedulers import set_scheduler

_OWN_SEEDS = 1_000_000_000  # beyond those of any table


@torch.no_grad()
def drawings(case: Case, count: int) -> torch.Tensor:
    """Latents (count, 4, h, w) that the base draws of the case's prompt, from seeds of their own.

    The autoencoder is left out: encoding the pictures would give these latents back, but for its
    loss.
    """
    set_scheduler(case.base, case.sampling.scheduler)
    generators = [
        torch.Generator().manual_seed(case.seed + _OWN_SEEDS * (1 + k)) for k in range(count)
    ]
    width, height = size_of(case.base, case.sampling)
    return case.base(
        [case.prompt] * count,
        num_inference_steps=case.sampling.steps,
        guidance_scale=case.sampling.guidance,
        generator=generators,
        output_type="latent",
        width=width,
        height=height,
    ).images


def random_points(
    pipeline: StableDiffusionPipeline, latents: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps (B,) and noise like the latents, drawn on the CPU."""
    steps = pipeline.scheduler.config.num_train_timesteps
    t = torch.randint(steps, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    return t.to(latents.device), noise.to(latents)


def denoising_loss(
    pipeline: StableDiffusionPipeline,
    latents: torch.Tensor,
    embeddings: torch.Tensor,
    points: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """‖ε − ε_θ(z_t, t, c)‖², the mean over everything: latents (B, 4, h, w), embeddings (B, 77, d),
    `points` the timesteps and noise."""
    t, noise = points
    noisy = pipeline.scheduler.add_noise(latents, noise, t)
    predicted = pipeline.unet(noisy, t, encoder_hidden_states=embeddings).sample
    return torch.nn.functional.mse_loss(predicted.float(), noise.float())


def frozen(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The pipeline as fp32, in which gradients don't vanish; no parameter of its gets any."""
    if pipeline.unet.dtype != torch.float32:
        pipeline = pipeline.to(torch.float32)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.requires_grad_(False)
    return pipeline
