"""A pipeline from one file, as SD 1.x checkpoints are handed around: no hub is asked.

Such a file holds weights alone: the configuration and the tokenizer travel with the package, and
the prediction type is read from what stands in the file, or in a `.yaml` beside it.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel

from sdd_lora.checkpoint.copying import as_array, read_bytes
from sdd_lora.checkpoint.describe import ModelDescription
from sdd_lora.checkpoint.layout import read_any_header
from sdd_lora.checkpoint.locate import DEMO_FOLDER
from sdd_lora.checkpoint.prediction import Prediction
from sdd_lora.errors import BadInput
from sdd_lora.io import torch_zip
from sdd_lora.io.safetensors import Header, open_input, serialize
from sdd_lora.sd.clip_tokenizer import clip_tokenizer
from sdd_lora.sd1 import LDM_TEXT_PREFIX

#: SD 1.x's configurations in diffusers' layout, without weights
SD15_FOLDER = Path(str(files("sdd_lora.sd").joinpath("sd15")))


def configuration_of(unet_widths: tuple[int, ...]) -> Path:
    """The configurations for a UNet of these widths: the embedded model's folder, or SD 1.x's."""
    small = read_config(DEMO_FOLDER, "unet")
    return DEMO_FOLDER if unet_widths == tuple(small["block_out_channels"]) else SD15_FOLDER


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """The configuration of a part of a diffusers folder."""
    config: dict[str, Any] = json.loads((folder / part / "config.json").read_text("utf-8"))
    return config


def load_single_file(
    found: ModelDescription, dtype: torch.dtype, **parts: Any
) -> StableDiffusionPipeline:
    """A pipeline of the weights in one file; `parts` are taken as they are, None included."""
    path, configuration = found.path, configuration_of(found.unet_widths)
    header = read_any_header(path)
    if configuration == SD15_FOLDER:
        parts.setdefault("tokenizer", clip_tokenizer())
    if not any(key.startswith(f"{LDM_TEXT_PREFIX}text_model.") for key in header.tensors):
        parts.setdefault("text_encoder", _bare_text_encoder(path, header, configuration, dtype))
    with _of_tensors_alone(path) as plain:
        pipeline = StableDiffusionPipeline.from_single_file(
            str(plain),
            config=str(configuration),
            local_files_only=True,
            dtype=dtype,
            safety_checker=None,
            disable_mmap=plain != path,  # else it could not be removed everywhere
            **parts,
        )
    pipeline.scheduler.register_to_config(**_schedule_of(found.prediction))
    return pipeline


def load_vae_file(path: Path, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE in a file of its own, or in a whole model's."""
    keys = read_any_header(path).tensors
    key = next((key for key in keys if key.endswith("decoder.conv_in.weight")), None)
    if key is None:
        raise BadInput(f"{path}: expected a VAE, found no decoder.conv_in.weight")
    small = read_config(DEMO_FOLDER, "vae")
    is_small = keys[key].shape[0] == small["block_out_channels"][-1]
    return AutoencoderKL.from_single_file(
        str(path),
        config=str(DEMO_FOLDER if is_small else SD15_FOLDER),
        subfolder="vae",
        local_files_only=True,
        dtype=dtype,
    )


def _schedule_of(prediction: Prediction) -> dict[str, str | bool]:
    """Changes to the scheduler's configuration for what a file's UNet predicts."""
    changes: dict[str, str | bool] = {}
    if prediction.kind is not None:
        changes["prediction_type"] = prediction.kind
    if prediction.zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changes


def _bare_text_encoder(
    path: Path, header: Header, configuration: Path, dtype: torch.dtype
) -> CLIPTextModel:
    """The text encoder of a file whose keys lack the level `text_model`, as old merges do."""
    config = CLIPTextConfig.from_pretrained(configuration / "text_encoder")
    encoder = CLIPTextModel(config)
    names = {name.removeprefix("text_model."): name for name in encoder.state_dict()}
    tensors = {}
    with open_input(path) as file:
        for key, info in header.tensors.items():
            name = names.get(key.removeprefix(LDM_TEXT_PREFIX))
            if key.startswith(LDM_TEXT_PREFIX) and name is not None:
                array = as_array(read_bytes(file, header, key), info)
                tensors[name] = torch.from_numpy(array.astype("float32"))
    absent = names.keys() - {name.removeprefix("text_model.") for name in tensors}
    if lacking := sorted(name for name in absent if not name.endswith("position_ids")):
        key = LDM_TEXT_PREFIX + lacking[0]
        raise BadInput(f"{path}: expected a text encoder, found no {key}")
    encoder.load_state_dict(tensors, strict=False)
    return encoder.to(dtype).eval()


@contextmanager
def _of_tensors_alone(path: Path) -> Iterator[Path]:
    """A file that diffusers reads: of a legacy one that holds other objects too (a trainer's
    callbacks), which torch rightly refuses, a temporary file of the model's tensors."""
    header = torch_zip.read_pickle_header(path) if torch_zip.is_torch_file(path) else None
    if header is None or not header.refused:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "model.safetensors"
        with open_input(path) as file, open(plain, "wb") as output:
            tensors = {
                key: as_array(read_bytes(file, header, key), info)
                for key, info in header.tensors.items()
                if not key.startswith("model_ema.")
            }
            output.writelines(serialize(tensors, {"format": "pt"}))
        del tensors
        yield plain
