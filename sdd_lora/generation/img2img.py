"""Image-to-image (SDEdit, Meng et al. 2021, arXiv 2108.01073): drawing that starts from images."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image

from sdd_lora.generation.guided import size_of
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.io.pictures import reading


class FromImages(StableDiffusionImg2ImgPipeline):
    """Called like the text-to-image pipeline; each prompt starts from the image that `images` has
    of its job, whose size it keeps. `strength` is the share of the noise schedule that is redone.
    """

    images: Mapping[Job, Path]
    strength: float

    def __call__(
        self,
        prompt: list[str],
        generator: list[Any],
        guidance_scale: float,
        width: int | None = None,
        height: int | None = None,
        **options: Any,
    ) -> Any:
        start = []
        for text, seeded in zip(prompt, generator, strict=True):
            job = Job(text, seeded.initial_seed(), guidance_scale, width, height)
            path = self.images[job]
            advice = "can't read this image; delete it and run again, which draws it anew"
            with reading(path, advice), Image.open(path) as opened:
                start.append(opened.convert("RGB"))
        return super().__call__(
            prompt,
            image=start,
            strength=self.strength,
            generator=generator,
            guidance_scale=guidance_scale,
            **options,
        )


def from_images(
    pipeline: StableDiffusionPipeline,
    images: Mapping[Job, Path],
    sampling: Sampling,
    strength: float,
) -> FromImages:
    """An img2img pipeline over the same parts; `images` has a file for each job that it will draw
    with `sampling`. `strength` lies between 0 and 1."""
    started = FromImages(**pipeline.components, requires_safety_checker=False)
    started.set_progress_bar_config(disable=True)
    started.strength = strength
    started.images = {_as_drawn(job, sampling, pipeline): file for job, file in images.items()}
    return started


def _as_drawn(job: Job, sampling: Sampling, pipeline: StableDiffusionPipeline) -> Job:
    """The job with the guidance and the size that it is drawn with: both sides, or none."""
    own = sampling.for_job(job)
    width, height = size_of(pipeline, own) if own.width or own.height else (None, None)
    return replace(job, guidance=own.guidance, width=width, height=height)
