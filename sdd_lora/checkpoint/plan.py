"""What a bake is going to do: the tensors it edits in each file, and where all others go."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdd_lora.adapter.algebra import Weighted
from sdd_lora.adapter.factors import Factors
from sdd_lora.checkpoint.copying import Segment, merged_segments
from sdd_lora.checkpoint.history import BakedAdapter, BakeRecord, history_of
from sdd_lora.checkpoint.layout import (
    Checkpoint,
    TensorLocation,
    WeightSet,
    component_of,
    plain_key,
)
from sdd_lora.checkpoint.rounding import Rounding
from sdd_lora.errors import BadInput
from sdd_lora.io import torch_zip
from sdd_lora.io.safetensors import NUMPY_DTYPES, Header, TensorInfo
from sdd_lora.io.torch_pickle import StridedInfo

EmaChoice = Literal["patch", "drop"]
#: The deltas of one module, each with its weight.
Parts = list[tuple[Factors, float]]

_STORED_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
#: Endings of the scales that stand beside fp8 weights which were divided by them.
_SCALES = (".scale_weight", ".weight_scale")


@dataclass(frozen=True)
class FilePlan:
    """The edits of one file, in the order of its data, and the tensors that it loses.

    `edits` maps a tensor's key to its module and the deltas that are added to it; `history` holds
    the file's records of earlier bakes.
    """

    path: Path
    header: Header
    edits: dict[str, tuple[str, Parts]]
    dropped: frozenset[str]
    history: tuple[BakeRecord, ...]

    @property
    def untouched(self) -> list[str]:
        """The tensors that aren't edited, in the header's order."""
        return [key for key in self.header.tensors if key not in self.edits]

    def output_tensors(self) -> dict[str, TensorInfo]:
        """The output's tensors. Where none is dropped they stay where they are.

        A legacy file's are laid out anew, the widest dtypes first, so that every tensor is aligned.
        """
        legacy = isinstance(self.header, torch_zip.PickleHeader)
        if not self.dropped and not legacy:
            return self.header.tensors
        kept = {k: info for k, info in self.header.tensors.items() if k not in self.dropped}
        placed, offset = {}, 0
        for key in sorted(
            kept, key=lambda k: -NUMPY_DTYPES[kept[k].dtype].itemsize if legacy else kept[k].start
        ):
            info = kept[key]
            end = offset + math.prod(info.shape) * NUMPY_DTYPES[info.dtype].itemsize
            placed[key] = TensorInfo(info.dtype, info.shape, offset, end)
            offset = end
        return {key: placed[key] for key in kept}

    def strided(self) -> set[str]:
        """Tensors of a legacy file that aren't stored row by row."""
        tensors = self.header.tensors.items()
        return {key for key, info in tensors if isinstance(info, StridedInfo)}

    def segments(self, output: Header) -> Iterator[Segment]:
        """The ranges to copy, in the output's order, neighbours together."""
        start, tensors = self.header.data_start, self.header.tensors
        rewritten = self.strided() | set(self.edits)
        return merged_segments(
            Segment(start + tensors[key].start, output.data_start + info.start, info.nbytes)
            for key, info in sorted(output.tensors.items(), key=lambda item: item[1].start)
            if key not in rewritten
        )


@dataclass(frozen=True)
class BakePlan:
    """The edits of a whole model, and the record that each edited file gets of them."""

    checkpoint: Checkpoint
    files: tuple[FilePlan, ...]
    record: BakeRecord
    rounding: Rounding

    @property
    def edited_sets(self) -> tuple[str, ...]:
        """The weight sets that the edits land in."""
        edited = {TensorLocation(file.path, key) for file in self.files for key in file.edits}
        return tuple(
            f"{weights.component}: {weights.label}"
            for weights in self.checkpoint.weight_sets
            if edited & set(weights.locations.values())
        )

    @property
    def stale(self) -> list[Path]:
        """Further copies, which aren't edited, of weights that are."""
        folders = {self.checkpoint.path, *(file.path.parent for file in self.files)}
        return [path for path in self.checkpoint.unread if path.parent in folders]

    @property
    def dropped_folders(self) -> list[Path]:
        """The folders of EMA copies, such as `unet_ema`, that the output is to be without."""
        if self.record.ema == "patch" or self.checkpoint.path.is_file():
            return []
        emas = [weights for weights in self.checkpoint.weight_sets if weights.is_ema]
        return sorted({at.file.parent for ema in emas for at in ema.locations.values()})

    def earlier(self) -> Iterator[tuple[Path, BakedAdapter]]:
        """Every adapter that the edited files' histories name."""
        for file in self.files:
            for record in file.history:
                for adapter in record.adapters:
                    yield file.path, adapter


def plan_bake(
    checkpoint: Checkpoint, adapters: Weighted, ema: EmaChoice, rounding: Rounding, whole: bool
) -> BakePlan:
    """Where every module lands, in every weight set; `whole` as in `BakeRecord`.

    Adapters whose delta is 0 everywhere are not recorded as baked in.
    Raises BadInput where a module doesn't land, or an adapter is in the model already.
    """
    collected = _by_module(adapters)
    if problems := misfits_of(checkpoint, adapters, ema):
        raise BadInput(
            f"{checkpoint.path}: {len(problems)} of the adapters' {len(collected)} modules don't "
            f"land in it, the first: {problems[0]}"
        )
    edits: dict[Path, dict[str, tuple[str, Parts]]] = {}
    for module, parts in collected.items():
        for weights in _sets_to_edit(checkpoint, module, ema):
            location = weights.locations[module]
            edits.setdefault(location.file, {})[location.key] = (module, parts)
    effective = [(adapter, weight) for adapter, weight in adapters if adapter.norm() > 0]
    baked = tuple(BakedAdapter.of(adapter, weight) for adapter, weight in effective)
    plan = BakePlan(
        checkpoint,
        tuple(
            _file_plan(checkpoint, path, edits[path], ema)
            for path in checkpoint.headers
            if path in edits
        ),
        BakeRecord(baked, str(rounding), ema, whole=whole),
        rounding,
    )
    for path, known in plan.earlier():
        for new in baked:
            if new.identities & known.identities:
                raise BadInput(
                    f"{path}: {new.name} is in it already, as {known.name} at weight "
                    f"{known.weight:g}; unbake it first, or bake into the original"
                )
    return plan


def misfits_of(checkpoint: Checkpoint, adapters: Weighted, ema: EmaChoice = "patch") -> list[str]:
    """A line for each module that can't be added to a weight set; none where all can be baked."""
    problems = []
    for module, parts in _by_module(adapters).items():
        sets = _sets_to_edit(checkpoint, module, ema)
        lines = [_misfit(checkpoint, weights, module, parts) for weights in sets]
        if not sets:
            component = component_of(module).replace("_", " ")
            lines = [f"{module}: the model holds no {component}"]
        problems += [line for line in lines if line is not None][:1]
    return problems


def _by_module(adapters: Weighted) -> dict[str, Parts]:
    collected: dict[str, Parts] = {}
    for adapter, weight in adapters:
        for module, factors in adapter.modules.items():
            collected.setdefault(module, []).append((factors, weight))
    return collected


def _sets_to_edit(checkpoint: Checkpoint, module: str, ema: EmaChoice) -> list[WeightSet]:
    sets = checkpoint.sets_of(component_of(module))
    return [weights for weights in sets if not (weights.is_ema and ema == "drop")]


def _misfit(checkpoint: Checkpoint, weights: WeightSet, module: str, parts: Parts) -> str | None:
    """Why a module's deltas can't be added to a set's weight; None where they can."""
    if module not in weights.locations:
        return f"{module}: {weights.label} of the {weights.component} have no such weight"
    location = weights.locations[module]
    info, beside = checkpoint.info(location), checkpoint.headers[location.file].tensors
    if any(location.key.removesuffix(".weight") + scale in beside for scale in _SCALES):
        return f"{module}: stored divided by a scale; use a copy of the model without scales"
    if info.dtype not in _STORED_FLOATS:
        return f"{module}: stored as {info.dtype}, which no delta can be added to"
    for factors, _ in parts:
        if not factors.fits(info.shape):
            return f"{module}: the weight is {info.shape}, the delta {factors.weight_shape}"
    return None


def _file_plan(
    checkpoint: Checkpoint, path: Path, edits: dict[str, tuple[str, Parts]], ema: EmaChoice
) -> FilePlan:
    header = checkpoint.headers[path]
    in_order = sorted(edits, key=lambda key: header.tensors[key].start)
    emas = (key for key in header.tensors if plain_key(key).startswith("model_ema."))
    dropped = emas if ema == "drop" else ()
    return FilePlan(
        path,
        header,
        {key: edits[key] for key in in_order},
        frozenset(dropped),
        history_of(path, header),
    )
