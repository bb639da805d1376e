"""Latents → images; numbers that are not finite never become an image."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.errors import SddLoraError
from sdd_lora.generation.sampling import Job


@torch.no_grad()
def decode_latents(
    pipeline: StableDiffusionPipeline, latents: torch.Tensor, jobs: Sequence[Job]
) -> tuple[np.ndarray, int]:
    """Images (B, H, W, 3) uint8 of latents (B, 4, h, w), one a job; and how many of them needed the
    VAE in fp32, because it overflowed in half precision.

    NaN and infinity would become black images, in which no detector finds anything. Raises
    SddLoraError for them, naming the job and the likely cause.
    """
    _require_finite_latents(latents, jobs, "the latents", pipeline)
    scaled = latents / pipeline.vae.config.scaling_factor
    images = _decoded(pipeline, scaled)
    overflowed = ~_are_finite(images)
    if overflowed.any() and pipeline.vae.dtype != torch.float32:
        images = images.float()
        images[overflowed] = _decode_in_fp32(pipeline, scaled[overflowed])
    _require_finite_latents(images, jobs, "the decoded image", pipeline)
    floats = pipeline.image_processor.postprocess(images, output_type="np")
    return (floats * 255).round().astype(np.uint8), int(overflowed.sum())


def _decode_in_fp32(pipeline: StableDiffusionPipeline, scaled: torch.Tensor) -> torch.Tensor:
    """Decode with the VAE in fp32, as user interfaces do when half precision overflows."""
    dtype = pipeline.vae.dtype
    try:
        pipeline.vae.to(torch.float32)
        return _decoded(pipeline, scaled.float())
    finally:
        pipeline.vae.to(dtype)


def _decoded(pipeline: StableDiffusionPipeline, scaled: torch.Tensor) -> torch.Tensor:
    """The VAE's images (B, 3, H, W); on a card one at a time, since each takes three times the
    memory there that it takes in the UNet."""
    at_once = 1 if scaled.device.type == "cuda" else len(scaled)
    inputs = scaled.to(pipeline.vae.dtype).split(at_once)
    with torch.autocast(scaled.device.type, enabled=False):  # that of a training around it
        return torch.cat([pipeline.vae.decode(x, return_dict=False)[0] for x in inputs])


def _are_finite(values: torch.Tensor) -> torch.Tensor:
    """Whether all numbers of each item are finite, (B,)."""
    return torch.isfinite(values).flatten(1).all(dim=1)


def _require_finite_latents(
    values: torch.Tensor, jobs: Sequence[Job], of: str, pipeline: StableDiffusionPipeline
) -> None:
    broken = [
        job for job, whole in zip(jobs, _are_finite(values).tolist(), strict=True) if not whole
    ]
    if broken:
        raise SddLoraError(
            f"image of {broken[0].prompt!r}, seed {broken[0].seed}: {of} holds numbers that are "
            f"not finite (it would be a black image, as {len(broken)} of {len(jobs)} drawn at once "
            f"would); likely cause: {_likely_cause(pipeline)}"
        )


def _likely_cause(pipeline: StableDiffusionPipeline) -> str:
    parts = {"text encoder": pipeline.text_encoder, "UNet": pipeline.unet, "VAE": pipeline.vae}
    for part, module in parts.items():
        for name, parameter in module.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"{part}: {name} holds NaN or infinity; get the file again, or in fp32"
    if pipeline.unet.dtype == torch.float16:
        return "numbers beyond fp16's largest, 65504; try precision fp32 or bf16"
    if getattr(pipeline.unet, "peft_config", None):
        return "an adapter's weight is too large; try a smaller one"
    return "weights too large to compute with; get the model's file again"
