"""Samplers by their short names, as data: command line and bench files know them without torch."""

from typing import TYPE_CHECKING, Literal, get_args

from sdd_lora.errors import BadInput

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Scheduler = Literal["ddim", "dpm++", "euler", "euler-a", "lcm", "lms", "pndm", "unipc"]
SCHEDULERS: tuple[Scheduler, ...] = get_args(Scheduler)

#: diffusers' class of each sampler
_CLASSES: dict[Scheduler, str] = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
#: and A1111's name for it
NAMES_IN_A1111: dict[Scheduler, str] = {
    "ddim": "DDIM",
    "dpm++": "DPM++ 2M",
    "euler": "Euler",
    "euler-a": "Euler a",
    "lcm": "LCM",
    "lms": "LMS",
    "pndm": "PLMS",
    "unipc": "UniPC",
}


def set_scheduler(pipeline: "StableDiffusionPipeline", name: Scheduler) -> None:
    """Give the pipeline a sampler on its own noise schedule.

    Latents are not confined to [-1, 1]: they are never clipped. Raises BadInput for one that needs
    a package that is not installed.
    """
    import diffusers

    scheduler = getattr(diffusers, _CLASSES[name])
    try:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    except ImportError as error:  # diffusers' LMS integrates by scipy
        raise BadInput(f"scheduler {name}: needs a package: pip install scipy") from error
