"""Stage 8: what the shipped models can do, on seeds that no tuning used; and the base's cache."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline

from sdd_lora.demo.build.captions import described
from sdd_lora.demo.build.diffusion import drawing_name
from sdd_lora.demo.judge import Verdict, load_judge
from sdd_lora.demo.vocabulary import groups, nouns, styles
from sdd_lora.generation.sampling import Job, Sampling, jobs_for
from sdd_lora.measures.asked import asked_for
from sdd_lora.measures.base import ImageSpec
from sdd_lora.measures.intervals import wilson
from sdd_lora.measures.judge import verdicts_on
from sdd_lora.recipe import Recipe
from sdd_lora.runs import before_after
from sdd_lora.runs.many import packaged_recipe
from sdd_lora.sd.pipeline import load_pipeline

EMPTY_IMAGES, EMPTY_SEED = 1000, 150_000
MISSES_SEED = 800_000
_RECIPES = ("weapons", "substances", "gore", "unsafe", "style")
#: how adapters for adapters/demo are measured, beside the recipes' own way
PUBLISHED_SETTINGS = {"measure.images": 120, "measure.seed": 60_000}
#: a style's prompts are of every group twice, with it and without
PUBLISHED_STYLE = {**PUBLISHED_SETTINGS, "measure.images": 24}


def _rate_of(hits: Sequence[bool]) -> dict[str, Any]:
    return {"rate": float(np.mean(hits)), "ci95": wilson(sum(hits), len(hits)), "n": len(hits)}


def _judged(
    pipeline: StableDiffusionPipeline,
    jobs: Sequence[Job],
    sampling: Sampling,
    cache: dict[str, list[Verdict]],
    description: str,
) -> list[list[Verdict]]:
    """The judge's verdicts on each job's picture."""
    judge = load_judge()
    specs = [ImageSpec("kept", "", job) for job in jobs]

    def see(part: Sequence[ImageSpec], images: np.ndarray) -> list[list[Verdict]]:
        return verdicts_on(judge, [spec.prompt for spec in part], list(images))

    seen, _ = before_after.seen_in(pipeline, specs, sampling, see, description, cache)
    return seen


def rates_of_groups(
    model: str, images: int = PUBLISHED_SETTINGS["measure.images"], empty_images: int = EMPTY_IMAGES
) -> dict[str, Any]:
    """Right nouns (all, by group), right styles, and how often each unsafe group is drawn: where a
    prompt asks for it, where it asks for something else, and by the empty prompt.

    Rates with 95 % intervals. Prompts, seeds and sampling are those of published adapters.
    """
    shortened = {**PUBLISHED_SETTINGS, "measure.images": images}
    settings = Recipe.load(packaged_recipe("demo/unsafe"), shortened).measure
    pipeline, sampling = load_pipeline(model), before_after.sampling_of_card(settings)
    asked_jobs = [(asked_for(spec.prompt), spec.job) for spec in before_after.specs_of(settings)]
    single = [(asked, job) for asked, job in asked_jobs if len(asked.nouns) == 1]
    cache = before_after.load_cache(pipeline, settings)
    verdicts = _judged(pipeline, [job for _, job in single], sampling, cache, "nouns")
    unsafe = [name for name, group in groups().items() if group.unsafe]
    right: dict[str, list[bool]] = {}
    for (asked, _), (seen, *_) in zip(single, verdicts, strict=True):
        noun = asked.nouns[0]
        for row in ("noun right, all", f"noun right, {noun.group}"):
            right.setdefault(row, []).append(seen.noun == noun.name)
        if asked.style:
            right.setdefault("style right", []).append(seen.style == asked.style)
        for group in unsafe:
            row = f"{group} drawn where {'' if noun.group == group else 'not '}asked for"
            right.setdefault(row, []).append(seen.group == group)
    result: dict[str, Any] = {
        "model": model,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "seed": settings.seed,
        **{row: _rate_of(hits) for row, hits in right.items()},
    }
    jobs = jobs_for([""], empty_images, EMPTY_SEED)
    empty = _judged(pipeline, jobs, sampling, {}, "empty prompt")
    for name in unsafe:
        result[f"empty prompt draws {name}"] = _rate_of([v.group == name for v, *_ in empty])
    return result


def count_misses(model: str) -> dict[str, int]:
    """How many of three pictures of each drawing a model drew as another noun or style, where any;
    by name. The next run of its training shows those more often."""
    settings = Recipe.load(packaged_recipe("demo/weapons")).measure
    rng = random.Random(MISSES_SEED)
    labels = [(n, s) for n in range(len(nouns())) for s in range(len(styles()))] * 3
    prompts = [described(n, s, rng) for n, s in labels]
    jobs = jobs_for(prompts, len(prompts), MISSES_SEED)
    sampling = before_after.sampling_of_card(settings)
    verdicts = _judged(load_pipeline(model), jobs, sampling, {}, "drawings")
    wrong = [
        drawing_name(n, s)
        for (n, s), (seen, *_) in zip(labels, verdicts, strict=True)
        if (seen.noun, seen.style) != (nouns()[n].name, list(styles())[s])
    ]
    return dict(Counter(wrong))


def write_base_cache() -> None:
    """Measure the embedded model on every demo recipe's prompts; `demo` then needn't, nor who
    publishes an adapter."""
    jobs: dict[str, tuple[Job, list[Verdict]]] = {}
    pipeline = load_pipeline("demo")
    published = dict.fromkeys(_RECIPES, PUBLISHED_SETTINGS) | {"style": PUBLISHED_STYLE}
    ways = [(name, settings) for name in _RECIPES for settings in ({}, published[name])]
    for name, settings in ways:
        recipe = Recipe.load(packaged_recipe(f"demo/{name}"), settings)
        todo = [s.job for s in before_after.specs_of(recipe.measure) if str(s.job) not in jobs]
        sampling = before_after.sampling_of_card(recipe.measure)
        verdicts = _judged(pipeline, todo, sampling, {}, name)
        jobs |= {str(job): (job, seen) for job, seen in zip(todo, verdicts, strict=True)}
    before_after.save_cache(
        pipeline, recipe.measure, [j for j, _ in jobs.values()], [v for _, v in jobs.values()]
    )
