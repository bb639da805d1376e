"""A frozen base in 4 bits: NF4 of bitsandbytes (Dettmers et al. 2023, QLoRA) for linear layers.

The convolutions stay in the training's own precision: they hold 589 M of SD 1.5's 859.5 M
parameters, 1.18 GB in bf16, bitsandbytes has no 4-bit convolution, and unpacking one for every
forward would cost time where the whole already fits a card of 4 GB.
"""

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sdd_lora.errors import BadInput

_KIND = "nf4"
#: bytes a weight: half a byte, a scale of 8 bits for 64 of them, and one of fp32 for 256 scales
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)


def quantise(unet: UNet2DConditionModel, device: torch.device, dtype: torch.dtype) -> None:
    """Onto `device` in place: linear weights in NF4, norms in fp32, everything else in `dtype`,
    in which forwards compute. A UNet already packed stays as it is. Raises BadInput where
    bitsandbytes is missing."""
    if getattr(unet, "is_loaded_in_4bit", False):
        return
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise BadInput(
            f"training.base_precision: nf4 needs bitsandbytes, which is missing here ({error}); "
            "expected bf16, fp16 or fp32 without it"
        ) from error
    cast(unet, dtype)
    for name in linear_layers(unet):
        plain = unet.get_submodule(name)
        assert isinstance(plain, nn.Linear)
        packed = Linear4bit(
            plain.in_features,
            plain.out_features,
            plain.bias is not None,
            compute_dtype=dtype,
            quant_type=_KIND,
            device="meta",
        )
        packed.weight = Params4bit(
            plain.weight.data, requires_grad=False, quant_type=_KIND, module=packed
        )
        packed.bias = plain.bias
        parent, _, own = name.rpartition(".")
        setattr(unet.get_submodule(parent), own, packed.to(device))  # moving it packs it
    unet.to(device)
    unet.is_loaded_in_4bit = True  # peft asks for this before it adapts such layers


def cast(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    """To `dtype`, but norms to fp32: 4-bit layers answer in their input's dtype, so that the time
    embedding and the features it is added to are fp32, and a norm in half precision can't take
    fp32 on the CPU."""
    unet.to(dtype=dtype)
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.float()


def linear_layers(unet: UNet2DConditionModel) -> list[str]:
    """Names of the layers that `quantise` packs: all linear ones of a UNet without adapters."""
    return [name for name, module in unet.named_modules() if type(module) is nn.Linear]
