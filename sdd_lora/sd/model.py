"""The parts of an SD 1.x model: from the embedded one, a folder, one file, or a hub id."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from sdd_lora.checkpoint.copying import as_array, read_bytes
from sdd_lora.checkpoint.describe import ModelDescription, describe_model, require_sd1
from sdd_lora.checkpoint.locate import DEMO_FOLDER, local
from sdd_lora.errors import BadInput
from sdd_lora.io import torch_zip as pickles
from sdd_lora.io.safetensors import open_input, serialize

#: the UNet of SD 1.x where it differs from diffusers' defaults
SD1_UNET = {"sample_size": 64, "cross_attention_dim": 768}
SD1_CHANNELS = 4


def fingerprint(unet: UNet2DConditionModel) -> str:
    """SHA-256 of an unadapted UNet's cross-attention weights, names and shapes.

    Taken at fp16, so that a model keeps its fingerprint in another layout and as fp32 or fp16.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        if ".attn2." in name:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class TrainingParts:
    """What training needs of a model; the autoencoder is never loaded for it."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel | None
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    fingerprint: str


def load_training_parts(model: str) -> TrainingParts:
    """Tokenizer, text encoder, UNet (fp32, on the CPU) and a DDIM scheduler of a MODEL.

    Raises BadInput for what is missing, damaged, or no Stable Diffusion 1.x.
    """
    pipeline = _pipeline(model, torch.float32, vae=None)
    return TrainingParts(
        pipeline.tokenizer, pipeline.text_encoder, pipeline.unet,
        ddim(pipeline), fingerprint(pipeline.unet),
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


def require_model(model: str, **parts: Any) -> tuple[Path, ModelDescription]:
    """The file or folder of a MODEL, and what is in it; a hub id's files are downloaded, but those
    of `parts` that are None.

    Raises BadInput where it is missing, damaged, no Stable Diffusion 1.x, or made for more than
    prompts.
    """
    path = local(model) or _download(model, **parts)
    found = _require_text_to_image(path)
    if path.is_dir() and not _has_tokenizer(path / "tokenizer"):
        raise BadInput(
            f"{path}: expected tokenizer/ with tokenizer.json, or vocab.json and merges.txt, "
            "beside unet/ and text_encoder/; another copy of the model has it"
        )
    return path, found


def unet_config(model: str) -> dict[str, Any]:
    """A MODEL's UNet configuration, as diffusers has it; nothing is downloaded or loaded.

    A hub id is taken for SD 1.x itself, as is every single file of its widths. Raises BadInput for
    what is no Stable Diffusion 1.x.
    """
    path = local(model)
    if path is None:
        return dict(SD1_UNET)
    _require_text_to_image(path)
    if path.is_file():
        source = _configuration_for(path).get("config")
        if source is None:
            return dict(SD1_UNET)
        path = Path(source)
    config: dict[str, Any] = json.loads((path / "unet" / "config.json").read_text("utf-8"))
    return config


def _pipeline(model: str, dtype: torch.dtype, **parts: Any) -> StableDiffusionPipeline:
    path, found = require_model(model, **parts)
    options: dict[str, Any] = {"torch_dtype": dtype, "safety_checker": None} | parts
    try:
        if path.is_file():
            with _of_tensors_alone(path) as plain:
                return StableDiffusionPipeline.from_single_file(
                    str(plain), **_configuration_for(path), **options,
                    disable_mmap=plain != path,  # else it could not be removed everywhere
                )  # fmt: skip
        return StableDiffusionPipeline.from_pretrained(
            path, requires_safety_checker=False, feature_extractor=None, local_files_only=True,
            variant=_variant(found), **options,
        )  # fmt: skip
    except Exception as error:
        first = " ".join(str(error).split())[:300]
        if path.is_file() and "config" not in _configuration_for(path):
            first = (
                "a single file holds no tokenizer and no configuration, and SD 1.5's could not be "
                f"had from the hub; go online once, or give a diffusers folder ({first})"
            )
        raise BadInput(f"{path}: can't load it: {first}") from error


def _require_text_to_image(path: Path) -> ModelDescription:
    found = require_sd1(path)
    if found.in_channels != SD1_CHANNELS:
        kind = "an inpainting model" if found.inpainting else "a model for more than prompts"
        raise BadInput(
            f"{path}: expected a text-to-image model, whose UNet takes {SD1_CHANNELS} channels, "
            f"found {kind} with {found.in_channels}"
        )
    return found


def _has_tokenizer(folder: Path) -> bool:
    """Without these, transformers would make an empty one."""
    whole = (folder / "tokenizer.json").is_file()
    return whole or all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))


def _variant(found: ModelDescription) -> str | None:
    """Which weights of a folder to load, where it has none without a variant's name."""
    labels = [label.removeprefix("sharded ") for label in found.copies]
    return None if "weights" in labels else labels[0].removeprefix("variant ")


@contextmanager
def _of_tensors_alone(path: Path) -> Iterator[Path]:
    """A single file that diffusers reads: a legacy one that holds other objects too (a trainer's
    callbacks), which torch rightly refuses, as a temporary file of the model's tensors."""
    header = pickles.read_header(path) if pickles.is_pickle(path) else None
    if header is None or not header.refused:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model.safetensors"
        with open_input(path) as file, open(plain, "wb") as output:
            tensors = {
                key: as_array(read_bytes(file, header, key), info)
                for key, info in header.tensors.items() if not key.startswith("model_ema.")
            }  # fmt: skip
            output.writelines(serialize(tensors, {"format": "pt"}))
        del tensors
        yield plain


def _download(model: str, **parts: Any) -> Path:
    """What a pipeline needs of a hub repository, and no more."""
    try:
        folder = StableDiffusionPipeline.download(
            model, use_safetensors=True, safety_checker=None, feature_extractor=None, **parts
        )
    except Exception as error:
        first = " ".join(str(error).split())[:200]
        raise BadInput(
            f"{model}: not to be had from the hub ({first}). Offline, give a diffusers folder, "
            "a .safetensors file, or `demo` (the embedded model)"
        ) from error
    return Path(folder)


def _configuration_for(path: Path) -> dict[str, Any]:
    """A single file's configuration and tokenizer: the embedded model's where the UNet is of its
    size; SD 1.5's, which diffusers takes from the hub, otherwise."""
    small = json.loads((DEMO_FOLDER / "unet" / "config.json").read_text("utf-8"))
    if describe_model(path).unet_widths != tuple(small["block_out_channels"]):
        return {}
    return {"config": str(DEMO_FOLDER), "local_files_only": True}
