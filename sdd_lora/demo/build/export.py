"""Stage 5: the trained parts as files: a diffusers folder in fp16, and one file in LDM layout."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from safetensors.numpy import load_file
from transformers import CLIPTokenizer

from sdd_lora.demo.build.diffusion import (
    NOISE_SCHEDULE,
    encode_pictures,
    make_text_encoder,
    make_unet,
)
from sdd_lora.demo.build.ldm import as_ldm
from sdd_lora.demo.build.schedule import WeightAverage
from sdd_lora.io.atomic import atomic_output
from sdd_lora.io.safetensors import serialize


def assemble(
    work: Path, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, ema: WeightAverage
) -> StableDiffusionPipeline:
    """A pipeline of the averaged weights, rounded to fp16 as they will be shipped."""
    model = torch.nn.ModuleDict({"unet": make_unet(), "text_encoder": make_text_encoder(tokenizer)})
    ema.copy_to(model)
    autoencoder.register_to_config(
        scaling_factor=float(encode_pictures(work, autoencoder)["scale"])
    )
    return StableDiffusionPipeline(
        vae=autoencoder.half(),
        text_encoder=model["text_encoder"].half(),
        tokenizer=tokenizer,
        unet=model["unet"].half(),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _scheduler() -> PNDMScheduler:
    """Configured as SD 1.5's own; `clip_sample` is for those who make a DDIM scheduler of it."""
    scheduler = PNDMScheduler(**NOISE_SCHEDULE, skip_prk_steps=True, steps_offset=1)
    scheduler.register_to_config(clip_sample=False, set_alpha_to_one=False)
    return scheduler


def save_single_file(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Write a pipeline as community models are: ONE fp16 file in the original LDM key layout."""
    parts = [
        {k: v.detach().half().numpy() for k, v in part.state_dict().items()}
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    ]
    _write_community(as_ldm(*parts), path)


def average_files(paths: Sequence[Path], output: Path) -> None:
    """Write the mean of files of `save_single_file`, of runs that went on one from another."""
    files = [load_file(path) for path in paths]
    means = {
        name: np.stack([file[name] for file in files]).mean(0, np.float64).astype(np.float16)
        for name in files[0]
    }
    _write_community(means, output)


def _write_community(tensors: dict[str, np.ndarray], path: Path) -> None:
    metadata = {
        "modelspec.title": "demo-community",
        "modelspec.architecture": "stable-diffusion-v1",
    }
    with atomic_output(path) as file:
        file.writelines(serialize(tensors, metadata))


def save_folder(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the diffusers folder, with the tokenizer also in the form older versions read."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text("utf-8"))["model"]
    (folder / "tokenizer" / "vocab.json").write_text(
        json.dumps(tokenizer["vocab"], ensure_ascii=False), "utf-8"
    )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges, ""]), "utf-8"
    )
