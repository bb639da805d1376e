"""The parts of an SD 1.x model: from the embedded one, a folder, one file, or a hub id."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from sdd_lora.checkpoint.describe import ModelDescription, require_sd1
from sdd_lora.checkpoint.locate import local
from sdd_lora.checkpoint.prediction import PredictionType
from sdd_lora.errors import BadInput
from sdd_lora.io.download import download_pipeline
from sdd_lora.progress import warn
from sdd_lora.sd.prompts import embed
from sdd_lora.sd.single_file import (
    SD15_FOLDER,
    configuration_of,
    load_single_file,
    load_vae_file,
    read_config,
)

SD1_CHANNELS = 4
_NOISIEST = 999
#: side of a latent that tells enough of a UNet, at a sixteenth of the arithmetic
_PROBE_SIDE = 16
#: cosine of noise and what a UNet makes of it, below which it hardly predicts noise
_RETURNS_THE_NOISE = 0.5


def fingerprint(unet: UNet2DConditionModel) -> str:
    """SHA-256 of an unadapted UNet's cross-attention weights, names and shapes.

    Taken at fp16, so that a model keeps its fingerprint in another layout and as fp32 or fp16.
    """
    weights = unet.state_dict().items()
    return _digest_at_fp16((name, tensor) for name, tensor in weights if ".attn2." in name)


def _digest_at_fp16(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights):
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


def load_training_parts(model: str, prediction: PredictionType | None = None) -> TrainingParts:
    """Tokenizer, text encoder, UNet (fp32, on the CPU) and a DDIM scheduler of a MODEL.

    `prediction` is what the UNet predicts, where the model's files don't say. Raises BadInput for
    what is missing, damaged, or no Stable Diffusion 1.x.
    """
    pipeline = _pipeline(model, torch.float32, prediction, vae=None)
    return TrainingParts(
        pipeline.tokenizer,
        pipeline.text_encoder,
        pipeline.unet,
        ddim(pipeline),
        fingerprint(pipeline.unet),
    )


@dataclass
class TextParts:
    """What reads prompts, and a digest of its weights."""

    tokenizer: CLIPTokenizer
    encoder: CLIPTextModel
    fingerprint: str


def load_text_parts(model: str) -> TextParts:
    """Tokenizer and text encoder (fp32, on the CPU) of a MODEL, and nothing else of it.

    Raises BadInput for what is missing, damaged, or no Stable Diffusion 1.x.
    """
    pipeline = _pipeline(model, torch.float32, None, unet=None, vae=None)
    encoder = pipeline.text_encoder
    return TextParts(pipeline.tokenizer, encoder, text_fingerprint(encoder))


def text_fingerprint(encoder: CLIPTextModel) -> str:
    """A digest of a text encoder's weights, taken at fp16, so that a model keeps it in another
    layout and as fp32 or fp16."""
    return _digest_at_fp16(
        (name.removeprefix("text_model."), tensor)
        for name, tensor in encoder.state_dict().items()
        if tensor.is_floating_point()
    )[:16]


def another_encoder(name: str, model: str) -> str:
    """What is said of a portable adapter on a MODEL with another text encoder."""
    return (
        f"{name}: made with another text encoder than {model}'s, so it may miss; solve (`sdd-lora "
        f"stack {name}.safetensors --model {model} -o OUT`) makes it anew from its words, as "
        "`resolve=True` does where it is baked or converted"
    )


def load_base_pipeline(
    model: str,
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
    prediction: PredictionType | None = None,
) -> StableDiffusionPipeline:
    """A diffusers pipeline of a MODEL, without safety checker, with a DDIM scheduler.

    `vae` is a MODEL or a file whose VAE takes the place of the model's; `prediction` is epsilon or
    v_prediction, where the model's files say nothing of it, or the wrong thing.
    """
    parts = {} if vae is None else {"vae": load_vae(vae, dtype)}
    pipeline = _pipeline(model, dtype, prediction, **parts)
    pipeline.scheduler = ddim(pipeline)
    return pipeline


def load_vae(name: str, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE of a MODEL, of a VAE's own folder or hub id, or of one file. Raises BadInput where
    there is none."""
    path = local(name)
    try:
        if path is not None and path.is_file():
            return load_vae_file(path, dtype)
        folder, options = str(path or name), {"dtype": dtype}
        if path is not None:
            subfolder = "vae" if (path / "vae").is_dir() else None
            return AutoencoderKL.from_pretrained(
                folder, subfolder=subfolder, local_files_only=True, **options
            )
        try:
            return AutoencoderKL.from_pretrained(folder, subfolder="vae", **options)
        except OSError:
            return AutoencoderKL.from_pretrained(folder, **options)
    except BadInput:
        raise
    except Exception as error:
        first = " ".join(str(error).split())[:300]
        raise BadInput(f"{name}: expected a VAE, can't load one: {first}") from error


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
    path = local(model) or download_pipeline(model, **parts)
    found = _require_text_to_image(path)
    if path.is_dir() and not _has_tokenizer(path / "tokenizer"):
        raise BadInput(
            f"{path}: expected tokenizer/ with tokenizer.json, or vocab.json and merges.txt, "
            "beside unet/ and text_encoder/; another copy of the model has it"
        )
    return path, found


def unet_config(model: str) -> dict[str, Any]:
    """A MODEL's UNet configuration, as diffusers has it; nothing is downloaded or loaded.

    A hub id is taken for SD 1.x itself. Raises BadInput for what is no Stable Diffusion 1.x.
    """
    return part_configs(model, ("unet",))["unet"]


def part_configs(model: str, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Configurations of a MODEL's parts (unet, vae, text_encoder) by name, as `unet_config`."""
    path = local(model)
    if path is None:
        folder = SD15_FOLDER
    else:
        found = _require_text_to_image(path)
        folder = configuration_of(found.unet_widths) if path.is_file() else path
    return {part: read_config(folder, part) for part in parts}


def _pipeline(
    model: str, dtype: torch.dtype, prediction: PredictionType | None, **parts: Any
) -> StableDiffusionPipeline:
    path, found = require_model(model, **parts)
    _require_parts(found, parts)
    try:
        if path.is_file():
            pipeline = load_single_file(found, dtype, **parts)
        else:
            pipeline = StableDiffusionPipeline.from_pretrained(
                path,
                dtype=dtype,
                safety_checker=None,
                requires_safety_checker=False,
                feature_extractor=None,
                local_files_only=True,
                variant=_variant(found),
                **parts,
            )
    except BadInput:
        raise
    except Exception as error:
        first = " ".join(str(error).split())[:300]
        raise BadInput(f"{path}: can't load it: {first}") from error
    # a tokenizer's own limit may be missing, or another than the text encoder's positions
    positions = pipeline.text_encoder.config.max_position_embeddings
    pipeline.tokenizer.model_max_length = positions
    if prediction is not None:
        pipeline.scheduler.register_to_config(prediction_type=prediction)
    elif found.prediction.kind is None and pipeline.unet is not None:
        _warn_of_another_prediction(pipeline, path)
    return pipeline


@torch.no_grad()
def _warn_of_another_prediction(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Where no file says what the UNet predicts, ask the UNet: at t = 999, where a latent is all
    but pure noise, a UNet that predicts noise returns it (a cosine of 0.999 on the embedded model),
    and one that predicts v, α ε − σ x₀, an image's negative."""
    unet, size = pipeline.unet, min(_PROBE_SIDE, pipeline.unet.config.sample_size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, SD1_CHANNELS, size, size, generator=generator).to(unet.dtype)
    empty = embed([""], pipeline.tokenizer, pipeline.text_encoder).to(unet.dtype)
    output = unet(noise, torch.tensor(_NOISIEST), empty).sample
    cosine = float(torch.cosine_similarity(output.flatten().float(), noise.flatten().float(), 0))
    if cosine < _RETURNS_THE_NOISE:
        warn(
            f"{path}: no file says what its UNet predicts, and given noise it does not return it "
            f"(cosine {cosine:.2f}): is taken for epsilon; `prediction='v_prediction'` if it was "
            "trained so"
        )


def _require_parts(found: ModelDescription, parts: dict[str, Any]) -> None:
    """Raises BadInput, with the way out, for parts that a model lacks."""
    if "text_encoder" in found.missing:
        raise BadInput(
            f"{found.path}: holds no text encoder; give a whole model, and this file as "
            "`weights=FILE` where it holds a UNet"
        )
    if "vae" in found.missing and "vae" not in parts:
        raise BadInput(
            f"{found.path}: holds no VAE, which makes images of latents; give one as `vae=MODEL`: "
            "a model that has one, or a VAE's own file"
        )


def _require_text_to_image(path: Path) -> ModelDescription:
    found = require_sd1(path)
    if found.in_channels != SD1_CHANNELS:
        kind = "an inpainting model" if found.inpainting else "a model for more than prompts"
        raise BadInput(
            f"{path}: expected a text-to-image model, whose UNet takes {SD1_CHANNELS} channels, "
            f"found {kind} with {found.in_channels}"
        )
    if found.prediction.guidance_embedding:
        raise BadInput(
            f"{path}: a latent consistency model (LCM), whose UNet takes the guidance as an "
            "embedding (time_cond_proj_dim); expected a plain SD 1.x model, or one with LCM-LoRA"
        )
    if found.prediction.few_steps:
        _warn_of_few_steps(path, found.prediction.few_steps)
    return found


@cache
def _warn_of_few_steps(path: Path, sign: str) -> None:
    """Once a model: several parts of a run ask what it is."""
    warn(
        f"{path}: by its {sign} made for few steps (LCM, Turbo, …): guidance and many DDIM steps, "
        "by which adapters are trained and measured here, don't suit it; train on the model that "
        "it was made from, the adapter fits both. It draws with `scheduler='lcm'`, 4 to 8 steps "
        "and a guidance of 1 to 2"
    )


def _has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer; of none, transformers would make an empty one."""
    whole = (folder / "tokenizer.json").is_file()
    return whole or all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))


def _variant(found: ModelDescription) -> str | None:
    """Which weights of a folder to load, where it has none without a variant's name."""
    labels = [label.removeprefix("sharded ") for label in found.copies]
    return None if "weights" in labels else labels[0].removeprefix("variant ")
