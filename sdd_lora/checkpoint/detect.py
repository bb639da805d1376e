"""Is an adapter in a model, how strongly: by what the model says of itself, and by its weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdd_lora import sd1 as names
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint import history as provenance
from sdd_lora.checkpoint.copying import as_array, read_bytes
from sdd_lora.checkpoint.history import BakedAdapter, Baking
from sdd_lora.checkpoint.layout import Checkpoint, Place, open_checkpoint, require_sd1_unet
from sdd_lora.checkpoint.rounding import Delta, fits
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import open_input

#: An adapter counts as baked already where at least this share of it lies in the model.
IN_IT = 0.5


@dataclass(frozen=True)
class Presence:
    """`recorded`: what the model's provenance says of the adapter, None where it says nothing.

    `expected`: the weight at which the adapter should then lie in the model, itself or as a part of
    the recorded one; 1 where nothing is recorded, None where the record doesn't say.
    `strength`: the weight at which the adapter's delta lies in (model − base), by projection;
    `share`: the part of that difference's norm that the adapter explains. None without a base.
    """

    recorded: BakedAdapter | None
    expected: float | None = 1.0
    strength: float | None = None
    share: float | None = None

    @property
    def present(self) -> bool:
        """By the weights where they were compared and it is known what to expect, else recorded."""
        if self.expected is None or self.strength is None:
            return self.recorded is not None and self.expected != 0
        return self.expected != 0 and self.strength / self.expected >= IN_IT


def chain_of_model(path: str | Path) -> tuple[Baking, ...]:
    """Everything that was baked into a model, oldest first. Raises BadInput.

    A call's entries in several files, which differ in their fingerprints alone, count once.
    """
    checkpoint = open_checkpoint(Path(path))
    chains = [provenance.chain_of(file, header) for file, header in checkpoint.headers.items()]
    merged: list[Baking] = []
    for chain in sorted(chains, key=len, reverse=True):
        at = len(merged)
        for baking in reversed(chain):  # what is new goes before what it was followed by
            calls = [known.call for known in merged]
            if baking.call in calls:
                at = calls.index(baking.call)
            else:
                merged.insert(at, baking)
    return tuple(merged)


def find(model: str | Path, adapter: Adapter, base: str | Path | None = None) -> Presence:
    """Whether `adapter` is in `model`. Raises BadInput where the files can't be compared."""
    chain = chain_of_model(model)
    wanted = {adapter.identity, *adapter.lineage}
    recorded = next(
        (known for baking in chain for known in baking.adapters if known.identities & wanted), None
    )
    expected = 1.0 if recorded is None else _expected(recorded, adapter)
    if base is None:
        return Presence(recorded, expected)
    strength, share = project(open_checkpoint(Path(model)), open_checkpoint(Path(base)), adapter)
    return Presence(recorded, expected, strength, share)


def _expected(known: BakedAdapter, adapter: Adapter) -> float | None:
    """The weight of `adapter` in a model that holds `known`, by what both hold in common."""
    ours = {adapter.identity: 1.0} | provenance.parts_of(adapter)
    theirs = {known.identity: 1.0} | known.parts
    common = (identity for identity in theirs if ours.get(identity))
    return next((known.weight * theirs[each] / ours[each] for each in common), None)


def refuse_present(
    model: Checkpoint, base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]
) -> None:
    """Raises BadInput where half of an adapter or more, at its weight, is in the model already."""
    require_sd1_unet(base)
    for adapter, weight in adapters:
        strength, _ = project(model, base, adapter)
        if strength / weight >= IN_IT:
            raise BadInput(
                f"{model.path}: {adapter.name} is in it already: against {base.path} its weights "
                f"hold it at {strength:.2f}; bake into the original"
            )


def project(model: Checkpoint, base: Checkpoint, adapter: Adapter) -> tuple[float, float]:
    """⟨W − B, Δ⟩ / ‖Δ‖², and the share ⟨W − B, Δ⟩ / (‖W − B‖·‖Δ‖), over the adapter's modules.

    Raises BadInput where one of them is missing in either, or of another shape.
    """
    product = square = difference_square = 0.0
    for module, factors in adapter.factors.items():
        theirs, ours = _weight(base, module), _weight(model, module)
        if theirs.shape != ours.shape or not fits(factors.weight_shape, ours.shape):
            raise BadInput(
                f"{module}: {model.path}, {base.path} and {adapter.name} differ in shape: "
                f"{ours.shape}, {theirs.shape}, {factors.weight_shape}"
            )
        delta = Delta.of([(factors, 1.0)])
        for block in delta.blocks():
            change = delta.rows(block)
            with np.errstate(invalid="ignore"):  # seen below
                difference = ours.rows(block) - theirs.rows(block)
            product += float((difference * change).sum())
            square += float((change * change).sum())
            difference_square += float((difference * difference).sum())
        if not math.isfinite(difference_square):
            raise BadInput(
                f"{module}: holds NaN or infinite weights in {model.path} or in {base.path}, which "
                "can't be compared"
            )
    norms = math.sqrt(square * difference_square)
    return (product / square if square else 0.0), (product / norms if norms else 0.0)


class _Weight:
    """A stored weight, read whole and widened block by block."""

    def __init__(self, checkpoint: Checkpoint, place: Place) -> None:
        info = checkpoint.info(place)
        with open_input(place.file) as file:
            data = read_bytes(file, checkpoint.headers[place.file], place.key)
        self.shape = info.shape
        self._matrix = as_array(data, info).reshape(info.shape[0], -1)

    def rows(self, block: slice) -> np.ndarray:
        return self._matrix[block].astype(np.float64)


def _weight(checkpoint: Checkpoint, module: str) -> _Weight:
    component = "text_encoder" if names.is_text(module) else "unet"
    for copy in checkpoint.copies:
        if copy.component == component and module in copy.places:
            return _Weight(checkpoint, copy.places[module])
    raise BadInput(f"{checkpoint.path}: no weight for {module}")
