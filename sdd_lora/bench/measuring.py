"""Values of a bench's images, kept in files beside them: nothing is measured twice."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdd_lora.bench.grid import Cell, Conditions
from sdd_lora.bench.results import ALL, DAMAGED_IMAGE, ImageRecord, Row
from sdd_lora.errors import BadInput
from sdd_lora.generation.manifest import as_entry, drawn_in
from sdd_lora.generation.sampling import Job
from sdd_lora.io.jsonl import append_lines, read_lines
from sdd_lora.io.pictures import reading
from sdd_lora.measures.base import ImageSpec, Values, is_black, taken
from sdd_lora.measures.registry import LoadedMeasure

#: where `sd` draws what others start from, or are compared with
BASE = Path("images") / "sd"
VALUES, VALUES_OF_SETS = "values.jsonl", "values-of-sets.jsonl"
#: stands among the values where a measure's key does: whether the image is black
BLACK = "black"
_MEASURED_AT_ONCE = 256


class Measuring:
    """Measures the cells of a bench in `folder`.

    `default` are the conditions under which `sd` drew what images are compared with. `notes` says
    how many images no measure counts.
    """

    def __init__(self, folder: Path, measures: Sequence[LoadedMeasure], default: Conditions):
        self.folder, self.measures, self.default = folder, measures, default
        self.notes: list[str] = []

    def records(self, cell: Cell) -> list[ImageRecord]:
        """A record of each of a cell's images, with its values; what is missing is measured."""
        target = self.folder / cell.folder
        files = {job: self._name(path) for job, path in drawn_in(target).items()}
        references = self._references(cell)
        keys = {BLACK: BLACK} | {
            m.key: f"{m.key} beside sd" if references and m.compares else m.key
            for m in self.measures
        }
        kept = read_lines(target / VALUES, {"measure": str, "file": str, "values": dict})
        known = {(line["measure"], line["file"]): line["values"] for line in kept}
        missing = [
            spec
            for spec in cell.specs
            if any((key, files[spec.job]) not in known for key in keys.values())
        ]
        for start in range(0, len(missing), _MEASURED_AT_ONCE):
            part = missing[start : start + _MEASURED_AT_ONCE]
            for key, found in self._measured(part, files, references, keys, known):
                lines = [
                    {"measure": key, "file": file, "values": values}
                    for file, values in found.items()
                ]
                append_lines(target / VALUES, lines)
                known |= {(key, file): values for file, values in found.items()}
        self._note_black(cell, [known[BLACK, files[spec.job]][BLACK] for spec in cell.specs])
        return [self._record(cell, spec, files[spec.job], keys, known) for spec in cell.specs]

    def _references(self, cell: Cell) -> dict[Job, str]:
        """The files of `sd`'s images from the same latents; none where they can't be compared, or
        where a run was killed while `sd` was drawn, and goes on with others."""
        same = replace(cell.conditions, weight=1.0, snapshot=None, training="")
        if cell.method == "sd" or same != self.default:
            return {}
        found = {job: self._name(path) for job, path in drawn_in(self.folder / BASE).items()}
        return found if all(spec.job in found for spec in cell.specs) else {}

    def _measured(
        self,
        specs: Sequence[ImageSpec],
        files: dict[Job, str],
        references: dict[Job, str],
        keys: dict[str, str],
        known: dict[tuple[str, str], Values],
    ) -> Iterator[tuple[str, dict[str, Values]]]:
        """Each measure's key and its values, by file, of the images that it lacks."""
        images = {spec.job: self._image(files[spec.job]) for spec in specs}
        yield BLACK, {files[job]: {BLACK: is_black(image)} for job, image in images.items()}
        for loaded in self.measures:
            key = keys[loaded.key]
            todo = [spec for spec in specs if (key, files[spec.job]) not in known]
            compared = (
                [self._image(references[spec.job]) for spec in todo]
                if references and loaded.compares
                else None
            )
            values = taken(loaded.measure, todo, [images[spec.job] for spec in todo], compared)
            found = {files[spec.job]: v for spec, v in zip(todo, values, strict=True)}
            _check_finite(loaded.name, found)
            yield key, found

    def _record(
        self,
        cell: Cell,
        spec: ImageSpec,
        file: str,
        keys: dict[str, str],
        known: dict[tuple[str, str], Values],
    ) -> ImageRecord:
        values: Values = {}
        for loaded in self.measures:
            values |= known[keys[loaded.key], file]
        return ImageRecord(
            method=cell.method,
            variation=cell.variation,
            setting=cell.setting,
            kind=spec.kind,
            set=spec.set,
            **as_entry(replace(spec.job, prompt=spec.prompt)),
            file=file,
            values=values,
            asked=spec.job.prompt if spec.wanted else None,
            categories=spec.categories or None,
            training=cell.conditions.training or None,
        )

    def _note_black(self, cell: Cell, black: Sequence[Any]) -> None:
        if any(black):
            self.notes.append(
                f"{cell.label}: {sum(black)} of {len(black)} images are black all over, which is "
                "what NaN or a safety checker leaves; no measure counts them"
            )

    def set_rows(self, cell: Cell) -> list[Row]:
        """Rows of the measures that take all of a method's kept images at once, without interval;
        what was measured before is kept."""
        target, drawn = self.folder / cell.folder, drawn_in(self.folder / cell.folder)
        kept = read_lines(target / VALUES, {"measure": str, "file": str, "values": dict})
        black = {x["file"] for x in kept if x["measure"] == BLACK and x["values"][BLACK]}
        names = [self._name(drawn[spec.job]) for spec in cell.specs if spec.kind == "kept"]
        names = [name for name in names if name not in black]
        told = read_lines(target / VALUES_OF_SETS, {"measure": str, "values": dict})
        known = {x["measure"]: x["values"] for x in told}
        rows = []
        for loaded in self.measures:
            if not loaded.measure.overrides("per_set") or not names:
                continue
            if loaded.key not in known:
                known[loaded.key] = loaded.measure.per_set(map(self._image, names))
                line = {"measure": loaded.key, "values": known[loaded.key]}
                append_lines(target / VALUES_OF_SETS, [line])
            rows += [
                Row(
                    method=cell.method,
                    measure=name,
                    group=ALL,
                    value=value,
                    ci95=None,
                    n=len(names),
                )
                for name, value in known[loaded.key].items()
            ]
        return rows

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _image(self, name: str) -> np.ndarray:
        path = self.folder / name
        with reading(path, DAMAGED_IMAGE), Image.open(path) as image:
            return np.asarray(image.convert("RGB"))


def _check_finite(measure: str, found: dict[str, Values]) -> None:
    """Raises BadInput where a measure gives no number: weights with NaN in them."""
    for file, values in found.items():
        if not all(map(math.isfinite, values.values())):
            raise BadInput(
                f"measure {measure}: expected finite numbers, found {values} for {file}; are its "
                "weights sound? What was drawn stays: run again with others, or without this "
                "measure"
            )


def without_rows(measures: Sequence[LoadedMeasure], rows: Sequence[Row]) -> list[str]:
    """A line for each measure that has no number, because nothing was drawn that it counts."""
    there = {row.measure for row in rows}
    lines = []
    for loaded in measures:
        info = loaded.measure.info
        if not there & info.keys():
            counted = " or ".join(sorted({i.of for i in info.values()} - {"all"}))
            beside = " beside sd's" if loaded.compares else ""
            lines.append(f"{loaded.name}: it takes {counted} images{beside}, and there are none")
    return lines
