"""`metrics.json`: what a result took, and what it does, as `train` and `measure` write it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue, ValidationError

from sdd_lora.adapter.metadata import Entry, TrainedOn
from sdd_lora.errors import BadInput, first_problem
from sdd_lora.io.text import read_text

METRICS_FILE = "metrics.json"
Interval = tuple[float, float]


class FileNumbers(Entry):
    """The file that was measured."""

    sha256: str | None = None
    parameters: int | None = None
    bytes: int | None = None


class Snapshot(Entry):
    """When a result was kept, and what had been spent on it."""

    iteration: int
    unet_passes: int
    seconds: float


class TrainingReport(Entry):
    """Numbers of a finished training, all unset where there was none; `peak_bytes` is None where an
    earlier training in the same process hides it, `final_loss` where there were no iterations."""

    iterations: int = 0
    unet_passes: int = 0
    seconds: float = 0.0
    peak_bytes: int | None = None
    final_loss: float | None = None


class CardRow(Entry):
    """A rate before and after, each a fraction of `n` images of `prompts` different prompts."""

    name: str
    group: str
    prompts: int
    before: float
    after: float
    n: int
    ci95_before: Interval
    ci95_after: Interval
    ci95_change: Interval | None = None  # of earlier versions


class BlackImages(Entry):
    """How many images are all black, `before` and `after`, of `images`; they count in no row."""

    before: int
    after: int
    images: int


class TransferRows(Entry):
    """The rows on another model than the one that the result was trained on."""

    model: str
    measures: list[CardRow] = []
    black: BlackImages | None = None


class WithstoodRow(Entry):
    """How often an attack finds what is erased, in the model itself (`before`) and with the result
    (`after`), on the same `n` prompts and seeds; UNet passes a prompt are those of the latter."""

    attack: str
    access: str
    strength: str
    before: float
    after: float
    n: int
    ci95_before: Interval
    ci95_after: Interval
    unet_passes: float


class Metrics(Entry):
    """All of `metrics.json`. `recipe_sha256` and `snapshots` are of a training, `measured_…` of a
    measurement without one; `adapter` or `weights` is the file."""

    tool: str = ""
    versions: dict[str, str] = {}
    recipe_sha256: str | None = None
    snapshots: list[Snapshot] = []
    measured_by: str | None = None
    measured_on: str | None = None
    measured_with: dict[str, JsonValue] = {}
    base: TrainedOn = TrainedOn()
    adapter: FileNumbers | None = None
    weights: FileNumbers | None = None
    training: TrainingReport = TrainingReport()
    measures: list[CardRow] = []
    black: BlackImages | None = None
    transfer: list[TransferRows] = []
    attacks: list[WithstoodRow] = []

    @classmethod
    def read(cls, folder: Path) -> "Metrics":
        """The metrics of a run's folder. Raises BadInput where they are missing or damaged."""
        path = folder / METRICS_FILE
        try:
            return cls.model_validate_json(read_text(path, "the numbers of a run"))
        except ValidationError as error:
            raise BadInput(f"{path}: the file is damaged: {first_problem(error)}") from None

    def __or__(self, changes: Mapping[str, Any]) -> "Metrics":
        return self.model_copy(update=dict(changes))

    def as_json(self) -> dict[str, Any]:
        """The fields that were given, as JSON has them: lists, not tuples."""
        return self.model_dump(mode="json", exclude_unset=True)

    def to_json(self) -> str:
        return json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n"
