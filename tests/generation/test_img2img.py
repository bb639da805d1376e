"""Image-to-image over the methods' loop: each job starts from its own image, whatever its batch."""

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from sdd_lora.generation.images import draw
from sdd_lora.generation.img2img import from_images
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.sd.pipeline import load_pipeline

SAMPLING = Sampling(steps=4, guidance=4.0, batch=2)
JOBS = [Job("a cat", 1), Job("a bomb", 2, guidance=7.0), Job("a bus", 3, width=128)]


def test_each_job_starts_from_its_own_image_as_diffusers_does(tmp_path):
    pipeline = load_pipeline("demo")
    files = {}
    for index, image in draw(pipeline, JOBS, SAMPLING, "test"):
        files[JOBS[index]] = tmp_path / f"{index}.png"
        Image.fromarray(image).save(files[JOBS[index]])
    started = from_images(pipeline, files, SAMPLING, 0.5)
    redrawn = dict(draw(started, JOBS, SAMPLING, "test"))
    theirs = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    for index, job in enumerate(JOBS):
        expected = theirs(
            job.prompt,
            image=Image.open(files[job]),
            strength=0.5,
            num_inference_steps=4,
            guidance_scale=job.guidance or 4.0,
            generator=torch.Generator().manual_seed(job.seed),
            output_type="np",
        ).images[0]
        difference = np.abs(redrawn[index].astype(int) - np.round(expected * 255))
        assert difference.max() <= 1
        start = np.asarray(Image.open(files[job])).astype(int)
        assert np.abs(redrawn[index] - start).max() > 20
