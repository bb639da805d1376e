"""Pictures while training: a few prompts with the same seeds, every N iterations."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from sdd_lora.errors import SddLoraError
from sdd_lora.generation.images import draw
from sdd_lora.generation.sampling import Sampling, jobs_for
from sdd_lora.io.atomic import atomic_output
from sdd_lora.progress import warn
from sdd_lora.recipe import Recipe
from sdd_lora.runs.folder import sample_file
from sdd_lora.runs.sheet import sheet
from sdd_lora.sd.model import TrainingParts, load_vae
from sdd_lora.sd.prompts import skipped
from sdd_lora.training.trainer import Trainer

_OF_A_KIND, _DRAWN_AT_ONCE = 4, 4


def sample_prompts(recipe: Recipe) -> list[str]:
    """Prompts of the concept, then kept ones, spread over those that the recipe measures with, or
    else erases and keeps."""
    asked = recipe.measure.prompts
    kinds = (asked.concept or recipe.concepts, asked.kept or recipe.preserve.prompts)
    counts = [min(_OF_A_KIND, len(kind)) for kind in kinds]
    return [
        kind[i * len(kind) // count]
        for kind, count in zip(kinds, counts, strict=True)
        for i in range(count)
    ]


class Samples:
    """Draws what a training has reached into a run's folder, and into TensorBoard's log.

    It leaves the training as it is: images have seeds of their own, the UNet is the trainer's in
    the teacher's role, and text encoder and VAE are on its device only while they draw.
    """

    def __init__(self, recipe: Recipe, parts: TrainingParts, place: Path) -> None:
        self._recipe, self._place = recipe, place
        self._pipeline = StableDiffusionPipeline(
            vae=load_vae(recipe.model, torch.float32),
            text_encoder=parts.text_encoder,
            tokenizer=parts.tokenizer,
            unet=parts.unet,
            scheduler=DDIMScheduler.from_config(parts.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self._pipeline.set_progress_bar_config(disable=True)
        self._prompts = sample_prompts(recipe)
        self._base: list[np.ndarray] = []

    def __call__(self, trainer: Trainer) -> None:
        """Draw, where the iteration is due and not drawn yet; Ctrl-C leaves it for the next call
        at this iteration. What can't be drawn is told, and the training goes on."""
        every, total = self._recipe.measure.every, trainer.recipe.training.iterations
        number, path = trainer.iteration, sample_file(self._place, trainer.iteration)
        is_due = every and number and (number % every == 0 or number == total)
        if not is_due or path.exists() or not trainer.accelerator.is_main_process:
            return
        try:
            with trainer.roles.base():
                self._base = self._base or self._images(trainer, "base")
            with trainer.roles.teacher():
                now = self._base and self._images(trainer, f"iteration {number}")
        except SddLoraError as error:
            warn(f"{path.name}: not drawn: {error}")
            return
        if not now:
            return
        picture = sheet(self._prompts, {"base": self._base, f"iteration\n{number}": now})
        path.parent.mkdir(exist_ok=True)
        with atomic_output(path) as file:
            picture.save(file, "PNG")
        for tracker in trainer.accelerator.trackers:
            tracker.log_images(
                {"samples": np.asarray(picture)[None]}, step=number, dataformats="NHWC"
            )

    def _images(self, trainer: Trainer, description: str) -> list[np.ndarray]:
        """Images (H, W, 3) uint8 of the prompts; none where Ctrl-C came meanwhile."""
        settings, own = self._recipe.measure, (self._pipeline.vae, self._pipeline.text_encoder)
        jobs = jobs_for(self._prompts, len(self._prompts), settings.seed)
        sampling = Sampling(settings.steps, settings.guidance, batch=_DRAWN_AT_ONCE)
        homes = [module.device for module in own]
        for module in own:
            module.to(trainer.accelerator.device)
        images = []
        try:
            clip_skip = self._recipe.clip_skip or 1
            with trainer.accelerator.autocast(), skipped(own[1], clip_skip):
                for _, image in draw(self._pipeline, jobs, sampling, description):
                    if trainer.interrupted():
                        return []
                    images.append(image)
        finally:
            for module, home in zip(own, homes, strict=True):
                module.to(home)
        return images
