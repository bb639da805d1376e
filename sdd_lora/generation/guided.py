"""Sampling with a third prediction beside guidance's two: the concept's, which SLD and SEGA steer
away from. A small loop of our own, because diffusers' pipelines of these methods are deprecated."""

from collections.abc import Callable

import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.generation.sampling import Sampling

#: (step, ε of the empty prompt, of the prompt, of the concept) → the ε to step with; all
#: (1, 4, h, w). Called once a step, in order.
Guide = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def denoise(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    generators: list[torch.Generator],
    sampling: Sampling,
    new_guide: Callable[[], Guide],
) -> torch.Tensor:
    """Latents (B, 4, h, w), one a prompt, each with a guide of its own.

    One image at a time, its three predictions in one pass: the guides' thresholds and scales (up to
    5000) would make differences that can be seen of the rounding in which batches differ.
    """
    return torch.cat(
        [
            _denoise_one(pipeline, prompt, generator, sampling, new_guide())
            for prompt, generator in zip(prompts, generators, strict=True)
        ]
    )


@torch.no_grad()
def _denoise_one(
    pipeline: StableDiffusionPipeline,
    prompt: str,
    generator: torch.Generator,
    sampling: Sampling,
    guide: Guide,
) -> torch.Tensor:
    """Latents (1, 4, h, w); the initial noise and the steps are those of the pipeline. Without
    guidance, at 1 or less, nothing is guided away, as in diffusers."""
    device, scheduler = pipeline.device, pipeline.scheduler
    text, empty = pipeline.encode_prompt(prompt, device, 1, True, sampling.negative_prompt)
    concept, _ = pipeline.encode_prompt(sampling.concept, device, 1, False)
    embeddings = torch.cat([empty, text, concept])  # (3, 77, d)
    scheduler.set_timesteps(sampling.steps, device=device)
    width, height = size_of(pipeline, sampling)
    latents = pipeline.prepare_latents(
        1, pipeline.unet.config.in_channels, height, width, embeddings.dtype, device, generator
    )
    options = pipeline.prepare_extra_step_kwargs(generator, 0.0)
    for step, t in enumerate(scheduler.timesteps):
        noisy = scheduler.scale_model_input(torch.cat([latents] * 3), t)
        predicted = pipeline.unet(noisy, t, encoder_hidden_states=embeddings, return_dict=False)[0]
        alone, prompted, of_concept = predicted.chunk(3)
        noise = guide(step, alone, prompted, of_concept) if sampling.guidance > 1 else prompted
        latents = scheduler.step(noise, t, latents, **options, return_dict=False)[0]
    return latents


def size_of(pipeline: StableDiffusionPipeline, sampling: Sampling) -> tuple[int, int]:
    """Width and height in pixels; a side that the sampling leaves open is the model's own."""
    own = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    return sampling.width or own, sampling.height or own
