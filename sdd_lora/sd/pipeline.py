"""A diffusers pipeline of a MODEL with adapters on its UNet and text encoder, or other weights."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.weighted import AdaptersLike, with_weights
from sdd_lora.checkpoint.prediction import PredictionType
from sdd_lora.errors import BadInput
from sdd_lora.progress import warn
from sdd_lora.sd.devices import DTYPES, best_device, default_dtype
from sdd_lora.sd.model import another_encoder, load_base_pipeline, text_fingerprint
from sdd_lora.sd.prompts import skip_last_layers
from sdd_lora.sd.textual_inversion import add_embedding, named_embedding
from sdd_lora.sd.weights import apply_weights
from sdd_lora.sd1 import misfits


def load_pipeline(
    model: str | Path,
    adapters: AdaptersLike = (),
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    weights: str | Path | None = None,
    vae: str | None = None,
    prediction: PredictionType | None = None,
    clip_skip: int = 1,
    torch_dtype: torch.dtype | str | None = None,
    embeddings: Sequence[str] = (),
) -> StableDiffusionPipeline:
    """A `StableDiffusionPipeline` of MODEL; the adapters are live, not merged.

    `adapters`: Adapters, files, runs' folders or hub ids, each alone (weight 1), as "A:0.8" or as
    (A, 0.8). `dtype`, or as diffusers called it `torch_dtype`: torch's, or fp32, fp16 or bf16.
    `weights` is a file of a UNet's weights, whole or partial, that take the place of the model's;
    `vae` a MODEL or file whose VAE does. `prediction` is epsilon or v_prediction where the model's
    files don't say. `clip_skip` counts as user interfaces do: 1 takes the text encoder's last
    layer, 2 the one before. `embeddings` are files of learned words (textual inversion), FILE or
    NAME=FILE: prompts name them by the file's name, or by NAME. The device is CUDA, MPS or the CPU,
    whichever there is; the dtype fp16 on CUDA, else fp32. Raises BadInput for a model that is no
    SD 1.x and for adapters or weights that don't fit it.
    """
    model, parts = str(model), with_weights(adapters)
    if dtype is not None and torch_dtype is not None:
        raise BadInput("dtype and torch_dtype are one thing: expected one of them")
    device = torch.device(device) if device is not None else best_device()
    chosen = _dtype_named(dtype if torch_dtype is None else torch_dtype) or default_dtype(device)
    pipeline = load_base_pipeline(model, chosen, vae, prediction)
    pipeline.set_progress_bar_config(disable=True)
    if weights is not None:
        apply_weights(pipeline.unet, Path(weights))
    _tell_of_another_encoder(pipeline, parts, model)
    names = [f"adapter_{number}" for number in range(len(parts))]
    for name, (adapter, _) in zip(names, parts, strict=True):
        _check_adapter_fits(pipeline, adapter, model)
        arrays = adapter.on(partial(_own_weight, pipeline.unet)).to_state_dict("kohya")
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        with _without_notices():
            pipeline.load_lora_weights(tensors, adapter_name=name)
    if parts:
        pipeline.set_adapters(names, [weight for _, weight in parts])
    skip_last_layers(pipeline.text_encoder, clip_skip)
    for name, path in map(named_embedding, embeddings):
        add_embedding(pipeline, name, path)
    return pipeline.to(device)


@contextmanager
def _without_notices() -> Iterator[None]:
    """diffusers tells of each part of the model that an adapter leaves alone; what doesn't fit is
    refused before."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _dtype_named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its name, or itself. Raises BadInput for a name that is none."""
    if not isinstance(dtype, str):
        return dtype
    if dtype not in DTYPES:
        raise BadInput(f"dtype {dtype!r}: expected a torch.dtype, or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def sha256_of_parts(pipeline: StableDiffusionPipeline) -> str:
    """SHA-256 of all weights of text encoder, UNet and autoencoder, taken at fp16, so that a model
    keeps it in another layout and as fp32 or fp16."""
    digest = hashlib.sha256()
    for part in (pipeline.text_encoder, pipeline.unet, pipeline.vae):
        for tensor in part.state_dict().values():
            digest.update(tensor.detach().cpu().half().numpy().tobytes())
    return digest.hexdigest()


def _check_adapter_fits(pipeline: StableDiffusionPipeline, adapter: Adapter, model: str) -> None:
    """A loader would only warn of a module that the model lacks."""
    shapes = _weight_shapes(pipeline.unet, "")
    shapes |= _weight_shapes(pipeline.text_encoder, "text_encoder.")
    wrong = {
        name: factors.weight_shape
        for name, factors in adapter.modules.items()
        if not factors.fits(shapes.get(name, ()))
    }
    if problems := misfits(wrong, shapes):
        raise BadInput(f"{adapter.name} does not fit {model}: {problems[0]}")


def _tell_of_another_encoder(
    pipeline: StableDiffusionPipeline, adapters: Sequence[tuple[Adapter, float]], model: str
) -> None:
    """A portable adapter was made of what one text encoder makes of words. Weights in bf16 have
    lost the bits that tell which encoder they are."""
    if pipeline.text_encoder.dtype == torch.bfloat16:
        return
    portable = [adapter for adapter, _ in adapters if adapter.is_portable]
    made = {a.name: a.metadata.words.text_encoder for a in portable if a.metadata.words}
    found = text_fingerprint(pipeline.text_encoder) if made else None
    for name, digest in made.items():
        if digest is not None and digest != found:
            warn(another_encoder(name, model))


def _own_weight(unet: UNet2DConditionModel, name: str) -> np.ndarray:
    """A layer's own weight (out, in), fp32, without the adapters on it."""
    layer = unet.get_submodule(name)
    weight = getattr(layer, "base_layer", layer).weight
    return weight.detach().float().cpu().numpy()


def _weight_shapes(part: torch.nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of weights by module name; layers that carry LoRA go by their own name, and the text
    encoder's with and without the level that transformers 5 dropped."""
    shapes = {}
    for key, tensor in part.state_dict().items():
        if key.endswith(".weight") and "lora_" not in key:
            name = key.removesuffix(".weight").removesuffix(".base_layer")
            shapes[prefix + name] = tuple(tensor.shape)
            if prefix:
                shapes[f"{prefix}text_model.{name.removeprefix('text_model.')}"] = shapes[
                    prefix + name
                ]
    return shapes
