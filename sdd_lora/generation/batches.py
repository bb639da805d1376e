"""How many images are drawn at once: as many as asked for, where a card's free memory holds them.

The batch changes no image beyond rounding, and is part of no recipe's or folder's identity.
"""

import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.generation.guided import size_of
from sdd_lora.generation.sampling import Sampling
from sdd_lora.progress import say

#: peak of a UNet's forward without gradients, for one sample: this times its first width, the
#: latent's height and width, and the bytes of a number; counted at SD 1.5's size by generation/plan
UNET_NUMBERS = 26.1
#: of the VAE's decoding of one latent: this times its first width, the image's height and width, …
VAE_NUMBERS = 6.0
#: what kernels' workspaces and the allocator's gaps may take beside tensors
_SPARE = 0.15
_SAMPLES_OF_AN_IMAGE = 2  # ε(∅) and ε(prompt)


def images_at_once(pipeline: StableDiffusionPipeline, sampling: Sampling) -> int:
    """`sampling.batch`, or as many fewer images, at least one, as the card's free memory holds.

    Where no CUDA device draws it is `sampling.batch`: their free memory isn't known.
    """
    if pipeline.device.type != "cuda":
        return sampling.batch
    free = free_bytes(pipeline.device)
    fixed, each = bytes_of_drawing(pipeline, sampling)
    fitting = int((free * (1 - _SPARE) - fixed) // each)
    batch = min(sampling.batch, max(1, fitting))
    if batch < sampling.batch:
        say(
            f"drawing {batch} images at once, not {sampling.batch}: the card has {free / 1e9:.1f} "
            f"GB free, and each takes about {each / 1e9:.2f} GB"
        )
    return batch


def bytes_of_drawing(pipeline: StableDiffusionPipeline, sampling: Sampling) -> tuple[int, int]:
    """(bytes to decode an image, bytes that each image of a batch takes in the UNet), about."""
    width, height = size_of(pipeline, sampling)
    scale = pipeline.vae_scale_factor
    vae_widths, unet_widths = (
        part.config.block_out_channels for part in (pipeline.vae, pipeline.unet)
    )
    decoding = VAE_NUMBERS * vae_widths[0] * width * height * pipeline.vae.dtype.itemsize
    sample = UNET_NUMBERS * unet_widths[0] * (width // scale) * (height // scale)
    return int(decoding), int(_SAMPLES_OF_AN_IMAGE * sample * pipeline.unet.dtype.itemsize)


def free_bytes(device: torch.device) -> int:
    """Bytes of a CUDA device that torch can have: what no process holds, and what this process has
    reserved and not given to a tensor."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
