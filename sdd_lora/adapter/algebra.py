"""Adapters made of adapters: exact sums, and smaller ones at a stated cost."""

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from threadpoolctl import threadpool_limits

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.factors import Factors, concatenated, truncated
from sdd_lora.adapter.metadata import Metadata, ResizedFrom
from sdd_lora.adapter.weighted import AdapterLike, AdaptersLike, as_adapter, with_weights
from sdd_lora.errors import BadInput
from sdd_lora.progress import warn

Weighted = Sequence[tuple[Adapter, float]]


def stack(adapters: AdaptersLike, name: str | None = None) -> Adapter:
    """Σ wᵢ ΔWᵢ as one adapter: exact for any ranks, alphas and signs of the weights.

    `adapters`: Adapters, files, runs' folders or hub ids, each alone (weight 1), as "A:0.8" or as
    (A, 0.8). Factors are concatenated, so ranks add up; summing up and down apart would bring in
    cross terms. Raises BadInput where there is no part, or two are for models of other widths.
    """
    parts = with_weights(adapters)
    if not parts:
        raise BadInput("nothing to stack: expected at least one adapter")
    if len({adapter.is_portable for adapter, _ in parts}) > 1:
        raise BadInput(
            "portable adapters and those for one model: make the portable ones for that model "
            "first (adapter_on, or `sdd-lora convert FILE --base MODEL`)"
        )
    collected: dict[str, list[Factors]] = {}
    for adapter, weight in parts:
        if not math.isfinite(weight):
            raise BadInput(f"{adapter.name}: expected a finite weight, found {weight}")
        for module, part in adapter.factors.items():
            collected.setdefault(module, []).append(part.scaled(weight))
    for module, found in collected.items():
        require_one_model(module, found)
    for adapter, _ in parts:
        if not adapter.norm():
            warn(f"{adapter.name}: changes nothing: its delta is 0 everywhere")
    factors = {module: concatenated(found) for module, found in collected.items()}
    return Adapter(factors, _merged_metadata(parts, name))


@dataclass(frozen=True)
class Resized:
    """A smaller adapter and the relative errors, ‖ΔW − ΔW′‖ / ‖ΔW‖, that it costs."""

    adapter: Adapter
    error: float
    error_of_module: dict[str, float]

    def __repr__(self) -> str:
        return f"Resized({self.adapter!r}, error {self.error:.3g})"


def resize(adapter: AdapterLike, rank: int | None = None, energy: float | None = None) -> Resized:
    """The best adapter of at most `rank`, or the smallest that keeps the share `energy` of ‖ΔW‖².

    `adapter` may be a file, a run's folder or a hub id. Exactly one of rank and energy is given;
    energy is in (0, 1]. Raises BadInput otherwise.
    """
    require_one_size(rank, energy)
    adapter = as_adapter(adapter)
    factors, errors = {}, {}
    lost = whole = 0.0
    with threadpool_limits(1, user_api="blas"):  # the same bytes at any number of threads
        for module, found in adapter.factors.items():
            factors[module], errors[module] = truncated(found, rank, energy)
            norm = found.norm()
            whole += norm**2
            lost += (errors[module] * norm) ** 2
    error = math.sqrt(lost / whole) if whole else 0.0
    source = ResizedFrom(
        identity=adapter.identity,
        lineage=list(adapter.lineage),
        rank=adapter.rank,
        relative_error=error,
    )
    return Resized(adapter.derived(factors, resized_from=source), error, errors)


def require_one_model(module: str, parts: Iterable[Factors]) -> None:
    """Raises BadInput where a module's factors in several adapters are for different shapes."""
    shapes = {part.weight_shape for part in parts}
    if len(shapes) > 1:
        raise BadInput(
            f"these adapters are for different models: {module} is "
            f"{' and '.join(map(str, sorted(shapes)))}; stack adapters of one model"
        )


def require_one_size(rank: int | None, energy: float | None) -> None:
    """Raises BadInput unless exactly one of rank ≥ 1 and 0 < energy ≤ 1 is given."""
    if (rank is None) == (energy is None):
        raise BadInput("expected either a rank or an energy")
    if rank is not None and rank < 1:
        raise BadInput(f"rank {rank}: expected at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise BadInput(f"energy {energy}: expected a share above 0, up to 1")


def _merged_metadata(parts: Weighted, name: str | None) -> Metadata:
    """Where a stack comes from; `base` stays where all parts agree on it."""
    concepts = [c for adapter, weight in parts if weight > 0 for c in adapter.metadata.concepts]
    metadata = Metadata(
        name=name or "+".join(adapter.name for adapter, _ in parts),
        merged_from=[adapter.as_part(weight) for adapter, weight in parts],
        concepts=list(dict.fromkeys(concepts)),
    )
    if header := _shared_labels([adapter.metadata.header for adapter, _ in parts]):
        metadata |= {"header": header}
    bases = [adapter.metadata.base for adapter, _ in parts]
    agreed = bases[0] is not None and all(base == bases[0] for base in bases)
    return metadata | {"base": bases[0]} if agreed else metadata


def _shared_labels(headers: Sequence[dict[str, str]]) -> dict[str, str]:
    """Trigger words and tags of all parts, as user interfaces read them in a header."""
    labels = {}
    for key in ("modelspec.trigger_phrase", "modelspec.tags"):
        listed = [text for header in headers if (text := header.get(key))]
        if listed:
            labels[key] = ", ".join(dict.fromkeys(listed))
    frequency: dict[str, Any] = {}
    for header in headers:
        with suppress(ValueError, RecursionError):
            found = json.loads(header.get("ss_tag_frequency", "{}"))
            frequency |= found if isinstance(found, dict) else {}
    return labels | ({"ss_tag_frequency": json.dumps(frequency)} if frequency else {})
