"""Which model a checkpoint is: its family, widths and inventory, from headers alone."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdd_lora import sd1
from sdd_lora.checkpoint.layout import (
    Checkpoint,
    Layout,
    TensorLocation,
    WeightSet,
    open_checkpoint,
    plain_key,
)
from sdd_lora.checkpoint.prediction import Prediction, prediction_of
from sdd_lora.errors import BadInput
from sdd_lora.io import torch_zip

FAMILIES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sdxl-refiner": "Stable Diffusion XL refiner",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux",
    "controlnet": "a ControlNet",
    "adapter": "an adapter (LoRA), not a model",
    "lora-inside": "a model with LoRA layers in it (peft's base_layer); call unload_lora_weights() "
    "after fuse_lora() and save it again",
    "quantised": "a quantised model (bitsandbytes), to which nothing can be added; use the model "
    "that it was made from",
    "other-unet": "a UNet of another structure",
    "unknown": "no diffusion model that this tool knows",
}
_TO_K = re.compile(
    r"((?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+"
    r"|(?:input_blocks\.\d+|middle_block|output_blocks\.\d+)\.\d+)"
    r"\.transformer_blocks\.(\d+)\.attn2\.to_k\.weight$"
)
#: Keys that only another family has, the surest first.
_MARKS = (
    ("lora-inside", re.compile(r"\.base_layer\.")),
    ("quantised", re.compile(r"\.quant_state\.bitsandbytes__|\.weight\.absmax$|\.SCB$")),
    ("adapter", re.compile(r"lora_|\.lora[._]|_lora\.")),
    ("controlnet", re.compile(r"^(control_model|controlnet_|input_hint_block|zero_convs)")),
    ("flux", re.compile(r"(^|\.)double_blocks\.|(^|\.)single_transformer_blocks\.")),
    ("sd3", re.compile(r"(^|\.)joint_blocks\.")),
)


@dataclass(frozen=True)
class ModelDescription:
    """A checkpoint, described for `inspect` and for whoever loads it.

    `dtypes` counts tensors by storage (safetensors' codes: F16, BF16, F8_E4M3, …) over the UNet's
    and the text encoder's files; `copies` labels the UNet's weight sets, and `unread` names further
    copies in a folder; `code` is what a legacy file's pickle would import, and nobody runs.
    `unet_widths` (the four levels) and `context_width` are () and 0 where the family is not SD 1.x.
    """

    path: Path
    family: str
    layout: Layout
    legacy: bool
    code: tuple[str, ...]
    dtypes: dict[str, int]
    copies: tuple[str, ...]
    missing: tuple[str, ...]
    in_channels: int
    unet_widths: tuple[int, ...]
    context_width: int
    has_ema: bool
    unread: tuple[str, ...]
    prediction: Prediction

    @property
    def inpainting(self) -> bool:
        return self.in_channels == 9

    @property
    def small(self) -> bool:
        """Whether the structure is SD 1.x's and the widths aren't, as in the embedded model."""
        return self.family == "sd1" and self.unet_widths != sd1.SD15.blocks


def describe_model(path: Path) -> ModelDescription:
    """Describe a MODEL of any family. Raises BadInput where it is missing or damaged."""
    return _describe_model(open_checkpoint(path))


def require_sd1(path: Path) -> ModelDescription:
    """`describe_model`, and BadInput where it is of another family or its UNet is incomplete."""
    return _describe_model(open_sd1(path))


def open_sd1(path: Path) -> Checkpoint:
    """`open_checkpoint`, and BadInput where its UNet is not SD 1.x's or incomplete."""
    checkpoint = open_checkpoint(path)
    family = family_of(checkpoint)
    if family != "sd1":
        found = FAMILIES[family]
        if "unet" in checkpoint.missing and family == "unknown":
            found = f"no UNet in it (missing: {', '.join(checkpoint.missing)})"
        raise BadInput(f"{path}: expected a Stable Diffusion 1.x model, found {found}")
    for weights in checkpoint.sets_of("unet"):
        if not weights.is_ema:
            _require_complete(checkpoint, weights)
    _require_all_known(checkpoint)
    return checkpoint


def family_of(checkpoint: Checkpoint) -> str:
    """A key of FAMILIES: by block structure first, then by widths."""
    shapes = {
        plain_key(key): info.shape
        for header in checkpoint.headers.values()
        for key, info in header.tensors.items()
    }
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith("model_ema.")}
    for family, mark in _MARKS:
        if any(mark.search(key) for key in shapes):
            return family
    blocks = _cross_attention_keys(shapes)
    if not blocks:
        return "unknown"
    contexts = {shape[-1] for shape in blocks.values()}
    if contexts == {2048}:
        return "sdxl"
    if contexts == {1280}:
        return "sdxl-refiner"
    modules = {m for weights in checkpoint.sets_of("unet") for m in weights.locations}
    expected = {f"{place}.transformer_blocks.0.attn2.to_k" for place in sd1.PLACES}
    if len(blocks) != len(expected) or not expected <= modules:
        return "other-unet"
    linear_projection = len(_shape(checkpoint, next(iter(sd1.PLACES)) + ".proj_in")) == 2
    return "sd2" if linear_projection or contexts == {1024} else "sd1"


def _describe_model(checkpoint: Checkpoint) -> ModelDescription:
    family = family_of(checkpoint)
    widths = _widths_of(checkpoint) if family == "sd1" else None
    conv_in = _shape(checkpoint, "conv_in")
    unets = checkpoint.sets_of("unet")
    tensors = [info for header in checkpoint.headers.values() for info in header.tensors.values()]
    headers = checkpoint.headers.values()
    pickles = [header for header in headers if isinstance(header, torch_zip.PickleHeader)]
    return ModelDescription(
        path=checkpoint.path,
        family=family,
        layout=checkpoint.layout,
        legacy=bool(pickles),
        code=tuple(dict.fromkeys(name for header in pickles for name in header.code)),
        dtypes=dict(Counter(info.dtype for info in tensors)),
        copies=tuple(weights.label for weights in unets),
        missing=checkpoint.missing,
        in_channels=conv_in[1] if len(conv_in) == 4 else 0,
        unet_widths=widths.blocks if widths else (),
        context_width=widths.context if widths else 0,
        has_ema=any(weights.is_ema for weights in unets),
        unread=tuple(path.relative_to(checkpoint.path).as_posix() for path in checkpoint.unread),
        prediction=prediction_of(checkpoint),
    )


def _shape(checkpoint: Checkpoint, module: str) -> tuple[int, ...]:
    """The shape of a module's weight; () where there is none."""
    location = checkpoint.find(module)
    return () if location is None else checkpoint.info(location).shape


def _widths_of(checkpoint: Checkpoint) -> sd1.Widths:
    """The widths of an SD 1.x UNet."""
    levels = {level: place for place, level in reversed(sd1.PLACES.items())}
    to_k = [_shape(checkpoint, f"{levels[n]}.transformer_blocks.0.attn2.to_k") for n in range(4)]
    first, second, third, last = (shape[0] for shape in to_k)  # of (width, context)
    return sd1.Widths((first, second, third, last), to_k[0][1])


def _require_complete(checkpoint: Checkpoint, weights: WeightSet) -> None:
    """Raises BadInput unless every linear and convolution weight of the UNet is there."""
    conv_in = weights.locations.get("conv_in")
    channels = checkpoint.info(conv_in).shape[1] if conv_in else 4
    for module, expected in sd1.unet_shapes(_widths_of(checkpoint), channels).items():
        location = weights.locations.get(module)
        if location is None:
            raise BadInput(
                f"{checkpoint.path}: {weights.label}: expected a complete Stable Diffusion 1.x "
                f"UNet, found no weight for {module}"
            )
        if (found := checkpoint.info(location).shape) != expected:
            raise BadInput(
                f"{location.file}: {location.key}: expected the shape {expected}, found {found}"
            )


def _require_all_known(checkpoint: Checkpoint) -> None:
    """Raises BadInput where a cross-attention weight is in none of the weight sets."""
    known = {at for weights in checkpoint.weight_sets for at in weights.locations.values()}
    for file, header in checkpoint.headers.items():
        for key in filter(_TO_K.search, header.tensors):
            if TensorLocation(file, key) not in known:
                raise BadInput(
                    f"{file}: {key}: of one more copy of the UNet, in unknown names, which an edit "
                    "would miss; take it out of the file"
                )


def _cross_attention_keys(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shape of each cross-attention's to_k, in diffusers' or LDM names without prefixes."""
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        if (match := _TO_K.search(key)) and len(shape) == 2:
            found[match.group()] = shape
    return found
