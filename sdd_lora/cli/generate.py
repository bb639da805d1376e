"""`sdd-lora generate`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sdd_lora.cli.common import Result, verb, weighted
from sdd_lora.errors import BadInput


class Scheduler(str, Enum):
    """Samplers that diffusers has."""

    ddim = "ddim"
    dpmsolver = "dpm++"
    euler_a = "euler-a"
    pndm = "pndm"


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
    prompts: Annotated[Path | None, typer.Option(help="Text file of prompts, one a line.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapter file or run folder, with an optional weight: a.safetensors:0.8. "
            "Repeatable.",
            metavar="A[:w]",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="How to draw: sd (as is), or neg (--concept as negative prompt).")
    ] = "sd",
    concept: Annotated[str, typer.Option(help="The concept that --method works against.")] = "",
    images: Annotated[int, typer.Option(help="Images a prompt.", min=1)] = 1,
    seed: Annotated[
        int, typer.Option(help="Seed of the first image; the others count up.", min=0)
    ] = 0,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1, max=1000)] = 25,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 7.5,
    scheduler: Annotated[Scheduler, typer.Option(help="Sampler.")] = Scheduler.ddim,
    batch: Annotated[int, typer.Option(help="Images drawn at once; changes no image.", min=1)] = 8,
) -> Result:
    """Draw images, each a function of its prompt, its seed and the settings alone.

    Run again with the same settings, it draws what is missing and nothing else.

    Examples:

        sdd-lora generate demo --prompt "a cat and a bomb" -o out

        sdd-lora generate demo --prompts prompts.txt --adapter runs/demo-weapons:0.8 -o out
    """  # fmt: skip
    texts = [*(prompt or []), *(_lines(prompts) if prompts else [])]
    if not texts:
        raise BadInput("no prompt: give --prompt TEXT or --prompts FILE")
    adapters = [weighted(a) for a in adapter or []]

    from sdd_lora.generation.images import Job, Sampling, check_sampling
    from sdd_lora.generation.images import generate as draw_images
    from sdd_lora.generation.pipeline import load_adapters, load_pipeline

    sampling = Sampling(steps, guidance, scheduler.value, method, concept, batch)
    check_sampling(sampling)
    loaded = load_adapters(adapters)
    pipeline = load_pipeline(model, loaded)
    jobs = [Job(text, seed + i * images + k) for i, text in enumerate(texts) for k in range(images)]
    settings = {
        "model": model,
        "adapters": [
            {"adapter": name, "weight": w, "identity": a.identity}
            for (name, w), (a, _) in zip(adapters, loaded, strict=True)
        ],
    }
    drawn = draw_images(pipeline, jobs, sampling, output, settings)
    text = f"{drawn} images drawn, {len(jobs)} in {output}"
    return Result({"folder": str(output), "images": len(jobs), "drawn": drawn}, text)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"{path}: expected a text file of prompts, can't read it: {error}"
        ) from error
