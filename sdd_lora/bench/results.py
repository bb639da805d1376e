"""What a bench found: `results.json`, and the lines of `images.jsonl`, as models."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError, model_validator

from sdd_lora.adapter.metrics import Interval
from sdd_lora.errors import BadInput, first_problem
from sdd_lora.io.text import read_text
from sdd_lora.measures.base import FrozenModel, MeasureInfo

RESULTS, IMAGES, BENCH = "results.json", "images.jsonl", "bench.yaml"
DAMAGED_IMAGE = "can't read this image; delete it and run evaluate again, which draws it anew"
#: the group of a row that counts all of a measure's images
ALL = "all"


class ImageRecord(FrozenModel):
    """A line of images.jsonl: what was drawn how, and its values.

    `prompt` is what the image is judged by; `asked` is what was asked instead, under an attack.
    `training` is the one that drew it, where its row has several.
    """

    model_config = ConfigDict(extra="allow")  # of later versions
    method: str
    variation: str | None
    setting: float | str | None
    kind: str
    set: str
    prompt: str
    seed: int
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    file: str
    values: dict[str, bool | float]
    asked: str | None = None
    categories: tuple[str, ...] | None = None
    training: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What is the same along a row of images: set, prompt, seed, guidance and size."""
        return (
            self.kind,
            self.set,
            self.prompt,
            *(self.seed, self.guidance),
            self.width,
            self.height,
        )

    @property
    def groups(self) -> list[str]:
        """The groups that the image counts for: its set, and its categories, which may overlap."""
        return [self.set, *(f"{self.set}: {name}" for name in self.categories or ())]

    def to_line(self) -> str:
        told = self.model_dump(mode="json")
        kept = {k: v for k, v in told.items() if v is not None or k in ("variation", "setting")}
        return json.dumps(kept, ensure_ascii=False) + "\n"


class Row(FrozenModel):
    """One number: a rate (fraction of `n` images) or a mean of `n` values, with its 95 % interval.

    `difference` is to `sd` on the same seeds. Both intervals are missing where a measure has none.
    """

    method: str
    measure: str
    group: str
    value: float
    ci95: Interval | None
    n: int
    difference: float | None = None
    ci95_difference: Interval | None = None


class SettingRow(Row):
    """A row of a variation: drawn with another `setting`, compared with `sd` under the same one."""

    setting: float | str


class Variation(FrozenModel):
    """The same measures while one field of the sampling varies."""

    name: str
    field: str
    rows: list[SettingRow]


class AttackRow(FrozenModel):
    """A rate of what is erased, of a method, without (`before`) and under an attack (`after`): `n`
    prompts, the same seeds. The cost is of finding what to ask, and a prompt's: seconds, and
    samples forward through a UNet (those of gradients go backward too). `access` says whom the
    attack is open to, `effort` how strong it is; both are empty in results of earlier versions."""

    attack: str
    method: str
    measure: str
    before: float
    ci95_before: Interval
    after: float
    ci95_after: Interval
    change: float
    ci95_change: Interval
    n: int
    seconds: float
    unet_passes: float
    access: str = ""
    effort: str = ""


class ConceptShift(FrozenModel):
    """A kept concept under a method: the rate at which it is drawn, without (`before`) and with."""

    method: str
    concept: str
    group: str
    before: float
    after: float
    change: float
    ci95_change: Interval
    n: int


class AdapterCosines(FrozenModel):
    """Cosines between the adapters' changes, (n, n)."""

    names: list[str]
    cosine: list[list[float]]

    @model_validator(mode="after")
    def _is_square(self) -> "AdapterCosines":
        sides = {len(self.names), len(self.cosine), *map(len, self.cosine)}
        if len(sides) > 1:
            raise ValueError("expected as many rows, and columns, as names")
        return self


class PromptUse(FrozenModel):
    """How many (`used`) of the prompts of a set (`of`) a row's `images` are drawn from."""

    kind: str
    set: str
    used: int
    of: int
    images: int


class ChoiceRow(FrozenModel):
    """A snapshot of a trained row on the prompts and seeds of `choice`: rates over `n` images each
    of what is erased and kept, and whether the table's row is drawn with it."""

    method: str
    iteration: int
    drawn: float
    kept: float
    n: tuple[int, int]
    chosen: bool


class Cost(FrozenModel):
    """What a row took, and what its method was `told` to erase and to keep; None where that is not
    known. Bytes are those of what a user gets."""

    method: str
    told: str
    unet_passes: int | None = None
    seconds: float | None = None
    parameters: int | None = None
    bytes: int | None = None


class Results(FrozenModel):
    """All of `results.json`. `methods` says for each row what drew it: recipe, adapters, training;
    `sources` for each measure whose weights, or which package, made its numbers; `missing` which
    measures could not be taken, and why; `notes` what else a reader must know; `prompts` how many
    of each set's prompts were drawn; `choices` which snapshots stand in the table; `costs` what
    each row took."""

    bench: str
    model: str
    date: str
    command: str
    versions: dict[str, str]
    rows: list[Row]
    concepts: list[str] = []
    sampling: dict[str, Any] = {}
    methods: dict[str, dict[str, Any]] = {}
    measures: dict[str, MeasureInfo] = {}
    sources: dict[str, str] = {}
    variations: list[Variation] = []
    attacks: list[AttackRow] = []
    collateral: list[ConceptShift] = []
    interference: AdapterCosines | None = None
    missing: list[str] = []
    notes: list[str] = []
    prompts: list[PromptUse] = []
    choices: list[ChoiceRow] = []
    costs: list[Cost] = []

    @classmethod
    def load(cls, folder: Path) -> "Results":
        """Read a bench's results. Raises BadInput where they are missing or broken."""
        path = folder / RESULTS
        try:
            text = read_text(path, "the results of `sdd-lora evaluate`")
            return cls.model_validate_json(text)
        except ValidationError as error:
            problem = first_problem(error)
            raise BadInput(f"{path}: damaged, or of another version: {problem}") from None

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"

    def info(self, measure: str) -> MeasureInfo:
        return self.measures.get(measure, MeasureInfo(kind="mean", of="all", better="neither"))

    def headline(self) -> list[str]:
        """Measures that have a row over all images, in order of appearance."""
        return list(dict.fromkeys(row.measure for row in self.rows if row.group == ALL))

    def image_counts(self, measure: str) -> list[int]:
        """The different numbers of images behind a measure's headline rows; usually one."""
        return sorted({r.n for r in self.rows if r.measure == measure and r.group == ALL})

    def measure_names(self) -> list[str]:
        return list(dict.fromkeys(row.measure for row in self.rows))

    def method_names(self) -> list[str]:
        return list(dict.fromkeys(row.method for row in self.rows))


def find_row(rows: Sequence[Row], method: str, measure: str, group: str) -> Row | None:
    """The row of these three, if there is one."""
    wanted = (method, measure, group)
    return next((r for r in rows if (r.method, r.measure, r.group) == wanted), None)


def pair_of(infos: Mapping[str, MeasureInfo]) -> tuple[str, str] | None:
    """The first rate of what is erased (lower is better) and of what is kept (higher is better)."""
    found: dict[tuple[str, str], str] = {}
    for name, info in infos.items():
        if info.kind == "rate":
            found.setdefault((info.of, info.better), name)
    erased, kept = found.get(("erased", "lower")), found.get(("kept", "higher"))
    return (erased, kept) if erased and kept else None
