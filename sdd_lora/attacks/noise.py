"""The denoising loss that attacks lower, on what the unprotected model draws."""

import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.errors import BadInput


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
    `points` the timesteps and noise. z_t = √ᾱ z + √(1 − ᾱ) ε, whatever sampler draws.

    Raises BadInput for a model that predicts something else than ε.
    """
    if (kind := pipeline.scheduler.config.prediction_type) != "epsilon":
        raise BadInput(f"attacks: the model predicts {kind}; expected epsilon")
    t, noise = points
    alphas = pipeline.scheduler.alphas_cumprod.to(latents)[t][:, None, None, None]
    noisy = alphas**0.5 * latents + (1 - alphas) ** 0.5 * noise
    predicted = pipeline.unet(noisy, t, encoder_hidden_states=embeddings).sample
    return torch.nn.functional.mse_loss(predicted.float(), noise.float())


def frozen(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The pipeline as fp32, in which gradients don't vanish; no parameter of its gets any."""
    if pipeline.unet.dtype != torch.float32:
        pipeline = pipeline.to(torch.float32)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.requires_grad_(False)
    return pipeline
