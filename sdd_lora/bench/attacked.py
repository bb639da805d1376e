"""A bench's attacks: found once for each prompt, kept in a file beside the images, then drawn."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.attacks import words
from sdd_lora.attacks.base import AttackSettings
from sdd_lora.attacks.case import Case
from sdd_lora.attacks.noise import frozen
from sdd_lora.attacks.registry import ATTACK_FUNCTIONS, armed_pipeline, counted
from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.grid import Cell
from sdd_lora.bench.methods import Weights
from sdd_lora.errors import BadInput
from sdd_lora.generation.given import Given
from sdd_lora.generation.manifest import as_entry, job_in
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.io.distributed import processes
from sdd_lora.io.jsonl import append_lines, read_lines
from sdd_lora.progress import progress
from sdd_lora.sd.pipeline import load_pipeline

_WORDINGS: dict[str, Callable[[Sequence[str], Any], Mapping[str, Sequence[str]]]] = {
    "paraphrase": words.paraphrases,
    "group_word": words.group_words,
}
FOUND = "attacks.jsonl"
_FIELDS = {
    "key": str,
    "prompt": str,
    "seed": int,
    "asked": str,
    "words": dict,
    "seconds": float,
    "unet_passes": int,
}
#: attack → a number, raised when it would find something else than it did before
_REVISIONS = {"ring_a_bell": [2]}


@dataclass(frozen=True)
class Armed:
    """A cell whose prompts are what its attack asks, and what they are drawn with: new `words` in
    them, with embeddings (d,), what else each job is drawn from, and an adapter."""

    cell: Cell
    words: Mapping[str, torch.Tensor]
    given: Mapping[Job, Path]
    adapter: Adapter | None

    def pipeline(self, weights: Weights, sampling: Sampling) -> StableDiffusionPipeline:
        """The pipeline that draws the cell."""
        pipeline = weights.pipeline(self.cell, self.adapter)
        given = {job: partial(Given.load, file) for job, file in self.given.items()}
        return armed_pipeline(pipeline, sampling, self.words, given)


class Attacking:
    """Finds what cells ask instead of their prompts."""

    def __init__(self, bench: Bench, weights: Weights, folder: Path) -> None:
        self.bench, self.weights, self.folder = bench, weights, folder

    def check(self, cells: Sequence[Cell]) -> None:
        """Raises BadInput for prompts that can't be said in other words."""
        for cell in cells:
            name, _, _ = cell.conditions.attack.partition(" ")
            if name in _WORDINGS:
                other = _WORDINGS[name](self.bench.erased, self._settings(cell))
                for spec in cell.specs:
                    try:
                        words.reworded(spec.job.prompt, spec.job.seed, other)
                    except BadInput as error:
                        raise BadInput(f"attacks.{name}: {error}") from None

    def armed(self, cell: Cell) -> Armed:
        """The cell with what its attack asks in place of its prompts."""
        found, place = self.found(cell), self._place(cell)
        specs = [
            replace(spec, job=replace(spec.job, prompt=line["asked"]), wanted=spec.job.prompt)
            for spec, line in zip(cell.specs, found, strict=True)
        ]
        pairs = list(zip(specs, found, strict=True))
        adapters = {line["adapter"] for line in found if line.get("adapter")}
        return Armed(
            replace(cell, specs=specs),
            {name: torch.tensor(v) for line in found for name, v in line["words"].items()},
            {spec.job: place / line["given"] for spec, line in pairs if line.get("given")},
            next((Adapter.load(place / name) for name in adapters), None),
        )

    def cost(self, cell: Cell) -> tuple[float, float]:
        """Seconds, and UNet passes, that a prompt took to attack: means."""
        found = self.found(cell)
        seconds, passes = (sum(line[key] for line in found) for key in ("seconds", "unet_passes"))
        return seconds / len(found), passes / len(found)

    def found(self, cell: Cell) -> list[dict[str, Any]]:
        """A line for each image: asked, words, given, adapter, before, after, seconds, unet_passes.
        What is missing is found now."""
        name, _, _ = cell.conditions.attack.partition(" ")
        if name not in ATTACK_FUNCTIONS:
            free = {"words": {}, "seconds": 0.0, "unet_passes": 0}
            return [{"asked": spec.job.prompt} | free for spec in cell.specs]
        place, key = self._place(cell), self._key(cell)
        known = {job_in(x): x for x in read_lines(place / FOUND, _FIELDS) if x["key"] == key}
        missing = [(i, spec.job) for i, spec in enumerate(cell.specs) if spec.job not in known]
        state = processes()
        state.wait_for_everyone()  # all have read what is there
        if missing and state.is_main_process:
            place.mkdir(parents=True, exist_ok=True)
            self._find_all(cell, missing, next(iter(known.values()), None))
        state.wait_for_everyone()
        lines = read_lines(place / FOUND, _FIELDS)
        known = {job_in(line): line for line in lines if line["key"] == key}
        return [known[spec.job] for spec in cell.specs]

    def _find_all(
        self, cell: Cell, missing: Sequence[tuple[int, Job]], first: dict[str, Any] | None
    ) -> None:
        """Append a line for each job that is missing. `first` is the line of another job, whose
        finding serves all where the attack is found once."""
        name, _, _ = cell.conditions.attack.partition(" ")
        settings, key, place = self._settings(cell), self._key(cell), self._place(cell)
        protected = frozen(self.weights.pipeline(cell)) if settings.through_method else self.base
        with progress(name, len(missing)) as advance:
            for number, job in missing:
                if settings.once and first is not None:
                    free = {"asked": job.prompt, "seconds": 0.0, "unet_passes": 0}
                    kept = ("words", "adapter", "before", "after")
                    found = {name: first[name] for name in kept} | free
                else:
                    case = Case(
                        protected,
                        self.base,
                        self.bench.erased,
                        job.prompt,
                        job.seed,
                        self._sampling.for_job(job),
                        number,
                    )
                    found = self._find(name, case, settings, place, key)
                first = first or found
                append_lines(place / FOUND, [{"key": key} | as_entry(job) | found])
                advance()

    def _find(
        self, name: str, case: Case, settings: AttackSettings, place: Path, key: str
    ) -> dict[str, Any]:
        """What a line says of a case; tensors go to files beside it first."""
        started = time.monotonic()
        with counted([case.protected, case.base]) as passes:
            found = ATTACK_FUNCTIONS[name](case, settings)
        file = f"{key}-{case.number:05d}.safetensors"
        if found.given is not None:
            found.given.save(place / file)
        if found.adapter is not None:
            found.adapter.save(place / file, dtype="fp32")
        return {
            "asked": found.prompt,
            "words": {word: vector.tolist() for word, vector in found.words.items()},
            "given": None if found.given is None else file,
            "adapter": None if found.adapter is None else file,
            "before": found.before,
            "after": found.after,
            "seconds": round(time.monotonic() - started, 3),
            "unet_passes": passes.count,
        }

    def _place(self, cell: Cell) -> Path:
        """Where a cell's lines lie; methods share them where they are not found through one."""
        own = self._settings(cell).through_method
        return self.folder / (cell.folder if own else cell.folder.parent)

    @cached_property
    def base(self) -> StableDiffusionPipeline:
        """The model that nothing protects."""
        return frozen(load_pipeline(self.bench.model))

    @property
    def _sampling(self) -> Sampling:
        default = self.bench.sampling
        return Sampling(default.steps, default.guidance, default.scheduler)

    def _settings(self, cell: Cell) -> AttackSettings:
        assert self.bench.attacks is not None
        return self.bench.attacks.chosen[cell.conditions.attack]

    def _key(self, cell: Cell) -> str:
        """What an attack's outcome depends on besides prompt and seed."""
        name, _, _ = cell.conditions.attack.partition(" ")
        settings = self._settings(cell)
        on = [
            name,
            settings.content(),
            self.bench.erased,
            asdict(self._sampling),
            self.weights.fingerprint(self.bench.model),
            self.weights.settings(cell) if settings.through_method else [],
            *_REVISIONS.get(name, ()),
        ]
        return hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()[:24]
