"""What drawing takes of a card, and how many images are drawn at once: as many as asked for, where
the free memory holds them. The batch changes no image beyond rounding, and is part of no recipe's
or folder's identity.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from sdd_lora.generation.guided import size_of
from sdd_lora.generation.sampling import Sampling
from sdd_lora.progress import say

#: peak of a UNet's forward without gradients, for one sample: this times its first width, the
#: latent's height and width, and a number's bytes; counted on SD 1.5 as `plan` counts
_UNET_NUMBERS = 26.1
#: of the VAE's decoding of one latent: this times its first width, the image's height and width, …
_VAE_NUMBERS = 6.0
#: what kernels' workspaces and the allocator's gaps may take beside tensors
_SPARE = 0.15
_SAMPLES_OF_AN_IMAGE = 2  # ε(∅) and ε(prompt)


@dataclass(frozen=True)
class DrawingFootprint:
    """Bytes of drawing: all the model's `weights`, `each` image's in the UNet, and `decoding` one
    image, which comes afterwards."""

    weights: int
    each: int
    decoding: int
    text_encoder_parameters: int

    def total(self, images: int) -> int:
        """Peak bytes of tensors where so many images are drawn at once."""
        return self.weights + max(images * self.each, self.decoding)


def drawing_footprint(
    configs: Mapping[str, Mapping[str, Any]], dtype: torch.dtype = torch.float16
) -> DrawingFootprint:
    """Of a model by its parts' configurations (`unet`, `vae`, `text_encoder`), at its own size."""
    with torch.device("meta"):
        parts = [
            UNet2DConditionModel.from_config(dict(configs["unet"])),
            AutoencoderKL.from_config(dict(configs["vae"])),
            CLIPTextModel(CLIPTextConfig.from_dict(dict(configs["text_encoder"]))),
        ]
    *_, text_encoder = numbers = [sum(p.numel() for p in part.parameters()) for part in parts]
    unet_widths, vae_widths = (configs[x]["block_out_channels"] for x in ("unet", "vae"))
    side, scale = configs["unet"]["sample_size"], 2 ** (len(vae_widths) - 1)
    decoding = _VAE_NUMBERS * vae_widths[0] * (side * scale) ** 2 * dtype.itemsize
    sample = _UNET_NUMBERS * unet_widths[0] * side**2 * dtype.itemsize
    return DrawingFootprint(
        weights=sum(numbers) * dtype.itemsize,
        each=int(_SAMPLES_OF_AN_IMAGE * sample),
        decoding=int(decoding),
        text_encoder_parameters=text_encoder,
    )


def images_at_once(pipeline: StableDiffusionPipeline, sampling: Sampling) -> int:
    """`sampling.batch`, or as many fewer images, at least one, as the card's free memory holds.

    Where no CUDA device draws it is `sampling.batch`: their free memory isn't known.
    """
    if pipeline.device.type != "cuda":
        return sampling.batch
    free = _free_bytes(pipeline.device)
    width, height = size_of(pipeline, sampling)
    latent = (width // pipeline.vae_scale_factor) * (height // pipeline.vae_scale_factor)
    sample = _UNET_NUMBERS * pipeline.unet.config.block_out_channels[0] * latent
    decoding = _VAE_NUMBERS * pipeline.vae.config.block_out_channels[0] * width * height
    each = _SAMPLES_OF_AN_IMAGE * sample * pipeline.unet.dtype.itemsize
    left = free * (1 - _SPARE) - decoding * pipeline.vae.dtype.itemsize
    batch = min(sampling.batch, max(1, int(left // each)))
    if batch < sampling.batch:
        say(
            f"drawing {batch} images at once, not {sampling.batch}: the card has {free / 1e9:.1f} "
            f"GB free, and each takes about {each / 1e9:.2f} GB"
        )
    return batch


def _free_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that torch can have: what no process holds, and what this process has
    reserved and not given to a tensor."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
