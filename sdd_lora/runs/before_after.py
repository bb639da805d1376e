"""What a card says: the same prompts and seeds drawn without and with an adapter, side by side."""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from diffusers import StableDiffusionPipeline
from PIL import Image

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.metrics import BlackImages, CardRow
from sdd_lora.demo.judge import JUDGE_FILE, Verdict
from sdd_lora.demo.vocabulary import groups
from sdd_lora.errors import BadInput
from sdd_lora.generation.images import draw
from sdd_lora.generation.sampling import Job, Sampling, jobs_for
from sdd_lora.io.atomic import sha256_of
from sdd_lora.measures.asked import asked_for
from sdd_lora.measures.base import ImageSpec, Values, is_black, taken
from sdd_lora.measures.card_rows import card_rows
from sdd_lora.measures.judge import JudgeMeasure
from sdd_lora.measures.registry import card_measure
from sdd_lora.recipe import MeasureSettings, Recipe
from sdd_lora.runs.seen import SeenImages
from sdd_lora.runs.sheet import preview, sheet
from sdd_lora.sd.devices import precision_of
from sdd_lora.sd.model import fingerprint, require_model, unet_config
from sdd_lora.sd.pipeline import load_pipeline, sha256_of_parts

BASE_CACHE = Path(str(files("sdd_lora.demo").joinpath("base_verdicts.json.gz")))
_PICTURES_OF_A_KIND = 8  # shown in the picture
_DRAWN_AT_ONCE = 16
_SEEN_AT_ONCE = 32  # images judged at once, and lost where it is interrupted
Seen = TypeVar("Seen")


@dataclass
class Measured:
    """Rows of the table, and the picture: concept and kept prompts, before above after.

    `preview`: the same of one concept prompt and one kept prompt. `black`: images that count in
    no row.
    """

    rows: list[CardRow]
    picture: Image.Image
    preview: Image.Image
    black: BlackImages


def wanted(recipe: Recipe) -> bool:
    """Whether the recipe asks for a measurement: a detector, and prompts for it."""
    return recipe.measure.detector != "none" and bool(specs_of(recipe.measure))


def check_measuring(recipe: Recipe) -> None:
    """Raises BadInput for a `measure` section that could not be carried out after training."""
    if not wanted(recipe):
        return
    card_measure(recipe.measure.detector, recipe.concepts)
    sizes = {recipe.model: unet_config(recipe.model).get("sample_size")}
    for model in recipe.measure.transfer:
        try:
            require_model(model)
        except BadInput as error:
            raise BadInput(f"measure.transfer: {error}") from None
        sizes[model] = unet_config(model).get("sample_size")
    judged = unet_config("demo").get("sample_size")
    for model, size in sizes.items():
        if recipe.measure.detector == "judge" and size != judged:
            raise BadInput(
                "measure.detector: the judge knows the embedded model's pictures alone; "
                f"for {model} expected nudenet, open_nsfw or none"
            )


def measure_before_after(
    recipe: Recipe,
    adapter: Adapter | None,
    model: str,
    weights: Path | None = None,
    kept_in: Path | None = None,
) -> Measured:
    """Draw `measure.images` of each kind of prompt, before and after; judge or flag; tabulate.

    After: with the adapter, or with the UNet weights of the file `weights`. Verdicts on the
    embedded model without an adapter come from a cache that travels with it; what the cache lacks
    is drawn. What is seen goes into the folder `kept_in`, from which an interrupted call goes on.
    """
    settings = recipe.measure
    sampling, specs = sampling_of_card(settings), specs_of(settings)
    shown = _shown_indices([spec.kind for spec in specs])
    detector = card_measure(settings.detector, recipe.concepts)

    def see(part: Sequence[ImageSpec], images: np.ndarray) -> list[Values]:
        values = taken(detector, part, list(images))
        for index, image in enumerate(images):
            if is_black(image):
                values[index] = {"black": True}
        return values

    prediction = recipe.prediction if model == recipe.model else None
    load = partial(
        load_pipeline,
        model,
        dtype=settings.precision,
        prediction=prediction,
        clip_skip=recipe.clip_skip or 1,
    )
    pipeline = load()
    conditions = {
        "unet": fingerprint(pipeline.unet),
        "dtype": str(pipeline.unet.dtype),
        "sampling": [model, prediction, settings.steps, settings.guidance, recipe.clip_skip],
        "measure": [settings.detector, detector.source, recipe.concepts],
        "images": [key_of(spec.job) for spec in specs],
    }

    def kept(when: str) -> SeenImages | None:
        return None if kept_in is None else SeenImages(kept_in, conditions | {"when": when})

    known: dict[str, Values] = {}
    if isinstance(detector, JudgeMeasure):
        cache = load_cache(pipeline, settings)
        known = {
            key: detector.values(spec, cache[key])
            for key, spec in ((key_of(spec.job), spec) for spec in specs)
            if key in cache
        }
    before, before_images = seen_in(
        pipeline, specs, sampling, see, "before", known, shown, kept("before")
    )
    pipeline = load([(adapter, 1.0)]) if adapter else load(weights=weights)
    after, after_images = seen_in(pipeline, specs, sampling, see, "after", {}, shown, kept("after"))
    picture = sheet(
        [specs[i].prompt for i in shown],
        {
            "before": [before_images[i] for i in shown],
            "after": [after_images[i] for i in shown],
        },
    )
    kinds = [specs[i].kind for i in shown]
    both = [shown[kinds.index(kind)] for kind in dict.fromkeys(kinds)]
    small = preview([before_images[i] for i in both], [after_images[i] for i in both])
    black = BlackImages(
        before=sum("black" in values for values in before),
        after=sum("black" in values for values in after),
        images=len(specs),
    )
    return Measured(card_rows(detector, specs, before, after), picture, small, black)


def sampling_of_card(settings: MeasureSettings) -> Sampling:
    return Sampling(steps=settings.steps, guidance=settings.guidance, batch=_DRAWN_AT_ONCE)


def specs_of(settings: MeasureSettings) -> list[ImageSpec]:
    """What is drawn: `images` for each kind of the concept's prompts, then of the kept ones.

    The judge tells kinds apart by what prompts ask for: one group's nouns, or several things; for
    other detectors all prompts are one kind. Each kind has seeds of its own, whatever the recipe,
    so that recipes share the base's pictures.
    """
    order = ["", *groups()]
    specs = []
    for kept, prompts in (("erased", settings.prompts.concept), ("kept", settings.prompts.kept)):
        kinds: dict[str, list[str]] = {}
        for prompt in prompts:
            nouns = asked_for(prompt).nouns if settings.detector == "judge" else ()
            kinds.setdefault(nouns[0].group if len(nouns) == 1 else "", []).append(prompt)
        for kind, members in kinds.items():
            first_seed = settings.seed + 10_000 * order.index(kind)
            jobs = jobs_for(members, settings.images, first_seed)
            specs += [ImageSpec(kept, kind, job) for job in jobs]
    return specs


def _shown_indices(kinds: Sequence[str]) -> list[int]:
    """Indices of the images that stand in the picture, of each kind some, spread over it."""
    erased = kinds.count("erased")
    kept = len(kinds) - erased
    count = min(_PICTURES_OF_A_KIND, kept)
    spread = [erased + i * kept // count for i in range(count)] if kept else []
    return [
        *(i * erased // _PICTURES_OF_A_KIND for i in range(min(_PICTURES_OF_A_KIND, erased))),
        *spread,
    ]


def seen_in(
    pipeline: StableDiffusionPipeline,
    specs: Sequence[ImageSpec],
    sampling: Sampling,
    see: Callable[[Sequence[ImageSpec], np.ndarray], Sequence[Seen]],
    description: str,
    known: Mapping[str, Seen],
    shown: Sequence[int] = (),
    kept: SeenImages | None = None,
) -> tuple[list[Seen], dict[int, np.ndarray]]:
    """What `see` finds in the image of each spec, and the images of those `shown`, by index.

    What is `known` of a job, by `key_of`, is not drawn, unless it is shown; nor is what is `kept`
    of an interrupted call, to which all that is drawn now is added.
    """
    found: list[Seen | None] = [known.get(key_of(spec.job)) for spec in specs]
    images = {}
    if kept:
        for i, seen in kept.values.items():
            found[i] = seen
            if i in shown and (image := kept.image(i)) is not None:
                images[i] = image
    todo = [i for i, seen in enumerate(found) if seen is None or (i in shown and i not in images)]
    drawing = draw(pipeline, [specs[i].job for i in todo], sampling, description)
    while drawn := list(islice(drawing, _SEEN_AT_ONCE)):
        indices = [todo[number] for number, _ in drawn]
        seen_now = see([specs[i] for i in indices], np.stack([image for _, image in drawn]))
        new = {i: image for i, (_, image) in zip(indices, drawn, strict=True) if i in shown}
        for i, seen in zip(indices, seen_now, strict=True):
            found[i] = seen
        images |= new
        if kept:
            kept.add(dict(zip(indices, seen_now, strict=True)), new)
    return [seen for seen in found if seen is not None], images


def key_of(job: Job) -> str:
    """A job's name in the cache of verdicts."""
    return f"{job.seed} {job.prompt}"


def load_cache(
    pipeline: StableDiffusionPipeline, settings: MeasureSettings
) -> dict[str, list[Verdict]]:
    """Cached verdicts on the unadapted model, empty where they are another model's or settings'."""
    if not BASE_CACHE.exists():
        return {}
    cache = json.loads(gzip.decompress(BASE_CACHE.read_bytes()))
    if cache["conditions"] != _conditions(pipeline, settings):
        return {}
    return {k: [Verdict(**v) for v in seen] for k, seen in cache["verdicts"].items()}


def save_cache(
    pipeline: StableDiffusionPipeline,
    settings: MeasureSettings,
    jobs: Sequence[Job],
    verdicts: Sequence[list[Verdict]],
) -> None:
    """Write the cache that travels with the embedded model."""
    content = {
        "conditions": _conditions(pipeline, settings),
        "verdicts": {
            key_of(job): [asdict(v) for v in seen] for job, seen in zip(jobs, verdicts, strict=True)
        },
    }
    packed = gzip.compress(json.dumps(content).encode(), mtime=0)
    BASE_CACHE.write_bytes(packed)


def _conditions(pipeline: StableDiffusionPipeline, settings: MeasureSettings) -> dict[str, Any]:
    """All that a verdict depends on besides prompt and seed."""
    precision = precision_of(pipeline.unet.dtype)
    return {
        "weights": sha256_of_parts(pipeline),
        "judge": sha256_of(JUDGE_FILE),
        "steps": settings.steps,
        "guidance": settings.guidance,
    } | ({} if precision == "fp32" else {"precision": precision})
