"""What a bench draws: cells (a method under some conditions), each with its images' prompts and
seeds."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdd_lora.attacks.base import AttackSettings
from sdd_lora.attacks.settings import AdapterWeight
from sdd_lora.bench.bench_file import ATTACK_VARIATION, Bench
from sdd_lora.bench.results import PromptUse
from sdd_lora.errors import BadInput
from sdd_lora.generation import methods as drawing
from sdd_lora.generation import prompt_files
from sdd_lora.generation.prompt_files import Prompt
from sdd_lora.generation.sampling import Job
from sdd_lora.measures.base import ImageSpec
from sdd_lora.progress import warn
from sdd_lora.sd.schedulers import Scheduler

_SEEDS_OF_A_SET = 100_000
#: lists of prompts that papers share, which are not ours to pass on → where they are
PROMPT_LISTS = {
    "i2p_benchmark.csv": "the hub's AIML-TUDA/i2p",
    "coco_30k.csv": "github.com/rohitgandikota/erasing, data/coco_30k.csv",
    "country_body.txt": "github.com/nannullna/safe-diffusion, prompts/country_body.txt",
}
_PROMPT_FILES = {".txt", ".csv", ".tsv", ".json", ".jsonl"}


@dataclass(frozen=True)
class Conditions:
    """What a variation may vary; see `VariationOf`. And the attack, if there is one, by its key;
    and which of a row's trainings draws, where it has several.

    `clip_skip` counts as user interfaces do; with `base_text_encoder` prompts are read by the
    bench's model's.
    """

    model: str
    steps: int
    guidance: float
    scheduler: Scheduler
    weight: float = 1.0
    image: float = 0.0
    extra_adapter: str = ""
    attack: str = ""
    snapshot: int | None = None
    clip_skip: int = 1
    base_text_encoder: bool = False
    training: str = ""


@dataclass(frozen=True)
class Cell:
    """One method under one set of conditions: a folder of images.

    `is_main`: its folder is the main table's, the setting being the default one.
    """

    method: str
    variation: str | None
    setting: float | str | None
    conditions: Conditions
    specs: list[ImageSpec]
    is_main: bool

    @property
    def folder(self) -> Path:
        if self.is_main:
            return Path("images") / self.method / self.conditions.training
        setting = "".join(c if c.isalnum() or c in ".-+" else "-" for c in str(self.setting))
        return Path("images") / str(self.variation) / setting / self.method

    @property
    def label(self) -> str:
        own = self.conditions.training or self.method
        return own if self.variation is None else f"{own}, {self.setting}"

    @property
    def drawn_by(self) -> str:
        """The name of what draws: the method's, or one of its trainings'."""
        return self.conditions.training or self.method


@dataclass(frozen=True)
class Grid:
    """All cells of a bench, the main table's first and `sd` first of them, being what others start
    from; and how many prompts of each set they use."""

    cells: list[Cell]
    prompts: list[PromptUse]

    @property
    def default(self) -> Conditions:
        """The main table's conditions."""
        return self.cells[0].conditions


def grid_of(bench: Bench) -> Grid:
    """The main table's cells, then the variations' and the attacks'."""
    specs, prompts = image_specs(bench)
    s = bench.sampling
    default = Conditions(bench.model, s.steps, s.guidance, s.scheduler)
    methods = sorted(bench.methods, key=lambda method: method != "sd")
    cells = [cell for method in methods for cell in _main_cells(bench, method, default, specs)]
    for name, variation in bench.variations.items():
        fewer = spread_over_sets(specs, {"erased": variation.erased, "kept": variation.kept})
        own = variation.field == "guidance" and any(s.job.guidance is not None for s in fewer)
        if own:  # which would win over the one that varies
            fewer = [replace(spec, job=replace(spec.job, guidance=None)) for spec in fewer]
        for value in variation.values:
            changed = _varied(default, variation.field, value)
            is_default = changed == default and not own
            cells += [
                Cell(m, name, value, changed, fewer, is_default and _is_drawn_once(bench, m))
                for m in variation.methods
            ]
    return Grid(cells + _attack_cells(bench, default, specs), prompts)


def _main_cells(
    bench: Bench, method: str, default: Conditions, specs: Sequence[ImageSpec]
) -> list[Cell]:
    """A method's cell of the main table; where it has several trainings, one each, among which its
    images are dealt out, always in the same way."""
    trainings = bench.trainings_of(method)
    if len(trainings) == 1:
        return [Cell(method, None, None, default, list(specs), True)]
    dealt = random.Random(0).sample(range(len(specs)), len(specs))
    cells = []
    for number, training in enumerate(trainings):
        own = [specs[i] for i in sorted(dealt[number :: len(trainings)])]
        cells.append(Cell(method, None, None, replace(default, training=training), own, True))
    return cells


def _is_drawn_once(bench: Bench, method: str) -> bool:
    """Whether the main table has all its images of a method from the same weights."""
    return method in bench.methods and len(bench.trainings_of(method)) == 1


def _attack_cells(bench: Bench, default: Conditions, specs: Sequence[ImageSpec]) -> list[Cell]:
    """Each attacked method without attack, which are the main table's images where it stands there,
    and under each attack that it can be put to."""
    if bench.attacks is None:
        return []
    methods, chosen = bench.attacks.methods, bench.attacks.chosen
    counts = {key: settings.targets or bench.attacks.targets for key, settings in chosen.items()}
    most = spread_over_sets(specs, {"erased": max(counts.values()), "kept": 0})
    targets = {
        count: spread_over_sets(most, {"erased": count, "kept": 0}) for count in counts.values()
    }
    cells = [
        Cell(m, ATTACK_VARIATION, "none", default, most, _is_drawn_once(bench, m)) for m in methods
    ]
    return cells + [
        Cell(
            m,
            ATTACK_VARIATION,
            key,
            replace(default, attack=key, **settings.conditions),
            targets[counts[key]],
            False,
        )
        for key, settings in chosen.items()
        for m in methods
        if _can_be_attacked(bench, m, settings)
    ]


def _can_be_attacked(bench: Bench, method: str, settings: AttackSettings) -> bool:
    """Gradients are taken through the weights that a method draws with, not its way of drawing; and
    only adapters have a weight."""
    if isinstance(settings, AdapterWeight):
        trained = method in bench.recipes and bench.recipe(method).parameters != "full"
        named = method in bench.adapters or method in bench.words
        return method != "baked" and (named or trained)
    by_weights = settings.draws_plainly or settings.access == "white-box"
    return not by_weights or draws_with(bench, method) == "sd"


def draws_with(bench: Bench, method: str) -> str:
    """The way of drawing that a row uses: its own, the user's own code, or as `sd` does."""
    return bench.code.get(method, method if method in drawing.METHODS else "sd")


def _varied(default: Conditions, field: str, value: Any) -> Conditions:
    """The default conditions with one field changed."""
    name = "extra_adapter" if field == "beside" else field
    changes: dict[str, Any] = {name: int(value) if field in ("steps", "snapshot") else value}
    return replace(default, **changes)


def image_specs(bench: Bench) -> tuple[list[ImageSpec], list[PromptUse]]:
    """All images of a row, each kind's number shared equally by its sets, each with its own seeds;
    and how many of each set's prompts they use.

    Raises BadInput where a file of prompts can't be read, and for an image that would count as
    erased and as kept.
    """
    specs: list[ImageSpec] = []
    uses = []
    first = bench.seeds.first
    for kind, sets, count in (
        ("erased", bench.prompts.erased, bench.seeds.erased),
        ("kept", bench.prompts.kept, bench.seeds.kept),
    ):
        for number, (name, entries) in enumerate(sets.items()):
            share = count // len(sets) + (number < count % len(sets))
            prompts = read_set(bench, entries)
            specs += [
                ImageSpec(kind, name, job, categories=prompt.categories)
                for prompt, job in _jobs(prompts, share, first)
            ]
            uses.append(
                PromptUse(
                    kind=kind,
                    set=name,
                    used=min(share, len(prompts)),
                    of=len(prompts),
                    images=share,
                )
            )
            first += _SEEDS_OF_A_SET
    erased = {spec.job for spec in specs if spec.kind == "erased"}
    for spec in specs:
        if spec.kind == "kept" and spec.job in erased:
            raise BadInput(
                f"prompts: {spec.job.prompt!r} with seed {spec.job.seed} stands among what is "
                "erased and what is kept; expected each picture in one of them"
            )
    return specs, uses


def spread_over_sets(specs: Sequence[ImageSpec], counts: dict[str, int]) -> list[ImageSpec]:
    """Some of each set's images, `counts` of each kind shared equally by its sets: the first ones,
    or, where these are fewer than the set's prompts, spread evenly over the prompts."""
    chosen: set[int] = set()
    for kind, count in counts.items():
        sets: dict[str, list[int]] = {}
        for index, spec in enumerate(specs):
            if spec.kind == kind:
                sets.setdefault(spec.set, []).append(index)
        for number, own in enumerate(sets.values()):
            share = count // len(sets) + (number < count % len(sets))
            prompts = len({specs[index].job.prompt for index in own})
            pool = own[: max(share, prompts)]
            chosen |= {pool[i] for i in _spread(len(pool), share)}
    return [spec for index, spec in enumerate(specs) if index in chosen]


def _spread(length: int, count: int) -> list[int]:
    """`count` of the indices below `length`, evenly over them; all in order if there are fewer."""
    return [i * length // count for i in range(count)] if count < length else list(range(length))


def read_set(bench: Bench, entries: str | Sequence[str]) -> list[Prompt]:
    """A set's prompts, files replaced by what they hold."""
    prompts: list[Prompt] = []
    for entry in [entries] if isinstance(entries, str) else entries:
        path = bench.file(entry)
        if path.name in PROMPT_LISTS and not path.exists():
            raise BadInput(
                f"{path}: expected a file of prompts, found no such file; get it from "
                f"{PROMPT_LISTS[path.name]}, and put it there"
            )
        is_file = path.suffix.lower() in _PROMPT_FILES
        found = prompt_files.read_prompts(path) if is_file else [Prompt(entry)]
        if any(prompt.steps or prompt.negative_prompt for prompt in found):
            warn(f"{entry}: its steps and negative prompts are not used: a bench draws all alike")
        prompts += found
    return prompts


def _jobs(prompts: Sequence[Prompt], count: int, first_seed: int) -> Iterator[tuple[Prompt, Job]]:
    """`count` times a prompt and its job: in turn, or spread evenly over prompts that are more.

    Seeds count up from `first_seed`, or, where a prompt has one of its own, from that.
    """
    if count < len(prompts):
        prompts = [prompts[i] for i in _spread(len(prompts), count)]
    for i in range(count):
        turn, prompt = i // len(prompts), prompts[i % len(prompts)]
        seed = first_seed + i if prompt.seed is None else prompt.seed + turn
        yield prompt, Job(prompt.text, seed, prompt.guidance, prompt.width, prompt.height)
