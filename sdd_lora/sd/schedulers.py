"""Samplers by their short names, as data: command line and bench files know them without torch."""

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Scheduler = Literal["ddim", "dpm++", "euler-a", "pndm"]
SCHEDULERS: tuple[Scheduler, ...] = get_args(Scheduler)

#: diffusers' class of each sampler
_CLASSES: dict[Scheduler, str] = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "pndm": "PNDMScheduler",
}


def set_scheduler(pipeline: "StableDiffusionPipeline", name: Scheduler) -> None:
    """Give the pipeline a sampler on its own noise schedule.

    Latents are not confined to [-1, 1]: they are never clipped.
    """
    import diffusers

    scheduler = getattr(diffusers, _CLASSES[name])
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, clip_sample=False)
