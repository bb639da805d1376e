"""The registry of measures: by name, or a user's own as `module:Class`; made with their options."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sdd_lora.errors import BadInput
from sdd_lora.io.plugins import is_plugin, load_plugin
from sdd_lora.measures.base import Measure, MeasureInfo
from sdd_lora.measures.clip import ClipScore
from sdd_lora.measures.fid import Fid
from sdd_lora.measures.judge import JudgeMeasure
from sdd_lora.measures.lpips import Lpips
from sdd_lora.measures.nudenet import NudeNet
from sdd_lora.measures.open_nsfw import OpenNsfw
from sdd_lora.measures.q16 import Q16
from sdd_lora.measures.traces import TracesMeasure
from sdd_lora.measures.unsafe import Unsafe

MEASURES: dict[str, type[Measure]] = {
    "judge": JudgeMeasure,
    "nudenet": NudeNet,
    "open_nsfw": OpenNsfw,
    "q16": Q16,
    "unsafe": Unsafe,
    "clip": ClipScore,
    "lpips": Lpips,
    "fid": Fid,
    "traces": TracesMeasure,
}


#: `measure.detector: picture`
PICTURE = "picture"


class NoMeasure(Measure):
    """Counts nothing: the images are drawn for eyes alone, where no detector knows the concept."""

    def __init__(self, erased: Sequence[str]) -> None:
        self.info, self.source = {}, "none"


@dataclass(frozen=True)
class LoadedMeasure:
    """A measure that is ready; its values are kept under `key`, which says what makes them."""

    name: str
    key: str
    measure: Measure

    @property
    def compares(self) -> bool:
        """Whether it compares images with the unchanged model's."""
        return self.measure.overrides("against_reference")


def card_measure(detector: str, concepts: Sequence[str]) -> Measure:
    """The measure behind `measure.detector`, as benches take it without options. Raises BadInput
    where it lacks its package, or knows none of the concepts."""
    known = {**MEASURES, PICTURE: NoMeasure}
    try:
        return known[detector](concepts)  # type: ignore[call-arg]
    except BadInput as error:
        raise BadInput(f"measure.detector: {detector}: {error}") from None


def load_measures(
    named: Mapping[str, Mapping[str, Any]], erased: Sequence[str], file: Callable[[str], Path]
) -> tuple[list[LoadedMeasure], list[str]]:
    """The measures of a bench, and a line for each that can't be taken.

    `named` maps names to options, `file` a path as the bench writes it to the file. Raises BadInput
    for a name that is none, options of a wrong type, numbers of one name from two measures, and
    where no measure is left.
    """
    found: list[LoadedMeasure] = []
    missing = []
    for name, options in named.items():
        measure_class = _class_of(name, file)
        _check_options(name, measure_class, options)
        files = {o: file(options[o]) for o in measure_class.files if options.get(o)}
        try:
            measure = measure_class(erased, **{**options, **files})  # type: ignore[call-arg]
        except BadInput as error:
            missing.append(f"{name}: {error}")
            continue
        made_by = json.dumps([dict(options), measure.source], sort_keys=True)
        digest = hashlib.sha256(made_by.encode()).hexdigest()[:16]
        found.append(LoadedMeasure(name, f"{name} {digest}", measure))
    if not found:
        raise BadInput("no measure can be taken:\n" + "\n".join(missing))
    _refuse_doubles(found)
    return found, missing


def _class_of(name: str, file: Callable[[str], Path]) -> type[Measure]:
    if name in MEASURES:
        return MEASURES[name]
    if not is_plugin(name):
        raise BadInput(
            f"measure {name}: expected one of {', '.join(MEASURES)}, or your own as module:Class"
        )
    found = load_plugin(name, file("."))
    if not (isinstance(found, type) and issubclass(found, Measure)):
        raise BadInput(f"measure {name}: expected a subclass of sdd_lora.measures.base.Measure")
    return found


def _check_options(name: str, measure: type[Measure], options: Mapping[str, Any]) -> None:
    """Raises BadInput for options that a measure has not, or of other types than it takes."""
    _, *known = inspect.signature(measure, eval_str=True).parameters.values()
    kinds = {parameter.name: parameter.annotation for parameter in known}
    if unknown := [option for option in options if option not in kinds]:
        raise BadInput(
            f"measures.{name}: unknown option {', '.join(unknown)}; "
            f"expected {', '.join(kinds) or 'none'}"
        )
    for option, value in options.items():
        kind = Any if kinds[option] is inspect.Parameter.empty else kinds[option]
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise BadInput(f"measures.{name}.{option}: {problem}, found {value!r}") from None


def _refuse_doubles(measures: Sequence[LoadedMeasure]) -> None:
    """Raises BadInput where two measures give a number of the same name and don't mean the same."""
    known: dict[str, MeasureInfo] = {}
    for loaded in measures:
        for name, info in loaded.measure.info.items():
            if known.setdefault(name, info) != info:
                raise BadInput(
                    f"measures: two give {name}, with other settings ({known[name].note}; "
                    f"{info.note}); expected the same ones, or one of the two measures alone"
                )
