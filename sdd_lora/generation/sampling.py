"""A job is one image to draw; the sampling is how images are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdd_lora.generation.prompt_files import Prompt
from sdd_lora.sd.schedulers import Scheduler


@dataclass(frozen=True)
class Job:
    """One image to draw; what is None is as the sampling has it. Sizes are in pixels."""

    prompt: str
    seed: int
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How images are drawn; `method` is one of the method ids, `concept` what it works against.

    Width and height count pixels, a multiple of 8; None is the model's own size.
    """

    steps: int = 25
    guidance: float = 7.5
    scheduler: Scheduler = "ddim"
    method: str = "sd"
    concept: str = ""
    batch: int = 8
    width: int | None = None
    height: int | None = None
    negative_prompt: str = ""

    def for_job(self, job: Job) -> "Sampling":
        """With what the job has of its own."""
        own = {name: getattr(job, name) for name in _JOBS_OWN}
        return replace(self, **{name: value for name, value in own.items() if value is not None})


#: fields of a job that win over the sampling's
_JOBS_OWN = ("guidance", "width", "height", "steps", "negative_prompt")


def jobs_for(prompts: Sequence[str], count: int, first_seed: int) -> list[Job]:
    """`count` jobs that go through the prompts in turn, each with its own seed."""
    return [Job(prompts[i % len(prompts)], first_seed + i) for i in range(count)]


def jobs_of(prompts: Sequence[Prompt], images: int, first_seed: int) -> list[Job]:
    """`images` jobs for each prompt; seeds count up from the prompt's own where it has one, and
    from `first_seed` through all prompts where not."""
    jobs = []
    for number, prompt in enumerate(prompts):
        start = first_seed + number * images if prompt.seed is None else prompt.seed
        own = {name: getattr(prompt, name) for name in _JOBS_OWN}
        jobs += [Job(prompt.text, start + k, **own) for k in range(images)]
    return jobs
