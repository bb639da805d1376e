"""Images of noise, and what a measure is told of them."""

import numpy as np

from sdd_lora.generation.sampling import Job
from sdd_lora.measures.base import ImageSpec


def noise_images(count, size=64, seed=0):
    """`count` images (size, size, 3) uint8."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8))


def specs(count, kind="kept", prompt="a cat"):
    return [ImageSpec(kind, "s", Job(prompt, i)) for i in range(count)]
