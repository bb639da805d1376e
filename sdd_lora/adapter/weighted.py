"""Adapters as people give them: in memory, or "A[:w]": a file, a run's folder or a hub id."""

import math
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from sdd_lora.errors import BadInput

if TYPE_CHECKING:
    from sdd_lora.adapter.adapter import Adapter

AdapterLike: TypeAlias = "Adapter | str | os.PathLike[str]"
WeightedLike: TypeAlias = "AdapterLike | tuple[AdapterLike, float]"
#: one adapter or several, with or without weights; texts may end in ":w"
AdaptersLike: TypeAlias = "WeightedLike | Sequence[WeightedLike]"


def weighted(argument: str) -> tuple[str, float]:
    """ "A[:w]" → (A, w); the weight is 1 where none is given. Windows drives are left alone."""
    if tag := re.fullmatch(r"<lora:(.+?)(?::([\d.-]+))?>", argument):
        raise BadInput(f"{argument}: expected a file, as {tag[1]}.safetensors:{tag[2] or 1}")
    head, _, tail = argument.rpartition(":")
    is_drive = os.name == "nt" and len(head) == 1
    if not head or is_drive or "/" in tail or "\\" in tail:
        return argument, 1.0
    try:
        weight = float(tail)
    except ValueError:
        raise BadInput(f"{argument}: expected A or A:weight, found the weight {tail!r}") from None
    if not math.isfinite(weight):
        raise BadInput(f"{argument}: expected a finite weight, found {tail}")
    return head, weight


def as_adapter(given: AdapterLike) -> "Adapter":
    """The adapter itself, or of a file, a run's folder or a hub id. Raises BadInput for others."""
    from sdd_lora.adapter.adapter import Adapter

    if isinstance(given, Adapter):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise BadInput(
            "expected an Adapter, a path or a hub id, each alone or as (adapter, weight), found "
            f"{type(given).__name__}"
        )
    return Adapter.load(os.fspath(given))


def with_weights(given: AdaptersLike) -> "list[tuple[Adapter, float]]":
    """Adapters with their weights, 1 where none is given; files are read.

    `given` is one adapter or several: an Adapter, a path, "A[:w]", or a pair of an adapter or path
    and its weight. Raises BadInput for what is none, and where an adapter can't be read.
    """
    several = isinstance(given, Sequence) and not (isinstance(given, str) or _is_pair(given))
    return [_loaded(one) for one in (given if several else [given])]  # type: ignore[union-attr]


def _loaded(given: Any) -> "tuple[Adapter, float]":
    if isinstance(given, str):
        given = weighted(given)
    source, weight = given if _is_pair(given) else (given, 1.0)
    return as_adapter(source), float(weight)


def _is_pair(given: Any) -> bool:
    """Whether it is (adapter, weight)."""
    is_two = isinstance(given, (tuple, list)) and len(given) == 2
    return is_two and isinstance(given[1], (int, float))
