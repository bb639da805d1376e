"""Whether an adapter is in a model, and how strongly: by the model's history and by its weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdd_lora import sd1
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint.history import BakedAdapter, BakeRecord, history_of, parts_of
from sdd_lora.checkpoint.layout import Checkpoint, open_checkpoint
from sdd_lora.checkpoint.rounding import Delta
from sdd_lora.errors import BadInput

#: An adapter counts as baked already where at least this share of it lies in the model.
IN_IT = 0.5


@dataclass(frozen=True)
class Presence:
    """`recorded`: the adapter in the model's history, None where it isn't.

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


def history_of_model(path: str | Path) -> tuple[BakeRecord, ...]:
    """Everything that was baked into a model, oldest first. Raises BadInput.

    A call's records in several files, which differ in their fingerprints alone, count once. Records
    of bakes that changed nothing are left out.
    """
    checkpoint = open_checkpoint(Path(path))
    histories = [history_of(file, header) for file, header in checkpoint.headers.items()]
    merged: list[BakeRecord] = []
    for history in sorted(histories, key=len, reverse=True):
        at = len(merged)
        for record in reversed(history):  # a new record goes before the one that followed it
            calls = [known.call for known in merged]
            if record.call in calls:
                at = calls.index(record.call)
            else:
                merged.insert(at, record)
    return tuple(record for record in merged if record.adapters)


def find_adapter(model: str | Path, adapter: Adapter, base: str | Path | None = None) -> Presence:
    """Whether `adapter` is in `model`. Raises BadInput where the files can't be compared."""
    wanted = {adapter.identity, *adapter.lineage}
    known = [baked for record in history_of_model(model) for baked in record.adapters]
    recorded = next((baked for baked in known if baked.identities & wanted), None)
    expected = 1.0 if recorded is None else _expected(recorded, adapter)
    if base is None:
        return Presence(recorded, expected)
    strength, share = project(open_checkpoint(Path(model)), open_checkpoint(Path(base)), adapter)
    return Presence(recorded, expected, strength, share)


def _expected(known: BakedAdapter, adapter: Adapter) -> float | None:
    """The weight of `adapter` in a model that holds `known`, by what both hold in common."""
    ours = {adapter.identity: 1.0} | parts_of(adapter)
    theirs = {known.identity: 1.0} | known.parts
    common = (identity for identity in theirs if ours.get(identity))
    return next((known.weight * theirs[each] / ours[each] for each in common), None)


def refuse_present(
    model: Checkpoint, base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]
) -> None:
    """Raises BadInput where half of an adapter or more, at its weight, is in the model already."""
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
    for module, factors in adapter.modules.items():
        theirs, ours = base.weight_of(module), model.weight_of(module)
        if theirs.shape != ours.shape or not factors.fits(ours.shape):
            raise BadInput(
                f"{module}: {model.path}, {base.path} and {adapter.name} differ in shape: "
                f"{ours.shape}, {theirs.shape}, {factors.weight_shape}"
            )
        delta = Delta.of([(factors, 1.0)], theirs)
        for block in delta.blocks():
            change = delta.rows(block)
            with np.errstate(invalid="ignore"):  # seen below
                difference = _rows_of(ours, block) - _rows_of(theirs, block)
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


def cross_attention_norms(model: Path) -> dict[str, float]:
    """Frobenius norms of the 64 matrices, in every weight set of the model.

    Raises BadInput where one holds NaN or infinite weights.
    """
    checkpoint = open_checkpoint(model)
    norms = {}
    for weights in checkpoint.weight_sets:
        for module in filter(weights.locations.__contains__, sd1.CROSS_ATTENTION):
            location = weights.locations[module]
            norm = float(np.linalg.norm(checkpoint.read(location).astype(np.float64)))
            if not math.isfinite(norm):
                raise BadInput(f"{location.file}: {location.key}: holds NaN or infinite weights")
            norms[f"{weights.label}: {module}"] = norm
    return norms


def _rows_of(weight: np.ndarray, block: slice) -> np.ndarray:
    """Some rows of a weight as a matrix, widened."""
    return weight.reshape(len(weight), -1)[block].astype(np.float64)
