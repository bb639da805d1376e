"""Samplers by their short names, as data: command line and bench files know them without torch."""

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from sdd_lora.errors import BadInput

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

Scheduler = Literal["ddim", "dpm++", "euler", "euler-a", "lcm", "lms", "pndm", "unipc"]
SCHEDULERS: tuple[Scheduler, ...] = get_args(Scheduler)


class Sampler(NamedTuple):
    """A sampler's class in diffusers, and its name in A1111."""

    diffusers_class: str
    in_a1111: str


SAMPLERS: dict[Scheduler, Sampler] = {
    "ddim": Sampler("DDIMScheduler", "DDIM"),
    "dpm++": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "euler": Sampler("EulerDiscreteScheduler", "Euler"),
    "euler-a": Sampler("EulerAncestralDiscreteScheduler", "Euler a"),
    "lcm": Sampler("LCMScheduler", "LCM"),
    "lms": Sampler("LMSDiscreteScheduler", "LMS"),
    "pndm": Sampler("PNDMScheduler", "PLMS"),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC"),
}


def set_scheduler(pipeline: "StableDiffusionPipeline", name: Scheduler) -> None:
    """Give the pipeline a sampler on its own noise schedule.

    Latents are not confined to [-1, 1]: they are never clipped. Raises BadInput for one that needs
    a package that is not installed.
    """
    import diffusers

    scheduler = getattr(diffusers, SAMPLERS[name].diffusers_class)
    try:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    except ImportError as error:  # diffusers' LMS integrates by scipy
        raise BadInput(f"scheduler {name}: needs a package: pip install scipy") from error
