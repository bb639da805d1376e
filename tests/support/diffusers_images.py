"""Whole images on the embedded model, ours and those of a pipeline of diffusers' own."""

import numpy as np
import torch

from sdd_lora.generation.images import draw
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.sd.pipeline import load_pipeline
from sdd_lora.sd.schedulers import set_scheduler

_JOBS = [Job("a bomb, noto style", 1), Job("a cat", 2)]


def require_images_of(pipeline_class, method, steps, settings, attributes=None):
    """Ours by `method` against "bomb" are those of diffusers' class, and other than plain ones."""
    pipeline = load_pipeline("demo", device="cpu")
    sampling = Sampling(steps, 5.0, method=method, concept="bomb")
    ours = np.stack([image for _, image in draw(pipeline, _JOBS, sampling, "test")])
    theirs = pipeline_class(
        **{key: part for key, part in pipeline.components.items() if key != "image_encoder"},
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    set_scheduler(theirs, "ddim")
    for name, value in (attributes or {}).items():
        setattr(theirs, name, value)
    images = [
        theirs(
            [job.prompt],
            num_inference_steps=steps,
            guidance_scale=5.0,
            output_type="np",
            generator=torch.Generator().manual_seed(job.seed),
            **settings,
        ).images
        for job in _JOBS
    ]
    assert np.abs(ours - np.concatenate(images) * 255).max() <= 2
    plain = [image for _, image in draw(pipeline, _JOBS, Sampling(steps, 5.0), "test")]
    assert np.abs(ours[0].astype(int) - plain[0]).max() > 20
