"""The pictures of a bench's page: grids of the same latents, methods or settings across."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from pydantic import ValidationError

from sdd_lora.attacks.settings import titled
from sdd_lora.bench.bench_file import ATTACK_VARIATION
from sdd_lora.bench.results import DAMAGED_IMAGE, IMAGES, ImageRecord, Results, Variation
from sdd_lora.errors import BadInput, first_problem
from sdd_lora.io.pictures import reading
from sdd_lora.progress import say

_ERASED_SHOWN, _KEPT_SHOWN, _ATTACKED_SHOWN = 3, 1, 4
_THUMBNAIL = 160
_EMBEDDED_SIDE = 96  # pictures up to this size are embedded as they are


@dataclass(frozen=True)
class GridPicture:
    """One image of a grid: a data URI, what the measures said, and the `mark` of what went wrong:
    "drawn" where it should have gone, "lost" where it should have stayed."""

    column: str
    source: str
    said: str
    mark: str


@dataclass(frozen=True)
class Strip:
    """A row of a grid: one prompt and seed, a picture in each column."""

    prompt: str
    seed: int
    group: str
    pictures: list[GridPicture]


@dataclass(frozen=True)
class PictureGrid:
    """Prompts down, methods or settings across."""

    columns: list[str]
    strips: list[Strip]


class PictureGrids:
    """The grids that a bench's folder holds pictures for."""

    def __init__(self, folder: Path, results: Results) -> None:
        self.folder, self.results = folder, results
        self.records = read_records(folder)

    @property
    def count(self) -> int:
        return len({record.file for record in self.records})

    def main(self, first: Sequence[str]) -> PictureGrid:
        """The table's methods, those named `first` in front."""
        own = [record for record in self.records if record.variation is None]
        methods = list(dict.fromkeys([*first, *self.results.method_names()]))
        return self._grid(own, methods, lambda r: r.method, _ERASED_SHOWN, _KEPT_SHOWN)

    def varied(self, variation: Variation) -> dict[str, PictureGrid]:
        """For each method of a variation, its settings across."""
        settings = list(dict.fromkeys(str(row.setting) for row in variation.rows))
        grids = {}
        for method in dict.fromkeys(row.method for row in variation.rows):
            own = self._of(variation.name, method)
            grids[method] = self._grid(own, settings, lambda r: str(r.setting), 2, 1)
        return {method: grid for method, grid in grids.items() if grid.strips}

    def attacked(self) -> dict[str, PictureGrid]:
        """For each attacked method, the first prompts under each attack."""
        grids = {}
        for method in dict.fromkeys(row.method for row in self.results.attacks):
            own = self._of(ATTACK_VARIATION, method)
            columns = list(dict.fromkeys(str(record.setting) for record in own))
            grid = self._grid(own, columns, lambda r: str(r.setting), _ATTACKED_SHOWN, 0)
            grids[method] = PictureGrid([titled(name) for name in columns], grid.strips)
        return {method: grid for method, grid in grids.items() if grid.strips}

    def _of(self, variation: str, method: str) -> list[ImageRecord]:
        return [r for r in self.records if r.variation == variation and r.method == method]

    def _grid(
        self,
        records: Sequence[ImageRecord],
        columns: list[str],
        column_of: Callable[[ImageRecord], str],
        erased_shown: int,
        kept_shown: int,
    ) -> PictureGrid:
        """The first prompts of each set that every column has drawn with the same seed."""
        found: dict[tuple[object, ...], dict[str, ImageRecord]] = {}
        for record in records:
            found.setdefault(record.key, {})[column_of(record)] = record
        shown: dict[tuple[str, str], int] = {}
        strips = []
        for drawn in found.values():
            first = next(iter(drawn.values()))
            limit = erased_shown if first.kind == "erased" else kept_shown
            count = shown.get((first.kind, first.set), 0)
            if len(drawn) == len(columns) and count < limit:
                shown[first.kind, first.set] = count + 1
                pictures = [self._picture(drawn[column], column) for column in columns]
                strips.append(Strip(first.prompt, first.seed, first.set, pictures))
        return PictureGrid(columns, strips)

    def _picture(self, record: ImageRecord, column: str) -> GridPicture:
        flags = {k: v for k, v in record.values.items() if isinstance(v, bool)}
        said = "; ".join(f"{name}: {'yes' if value else 'no'}" for name, value in flags.items())
        if record.asked is not None:
            said = f"asked: {record.asked}; {said}"
        better = {name: self.results.info(name).better for name in flags}
        mark = ""
        if any(there and better[name] == "lower" for name, there in flags.items()):
            mark = "drawn"
        elif record.kind == "kept" and any(
            not there and better[name] == "higher" for name, there in flags.items()
        ):
            mark = "lost"
        return GridPicture(column, _data_uri(self.folder / record.file), said, mark)


def read_records(folder: Path) -> list[ImageRecord]:
    """The lines of images.jsonl, none where it isn't there: published tables come without their
    pictures. Raises BadInput where one is damaged."""
    path = folder / IMAGES
    if not path.exists():
        say(f"{path}: no such file; the page comes without pictures")
        return []
    try:
        lines = path.read_text("utf-8").split("\n")  # prompts may hold U+2028, U+0085 …
        return [ImageRecord.model_validate_json(line) for line in lines if line]
    except ValidationError as error:
        problem = first_problem(error)
    except (OSError, UnicodeDecodeError) as error:
        problem = str(error)
    raise BadInput(
        f"{path}: expected a JSON object a line, one an image: {problem}; run evaluate again"
    )


def _data_uri(path: Path) -> str:
    """A small picture as it is, a large one as a JPEG thumbnail."""
    with reading(path, DAMAGED_IMAGE), Image.open(path) as opened:
        small = max(opened.size) <= _EMBEDDED_SIDE
        opened.thumbnail((_THUMBNAIL, _THUMBNAIL))
        file = io.BytesIO()
        if small:
            opened.save(file, "PNG", optimize=True)
        else:
            opened.convert("RGB").save(file, "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
