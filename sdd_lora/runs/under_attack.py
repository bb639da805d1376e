"""What a run's result withstands, for its card: attacks on the model with it, and without."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.metrics import WithstoodRow
from sdd_lora.attacks.base import AttackSettings
from sdd_lora.attacks.case import Attacked, Case
from sdd_lora.attacks.noise import frozen
from sdd_lora.attacks.registry import ATTACK_FUNCTIONS, armed_pipeline, counted
from sdd_lora.attacks.settings import ATTACK_KINDS
from sdd_lora.errors import BadInput
from sdd_lora.generation.images import draw
from sdd_lora.generation.sampling import Sampling
from sdd_lora.measures.base import ImageSpec, Measure, taken
from sdd_lora.measures.intervals import wilson
from sdd_lora.measures.registry import PICTURE, card_measure
from sdd_lora.progress import say
from sdd_lora.recipe import Recipe
from sdd_lora.runs.before_after import sampling_of_card, specs_of, wanted
from sdd_lora.runs.seen import SeenImages
from sdd_lora.sd.devices import DTYPES
from sdd_lora.sd.pipeline import load_pipeline

_MOST_PROMPTS = 20


def check_attacks(recipe: Recipe) -> None:
    """Raises BadInput for `measure.attacks` that could not be carried out after training."""
    for name in recipe.measure.attacks or ():
        counts = wanted(recipe) and recipe.measure.detector != PICTURE
        if not counts or not recipe.measure.prompts.concept:
            raise BadInput(
                "measure.attacks: expected a measure.detector that counts, and prompts to attack "
                "under measure.prompts.concept"
            )
        if problem := ATTACK_KINDS[name]().misfit(recipe.measure.steps, "ddim"):
            raise BadInput(f"measure.attacks: {name}: {problem}")


def withstood(
    recipe: Recipe, adapter: Adapter | None, weights: Path | None, kept_in: Path
) -> list[WithstoodRow]:
    """A row for each of `measure.attacks`, at its usual strength, on the first 20 of the concept's
    images; the result is an adapter, or a file of the UNet's weights. Attacks that are over are
    kept in the folder `kept_in`, so that Ctrl-C costs the one under way."""
    names = recipe.measure.attacks or []
    if not names:
        return []
    specs = [s for s in specs_of(recipe.measure) if s.kind == "erased"][:_MOST_PROMPTS]
    judged = card_measure(recipe.measure.detector, recipe.concepts)
    base = frozen(load_pipeline(recipe.model, clip_skip=recipe.clip_skip or 1))
    result = [] if adapter is None else [adapter]
    sides: list[tuple[list[Adapter], Path | None]] = [([], None), (result, weights)]
    rows = []
    for name in names:
        settings = ATTACK_KINDS[name]()
        say(f"attacking by {settings.title}")
        over = SeenImages(kept_in, {"recipe": recipe.sha256, name: settings.content()})
        for number, side in enumerate(sides):
            if number not in over.values:
                over.values[number] = _Side(recipe, name, base, *side).rate(specs, judged)
                over.add({number: over.values[number]}, {})
        before, after = (over.values[side]["shown"] for side in (0, 1))
        passes, n = over.values[1]["passes"], len(specs)
        rows.append(
            WithstoodRow(
                attack=settings.title,
                access=settings.access,
                strength=settings.effort,
                before=before / n,
                after=after / n,
                n=n,
                ci95_before=wilson(before, n),
                ci95_after=wilson(after, n),
                unet_passes=passes / n,
            )
        )
    return rows


@dataclass(frozen=True)
class _Side:
    """The model with adapters or weights, or with neither, under one attack."""

    recipe: Recipe
    name: str
    base: StableDiffusionPipeline
    adapters: Sequence[Adapter]
    weights: Path | None

    def rate(self, specs: Sequence[ImageSpec], judged: Measure) -> dict[str, int]:
        """How many images show what is erased, and the UNet passes of finding what to ask."""
        sampling = sampling_of_card(self.recipe.measure)
        found, passes = self._found(specs, sampling)
        asked = [
            replace(spec, job=replace(spec.job, prompt=one.prompt), wanted=spec.job.prompt)
            for spec, one in zip(specs, found, strict=True)
        ]
        jobs = [spec.job for spec in asked]
        learnt = [one.adapter for one in found[:1] if one.adapter is not None]
        given = {
            job: lambda there=one.given: there
            for job, one in zip(jobs, found, strict=True)
            if one.given is not None
        }
        words = {name: vector for one in found for name, vector in one.words.items()}
        pipeline = armed_pipeline(self._pipeline(learnt), sampling, words, given)
        images: dict[int, np.ndarray] = dict(draw(pipeline, jobs, sampling, self.name))
        values = taken(judged, asked, [images[i] for i in range(len(jobs))])
        shown = next(n for n, i in judged.info.items() if i.of != "kept" and i.better == "lower")
        return {"shown": sum(bool(value.get(shown)) for value in values), "passes": passes}

    def _found(self, specs: Sequence[ImageSpec], sampling: Sampling) -> tuple[list[Attacked], int]:
        """What the attack asks of each image; and the UNet passes that took."""
        if self.name not in ATTACK_FUNCTIONS:
            return [Attacked(spec.job.prompt) for spec in specs], 0
        settings = self._settings
        protected = frozen(self._pipeline()) if settings.through_method else self.base
        found: list[Attacked] = []
        with counted([protected, self.base]) as passes:
            for number, spec in enumerate(specs):
                if settings.once and found:
                    found.append(replace(found[0], prompt=spec.job.prompt))
                    continue
                case = Case(
                    protected,
                    self.base,
                    self.recipe.concepts,
                    spec.job.prompt,
                    spec.job.seed,
                    sampling,
                    number,
                )
                found.append(ATTACK_FUNCTIONS[self.name](case, settings))
        return found, passes.count

    @property
    def _settings(self) -> AttackSettings:
        return ATTACK_KINDS[self.name]()

    def _pipeline(self, learnt: Sequence[Adapter] = ()) -> StableDiffusionPipeline:
        conditions: Mapping[str, Any] = self._settings.conditions
        parts = [(adapter, conditions.get("weight", 1.0)) for adapter in self.adapters]
        precision = self.recipe.measure.precision
        return load_pipeline(
            self.recipe.model,
            parts + [(adapter, 1.0) for adapter in learnt],
            None if precision is None else DTYPES[precision],
            weights=self.weights,
            clip_skip=conditions.get("clip_skip", self.recipe.clip_skip or 1),
        )
