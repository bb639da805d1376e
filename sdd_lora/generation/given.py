"""Drawing from what is given besides a prompt: latents to go on from, a picture of which a part is
hidden, embeddings. Image-to-image starts so, and so do attacks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from safetensors.torch import load_file, save

from sdd_lora.generation.guided import size_of
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.io.atomic import atomic_output


@dataclass(frozen=True)
class Given:
    """What an image is drawn from; None is the usual.

    `latents` (4, h, w) stand before the sampler's step of index `step` (int64, no dimension). Of
    `known`, latents (4, h, w) of a picture, only the part that is `hidden` (1, h, w), 1 where it is
    and else 0, is drawn: the rest is put back after each step. `prompt` (77, d) are embeddings that
    stand in for the prompt's; `each_step` (steps, 77, d), one a step, for those of the prompt and
    of guidance.
    """

    latents: torch.Tensor | None = None
    step: torch.Tensor | None = None
    known: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    prompt: torch.Tensor | None = None
    each_step: torch.Tensor | None = None

    def save(self, path: Path) -> None:
        """Write what is there to a safetensors file, whole or not at all."""
        there = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {k: v.cpu().contiguous() for k, v in there.items() if v is not None}
        with atomic_output(path) as file:
            file.write(save(tensors))

    @classmethod
    def load(cls, path: Path) -> "Given":
        return cls(**load_file(path))


class FromGiven(StableDiffusionPipeline):
    """Called like the text-to-image pipeline; each image is drawn from what `given` has for its
    job, whose guidance and size are those that it is drawn with. In a batch all are given the same
    kinds of things, at the same step."""

    given: Callable[[Job], Given]

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str],
        generator: list[torch.Generator],
        guidance_scale: float,
        num_inference_steps: int,
        negative_prompt: list[str],
        width: int | None = None,
        height: int | None = None,
        **options: Any,
    ) -> StableDiffusionPipelineOutput:
        """Latents (B, 4, h, w) as `images`, one a prompt."""
        jobs = [
            Job(text, seeded.initial_seed(), guidance_scale, width, height)
            for text, seeded in zip(prompt, generator, strict=True)
        ]
        given = [self.given(job) for job in jobs]
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        text, empty = self.encode_prompt(
            prompt, self.device, 1, True, negative_prompt=negative_prompt
        )
        own = self._stacked([one.prompt for one in given])
        embeddings = text if own is None else own, empty
        size = size_of(self, Sampling(width=width, height=height))
        latents = self._denoised(given, embeddings, generator, guidance_scale, size)
        return StableDiffusionPipelineOutput(images=latents, nsfw_content_detected=None)

    def _denoised(
        self,
        given: Sequence[Given],
        embeddings: tuple[torch.Tensor, torch.Tensor],
        generator: list[torch.Generator],
        guidance: float,
        size: tuple[int, int],
    ) -> torch.Tensor:
        """Latents (B, 4, h, w) of the images; `embeddings` are the prompts' and the empty ones."""
        latents, known, hidden, each_step = (
            self._stacked([getattr(one, name) for one in given])
            for name in ("latents", "known", "hidden", "each_step")
        )
        first = 0 if given[0].step is None else int(given[0].step)
        if latents is None:
            shape = (len(given), self.unet.config.in_channels, *reversed(size))
            latents = self.prepare_latents(*shape, self.unet.dtype, self.device, generator)
        noise = latents / self.scheduler.init_noise_sigma  # put on what is known
        options = self.prepare_extra_step_kwargs(generator, 0.0)
        timesteps = self.scheduler.timesteps[first * self.scheduler.order :]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first * self.scheduler.order)
        for index, t in enumerate(timesteps, first):
            if each_step is not None:
                predicted = self._predicted(latents, t, each_step[:, index])
            elif guidance > 1:
                both = torch.cat([latents] * 2), torch.cat([embeddings[1], embeddings[0]])
                without, with_prompt = self._predicted(both[0], t, both[1]).chunk(2)
                predicted = without + guidance * (with_prompt - without)
            else:
                predicted = self._predicted(latents, t, embeddings[0])
            latents = self.scheduler.step(predicted, t, latents, **options, return_dict=False)[0]
            if known is not None and hidden is not None:
                shown = known
                if index + 1 < len(self.scheduler.timesteps):
                    following = self.scheduler.timesteps[index + 1 : index + 2]
                    shown = self.scheduler.add_noise(known, noise, following)
                latents = hidden * latents + (1 - hidden) * shown
        return latents

    def _predicted(
        self, latents: torch.Tensor, t: torch.Tensor, embeddings: torch.Tensor
    ) -> torch.Tensor:
        noisy = self.scheduler.scale_model_input(latents, t)
        return self.unet(noisy, t, encoder_hidden_states=embeddings, return_dict=False)[0]

    def _stacked(self, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        """The images' tensors as one, (B, …), as the UNet takes them; None where there are none."""
        there = [tensor for tensor in tensors if tensor is not None]
        return torch.stack(there).to(self.device, self.unet.dtype) if there else None


def from_given(pipeline: StableDiffusionPipeline, given: Callable[[Job], Given]) -> FromGiven:
    """A pipeline over the same parts that draws from what `given` has for each job."""
    drawing = FromGiven(**pipeline.components, requires_safety_checker=False)
    drawing.set_progress_bar_config(disable=True)
    drawing.given = given
    return drawing


def as_drawn(job: Job, sampling: Sampling, pipeline: StableDiffusionPipeline) -> Job:
    """The job with the guidance and the size that it is drawn with: both sides, or none."""
    own = sampling.for_job(job)
    width, height = size_of(pipeline, own) if own.width or own.height else (None, None)
    return Job(job.prompt, job.seed, own.guidance, width, height)
