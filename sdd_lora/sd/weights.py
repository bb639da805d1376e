"""Weights of a UNet, whole or a part of it, onto a pipeline's: what full fine-tuning published."""

from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from sdd_lora.checkpoint.copying import as_array, read_bytes
from sdd_lora.checkpoint.extract import canonical_parameter
from sdd_lora.checkpoint.layout import read_any_header
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import Header, open_input
from sdd_lora.progress import progress
from sdd_lora.sd1 import same_shape


@torch.no_grad()
def apply_weights(unet: UNet2DConditionModel, path: Path) -> None:
    """Write a file's tensors over the parameters of a UNet without adapters, one at a time.

    The file is a .safetensors, or a legacy pickle of tensors (.pt, .bin, .ckpt), in diffusers' or
    LDM names, bare or prefixed. Raises BadInput, before anything is changed, unless every tensor in
    it has its one parameter of its shape.
    """
    path = Path(path)
    header = read_any_header(path)
    parameters = dict(unet.named_parameters())
    targets = _targets(header, parameters, path)
    with open_input(path) as file, progress("weights", len(targets)) as advance:
        for name, key in targets.items():
            value = as_array(read_bytes(file, header, key), header.tensors[key])
            parameters[name].copy_(_as_fp32(value).reshape(parameters[name].shape))
            advance()


def _targets(
    header: Header, parameters: dict[str, torch.nn.Parameter], path: Path
) -> dict[str, str]:
    """Parameter's name → the key of its new value, for every key of the file."""
    if not header.tensors:
        raise BadInput(f"{path}: expected weights of a UNet, found no tensor")
    targets: dict[str, str] = {}
    lost = [key for key in header.tensors if canonical_parameter(key) not in parameters]
    if lost:
        raise BadInput(
            f"{path}: {lost[0]}: the model's UNet has no such parameter ({len(lost)} of "
            f"{len(header.tensors)} keys have no place); expected weights of a UNet alone, whole "
            "or partial. A whole checkpoint is a MODEL; an adapter is given as such"
        )
    for key, info in header.tensors.items():
        name = canonical_parameter(key) or ""
        if name in targets:
            raise BadInput(f"{path}: {key} and {targets[name]} are both {name}; expected one")
        shape = tuple(parameters[name].shape)
        if not same_shape(info.shape, shape):
            raise BadInput(f"{path}: {key}: expected the shape {shape}, found {info.shape}")
        if info.dtype[0] not in "FB" or info.dtype == "BOOL":
            raise BadInput(f"{path}: {key}: expected floating-point numbers, found {info.dtype}")
        targets[name] = key
    return targets


def _as_fp32(value: np.ndarray) -> torch.Tensor:
    """As fp32, exactly, where torch can't take numpy's view of a dtype (bf16, fp8)."""
    known = value.dtype in (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))
    return torch.from_numpy(value.copy() if known else value.astype(np.float32))
