"""Does an adapter fit a model, from headers alone; and how large the model's own matrices are."""

import math
from pathlib import Path

import numpy as np

from sdd_lora import sd1 as names
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint import plan as edits
from sdd_lora.checkpoint.copying import as_array, read_bytes
from sdd_lora.checkpoint.layout import open_checkpoint, require_sd1_unet
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import open_input


def misfits(model: Path, adapter: Adapter) -> list[str]:
    """What of the adapter finds no place in the model, a line each; empty where it can be baked.

    Raises BadInput where the model is no SD 1.x.
    """
    checkpoint = open_checkpoint(model)
    require_sd1_unet(checkpoint)
    return edits.misfits(checkpoint, [(adapter, 1.0)])


def cross_attention_norms(model: Path) -> dict[str, float]:
    """Frobenius norms of the 64 matrices, of every copy that the model holds.

    Raises BadInput where one holds NaN or infinite weights.
    """
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
            norm = float(np.linalg.norm(weight))
            if not math.isfinite(norm):
                raise BadInput(f"{place.file}: {place.key}: holds NaN or infinite weights")
            norms[f"{copy.label}: {module}"] = norm
    return norms
