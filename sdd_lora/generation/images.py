"""Prompts × seeds → images and a manifest; resumable, each image a function of prompt and seed."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers import CLIPTokenizer

from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.generation import manifest
from sdd_lora.generation.batches import images_at_once
from sdd_lora.generation.decoding import decode_latents
from sdd_lora.generation.methods import METHODS, gated, neg
from sdd_lora.generation.prompt_files import SIDES, is_side
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.io.atomic import atomic_output, locked
from sdd_lora.io.distributed import Shard, processes
from sdd_lora.io.jsonl import appended, drop_cut_line
from sdd_lora.progress import progress, warn
from sdd_lora.sd.devices import is_out_of_memory, precision_of
from sdd_lora.sd.prompts import cut_off
from sdd_lora.sd.schedulers import SAMPLERS, set_scheduler
from sdd_lora.version import __version__

#: methods that sample as `sd` does where an image's guidance is 1 or less
_CHANGE_GUIDANCE = METHODS.keys() - {"sd", "sdd-gated"}


def check_sampling(sampling: Sampling, jobs: Sequence[Job] = ()) -> None:
    """Raises BadInput for a method that is not there, lacks its concept, or would do nothing; and
    for sizes that can't be drawn."""
    if sampling.method not in METHODS:
        known = ", ".join(METHODS)
        raise BadInput(f"method {sampling.method}: not available; expected one of: {known}")
    if sampling.method != "sd" and not sampling.concept.strip(", "):
        raise BadInput(f"method {sampling.method}: needs a concept, what it works against")
    if sampling.method == "sd" and sampling.concept:
        raise BadInput("concept: nothing works against it; expected a method too, such as neg")
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
    nor the device changes it; a card draws as many at once as its free memory holds, and where that
    runs out, half as many. Warns of images that are all black. Raises SddLoraError for an image
    whose numbers are not finite.
    """
    set_scheduler(pipeline, sampling.scheduler)
    alike: dict[Sampling, list[int]] = {}
    for index, job in enumerate(jobs):
        alike.setdefault(sampling.for_job(job), []).append(index)
    batch, in_fp32, black = min(sampling.batch, len(jobs)), 0, 0
    with progress(description, len(jobs)) as advance:
        for own, indices in alike.items():
            batch = images_at_once(pipeline, replace(own, batch=batch))
            start = 0
            while start < len(indices):
                part = indices[start : start + batch]
                try:
                    images, retried = _draw_batch(pipeline, [jobs[i] for i in part], own)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    batch = _half_of(len(part), error)
                    continue
                yield from zip(part, images, strict=True)
                in_fp32 += retried
                black += sum(not image.any() for image in images)
                start += len(part)
                advance(len(part))
    if in_fp32:
        warn(
            f"{in_fp32} of {len(jobs)} images: the VAE overflowed in {pipeline.vae.dtype} and was "
            "run again in fp32"
        )
    if black:
        precision = precision_of(pipeline.unet.dtype)
        advice = "" if precision == "fp32" else "; try `precision='fp32'`"
        warn(f"{black} of {len(jobs)} images are all black, in {precision}{advice}")


def _draw_batch(
    pipeline: StableDiffusionPipeline, jobs: Sequence[Job], sampling: Sampling
) -> tuple[np.ndarray, int]:
    """What `decode_latents` gives for the jobs' latents."""
    generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
    sample = METHODS[sampling.method]
    latents = sample(pipeline, [job.prompt for job in jobs], generators, sampling)
    return decode_latents(pipeline, latents, jobs)


def _half_of(batch: int, error: Exception) -> int:
    """The batch to go on with after running out of memory. Raises SddLoraError where it was 1."""
    if batch == 1:
        raise SddLoraError(
            "out of memory while drawing a single image: draw smaller ones (width, height), "
            f"in precision fp16, or on another device ({str(error).splitlines()[0]:.200})"
        ) from error
    warn(f"out of memory with {batch} images at once: going on with {batch // 2}")
    return batch // 2


def generate(
    pipeline: StableDiffusionPipeline,
    jobs: Sequence[Job],
    sampling: Sampling,
    folder: Path,
    settings: dict[str, Any],
    shard: Shard | None = None,
) -> int:
    """Draw the images that are still missing in `folder`; returns how many were drawn now.

    The manifest has one line an image, in the jobs' order: file, prompt, seed, and the guidance and
    size that are its own. `settings` (model, adapters) and the sampling are kept beside it. Several
    processes share the images; all return when all are drawn. With a `shard`, only its images are
    drawn, beside those of others: a later call without one merges the shards' manifests. Raises
    BadInput where the folder holds another run, or another process draws into it.
    """
    state = processes()
    _check_method_fits(pipeline, sampling)
    if state.is_main_process:
        _warn_of_long_prompts(pipeline, jobs)
        _warn_of_low_guidance(sampling, jobs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder}: can't make this folder: {error.strerror}") from error
    lock = locked(folder, shared=shard is not None) if state.is_main_process else nullcontext()
    with lock:
        if state.is_main_process:
            precision = precision_of(pipeline.unet.dtype)
            manifest.take_settings(folder, sampling, settings, precision)
            if shard is None:
                manifest.merge_parts(folder)
        state.wait_for_everyone()
        todo = manifest.missing(folder, jobs)
        if shard is not None:
            mine = set(shard.take(range(len(jobs))))
            todo = [(index, job) for index, job in todo if index in mine]
        state.wait_for_everyone()  # nobody writes before all have read
        part = folder / manifest.part_name(state.process_index, shard)
        drop_cut_line(part)
        own = todo[state.process_index :: state.num_processes]
        _draw_into(folder, part, pipeline, own, sampling)
        state.wait_for_everyone()
        if state.is_main_process and shard is None:
            manifest.merge_parts(folder)
        state.wait_for_everyone()
    return len(todo)


def _draw_into(
    folder: Path,
    part: Path,
    pipeline: StableDiffusionPipeline,
    todo: Sequence[tuple[int, Job]],
    sampling: Sampling,
) -> None:
    """Draw images and append to a manifest; an image is there before its line is."""
    with appended(part) as lines:
        for number, image in draw(pipeline, [job for _, job in todo], sampling, "drawing"):
            index, job = todo[number]
            name = manifest.image_name(index)
            with atomic_output(folder / name) as file:
                text = parameters_text(job, sampling, image.shape)
                Image.fromarray(image).save(file, "PNG", pnginfo=text)
            lines.write(manifest.as_line({"file": name} | manifest.as_entry(job)))
            lines.flush()


def parameters_text(job: Job, sampling: Sampling, shape: tuple[int, ...]) -> PngInfo:
    """The text chunk `parameters` of an image (H, W, 3), as A1111 writes and reads it."""
    own = sampling.for_job(job)
    negative = neg.negative_prompt(own) if own.method == "neg" else own.negative_prompt
    settings: dict[str, object] = {
        "Steps": own.steps,
        "Sampler": SAMPLERS[own.scheduler].in_a1111,
        "CFG scale": own.guidance,
        "Seed": job.seed,
        "Size": f"{shape[1]}x{shape[0]}",
        "Method": own.method,
        "Version": f"sdd-lora {__version__}",
    }
    lines = [job.prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    info = PngInfo()
    info.add_text("parameters", "\n".join(lines))
    return info


def _check_method_fits(pipeline: StableDiffusionPipeline, sampling: Sampling) -> None:
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


def _warn_of_long_prompts(pipeline: StableDiffusionPipeline, jobs: Sequence[Job]) -> None:
    prompts = dict.fromkeys(job.prompt for job in jobs)
    if long := sum(bool(cut_off(pipeline.tokenizer, prompt)) for prompt in prompts):
        most = pipeline.tokenizer.model_max_length
        warn(f"{long} of {len(prompts)} prompts are over {most} tokens; the rest is not read")


def _warn_of_low_guidance(sampling: Sampling, jobs: Sequence[Job]) -> None:
    without = [own for job in jobs if (own := sampling.for_job(job)).guidance <= 1]
    low, negated = len(without), sum(bool(own.negative_prompt) for own in without)
    if negated:
        warn(
            f"{negated} of {len(jobs)} images have a guidance of 1 or less, where no negative "
            "prompt is read"
        )
    if low and sampling.method in _CHANGE_GUIDANCE:
        warn(
            f"{low} of {len(jobs)} images have a guidance of 1 or less, where {sampling.method} "
            "changes nothing"
        )
