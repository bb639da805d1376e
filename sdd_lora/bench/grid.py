"""What a bench draws: cells (a method under some conditions) of shots (a prompt and a seed)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdd_lora.attacks.settings import GRADIENTS
from sdd_lora.bench.bench_file import ATTACKS, Bench
from sdd_lora.errors import BadInput
from sdd_lora.generation import methods as drawing
from sdd_lora.generation import prompt_files
from sdd_lora.generation.prompt_files import Prompt
from sdd_lora.generation.sampling import Job
from sdd_lora.sd.schedulers import Scheduler

_SEEDS_OF_A_SET = 100_000
_PROMPT_FILES = {".txt", ".csv", ".json", ".jsonl"}


@dataclass(frozen=True)
class Shot:
    """One image wanted: its prompt and seed, the set and the categories that it counts for.

    Where an attack asks for it in other words, `wanted` is the prompt that names it.
    """

    kind: str
    set: str
    job: Job
    wanted: str = ""
    categories: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What the image is judged by."""
        return self.wanted or self.job.prompt


@dataclass(frozen=True)
class Conditions:
    """What a variation may vary; see `VariationOf`. And the attack, if there is one."""

    model: str
    steps: int
    guidance: float
    scheduler: Scheduler
    weight: float = 1.0
    image: float = 0.0
    beside: str = ""
    attack: str = ""


@dataclass(frozen=True)
class Cell:
    """One method under one set of conditions: a folder of images; the main table's where a
    variation's setting is the `usual` one."""

    method: str
    variation: str | None
    setting: float | str | None
    conditions: Conditions
    shots: list[Shot]
    usual: bool

    @property
    def folder(self) -> Path:
        if self.usual:
            return Path("images") / self.method
        setting = "".join(c if c.isalnum() or c in ".-+" else "-" for c in str(self.setting))
        return Path("images") / str(self.variation) / setting / self.method


def cells_of(bench: Bench) -> list[Cell]:
    """The main table's cells, then the variations'; `sd` first, being what others start from."""
    shots = shots_of(bench)
    s = bench.sampling
    usual = Conditions(bench.model, s.steps, s.guidance, s.scheduler)
    methods = sorted(bench.methods, key=lambda method: method != "sd")
    cells = [Cell(method, None, None, usual, shots, True) for method in methods]
    for name, variation in bench.variations.items():
        fewer = first_of_each(shots, {"erased": variation.erased, "kept": variation.kept})
        own = variation.field == "guidance" and any(s.job.guidance is not None for s in fewer)
        if own:  # which would win over the one that varies
            fewer = [replace(shot, job=replace(shot.job, guidance=None)) for shot in fewer]
        for value in variation.values:
            changed = _varied(usual, variation.field, value)
            cells += [
                Cell(m, name, value, changed, fewer, changed == usual and m in methods and not own)
                for m in variation.methods
            ]
    return cells + _attack_cells(bench, usual, shots)


def _attack_cells(bench: Bench, usual: Conditions, shots: Sequence[Shot]) -> list[Cell]:
    """Each attacked method without attack, which are the main table's images where it stands there,
    and under each attack that it can be put to."""
    if bench.attacks is None:
        return []
    fewer = first_of_each(shots, {"erased": bench.attacks.targets, "kept": 0})
    methods = bench.attacks.methods
    cells = [Cell(m, ATTACKS, "none", usual, fewer, m in bench.methods) for m in methods]
    return cells + [
        Cell(m, ATTACKS, name, replace(usual, attack=name), fewer, False)
        for name in bench.attacks.chosen for m in methods if _can_be_attacked(m, name)
    ]  # fmt: skip


def _can_be_attacked(method: str, attack: str) -> bool:
    """Gradients are taken through the weights that a method draws with, not its way of drawing."""
    return attack not in GRADIENTS or draws_with(method) == "sd"


def draws_with(method: str) -> str:
    """The way of drawing that a row uses: its own, or as `sd` does."""
    return method if method in drawing.METHODS else "sd"


def _varied(usual: Conditions, field: str, value: Any) -> Conditions:
    """The usual conditions with one field changed."""
    changes: dict[str, Any] = {field: int(value) if field == "steps" else value}
    return replace(usual, **changes)


def shots_of(bench: Bench) -> list[Shot]:
    """All images of a row: each kind's number shared equally by its sets, each with its own seeds.

    Raises BadInput where there is none, where a file of prompts can't be read, and for a picture
    that would count as both.
    """
    shots = []
    first = bench.seeds.first
    for kind, sets, count in (
        ("erased", bench.prompts.erased, bench.seeds.erased),
        ("kept", bench.prompts.kept, bench.seeds.kept),
    ):
        for number, (name, entries) in enumerate(sets.items()):
            share = count // len(sets) + (number < count % len(sets))
            prompts = read_prompts(bench, entries)
            shots += [
                Shot(kind, name, job, categories=prompt.categories)
                for prompt, job in _jobs(prompts, share, first)
            ]
            first += _SEEDS_OF_A_SET
    erased = {shot.job for shot in shots if shot.kind == "erased"}
    for shot in shots:
        if shot.kind == "kept" and shot.job in erased:
            raise BadInput(
                f"prompts: {shot.job.prompt!r} with seed {shot.job.seed} stands among what is "
                "erased and what is kept; expected each picture in one of them"
            )
    return shots


def first_of_each(shots: Sequence[Shot], counts: dict[str, int]) -> list[Shot]:
    """The first shots of each set, `counts` of each kind shared equally by its sets."""
    sets = {kind: list(dict.fromkeys(s.set for s in shots if s.kind == kind)) for kind in counts}
    left = {
        (kind, name): counts[kind] // len(names) + (i < counts[kind] % len(names))
        for kind, names in sets.items()
        for i, name in enumerate(names)
    }
    taken = []
    for shot in shots:
        if left[shot.kind, shot.set] > 0:
            left[shot.kind, shot.set] -= 1
            taken.append(shot)
    return taken


def read_prompts(bench: Bench, entries: str | Sequence[str]) -> list[Prompt]:
    """A set's prompts, files replaced by what they hold."""
    prompts: list[Prompt] = []
    for entry in [entries] if isinstance(entries, str) else entries:
        is_file = Path(entry).suffix.lower() in _PROMPT_FILES
        prompts += prompt_files.read_prompts(bench.file(entry)) if is_file else [Prompt(entry)]
    return prompts


def _jobs(prompts: Sequence[Prompt], count: int, first_seed: int) -> Iterator[tuple[Prompt, Job]]:
    """`count` times a prompt and its job, in turn. Seeds count up from `first_seed`, or, where a
    prompt has one of its own, from that."""
    for i in range(count):
        turn, prompt = i // len(prompts), prompts[i % len(prompts)]
        seed = first_seed + i if prompt.seed is None else prompt.seed + turn
        yield prompt, Job(prompt.text, seed, prompt.guidance, prompt.width, prompt.height)
