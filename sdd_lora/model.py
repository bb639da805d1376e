"""The parts of an SD 1.x model: from the embedded one, a folder, one file, or a hub id."""

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from sdd_lora.errors import BadInput

DEMO_FOLDER = Path(str(files("sdd_lora.demo").joinpath("model")))
COMMUNITY_FILE = Path(str(files("sdd_lora.demo").joinpath("community.safetensors")))
_OFFLINE_ADVICE = (
    "no model hub could be reached. Offline, give a diffusers folder, a .safetensors file, "
    "or `demo` (the embedded model)"
)


def fingerprint(unet: UNet2DConditionModel) -> str:
    """SHA-256 of the UNet's cross-attention weights, names and shapes.

    Taken at fp16, so that a model keeps its fingerprint in another layout and as fp32 or fp16.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        if ".attn2." in name and "lora" not in name:
            digest.update(f"{name.replace('.base_layer', '')} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class TrainingParts:
    """What training needs of a model; the autoencoder is never loaded for it."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel | None
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler


def load_training_parts(model: str) -> TrainingParts:
    """Tokenizer, text encoder, UNet (fp32, on the CPU) and a DDIM scheduler of a MODEL.

    Raises BadInput for what is missing, damaged, or no Stable Diffusion 1.x.
    """
    pipeline = _pipeline(model, torch.float32, vae=None)
    return TrainingParts(
        pipeline.tokenizer, pipeline.text_encoder, pipeline.unet,
        ddim(pipeline),
    )  # fmt: skip


def load_base_pipeline(model: str, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """A diffusers pipeline of a MODEL, without safety checker, with a DDIM scheduler."""
    pipeline = _pipeline(model, dtype)
    pipeline.scheduler = ddim(pipeline)
    return pipeline


def ddim(pipeline: StableDiffusionPipeline) -> DDIMScheduler:
    """DDIM on the model's noise schedule. Latents are not confined to [-1, 1], so they are never
    clipped, which is what DDIM does where a configuration says nothing."""
    return DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)


def _pipeline(model: str, dtype: torch.dtype, **parts: Any) -> StableDiffusionPipeline:
    path = _local_path(model)
    where = str(path or model)
    try:
        if path is not None and path.is_file():
            return _from_single_file(path, dtype, **parts)
        return StableDiffusionPipeline.from_pretrained(
            where, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False,
            feature_extractor=None, use_safetensors=True, local_files_only=path is not None,
            **parts,
        )  # fmt: skip
    except BadInput:
        raise
    except Exception as error:
        first = " ".join(str(error).split())[:300]
        if path is None:
            raise BadInput(f"{model}: can't load it: {_OFFLINE_ADVICE} ({first})") from error
        raise BadInput(f"{where}: expected an SD 1.x model, can't load it: {first}") from error


def _local_path(model: str) -> Path | None:
    """The file or folder of a MODEL, checked to be SD 1.x; None for a hub id."""
    if model == "demo":
        return DEMO_FOLDER
    if model == "demo-community":
        return COMMUNITY_FILE
    path = Path(model)
    if not path.exists():
        looks_local = path.suffix in (".safetensors", ".ckpt") or model.count("/") != 1
        if looks_local:
            raise BadInput(f"{model}: no such file or folder, and no hub id (owner/name) either")
        return None
    from sdd_lora.checkpoint.layout import require_sd1

    require_sd1(path)
    return path


def _from_single_file(path: Path, dtype: torch.dtype, **parts: Any) -> StableDiffusionPipeline:
    """One file holds no tokenizer and no configuration: the embedded model's serve where the UNet
    is of its size, the hub's SD 1.5 configuration otherwise."""
    from sdd_lora.checkpoint.layout import describe

    small = json.loads((DEMO_FOLDER / "unet" / "config.json").read_text())
    widths = describe(path).unet_widths
    config = {"config": str(DEMO_FOLDER)} if widths == tuple(small["block_out_channels"]) else {}
    return StableDiffusionPipeline.from_single_file(
        str(path), torch_dtype=dtype, safety_checker=None, local_files_only=bool(config),
        **config, **parts,
    )  # fmt: skip
