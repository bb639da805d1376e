"""Prompts × seeds → images and a manifest; resumable, each image a function of prompt and seed."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

from sdd_lora.errors import BadInput
from sdd_lora.generation.methods import METHODS, gated
from sdd_lora.generation.prompt_files import SIDES, is_side
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.io.atomic import appended, atomic_output, locked, whole_lines, write_text
from sdd_lora.io.distributed import processes
from sdd_lora.progress import progress, warn
from sdd_lora.sd.prompts import cut_off
from sdd_lora.sd.schedulers import set_scheduler

MANIFEST = "manifest.jsonl"
SETTINGS = "settings.json"
#: where processes write before all are done; the first one writes the manifest itself
_PART = "manifest.{}.jsonl"


#: methods that draw as `sd` does where an image's guidance is 1 or less
_CHANGE_GUIDANCE = METHODS.keys() - {"sd", "sdd-gated"}


#: what a manifest's line holds: the file's name, and what is the job's own
_TOLD = {
    "file": (str,), "prompt": (str,), "seed": (int,), "guidance": (int, float), "width": (int,),
    "height": (int,),
}  # fmt: skip
_IMAGE = re.compile(r"\d{5,}\.png")


def check_sampling(sampling: Sampling, jobs: Sequence[Job] = ()) -> None:
    """Raises BadInput for a method that is not there, lacks its concept, or would do nothing; and
    for sizes that can't be drawn."""
    if sampling.method not in METHODS:
        known = ", ".join(METHODS)
        raise BadInput(f"method {sampling.method}: not available; expected one of: {known}")
    if sampling.method != "sd" and not sampling.concept.strip(", "):
        raise BadInput(f"method {sampling.method}: needs --concept, what it works against")
    if sampling.method == "sd" and sampling.concept:
        raise BadInput("--concept: nothing works against it; give a --method, such as neg")
    every = {sampling.for_job(job) for job in jobs} or {sampling}
    highest = max(own.guidance for own in every)
    if sampling.method in _CHANGE_GUIDANCE and highest <= 1:
        raise BadInput(
            f"method {sampling.method}: changes guidance, and does nothing without it; expected a "
            f"guidance above 1, found {highest:g}"
        )
    for side in (side for own in every for side in (own.width, own.height)):
        if side is not None and not is_side(side):
            raise BadInput(f"width and height: expected {SIDES}, found {side}")


def draw(
    pipeline: StableDiffusionPipeline, jobs: Sequence[Job], sampling: Sampling, description: str
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index of the job, image (H, W, 3) uint8) for each job.

    They come in the jobs' order, unless some have a guidance or size of their own: a batch has one
    of each. Each image's noise comes from its own seed, drawn on the CPU, so that neither the batch
    nor the device changes it.
    """
    method = METHODS[sampling.method]
    set_scheduler(pipeline, sampling.scheduler)
    with progress(description, len(jobs)) as advance:
        for indices, own in _batches(jobs, sampling):
            part = [jobs[index] for index in indices]
            generators = [torch.Generator().manual_seed(job.seed) for job in part]
            images = method(pipeline, [job.prompt for job in part], generators, own)
            yield from zip(indices, images, strict=True)
            advance(len(part))


def _batches(jobs: Sequence[Job], sampling: Sampling) -> Iterator[tuple[list[int], Sampling]]:
    """Indices of the jobs that are drawn at once, with what they are drawn with."""
    alike: dict[Sampling, list[int]] = {}
    for index, job in enumerate(jobs):
        alike.setdefault(sampling.for_job(job), []).append(index)
    for own, indices in alike.items():
        for start in range(0, len(indices), own.batch):
            yield indices[start : start + own.batch], own


def generate(
    pipeline: StableDiffusionPipeline, jobs: Sequence[Job], sampling: Sampling, folder: Path,
    settings: dict[str, Any],
) -> int:  # fmt: skip
    """Draw what is still missing into `folder`; returns how many images were drawn now.

    The manifest has one line an image, in the jobs' order: file, prompt, seed, and the guidance and
    size that are its own. `settings` (model, adapters) and the sampling are kept beside it. Several
    processes share the images; all return when all are drawn. Raises BadInput where the folder
    holds another run, or another process draws into it.
    """
    state = processes()
    _check_fit(pipeline, sampling)
    if state.is_main_process:
        _tell_of_long_prompts(pipeline, jobs)
        _tell_of_low_guidance(sampling, jobs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: can't make this folder: {error.strerror}") from error
    settings = _all_settings(sampling, settings)
    with locked(folder) if state.is_main_process else nullcontext():
        if state.is_main_process:
            _claim(folder, settings)
            _tidy(folder)
        state.wait_for_everyone()
        missing = _missing(folder, jobs)
        state.wait_for_everyone()  # nobody writes before all have read
        mine = missing[state.process_index :: state.num_processes]
        index = state.process_index
        _draw_into(
            folder, MANIFEST if index == 0 else _PART.format(index), pipeline, mine, sampling
        )
        state.wait_for_everyone()
        if state.is_main_process:
            _tidy(folder)
        state.wait_for_everyone()
    return len(missing)


def _draw_into(
    folder: Path, manifest: str, pipeline: StableDiffusionPipeline,
    missing: Sequence[tuple[str, Job]], sampling: Sampling,
) -> None:  # fmt: skip
    """Draw into the named files; an image is there before its line is."""
    with appended(folder / manifest) as lines:
        for index, image in draw(pipeline, [job for _, job in missing], sampling, "drawing"):
            name, job = missing[index]
            with atomic_output(folder / name) as file:
                Image.fromarray(image).save(file, "PNG")
            lines.write(_line({"file": name} | as_entry(job)))
            lines.flush()


def _missing(folder: Path, jobs: Sequence[Job]) -> list[tuple[str, Job]]:
    """File names and jobs that the manifest lacks. Raises BadInput where it has other ones."""
    path = folder / MANIFEST
    done = {entry["file"]: job_in(entry) for entry in _entries(path)} if path.exists() else {}
    wanted = [(f"{i:05d}.png", job) for i, job in enumerate(jobs)]
    for name, job in wanted:
        if name in done and done[name] != job:
            raise BadInput(
                f"{path}: {name} is {_told(done[name])}, not {_told(job)}; choose another folder"
            )
    return [(name, job) for name, job in wanted if name not in done]


def drawn_in(folder: Path) -> dict[Job, Path]:
    """The file of each job that a folder's manifest names; none where there is no manifest."""
    path = folder / MANIFEST
    entries = _entries(path) if path.exists() else []
    return {job_in(entry): folder / entry["file"] for entry in entries}


def is_drawn(
    folder: Path, jobs: Sequence[Job], sampling: Sampling, settings: dict[str, Any]
) -> bool:
    """Has `generate` nothing left to draw? Raises BadInput where the folder holds another run."""
    if not (folder / SETTINGS).exists() or not (folder / MANIFEST).exists():
        return False
    _claim(folder, _all_settings(sampling, settings))
    names = [f"{i:05d}.png" for i in range(len(jobs))]
    return not _missing(folder, jobs) and all(map(_is_whole, (folder / name for name in names)))


def job_in(entry: dict[str, Any]) -> Job:
    """The job that a line of a manifest, or of another file, tells of."""
    return Job(**{name: entry[name] for name in Job.__dataclass_fields__ if name in entry})


def as_entry(job: Job) -> dict[str, Any]:
    """What a line tells of a job: its prompt, its seed, and what else is its own."""
    return {name: value for name, value in asdict(job).items() if value is not None}


def _told(job: Job) -> str:
    own = {name: value for name, value in as_entry(job).items() if name != "prompt"}
    return f"{job.prompt!r} with " + ", ".join(f"{name} {value}" for name, value in own.items())


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _check_fit(pipeline: StableDiffusionPipeline, sampling: Sampling) -> None:
    """Raises BadInput where a method can't work with the pipeline: before anything is written."""
    check_concept(sampling, pipeline.tokenizer)
    if sampling.method == "sdd-gated":
        gated.gated_layers(pipeline)


def check_concept(sampling: Sampling, tokenizer: CLIPTokenizer) -> None:
    """Raises BadInput where the model would not read all of what a method works against."""
    concepts = [sampling.concept]
    if sampling.method == "sdd-gated":
        concepts = gated.concepts_of(sampling.concept)
        for concept in concepts:
            if not all(gated.token_sets([concept], tokenizer)):
                raise BadInput(f"concept: the model reads nothing in {concept!r}")
    for concept in concepts:
        if lost := cut_off(tokenizer, concept):
            raise BadInput(f"concept: too long: the model would not read {lost!r}")


def _tell_of_long_prompts(pipeline: StableDiffusionPipeline, jobs: Sequence[Job]) -> None:
    prompts = dict.fromkeys(job.prompt for job in jobs)
    if long := sum(bool(cut_off(pipeline.tokenizer, prompt)) for prompt in prompts):
        most = pipeline.tokenizer.model_max_length
        warn(f"{long} of {len(prompts)} prompts are over {most} tokens; the rest is not read")


def _tell_of_low_guidance(sampling: Sampling, jobs: Sequence[Job]) -> None:
    low = sum(sampling.for_job(job).guidance <= 1 for job in jobs)
    if low and sampling.method in _CHANGE_GUIDANCE:
        warn(
            f"{low} of {len(jobs)} images have a guidance of 1 or less, where {sampling.method} "
            "changes nothing"
        )


def _all_settings(sampling: Sampling, settings: dict[str, Any]) -> dict[str, Any]:
    """What all images of a folder have in common; the batch changes none."""
    told = settings | asdict(sampling)
    del told["batch"]
    return told


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write the run's settings, or check that they are the ones of the run already there."""
    path = folder / SETTINGS
    if path.exists():
        found = _parsed(_text(path), path)
        changed = [k for k in settings.keys() | found.keys() if settings.get(k) != found.get(k)]
        if changed:
            raise BadInput(
                f"{folder}: holds images of another run ({', '.join(sorted(changed))} differ); "
                "choose another folder"
            )
        return
    with atomic_output(path) as file:
        file.write(json.dumps(settings, indent=2, ensure_ascii=False).encode())


def _tidy(folder: Path) -> None:
    """Make the manifest one file with one line for each image that is there, in their order.

    Lines that a kill cut short are dropped, and those of all processes' parts put in.
    """
    path = folder / MANIFEST
    parts = sorted(folder.glob(_PART.format("*")))
    entries = {
        entry["file"]: entry
        for file in [path, *parts] if file.exists()
        for entry in _entries(file)
    }  # fmt: skip
    there = sorted(name for name in entries if _is_whole(folder / name))
    text = "".join(_line(entries[name]) for name in there)
    if not path.exists() or path.read_bytes() != text.encode():
        write_text(path, text)
    for part in parts:
        part.unlink()


def _is_whole(image: Path) -> bool:
    """Is it there? A repaired file system leaves files of no bytes."""
    return image.is_file() and image.stat().st_size > 0


def _entries(path: Path) -> list[dict[str, Any]]:
    """A manifest's whole lines. Raises BadInput for one that is damaged."""
    entries = [_parsed(line, path) for line in whole_lines(path)]
    for number, entry in enumerate(entries, 1):
        typed = all(type(value) in _TOLD.get(name, ()) for name, value in entry.items())
        whole = typed and {"file", "prompt", "seed"} <= entry.keys()
        if not (whole and _IMAGE.fullmatch(entry["file"])):
            raise BadInput(f"{path}: line {number}: damaged; draw into another folder")
    return entries


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: can't read it ({error}); draw into another folder") from error


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path}: damaged ({error}); draw into another folder") from error
