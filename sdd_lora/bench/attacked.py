"""A bench's attacks: found once for each prompt, kept in a file beside the images, then drawn."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.attacks import words
from sdd_lora.attacks.case import Attacked, Case
from sdd_lora.attacks.inversion import inversion
from sdd_lora.attacks.noise import frozen
from sdd_lora.attacks.ring_a_bell import ring_a_bell
from sdd_lora.attacks.settings import GRADIENTS
from sdd_lora.attacks.unlearndiffatk import unlearndiffatk
from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.grid import Cell
from sdd_lora.bench.methods import Weights
from sdd_lora.errors import BadInput
from sdd_lora.generation.manifest import as_entry, job_in
from sdd_lora.generation.sampling import Sampling
from sdd_lora.io.distributed import processes
from sdd_lora.io.jsonl import append_lines, read_lines
from sdd_lora.progress import progress
from sdd_lora.sd.pipeline import load_pipeline

ATTACK_FUNCTIONS: dict[str, Callable[[Case, Any], Attacked]] = {
    "paraphrase": words.paraphrase,
    "group_word": words.group_word,
    "ring_a_bell": ring_a_bell,
    "inversion": inversion,
    "unlearndiffatk": unlearndiffatk,
}
_WORDINGS = {"paraphrase": words.paraphrases, "group_word": words.group_words}
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


@dataclass
class Passes:
    """Samples that went forward through UNets."""

    count: int = 0


class Attacking:
    """Finds what cells ask instead of their prompts."""

    def __init__(self, bench: Bench, weights: Weights, folder: Path) -> None:
        self.bench, self.weights, self.folder = bench, weights, folder

    def check(self, cells: Sequence[Cell]) -> None:
        """Raises BadInput for prompts that can't be said in other words."""
        for cell in cells:
            name = cell.conditions.attack
            if name in _WORDINGS:
                other = _WORDINGS[name](self.bench.erased, self._settings(name))
                for spec in cell.specs:
                    try:
                        words.reworded(spec.job.prompt, spec.job.seed, other)
                    except BadInput as error:
                        raise BadInput(f"attacks.{name}: {error}") from None

    def attacked(self, cell: Cell) -> tuple[Cell, dict[str, torch.Tensor]]:
        """The cell with what its attack asks in place of its prompts; and the new words in that,
        with their embeddings (d,)."""
        found = self.found(cell)
        specs = [
            replace(spec, job=replace(spec.job, prompt=line["asked"]), wanted=spec.job.prompt)
            for spec, line in zip(cell.specs, found, strict=True)
        ]
        new = {name: torch.tensor(v) for line in found for name, v in line["words"].items()}
        return replace(cell, specs=specs), new

    def cost(self, cell: Cell) -> tuple[float, float]:
        """Seconds, and UNet passes, that a prompt took to attack: means."""
        found = self.found(cell)
        seconds, passes = (sum(line[key] for line in found) for key in ("seconds", "unet_passes"))
        return seconds / len(found), passes / len(found)

    def found(self, cell: Cell) -> list[dict[str, Any]]:
        """A line for each image: asked, words, before, after, seconds, unet_passes. What is missing
        is found now."""
        name = cell.conditions.attack
        own = name in GRADIENTS  # else the methods share it
        place = self.folder / (cell.folder if own else cell.folder.parent)
        key = self._key(cell, own)
        known = {job_in(x): x for x in read_lines(place / FOUND, _FIELDS) if x["key"] == key}
        missing = [(i, spec.job) for i, spec in enumerate(cell.specs) if spec.job not in known]
        state = processes()
        state.wait_for_everyone()  # all have read what is there
        if missing and state.is_main_process:
            place.mkdir(parents=True, exist_ok=True)
            protected = frozen(self.weights.pipeline(cell)) if own else self.base
            with progress(name, len(missing)) as advance:
                for number, job in missing:
                    sampling = self._sampling.for_job(job)
                    case = Case(
                        protected,
                        self.base,
                        self.bench.erased,
                        job.prompt,
                        job.seed,
                        sampling,
                        number,
                    )
                    found = {"key": key} | as_entry(job) | self._find(name, case)
                    append_lines(place / FOUND, [found])
                    advance()
        state.wait_for_everyone()
        lines = read_lines(place / FOUND, _FIELDS)
        known = {job_in(line): line for line in lines if line["key"] == key}
        return [known[spec.job] for spec in cell.specs]

    def _find(self, name: str, case: Case) -> dict[str, Any]:
        started = time.monotonic()
        with counted([case.protected, case.base]) as passes:
            found = ATTACK_FUNCTIONS[name](case, self._settings(name))
        return {
            "asked": found.prompt,
            "words": {word: vector.tolist() for word, vector in found.words.items()},
            "before": found.before,
            "after": found.after,
            "seconds": round(time.monotonic() - started, 3),
            "unet_passes": passes.count,
        }

    @cached_property
    def base(self) -> StableDiffusionPipeline:
        """The model that nothing protects."""
        return frozen(load_pipeline(self.bench.model))

    @property
    def _sampling(self) -> Sampling:
        default = self.bench.sampling
        return Sampling(default.steps, default.guidance, default.scheduler)

    def _settings(self, name: str) -> Any:
        assert self.bench.attacks is not None
        return self.bench.attacks.chosen[name]

    def _key(self, cell: Cell, own: bool) -> str:
        """What an attack's outcome depends on besides prompt and seed."""
        name = cell.conditions.attack
        on = [
            name,
            self._settings(name).model_dump(mode="json"),
            self.bench.erased,
            asdict(self._sampling),
            self.weights.fingerprint(self.bench.model),
            self.weights.settings(cell) if own else [],
            *_REVISIONS.get(name, ()),
        ]
        return hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()[:24]


@contextmanager
def counted(pipelines: Sequence[StableDiffusionPipeline]) -> Iterator[Passes]:
    """Counts the samples that go through the pipelines' UNets within the block."""
    passes = Passes()

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        passes.count += len(inputs[0])

    unets = {id(pipeline.unet): pipeline.unet for pipeline in pipelines}
    hooks = [unet.register_forward_pre_hook(count) for unet in unets.values()]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()
