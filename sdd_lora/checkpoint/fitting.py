"""Does an adapter fit a model, from headers alone; and how large the model's own matrices are."""

from pathlib import Path

import numpy as np

from sdd_lora import names
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint.arithmetic import fits
from sdd_lora.checkpoint.layout import open_checkpoint, require_sd1_unet
from sdd_lora.checkpoint.stream import as_array, read_bytes
from sdd_lora.safetensors_file import open_input


def misfits(model: Path, adapter: Adapter) -> list[str]:
    """What of the adapter finds no place in the model, a line each; empty where it fits.

    Raises BadInput where the model is no SD 1.x.
    """
    checkpoint = open_checkpoint(model)
    require_sd1_unet(checkpoint)
    problems = []
    for module, factors in adapter.factors.items():
        shape = checkpoint.shape(module)
        if not shape:
            problems.append(f"{module}: the model has no such weight")
        elif not fits(factors.weight_shape, shape):
            problems.append(f"{module}: the weight is {shape}, the delta {factors.weight_shape}")
    return problems


def cross_attention_norms(model: Path) -> dict[str, float]:
    """Frobenius norms of the 64 matrices, of every copy that the model holds."""
    checkpoint = open_checkpoint(model)
    norms = {}
    for copy in checkpoint.copies:
        for module in names.CROSS_ATTENTION:
            if module not in copy.places:
                continue
            place = copy.places[module]
            with open_input(place.file) as file:
                data = read_bytes(file, checkpoint.headers[place.file], place.key)
            weight = as_array(data, checkpoint.info(place)).astype(np.float64)
            norms[f"{copy.label}: {module}"] = float(np.linalg.norm(weight))
    return norms
