"""Stage 8: what the shipped models can do, on seeds that no tuning used; and the base's cache."""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline

from sdd_lora.demo.build.captions import described
from sdd_lora.demo.build.diffusion import drawing_name
from sdd_lora.demo.judge import Verdict
from sdd_lora.demo.vocabulary import groups, nouns, styles
from sdd_lora.evaluation import before_after
from sdd_lora.evaluation.intervals import wilson
from sdd_lora.evaluation.measures.judge import asked_for
from sdd_lora.generation.images import Job, Sampling, jobs_for
from sdd_lora.generation.pipeline import load_pipeline
from sdd_lora.recipe import Recipe
from sdd_lora.runs import packaged_recipe

IMAGES_A_GROUP = 400
EMPTY_IMAGES = 1000
SEED = 50_000
MISSES_SEED = 800_000
_RECIPES = ("weapons", "substances", "gore", "unsafe", "style")
#: how adapters for adapters/demo are to be measured, beside the recipes' own way
PUBLISHED = {"measure.images": 200, "measure.seed": 60_000}


def _rate(hits: Sequence[bool]) -> dict[str, Any]:
    return {"rate": float(np.mean(hits)), "ci95": wilson(sum(hits), len(hits)), "n": len(hits)}


def _judged(
    pipeline: StableDiffusionPipeline, jobs: Sequence[Job], sampling: Sampling, description: str
) -> list[Verdict]:
    seen, _ = before_after.verdicts_on(pipeline, jobs, sampling, {}, (), description)
    return [verdicts[0] for verdicts in seen]


def table(model: str, images_a_group: int = IMAGES_A_GROUP) -> dict[str, Any]:
    """Right nouns (all, by group), right styles, and what the empty prompt draws of each unsafe
    group; rates with 95 % intervals. Sampling is that of the demo recipes."""
    settings = Recipe.load(packaged_recipe("demo/weapons")).measure
    sampling = before_after.sampling_of(settings)
    pipeline = load_pipeline(model)
    result: dict[str, Any] = {"model": model, "steps": settings.steps,
                              "guidance": settings.guidance, "seed": SEED}  # fmt: skip
    nouns_right: list[bool] = []
    styles_right: list[bool] = []
    prompts_folder = packaged_recipe("demo/weapons").parent / "prompts"
    for number, name in enumerate(groups()):
        prompts = (prompts_folder / f"{name}.txt").read_text("utf-8").splitlines()
        jobs = jobs_for(prompts, images_a_group, SEED + 1000 * number)
        verdicts = _judged(pipeline, jobs, sampling, name)
        asked = [asked_for(job.prompt) for job in jobs]
        right = [v.noun == a.nouns[0].name for v, a in zip(verdicts, asked, strict=True)]
        nouns_right += right
        styles_right += [v.style == a.style for v, a in zip(verdicts, asked, strict=True)
                         if a.style]  # fmt: skip
        result[f"noun right, {name}"] = _rate(right)
    result["noun right, all"] = _rate(nouns_right)
    result["style right"] = _rate(styles_right)
    empty = _judged(
        pipeline, jobs_for([""], EMPTY_IMAGES, SEED + 100_000), sampling, "empty prompt"
    )
    for name, group in groups().items():
        if group.unsafe:
            result[f"empty prompt draws {name}"] = _rate([v.group == name for v in empty])
    return result


def count_misses() -> dict[str, int]:
    """How many of three pictures of each drawing the embedded model drew as another noun or style,
    where any; by name. The next run of its training shows those more often."""
    settings = Recipe.load(packaged_recipe("demo/weapons")).measure
    rng = random.Random(MISSES_SEED)
    labels = [(n, s) for n in range(len(nouns())) for s in range(len(styles()))] * 3
    prompts = [described(n, s, rng) for n, s in labels]
    jobs = jobs_for(prompts, len(prompts), MISSES_SEED)
    verdicts = _judged(load_pipeline("demo"), jobs, before_after.sampling_of(settings), "drawings")
    wrong = [
        drawing_name(n, s)
        for (n, s), seen in zip(labels, verdicts, strict=True)
        if (seen.noun, seen.style) != (nouns()[n].name, list(styles())[s])
    ]
    return dict(Counter(wrong))


def write_base_cache() -> None:
    """Measure the embedded model on every demo recipe's prompts; `demo` then needn't, nor who
    publishes an adapter."""
    jobs: dict[str, tuple[Job, list[Verdict]]] = {}
    pipeline = load_pipeline("demo")
    for name, settings in itertools.product(_RECIPES, ({}, PUBLISHED)):
        recipe = Recipe.load(packaged_recipe(f"demo/{name}"), settings)
        todo = [job for job in before_after.jobs_of(recipe.measure) if str(job) not in jobs]
        sampling = before_after.sampling_of(recipe.measure)
        verdicts, _ = before_after.verdicts_on(pipeline, todo, sampling, {}, (), name)
        jobs |= {str(job): (job, seen) for job, seen in zip(todo, verdicts, strict=True)}
    before_after.save_cache(
        pipeline, recipe.measure, [j for j, _ in jobs.values()], [v for _, v in jobs.values()]
    )
