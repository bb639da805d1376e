"""Verbs that draw pictures and compare methods by them: generate, evaluate, report."""

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdd_lora.cli.common import Changes, Model, Result, is_main_process, verb, weighted
from sdd_lora.cli.tables import table
from sdd_lora.errors import BadInput
from sdd_lora.sd.schedulers import Scheduler

if TYPE_CHECKING:
    from sdd_lora.generation.sampling import Job

#: torch takes seeds of 64 bits
_SEEDS = 2**63


@verb("generate")
def generate(
    model: Model,
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
            "similarity to --concept)."
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
    """
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
    speaker = is_main_process()
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


@verb("evaluate")
def evaluate(
    bench: Annotated[Path, typer.Argument(help="A bench file.", metavar="BENCH")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder to fill [default: bench/NAME]."),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(help="Only these of the bench's methods; commas between them, or repeated."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="At most so many erased, and so many kept, images a row.", min=1),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The small table that the bench's `quick` describes.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            help="I/N: draw only the I-th of N shares of the images, as one job of an array; the "
            "same command without --shard then completes and measures."
        ),
    ] = None,
    changes: Changes = None,
) -> Result:
    """Measure every method of a bench on the same prompts and latents.

    What a method needs trained is trained once and kept in ~/.cache/sdd_lora (or $SDD_LORA_CACHE).
    Run again, also after a crash, it draws and measures what is missing and nothing else.

    Examples:

        sdd-lora evaluate recipes/bench/demo-single.yaml --quick

        sdd-lora evaluate recipes/bench/demo-single.yaml -o bench --methods sd,sdd,sdd-preserve

        sdd-lora report bench
    """
    from sdd_lora.bench.bench_file import Bench, chosen, limited
    from sdd_lora.io.strict_yaml import parse_override

    overrides = dict(map(parse_override, changes or []))
    wanted = limited(Bench.load(bench, quick=quick, overrides=overrides), limit)
    wanted = chosen(wanted, [m for given in methods or [] for m in given.split(",")])
    folder = output or Path("bench") / (wanted.name + (f"-limit{limit}" if limit else ""))

    from sdd_lora.bench.run import MARKDOWN, draw_shard, run
    from sdd_lora.bench.text import tables
    from sdd_lora.io.distributed import Shard
    from sdd_lora.runs.measure import versions
    from sdd_lora.runs.train import train

    command = shlex.join(["sdd-lora", *sys.argv[1:]])
    try:
        if shard is not None:
            share = Shard.parse(shard)
            drawn = draw_shard(wanted, folder, train, share)
            text = f"{drawn} images of shard {shard} drawn in {folder}"
            return Result({"folder": str(folder), "drawn": drawn}, text)
        results = run(wanted, folder, train, command, versions())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; run the same command again to go on in {folder}"
        ) from None
    if not is_main_process():
        raise typer.Exit
    shown = "\n\n".join(table(*each) for each in tables(results))
    text = f"{shown}\n\n{folder / MARKDOWN}; sdd-lora report {folder} shows it all"
    return Result({"folder": str(folder)} | results.model_dump(mode="json"), text)


@verb("report")
def report(
    folder: Annotated[
        Path, typer.Argument(help="The folder that `sdd-lora evaluate` filled.", metavar="DIR")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write [default: DIR/report.html]."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a report that is there.")] = False,
) -> Result:
    """Show a bench's results as one HTML file: table, pictures, curves, how to repeat it.

    The file needs nothing else: no network, no script; phones, dark mode and keyboards are served.

    Examples:

        sdd-lora report bench/demo-single

        sdd-lora report bench/demo-single -o table.html --force
    """
    from sdd_lora.bench.report import REPORT, render_report
    from sdd_lora.io.atomic import refuse_existing, write_text

    target = output or folder / REPORT
    refuse_existing(target, force)
    write_text(target, render_report(folder))
    size = target.stat().st_size
    return Result({"report": str(target), "bytes": size}, f"{target} ({size / 1e6:.1f} MB)")
