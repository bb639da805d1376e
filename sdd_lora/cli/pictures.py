"""Verbs that draw pictures and compare methods by them: generate, evaluate, report."""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sdd_lora.cli.common import (
    Changes,
    Model,
    Precision,
    Result,
    is_main_process,
    parse_overrides,
    verb,
)
from sdd_lora.cli.tables import table
from sdd_lora.errors import BadInput
from sdd_lora.progress import warn
from sdd_lora.sd.schedulers import Scheduler

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from sdd_lora.checkpoint.prediction import PredictionType
    from sdd_lora.generation.sampling import Job

#: torch takes seeds of 64 bits
_SEEDS = 2**63


# options of generate
_ImageFolder = Annotated[
    Path, typer.Option("--output", "-o", help="Folder for images and manifest.")
]
_TypedPrompts = Annotated[list[str] | None, typer.Option(help="A prompt. Repeatable.")]
_PromptFile = Annotated[
    Path | None,
    typer.Option(
        help="File of prompts: .txt (one a line), .csv, .tsv, .json or .jsonl (I2P's, COCO's and "
        "ESD's columns are known); its seeds, guidance, sizes, steps and negative prompts are used."
    ),
]
_Adapters = Annotated[
    list[str] | None,
    typer.Option(
        help="Adapter file or run folder, with an optional weight: a.safetensors:0.8. Repeatable.",
        metavar="A[:w]",
    ),
]
_Weights = Annotated[
    Path | None,
    typer.Option(help="A UNet's weights, whole or partial, instead of the model's."),
]
_Embeddings = Annotated[
    list[str] | None,
    typer.Option(
        "--embedding",
        help="Learned words (textual inversion; .pt, .bin or .safetensors): prompts name them by "
        "NAME [default: the file's name]. Repeatable.",
        metavar="[NAME=]FILE",
    ),
]
_Method = Annotated[
    str,
    typer.Option(
        help="How to draw: sd (as is), neg (--concept as negative prompt), sld-weak, "
        "sld-medium, sld-strong, sld-max, sega, or sdd-gated (every --adapter by the prompt's "
        "similarity to --concept)."
    ),
]
_Concept = Annotated[
    str,
    typer.Option(help="What --method works against; for sdd-gated several, with commas."),
]
_Images = Annotated[int, typer.Option(help="Images a prompt.", min=1)]
_Seed = Annotated[
    int | None,
    typer.Option(
        help="Seed of the first image; the others count up [default: the file's, else 0].",
        min=0,
    ),
]
_Steps = Annotated[
    int | None,
    typer.Option(help="Sampling steps [default: the file's, else 25].", min=1, max=999),
]
_Guidance = Annotated[
    float | None,
    typer.Option(help="Classifier-free guidance scale [default: the file's, else 7.5]."),
]
_Pixels = Annotated[
    int | None, typer.Option(help="Pixels [default: the file's, else the model's own].")
]
_NegativePrompt = Annotated[
    str | None, typer.Option(help="Guided away from [default: the file's, else nothing].")
]
_ClipSkip = Annotated[
    int,
    typer.Option(help="1: the text encoder's last layer; 2: the one before; …", min=1),
]
_Sampler = Annotated[Scheduler, typer.Option(help="Sampler.")]
_Column = Annotated[
    str | None, typer.Option(help="The column of --prompts that holds them, if oddly named.")
]
_Vae = Annotated[
    str | None,
    typer.Option(help="Another VAE: a model's, or in its own folder or file.", metavar="MODEL"),
]
_Prediction = Annotated[
    Literal["epsilon", "v_prediction"] | None,
    typer.Option(help="What the UNet predicts, where the model's files don't say."),
]
_Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps, … [default: the best there is].")
]
_Shard = Annotated[
    str | None,
    typer.Option(
        help="Draw part I of N, beside others; a last call without it merges all.",
        metavar="I/N",
    ),
]
_Batch = Annotated[int, typer.Option(help="Images drawn at once; changes no image.", min=1)]


@verb("generate", loads_model=True)
def generate(
    model: Model,
    output: _ImageFolder,
    prompt: _TypedPrompts = None,
    prompts: _PromptFile = None,
    adapter: _Adapters = None,
    weights: _Weights = None,
    embedding: _Embeddings = None,
    method: _Method = "sd",
    concept: _Concept = "",
    images: _Images = 1,
    seed: _Seed = None,
    steps: _Steps = None,
    guidance: _Guidance = None,
    width: _Pixels = None,
    height: _Pixels = None,
    negative_prompt: _NegativePrompt = None,
    clip_skip: _ClipSkip = 1,
    scheduler: _Sampler = "ddim",
    column: _Column = None,
    vae: _Vae = None,
    prediction: _Prediction = None,
    precision: Precision = None,
    device: _Device = None,
    shard: _Shard = None,
    batch: _Batch = 8,
) -> Result:
    """Draw images, each a function of its prompt, its seed and the settings alone.

    Run again with the same settings, it draws what is missing and nothing else. Options that are
    typed win over the columns of a file of prompts.

    Examples:

        sdd-lora generate demo --prompt "a cat and a bomb" -o out

        sdd-lora generate demo --prompts prompts.csv --adapter runs/demo-weapons:0.8 -o out

        sdd-lora generate demo --prompt "a bomb" --method sld-strong --concept bomb -o out

        sdd-lora generate demo --prompt "a my-word" --embedding my-word.pt -o out

    Several processes share the images: `torchrun --nproc-per-node 2 -m sdd_lora generate …`.
    """
    from sdd_lora.generation.prompt_files import Prompt, read_prompts, warn_of_foreign_syntax
    from sdd_lora.io.distributed import Shard

    own_shard = Shard.parse(shard) if shard is not None else None
    warn_of_foreign_syntax(prompt or [], "--prompt")
    texts = [*map(Prompt, prompt or []), *(read_prompts(prompts, column) if prompts else [])]
    if not texts:
        raise BadInput("no prompt: give --prompt TEXT or --prompts FILE")
    if column is not None and prompts is None:
        raise BadInput(f"--column {column}: names a column of --prompts FILE, which is not given")
    from sdd_lora.generation.images import check_sampling
    from sdd_lora.generation.images import generate as draw_images
    from sdd_lora.generation.sampling import Sampling, jobs_of

    typed = _given(  # wins over the columns of a file
        steps=steps, guidance=guidance, width=width, height=height, negative_prompt=negative_prompt
    )
    sampling = Sampling(**typed, scheduler=scheduler, method=method, concept=concept, batch=batch)
    replaced: dict[str, Any] = dict.fromkeys([*typed, *_given(seed=seed)])
    jobs = jobs_of([replace(text, **replaced) for text in texts], images, seed or 0)
    _check_numbers(sampling.guidance, jobs)
    check_sampling(sampling, jobs)
    speaker = is_main_process()
    pipeline, settings = _load(
        model, adapter or [], weights, vae, prediction, precision, device, clip_skip, embedding
    )
    drawn = draw_images(pipeline, jobs, sampling, output, settings, own_shard)
    if not speaker:
        raise typer.Exit
    total = len(jobs if own_shard is None else own_shard.take(jobs))
    of_shard = f"; shard {shard} is done, a last call without --shard merges all" if shard else ""
    text = f"{drawn} images drawn, {total} in {output}{of_shard}"
    return Result({"folder": str(output), "images": total, "drawn": drawn}, text)


def _load(
    model: str,
    adapters: Sequence[str],
    weights: Path | None,
    vae: str | None,
    prediction: "PredictionType | None",
    precision: str | None,
    device: str | None,
    clip_skip: int,
    embeddings: Sequence[str] | None,
) -> "tuple[StableDiffusionPipeline, dict[str, Any]]":
    """The pipeline of generate's options, and what images depend on besides the sampling."""
    from sdd_lora.adapter.weighted import weighted, with_weights
    from sdd_lora.io.atomic import sha256_of
    from sdd_lora.sd.devices import device_named
    from sdd_lora.sd.pipeline import load_pipeline, sha256_of_parts

    named = [weighted(adapter) for adapter in adapters]
    loaded = with_weights(named)
    for made in [adapter for adapter, _ in loaded if adapter.metadata.clip_skip is not None]:
        if made.metadata.clip_skip != clip_skip:
            warn(
                f"{made.name}: made for --clip-skip {made.metadata.clip_skip}, drawn with "
                f"{clip_skip}, where prompts are read otherwise: it may miss"
            )
    pipeline = load_pipeline(
        model,
        loaded,
        dtype=precision,
        device=device_named(device),
        weights=weights,
        vae=vae,
        prediction=prediction,
        clip_skip=clip_skip,
        embeddings=embeddings or (),
    )
    settings = {
        "model": model,
        "parts": sha256_of_parts(pipeline),
        "adapters": [
            {"adapter": name, "weight": weight, "identity": adapter.identity}
            for (name, weight), (adapter, _) in zip(named, loaded, strict=True)
        ],
        "weights": None if weights is None else sha256_of(weights),
    }
    own = _given(prediction=prediction)
    if embeddings:
        own["embeddings"] = list(embeddings)
    return pipeline, settings | own | ({"clip_skip": clip_skip} if clip_skip > 1 else {})


def _given(**options: Any) -> dict[str, Any]:
    """The options that were typed."""
    return {name: value for name, value in options.items() if value is not None}


def _check_numbers(guidance: float, jobs: "Sequence[Job]") -> None:
    """Raises BadInput for a guidance that is no number, and seeds that no generator takes."""
    for scale in {guidance, *(job.guidance for job in jobs if job.guidance is not None)}:
        if not math.isfinite(scale):
            raise BadInput(f"guidance: expected a finite number, found {scale}")
    highest = max(job.seed for job in jobs)
    if highest >= _SEEDS:
        raise BadInput(f"seeds: expected less than 2^63, found {highest}")


_OwnRows = Annotated[
    list[str] | None,
    typer.Option(
        help="A row of your own: an adapter (file, run's folder, hub id), a UNet's weights, a "
        "folder of pictures, or code as file.py:function or module:function. Repeatable.",
        metavar="NAME=WHAT",
    ),
]


@verb("evaluate", loads_model=True)
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
    row: _OwnRows = None,
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
    precision: Precision = None,
    changes: Changes = None,
) -> Result:
    """Measure every method of a bench on the same prompts and latents.

    What a method needs trained is trained once and kept in ~/.cache/sdd_lora (or $SDD_LORA_CACHE).
    Run again, also after a crash, it draws and measures what is missing and nothing else.

    Examples:

        sdd-lora evaluate recipes/bench/demo-single.yaml --quick

        sdd-lora evaluate recipes/bench/demo-single.yaml -o bench --methods sd,sdd,sdd-preserve

        sdd-lora evaluate recipes/bench/demo-single.yaml --quick --row mine=my-lora.safetensors

        sdd-lora report bench
    """
    from sdd_lora.bench.bench_file import Bench, chosen, limited, with_own_rows

    drawing = {} if precision is None else {"sampling.precision": precision}
    own = dict(map(_own_row, row or []))
    rows = {f"{kind}.{name}": what for name, (kind, what) in own.items()}
    overrides = parse_overrides(changes) | drawing | rows
    wanted = limited(Bench.load(bench, quick=quick, overrides=overrides), limit)
    if taken := [name for name in own if name in Bench.load(bench, quick=quick).every_method]:
        raise BadInput(f"--row {taken[0]}: a row of the bench; choose another name")
    wanted = chosen(wanted, [m for given in methods or [] for m in given.split(",")])
    wanted = with_own_rows(wanted, {name: kind for name, (kind, _) in own.items()})
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


def _own_row(text: str) -> tuple[str, tuple[str, Any]]:
    """ "mine=x.safetensors" → its name, the field of a bench that it goes into, and its entry
    there; paths are those of the current folder."""
    from sdd_lora.adapter.adapter import is_adapter_folder
    from sdd_lora.adapter.formats import looks_like_adapter
    from sdd_lora.checkpoint.layout import read_any_header
    from sdd_lora.io.plugins import is_plugin

    name, equals, what = text.partition("=")
    if not equals or not name or not what:
        raise BadInput(f"--row {text}: expected NAME=WHAT, such as mine=my-lora.safetensors")
    path = Path(what).resolve()
    if not path.exists() and is_plugin(what):
        place, _, function = what.rpartition(":")
        file = str(Path(place).resolve()) if place.endswith(".py") else place
        return name, ("code", f"{file}:{function}")
    if path.is_dir() and not is_adapter_folder(path):
        return name, ("images", str(path))
    if path.is_file() and not looks_like_adapter(read_any_header(path).tensors):
        return name, ("weights", str(path))
    return name, ("adapters", [str(path) if path.exists() else what])


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
