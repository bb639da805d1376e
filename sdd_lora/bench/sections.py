"""The sections of a bench."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from sdd_lora.attacks.base import distinct
from sdd_lora.io.strict_yaml import Count, Positive, Real, Section, Seed, Text, Whole
from sdd_lora.recipe.sections import DrawingPrecision, DrawingSection
from sdd_lora.sd.schedulers import SCHEDULERS, Scheduler

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Methods = Annotated[list[Name], Field(min_length=1), AfterValidator(distinct)]
Steps = Annotated[Whole, Field(gt=0, le=999)]  # SD 1.x leaves out the first of its 1000 timesteps
Field_ = Literal["weight", "guidance", "steps", "scheduler", "model", "image", "beside", "snapshot"]


class PromptSets(Section):
    """Sets by name: prompts that ask for what is erased, and prompts that must not change.

    An entry that ends in .txt, .csv, .json or .jsonl is a file beside the bench; its prompts may
    have seeds, guidance and sizes of their own.
    """

    erased: Annotated[dict[Name, str | list[str]], Field(min_length=1)]
    kept: dict[Name, str | list[str]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sets_hold_some(self) -> "PromptSets":
        for name, entries in [*self.erased.items(), *self.kept.items()]:
            if not entries and isinstance(entries, list):
                raise ValueError(f"{name}: expected prompts, or files of them, found none")
        return self


class Seeds(Section):
    """How many images all erased, and all kept, sets get together, and the first image's seed."""

    first: Seed = 60_000
    erased: Count = 200
    kept: Count = 400


class BenchSampling(DrawingSection):
    """How every method draws; `batch` changes no image."""

    steps: Steps = 25
    guidance: Real = 7.5
    scheduler: Scheduler = "ddim"
    batch: Positive = 16
    precision: DrawingPrecision = None


class TrainedBy(Section):
    """A recipe's file, beside the bench, and changes to it: {objective.kind: esd-x}.

    `seeds` are of as many trainings, which share the row's images: its intervals are over them,
    too. What carries the row's adapter besides carries that of the first.
    """

    file: Text
    set: dict[str, Any] = Field(default_factory=dict)
    seeds: Annotated[list[Seed], AfterValidator(distinct)] = Field(default_factory=list)


class Uce(Section):
    """UCE's row: `concepts` (the bench's where there are none) become `target`, by the last token;
    the outputs for `preserve` are held."""

    concepts: list[Text] = Field(default_factory=list)
    target: str = ""
    preserve: list[Text] = Field(default_factory=list)


class WordsRow(Section):
    """A row from words alone, as `sdd-lora erase` makes it: `concepts` (the bench's where there are
    none), `keep` and `rank`; or `solved`, names of such rows, solved as one."""

    concepts: list[Text] = Field(default_factory=list)
    keep: list[Text] = Field(default_factory=list)
    rank: Positive | None = None
    solved: list[Name] = Field(default_factory=list)


class Choice(Section):
    """How the table's snapshot of each trained row is chosen: of all of them and the result, the
    one of the greatest rate kept less rate drawn, of equals the earliest, on prompts and seeds of
    its own, which tell nothing of the table's. Of a row's several trainings the first one chooses.
    """

    methods: Methods
    prompts: PromptSets
    seeds: Seeds = Seeds(first=900_000_000, erased=42, kept=48)


class VariationOf(Section):
    """The measures again while one field takes other values.

    weight: of the method's adapters · guidance, steps, scheduler: of the sampling · model: another
    one · image: img2img from what `sd` drew, the value being how much of it is redone · beside:
    an adapter that every method carries besides · snapshot: of the method's training, after so many
    iterations, where it keeps one. Images are the first ones of the main table.
    """

    field: Field_
    values: Annotated[list[Real | Text], Field(min_length=1), AfterValidator(distinct)]
    methods: Methods
    erased: Count = 60
    kept: Count = 120

    @model_validator(mode="after")
    def _values_fit(self) -> "VariationOf":
        if self.erased + self.kept == 0:
            raise ValueError("expected images, of erased or of kept prompts, found none")
        kind, fits, expected = _TAKES[self.field]
        for value in self.values:
            if not isinstance(value, kind) or not fits(value):
                raise ValueError(f"{self.field} takes {expected}, found {value!r}")
        return self


def _any(value: Any) -> bool:
    return True


#: field → the kind of value that a variation gives it, which ones, and how to say that
_TAKES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "weight": (float, _any, "numbers"),
    "guidance": (float, _any, "numbers"),
    "steps": (float, lambda n: 1 <= n <= 999 and n.is_integer(), "whole numbers from 1 to 999"),
    "snapshot": (float, lambda n: n >= 1 and n.is_integer(), "numbers of iterations"),
    "image": (float, lambda share: 0 < share <= 1, "numbers over 0, up to 1"),
    "scheduler": (str, lambda name: name in SCHEDULERS, f"some of {', '.join(SCHEDULERS)}"),
    "model": (str, _any, "names of models"),
    "beside": (str, _any, "names of adapters"),
}


class Quick(Section):
    """What --quick changes: dotted fields of the bench, and of every recipe that it trains."""

    bench: dict[str, Any] = Field(default_factory=dict)
    recipes: dict[str, Any] = Field(default_factory=dict)
