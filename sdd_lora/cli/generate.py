"""`sdd-lora generate`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdd_lora.cli.common import Result, speaks, verb, weighted
from sdd_lora.errors import BadInput
from sdd_lora.sd.schedulers import Scheduler

if TYPE_CHECKING:
    from sdd_lora.generation.sampling import Job

#: torch takes seeds of 64 bits
_SEEDS = 2**63


@verb("generate")
def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="demo, demo-community, a diffusers folder, one file, or a hub id.", metavar="MODEL"
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for images and manifest.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt. Repeatable.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts: .txt (one a line), .csv, .json or .jsonl (I2P's, COCO's and "
            "ESD's columns are known); its seeds, guidance and sizes are used."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapter file or run folder, with an optional weight: a.safetensors:0.8. "
            "Repeatable.",
            metavar="A[:w]",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="A UNet's weights, whole or partial, instead of the model's."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="How to draw: sd (as is), neg (--concept as negative prompt), sld-weak, "
            "sld-medium, sld-strong, sld-max, sega, or sdd-gated (every --adapter by the prompt's "
            "nearness to --concept)."
        ),
    ] = "sd",
    concept: Annotated[
        str,
        typer.Option(help="What --method works against; for sdd-gated several, with commas."),
    ] = "",
    images: Annotated[int, typer.Option(help="Images a prompt.", min=1)] = 1,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the first image; the others count up. Not for prompts with their own.",
            min=0,
        ),
    ] = 0,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1, max=999)] = 25,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 7.5,
    width: Annotated[int | None, typer.Option(help="Pixels; the model's own if left out.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; the model's own if left out.")] = None,
    scheduler: Annotated[Scheduler, typer.Option(help="Sampler.")] = "ddim",
    batch: Annotated[int, typer.Option(help="Images drawn at once; changes no image.", min=1)] = 8,
) -> Result:
    """Draw images, each a function of its prompt, its seed and the settings alone.

    Run again with the same settings, it draws what is missing and nothing else.

    Examples:

        sdd-lora generate demo --prompt "a cat and a bomb" -o out

        sdd-lora generate demo --prompts prompts.csv --adapter runs/demo-weapons:0.8 -o out

        sdd-lora generate demo --prompt "a bomb" --method sld-strong --concept bomb -o out

    Several processes share the images: `torchrun --nproc-per-node 2 -m sdd_lora generate …`.
    """  # fmt: skip
    from sdd_lora.generation.prompt_files import Prompt, read_prompts

    texts = [*map(Prompt, prompt or []), *(read_prompts(prompts) if prompts else [])]
    if not texts:
        raise BadInput("no prompt: give --prompt TEXT or --prompts FILE")
    adapters = [weighted(a) for a in adapter or []]

    from sdd_lora.generation.images import check_sampling
    from sdd_lora.generation.images import generate as draw_images
    from sdd_lora.generation.sampling import Sampling, jobs_of
    from sdd_lora.io.atomic import sha256_of
    from sdd_lora.sd.pipeline import load_adapters, load_pipeline, sha256_of_parts

    sampling = Sampling(
        steps, guidance, scheduler, method, concept, batch, width=width, height=height
    )
    jobs = jobs_of(texts, images, seed)
    _check_numbers(guidance, jobs)
    check_sampling(sampling, jobs)
    speaker = speaks()
    loaded = load_adapters(adapters)
    pipeline = load_pipeline(model, loaded, weights=weights)
    settings = {
        "model": model,
        "parts": sha256_of_parts(pipeline),
        "adapters": [
            {"adapter": name, "weight": w, "identity": a.identity}
            for (name, w), (a, _) in zip(adapters, loaded, strict=True)
        ],
        "weights": None if weights is None else sha256_of(weights),
    }
    drawn = draw_images(pipeline, jobs, sampling, output, settings)
    if not speaker:
        raise typer.Exit
    text = f"{drawn} images drawn, {len(jobs)} in {output}"
    return Result({"folder": str(output), "images": len(jobs), "drawn": drawn}, text)


def _check_numbers(guidance: float, jobs: "Sequence[Job]") -> None:
    """Raises BadInput for a guidance that is no number, and seeds that no generator takes."""
    for scale in {guidance, *(job.guidance for job in jobs if job.guidance is not None)}:
        if not math.isfinite(scale):
            raise BadInput(f"guidance: expected a finite number, found {scale}")
    highest = max(job.seed for job in jobs)
    if highest >= _SEEDS:
        raise BadInput(f"seeds: expected less than 2^63, found {highest}")
