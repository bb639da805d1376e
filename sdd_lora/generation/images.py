"""Prompts × seeds → images and a manifest; resumable, each image a function of prompt and seed."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from sdd_lora.errors import BadInput
from sdd_lora.files import atomic_output
from sdd_lora.generation.methods import METHODS
from sdd_lora.generation.pipeline import set_scheduler
from sdd_lora.progress import progress

MANIFEST = "manifest.jsonl"
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Job:
    """One image to draw."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How images are drawn; `method` is one of the method ids, `concept` what it works against."""

    steps: int = 25
    guidance: float = 7.5
    scheduler: str = "ddim"
    method: str = "sd"
    concept: str = ""
    batch: int = 8


def check_sampling(sampling: Sampling) -> None:
    """Raises BadInput for a method that is not there, or that lacks its concept."""
    if sampling.method not in METHODS:
        known = ", ".join(METHODS)
        raise BadInput(f"--method {sampling.method}: not available; expected one of: {known}")
    if sampling.method != "sd" and not sampling.concept:
        raise BadInput(f"--method {sampling.method}: needs --concept, what it works against")
    if sampling.method == "sd" and sampling.concept:
        raise BadInput("--concept: nothing works against it; give a --method, such as neg")


def jobs_for(prompts: Sequence[str], count: int, first_seed: int) -> list[Job]:
    """`count` jobs that go through the prompts in turn, each with its own seed."""
    return [Job(prompts[i % len(prompts)], first_seed + i) for i in range(count)]


def draw(
    pipeline: StableDiffusionPipeline, jobs: Sequence[Job], sampling: Sampling, description: str
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index of the job, image (H, W, 3) uint8) for each job, in order.

    Each image's noise comes from its own seed, drawn on the CPU, so that neither the batch nor the
    device changes it.
    """
    method = METHODS[sampling.method]
    set_scheduler(pipeline, sampling.scheduler)
    with progress(description, len(jobs)) as advance:
        for start in range(0, len(jobs), sampling.batch):
            part = jobs[start : start + sampling.batch]
            generators = [torch.Generator().manual_seed(job.seed) for job in part]
            images = method(pipeline, [job.prompt for job in part], generators, sampling)
            for offset, image in enumerate(images):
                yield start + offset, image
            advance(len(part))


def generate(
    pipeline: StableDiffusionPipeline, jobs: Sequence[Job], sampling: Sampling, folder: Path,
    settings: dict[str, Any],
) -> int:  # fmt: skip
    """Draw what is still missing into `folder`; returns how many images were drawn now.

    The manifest has one line an image: file, prompt, seed. `settings` (model, adapters) and the
    sampling are kept beside it. Raises BadInput where the folder holds another run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: can't make this folder: {error.strerror}") from error
    settings = settings | asdict(sampling)
    del settings["batch"]
    _claim(folder, settings)
    done = _done(folder)
    wanted = [(f"{i:05d}.png", job) for i, job in enumerate(jobs)]
    for name, job in wanted:
        if name in done and done[name] != job:
            raise BadInput(
                f"{folder / MANIFEST}: {name} is {done[name].prompt!r} with seed "
                f"{done[name].seed}, not {job.prompt!r} with seed {job.seed}; choose another folder"
            )
    missing = [(name, job) for name, job in wanted if name not in done]
    with open(folder / MANIFEST, "a", encoding="utf-8") as manifest:
        for index, image in draw(pipeline, [job for _, job in missing], sampling, "drawing"):
            name, job = missing[index]
            with atomic_output(folder / name) as file:
                Image.fromarray(image).save(file, "PNG")
            manifest.write(json.dumps({"file": name} | asdict(job), ensure_ascii=False) + "\n")
            manifest.flush()
    return len(missing)


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write the run's settings, or check that they are the ones of the run already there."""
    path = folder / SETTINGS
    if path.exists():
        found = _parsed(path.read_text("utf-8"), path)
        changed = [k for k in settings.keys() | found.keys() if settings.get(k) != found.get(k)]
        if changed:
            raise BadInput(
                f"{folder}: holds images of another run ({', '.join(sorted(changed))} differ); "
                "choose another folder"
            )
        return
    with atomic_output(path) as file:
        file.write(json.dumps(settings, indent=2, ensure_ascii=False).encode())


def _done(folder: Path) -> dict[str, Job]:
    """Images that the manifest names and that are there; a line cut short by a kill is dropped."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    lines = path.read_text("utf-8").split("\n")
    entries = [_parsed(line, path) for line in lines[:-1]]
    if lines[-1]:
        with atomic_output(path) as file:
            file.write(("\n".join(lines[:-1]) + "\n").encode() if entries else b"")
    return {
        e["file"]: Job(e["prompt"], e["seed"]) for e in entries if (folder / e["file"]).exists()
    }


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path}: damaged ({error}); draw into another folder") from error
