"""Image-to-image (SDEdit, Meng et al. 2021, arXiv 2108.01073): drawing that starts from images."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from sdd_lora.generation.given import FromGiven, Given, as_drawn, from_given
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.io.pictures import read_picture
from sdd_lora.sd.schedulers import set_scheduler


def from_images(
    pipeline: StableDiffusionPipeline,
    images: Mapping[Job, Path],
    sampling: Sampling,
    strength: float,
) -> FromGiven:
    """An img2img pipeline over the same parts; `images` has a file for each job that it will draw
    with `sampling`, whose size it keeps. `strength` is the share of the noise schedule that is
    redone, over 0 and at most 1."""
    files = {as_drawn(job, sampling, pipeline): file for job, file in images.items()}

    def given(job: Job) -> Given:
        advice = "can't read this image; delete it and run again, which draws it anew"
        image = read_picture(files[job], advice)
        generator = torch.Generator().manual_seed(job.seed)
        return noised(
            pipeline, encode_image(pipeline, image, generator), sampling, strength, generator
        )

    return from_given(pipeline, given)


@torch.no_grad()
def encode_image(
    pipeline: StableDiffusionPipeline, image: np.ndarray, generator: torch.Generator
) -> torch.Tensor:
    """Latents (4, h, w) of an image (H, W, 3) uint8, drawn from what the autoencoder says."""
    pixels = pipeline.image_processor.preprocess(Image.fromarray(image))
    pixels = pixels.to(pipeline.device, pipeline.vae.dtype)
    encoded = pipeline.vae.encode(pixels).latent_dist.sample(generator)
    return (encoded * pipeline.vae.config.scaling_factor)[0]


def noised(
    pipeline: StableDiffusionPipeline,
    latents: torch.Tensor,
    sampling: Sampling,
    strength: float,
    generator: torch.Generator,
) -> Given:
    """What is known of a picture's latents (4, h, w) where the last `strength` of the schedule is
    to be drawn again."""
    set_scheduler(pipeline, sampling.scheduler)
    pipeline.scheduler.set_timesteps(sampling.steps)
    step = sampling.steps - min(int(sampling.steps * strength), sampling.steps)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    at = pipeline.scheduler.timesteps[step * pipeline.scheduler.order]
    noisy = pipeline.scheduler.add_noise(latents[None], noise[None], at[None].to(latents.device))
    return Given(latents=noisy[0], step=torch.tensor(step))
