"""From the three models of a diffusers folder to one file in LDM names."""

import re
from collections.abc import Mapping
from typing import Any

from sdd_lora import sd1 as names
from sdd_lora.errors import BadInput

VAE_PREFIX = "first_stage_model."

_VAE_HEADS = {
    "conv_norm_out.": "norm_out.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
}
_VAE_RESNET = {"conv_shortcut.": "nin_shortcut."}
_VAE_ATTENTION = {
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
_VAE_BLOCK = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets\.(\d+)|downsamplers\.0|upsamplers\.0)\."
)


def as_ldm(
    unet: Mapping[str, Any], vae: Mapping[str, Any], text_encoder: Mapping[str, Any]
) -> dict[str, Any]:
    """One file's tensors in LDM names, from the state dicts of a diffusers folder's models.

    Works on numpy arrays and torch tensors alike; only the VAE's attention changes its shape, from
    (c, c) to (c, c, 1, 1). Raises BadInput where a key has no place in the LDM layout.
    """
    levels = 1 + max((int(match[2]) for key in vae if (match := _VAE_BLOCK.search(key))), default=0)
    result = {}
    for key, tensor in unet.items():
        result[names.LDM_UNET_PREFIX + _unet_key(key)] = tensor
    for key, tensor in vae.items():
        name = VAE_PREFIX + vae_key(key, levels)
        is_projection = ".attn_1." in name and len(tensor.shape) == 2
        result[name] = tensor.reshape(*tensor.shape, 1, 1) if is_projection else tensor
    for key, tensor in text_encoder.items():
        bare = key.removeprefix("text_model.")
        result[f"{names.LDM_TEXT_PREFIX}text_model.{bare}"] = tensor
    return result


def vae_key(key: str, levels: int) -> str:
    """The LDM name, unprefixed, of a key of diffusers' AutoencoderKL with that many levels.

    LDM counts the decoder's levels from the picture, diffusers from the latents.
    """
    side, dot, rest = key.partition(".")
    if side not in ("encoder", "decoder") or not dot:
        return key  # quant_conv, post_quant_conv
    if match := _VAE_BLOCK.match(rest):
        direction, level = match[1], int(match[2])
        if direction == "up":
            level = levels - 1 - level
        inner = f"block.{match[4]}." if match[4] else f"{direction}sample."
        leaf = rest[match.end() :]
        head = f"{direction}.{level}.{inner}"
        return f"{side}.{head}{_replaced(leaf, _VAE_RESNET) if match[4] else leaf}"
    renamed = _replaced(rest, _VAE_HEADS)
    if renamed.startswith("mid.attn_1."):
        renamed = "mid.attn_1." + _replaced(renamed.removeprefix("mid.attn_1."), _VAE_ATTENTION)
    return f"{side}.{renamed}"


def _replaced(key: str, heads: Mapping[str, str]) -> str:
    for head, other in heads.items():
        if key.startswith(head):
            return other + key.removeprefix(head)
    return key


def _unet_key(key: str) -> str:
    try:
        return names.to_ldm(key)
    except KeyError:
        raise BadInput(f"{key}: Stable Diffusion 1.x's UNet has no such tensor") from None
