"""Numbers that are not finite never become an image, whoever draws."""

import numpy as np
import pytest
import torch
from support.adapters import random_adapter

from sdd_lora.errors import SddLoraError
from sdd_lora.generation.decoding import decode_latents
from sdd_lora.generation.images import draw, generate
from sdd_lora.generation.img2img import from_images
from sdd_lora.generation.methods import METHODS
from sdd_lora.generation.sampling import Job, Sampling
from sdd_lora.sd.pipeline import load_pipeline

JOBS = [Job("a cat", 1), Job("a bus", 2)]
SAMPLING = Sampling(steps=2, guidance=4.0)


def images(pipeline, sampling=SAMPLING):
    return np.stack([image for _, image in draw(pipeline, JOBS, sampling, "test")]).astype(int)


def put_nan(module):
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] = float("nan")


@pytest.mark.parametrize("method", METHODS)
def test_one_nan_in_the_unet_stops_every_method(method):
    pipeline = load_pipeline("demo", [(random_adapter(0.1), 1.0)] if "gated" in method else [])
    put_nan(pipeline.unet.conv_in)
    sampling = Sampling(2, 4.0, method=method, concept="" if method == "sd" else "bomb")
    with pytest.raises(SddLoraError, match=r"'a cat', seed 1: .*UNet: conv_in\.weight holds NaN"):
        images(pipeline, sampling)


def test_one_nan_in_the_vae_is_named_and_no_image_is_written(tmp_path):
    pipeline = load_pipeline("demo")
    put_nan(pipeline.vae.decoder.conv_in)
    with pytest.raises(SddLoraError, match=r"seed 1: .*VAE: decoder\.conv_in\.weight"):
        generate(pipeline, JOBS, SAMPLING, tmp_path, {})
    assert not list(tmp_path.glob("*.png"))


def test_one_nan_stops_image_to_image(tmp_path):
    pipeline = load_pipeline("demo")
    generate(pipeline, JOBS, SAMPLING, tmp_path, {})
    files = {job: tmp_path / f"{index:05d}.png" for index, job in enumerate(JOBS)}
    put_nan(pipeline.unet.conv_in)
    with pytest.raises(SddLoraError, match="UNet"):
        images(from_images(pipeline, files, SAMPLING, 0.9))


def test_an_adapters_weight_that_is_too_large_is_named():
    pipeline = load_pipeline("demo", [(random_adapter(0.3), 1e30)])
    with pytest.raises(SddLoraError, match="an adapter's weight is too large"):
        images(pipeline)


def test_a_vae_that_overflows_in_fp16_is_run_again_in_fp32(caplog):
    pipelines = [load_pipeline("demo", dtype=dtype) for dtype in (torch.float16, torch.float32)]
    for pipeline in pipelines:
        with torch.no_grad():
            pipeline.vae.decoder.conv_in.weight *= 2**12
    half, whole = map(images, pipelines)
    assert "2 of 2 images: the VAE overflowed" in caplog.text
    assert pipelines[0].vae.dtype == torch.float16
    assert np.abs(half - whole).mean() < 3
    assert whole.std() > 10


def test_only_the_image_that_overflows_is_run_again():
    pipeline = load_pipeline("demo", dtype=torch.float16)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    whole, retried = decode_latents(pipeline, latents, JOBS)
    assert retried == 0
    latents[1] *= 10_000
    mixed, retried = decode_latents(pipeline, latents, JOBS)
    assert retried == 1
    assert np.abs(mixed[0].astype(int) - whole[0]).max() <= 1


def test_latents_beyond_fp16_are_an_error_with_advice():
    pipeline = load_pipeline("demo", dtype=torch.float16)
    with torch.no_grad():
        pipeline.unet.conv_out.weight *= 60_000
    with pytest.raises(SddLoraError, match=r"65504; try precision fp32"):
        images(pipeline)
