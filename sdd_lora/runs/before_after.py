"""What a card says: the same prompts and seeds drawn without and with an adapter, side by side."""

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint.locate import DEMO_FOLDER
from sdd_lora.demo.judge import JUDGE_FILE, Verdict, load_judge
from sdd_lora.demo.vocabulary import groups
from sdd_lora.errors import BadInput
from sdd_lora.generation.images import draw
from sdd_lora.generation.sampling import Job, Sampling, jobs_for
from sdd_lora.io.atomic import sha256_of
from sdd_lora.measures import judge as judging
from sdd_lora.measures.flagging import Flagging
from sdd_lora.recipe import Measure, Recipe
from sdd_lora.sd.model import require_model, unet_config
from sdd_lora.sd.pipeline import load_pipeline, sha256_of_parts

BASE_CACHE = Path(str(files("sdd_lora.demo").joinpath("base_verdicts.json.gz")))
_PICTURES = 8  # of each kind shown in the picture
_BATCH = 16
_SEEN_AT_ONCE = 256  # images held in memory until they are judged
#: prompts and their images (B, H, W, 3) → what is seen in each
See = Callable[[Sequence[str], np.ndarray], Sequence[Any]]


@dataclass
class Measured:
    """Rows of the table, and the picture: concept and kept prompts, before above after."""

    rows: list[judging.Row]
    picture: Image.Image


def wanted(recipe: Recipe) -> bool:
    """Does the recipe ask for a measurement: a detector, and prompts for it?"""
    return recipe.measure.detector != "none" and bool(jobs_of(recipe.measure))


def check(recipe: Recipe, unet: UNet2DConditionModel) -> None:
    """Raises BadInput for what could not be measured afterwards."""
    if not wanted(recipe):
        return
    if recipe.measure.detector == "judge":
        judging.check_concepts(recipe.concepts)
    else:
        Flagging(recipe.measure.detector)
    sizes = {recipe.model: unet.config.sample_size}
    for model in recipe.measure.transfer:
        try:
            require_model(model)
        except BadInput as error:
            raise BadInput(f"measure.transfer: {error}") from None
        sizes[model] = unet_config(model).get("sample_size")
    small = json.loads((DEMO_FOLDER / "unet" / "config.json").read_text("utf-8"))
    for model, size in sizes.items():
        if recipe.measure.detector == "judge" and size != small["sample_size"]:
            raise BadInput(
                "measure.detector: the judge knows the embedded model's pictures alone; "
                f"for {model} expected nudenet, open_nsfw or none"
            )


def measure(
    recipe: Recipe, adapter: Adapter | None, model: str, weights: Path | None = None
) -> Measured:
    """Draw `measure.images` of each kind of prompt, before and after; judge or flag; tabulate.

    After: with the adapter, or with the UNet weights of the file `weights`.
    Verdicts on the embedded model without an adapter come from a cache that travels with it; what
    the cache lacks is drawn.
    """
    settings = recipe.measure
    sampling, jobs = sampling_of(settings), jobs_of(settings)
    concepts = len(_jobs(settings, settings.prompts.concept))
    shown = _shown(concepts, len(jobs) - concepts)
    flagging = None if settings.detector == "judge" else Flagging(settings.detector)
    see = flagging.see if flagging else None
    pipeline = load_pipeline(model)
    cache = {} if flagging else load_cache(pipeline, settings)
    before, before_images = verdicts_on(pipeline, jobs, sampling, cache, shown, "before", see)
    changed: dict[str, Any] = {"adapters": [(adapter, 1.0)]} if adapter else {"weights": weights}
    pipeline = load_pipeline(model, **changed)
    after, after_images = verdicts_on(pipeline, jobs, sampling, {}, shown, "after", see)
    prompts = [job.prompt for job in jobs]
    halves = [
        (prompts[part], before[part], after[part])
        for part in (slice(concepts), slice(concepts, None))
    ]
    rows = flagging.rows(*halves) if flagging else judging.rows(recipe.concepts, *halves)
    picture = side_by_side(
        [prompts[i] for i in shown], [before_images[i] for i in shown],
        [after_images[i] for i in shown],
    )  # fmt: skip
    return Measured(rows, picture)


def sampling_of(settings: Measure) -> Sampling:
    return Sampling(steps=settings.steps, guidance=settings.guidance, batch=_BATCH)


def jobs_of(settings: Measure) -> list[Job]:
    """What is drawn: `images` for each kind of the concept's prompts, then of the kept ones."""
    return _jobs(settings, settings.prompts.concept) + _jobs(settings, settings.prompts.kept)


def _jobs(settings: Measure, prompts: Sequence[str]) -> list[Job]:
    """Kinds are told apart by what prompts ask for: one group's nouns, or several things; by the
    judge, that is, all being one kind without it. Each has seeds of its own, whatever the recipe,
    so that recipes share the base's pictures."""
    kinds: dict[str, list[str]] = {}
    for prompt in prompts:
        asked = judging.asked_for(prompt).nouns if settings.detector == "judge" else ()
        kinds.setdefault(asked[0].group if len(asked) == 1 else "", []).append(prompt)
    order = ["", *groups()]
    return [
        job
        for kind, members in kinds.items()
        for job in jobs_for(members, settings.images, settings.seed + 10_000 * order.index(kind))
    ]


def _shown(concepts: int, kept: int) -> list[int]:
    """Indices of the images that stand in the picture: concepts first, kept ones spread."""
    count = min(_PICTURES, kept)
    spread = [concepts + i * kept // count for i in range(count)] if kept else []
    return [*(i * concepts // _PICTURES for i in range(min(_PICTURES, concepts))), *spread]


def verdicts_on(
    pipeline: StableDiffusionPipeline, jobs: Sequence[Job], sampling: Sampling,
    cache: dict[str, list[Verdict]], shown: Sequence[int], description: str,
    see: See | None = None,
) -> tuple[list[Any], dict[int, np.ndarray]]:  # fmt: skip
    """Verdicts on every job, by the judge or what else `see`s, and the images of those shown."""
    see = see or partial(judging.see, load_judge())
    verdicts: list[Any] = [cache.get(_key(job)) for job in jobs]
    todo = [i for i, seen in enumerate(verdicts) if seen is None or i in shown]
    images = {}
    drawing = draw(pipeline, [jobs[i] for i in todo], sampling, description)
    while drawn := list(islice(drawing, _SEEN_AT_ONCE)):
        rows = [todo[number] for number, _ in drawn]
        seen = see([jobs[i].prompt for i in rows], np.stack([image for _, image in drawn]))
        for i, (_, image), verdict in zip(rows, drawn, seen, strict=True):
            verdicts[i] = verdict
            if i in shown:
                images[i] = image
    return [seen for seen in verdicts if seen is not None], images


def _key(job: Job) -> str:
    return f"{job.seed} {job.prompt}"


def load_cache(pipeline: StableDiffusionPipeline, settings: Measure) -> dict[str, list[Verdict]]:
    """Cached verdicts on the unadapted model, empty where they are another model's or settings'."""
    if not BASE_CACHE.exists():
        return {}
    cache = json.loads(gzip.decompress(BASE_CACHE.read_bytes()))
    if cache["conditions"] != _conditions(pipeline, settings):
        return {}
    return {k: [Verdict(**v) for v in seen] for k, seen in cache["verdicts"].items()}


def save_cache(
    pipeline: StableDiffusionPipeline, settings: Measure, jobs: Sequence[Job],
    verdicts: Sequence[list[Verdict]],
) -> None:  # fmt: skip
    """Write the cache that travels with the embedded model."""
    content = {
        "conditions": _conditions(pipeline, settings),
        "verdicts": {
            _key(job): [asdict(v) for v in seen] for job, seen in zip(jobs, verdicts, strict=True)
        },
    }
    packed = gzip.compress(json.dumps(content).encode(), mtime=0)
    BASE_CACHE.write_bytes(packed)


def _conditions(pipeline: StableDiffusionPipeline, settings: Measure) -> dict:
    """All that a verdict depends on besides prompt and seed."""
    return {
        "weights": sha256_of_parts(pipeline),
        "judge": sha256_of(JUDGE_FILE),
        "steps": settings.steps,
        "guidance": settings.guidance,
    }


def side_by_side(
    prompts: Sequence[str], before: Sequence[np.ndarray], after: Sequence[np.ndarray]
) -> Image.Image:
    """A picture: prompts as captions, without the adapter above, with it below."""
    side, columns, caption = 128, 8, 30
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (2 * side + caption + 8)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, prompt in enumerate(prompts):
        x, y = i % columns * side, i // columns * (2 * side + caption + 8)
        pen.text((x + 3, y + 2), _wrapped(prompt), fill="black", spacing=1)
        for row, image in enumerate((before[i], after[i])):
            picture = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(picture, (x, y + caption + row * side))
    return sheet


def _wrapped(text: str, width: int = 21) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:2])
