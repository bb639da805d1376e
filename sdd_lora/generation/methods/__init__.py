"""Ways to sample: rows of the results table. One file each; adding a method is adding a file.

A method takes (pipeline, prompts, generators, sampling) and gives latents (B, 4, h, w), one a
prompt, which `sdd_lora.generation.decoding` makes images of. The table's other rows (sdd, esd-x-1,
baked, …) are `sd` with adapters or weights on the pipeline.
"""

from collections.abc import Callable

import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.generation.methods import gated, neg, sd, sega, sld
from sdd_lora.generation.sampling import Sampling

Method = Callable[
    [StableDiffusionPipeline, list[str], list[torch.Generator], Sampling], torch.Tensor
]

METHODS: dict[str, Method] = {
    "sd": sd.sample,
    "neg": neg.sample,
    **dict.fromkeys(sld.STRENGTHS, sld.sample),
    "sega": sega.sample,
    "sdd-gated": gated.sample,
}
