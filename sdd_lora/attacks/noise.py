"""The denoising loss that attacks lower, on what the unprotected model draws."""

import torch
from diffusers import StableDiffusionPipeline


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
