"""A portable adapter on a model: the ordinary adapter that it is there."""

from pathlib import Path

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint.describe import open_sd1
from sdd_lora.checkpoint.locate import locate
from sdd_lora.checkpoint.plan import misfits_of
from sdd_lora.errors import BadInput


def adapter_on(adapter: Adapter, model: str | Path) -> Adapter:
    """What a portable adapter is for a MODEL: ΔW = W · (up @ down) of each to_k and to_v.

    Reads these matrices and no others. Raises BadInput where the adapter isn't portable, or its
    width isn't the model's.
    """
    if not adapter.is_portable:
        raise BadInput(f"{adapter.name}: is for one model already; only portable adapters take one")
    checkpoint = open_sd1(locate(model))
    if problems := misfits_of(checkpoint, [(adapter, 1.0)]):
        raise BadInput(f"{adapter.name} does not fit {model}: {problems[0]}")
    return adapter.on(checkpoint.weight_of)
