"""Which tensors of a checkpoint an adapter touches, in every copy, and where the others go."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdd_lora import sd1 as names
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.factors import Factors
from sdd_lora.checkpoint.copying import Segment, merged
from sdd_lora.checkpoint.layout import Checkpoint, Copy
from sdd_lora.checkpoint.rounding import fits
from sdd_lora.errors import BadInput
from sdd_lora.io import torch_zip as pickles
from sdd_lora.io.safetensors import DTYPES, Header, TensorInfo

Weighted = Sequence[tuple[Adapter, float]]
EmaChoice = Literal["patch", "drop"]

_STORED_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
#: Of the factors that stand beside fp8 weights which were divided by them.
_SCALES = (".scale_weight", ".weight_scale")


@dataclass(frozen=True)
class Edits:
    """What is to be done to one file: the tensors to edit, in the file's order, and to drop."""

    path: Path
    header: Header
    parts: dict[str, tuple[str, list[tuple[Factors, float]]]]  # key → module, ΔWᵢ and wᵢ
    dropped: frozenset[str]


def plan_edits(checkpoint: Checkpoint, adapters: Weighted, ema: EmaChoice) -> list[Edits]:
    """Where every module lands, in every copy. Raises BadInput where one doesn't."""
    collected = _by_module(adapters)
    if problems := misfits(checkpoint, adapters, ema):
        raise BadInput(
            f"{checkpoint.path}: {len(problems)} of the adapters' {len(collected)} modules don't "
            f"land in it, the first: {problems[0]}"
        )
    parts: dict[Path, dict[str, tuple[str, list[tuple[Factors, float]]]]] = {}
    for module, found in collected.items():
        for copy in _copies_with(checkpoint, module, ema):
            place = copy.places[module]
            parts.setdefault(place.file, {})[place.key] = (module, found)
    return [
        _edits_of(path, header, parts[path], ema)
        for path, header in checkpoint.headers.items() if path in parts
    ]  # fmt: skip


def misfits(checkpoint: Checkpoint, adapters: Weighted, ema: EmaChoice = "patch") -> list[str]:
    """A line for each module that finds no place in a copy of the model's weights."""
    problems = []
    for module, found in _by_module(adapters).items():
        copies = _copies_with(checkpoint, module, ema)
        lines = [_misfit(checkpoint, copy, module, found) for copy in copies]
        if not copies:
            component = _component_of(module).replace("_", " ")
            lines = [f"{module}: the model holds no {component}"]
        problems += [line for line in lines if line is not None][:1]
    return problems


def _by_module(adapters: Weighted) -> dict[str, list[tuple[Factors, float]]]:
    collected: dict[str, list[tuple[Factors, float]]] = {}
    for adapter, weight in adapters:
        for module, factors in adapter.factors.items():
            collected.setdefault(module, []).append((factors, weight))
    return collected


def _component_of(module: str) -> str:
    return "text_encoder" if names.is_text(module) else "unet"


def _copies_with(checkpoint: Checkpoint, module: str, ema: EmaChoice) -> list[Copy]:
    """The copies that a module's delta goes into."""
    return [
        copy for copy in checkpoint.copies
        if copy.component == _component_of(module) and not (copy.is_ema and ema == "drop")
    ]  # fmt: skip


def _misfit(
    checkpoint: Checkpoint, copy: Copy, module: str, found: list[tuple[Factors, float]]
) -> str | None:
    """Why a module's deltas can't be added to a copy's weight; None where they can."""
    if module not in copy.places:
        return f"{module}: {copy.label} of the {copy.component} have no such weight"
    place = copy.places[module]
    info, beside = checkpoint.info(place), checkpoint.headers[place.file].tensors
    if any(place.key.removesuffix(".weight") + scale in beside for scale in _SCALES):
        return f"{module}: stored divided by a scale; use a copy of the model without scales"
    if info.dtype not in _STORED_FLOATS:
        return f"{module}: stored as {info.dtype}, which no delta can be added to"
    for factors, _ in found:
        if not fits(factors.weight_shape, info.shape):
            return f"{module}: the weight is {info.shape}, the delta {factors.weight_shape}"
    return None


def _edits_of(
    path: Path, header: Header, parts: dict[str, tuple[str, list[tuple[Factors, float]]]],
    ema: EmaChoice,
) -> Edits:  # fmt: skip
    in_order = sorted(parts, key=lambda key: header.tensors[key].start)
    dropped = [key for key in header.tensors if ema == "drop" and key.startswith("model_ema.")]
    return Edits(path, header, {key: parts[key] for key in in_order}, frozenset(dropped))


def laid_out(header: Header, dropped: frozenset[str]) -> dict[str, TensorInfo]:
    """The output's tensors. Where none is dropped they stay where they are.

    A legacy file's are laid out anew, the widest dtypes first, so that every tensor is aligned.
    """
    legacy = isinstance(header, pickles.PickleHeader)
    if not dropped and not legacy:
        return header.tensors
    kept = [key for key in header.tensors if key not in dropped]
    kept.sort(key=lambda key: _order(header.tensors[key], legacy))
    placed, offset = {}, 0
    for key in kept:
        info = header.tensors[key]
        end = offset + stored_bytes(info)
        placed[key] = TensorInfo(info.dtype, info.shape, offset, end)
        offset = end
    return {key: placed[key] for key in header.tensors if key in placed}


def _order(info: TensorInfo, legacy: bool) -> int:
    return -DTYPES[info.dtype].itemsize if legacy else info.start


def segments(edits: Edits, output: Header) -> Iterator[Segment]:
    """What is copied from where to where, in the output's order, neighbours together."""
    header = edits.header
    in_order = sorted(output.tensors.items(), key=lambda item: item[1].start)
    others = strided(header) | set(edits.parts)
    return merged(
        Segment(
            header.data_start + header.tensors[key].start, output.data_start + info.start,
            info.nbytes,
        )
        for key, info in in_order if key not in others
    )  # fmt: skip


def strided(header: Header) -> set[str]:
    """Tensors of a legacy file that aren't stored row by row."""
    return {key for key, info in header.tensors.items() if isinstance(info, pickles.StridedInfo)}


def stored_bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * DTYPES[info.dtype].itemsize
