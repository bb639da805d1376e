"""Names and shapes of SD 1.x's modules in every scheme that files use: data, and no tensors.

The canonical name of a module is diffusers': UNet modules bare
("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"), the text encoder's with a prefix
("text_encoder.text_model.encoder.layers.0.self_attn.q_proj").

| scheme | the same module |
|---|---|
| kohya | lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k |
| ldm | lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k |
| peft | unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k |
| bare | down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k |
| attn-procs | unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora |
| checkpoint | model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight |
| EMA copy | model_ema.diffusion_modelinput_blocks11transformer_blocks0attn2to_kweight |

"embeddings" is no module of a model: it is the prompts' embeddings, which all 32 to_k and to_v
read. A change of them is a change of each of these matrices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

Shape = tuple[int, ...]

UNET_PREFIX = "unet."
TEXT_PREFIX = "text_encoder."
TEXT_LAYERS_PREFIX = "text_encoder.text_model."
PEFT_FOLDER_PREFIX = "base_model.model."
COMFYUI_PREFIXES = ("diffusion_model.", "text_encoders.clip_l.transformer.")
LDM_UNET_PREFIX = "model.diffusion_model."
LDM_TEXT_PREFIX = "cond_stage_model.transformer."


@dataclass(frozen=True)
class Widths:
    """The widths that SD 1.x's structure leaves open: its four levels, and the text's."""

    blocks: tuple[int, int, int, int]
    context: int


SD15 = Widths((320, 640, 1280, 1280), 768)
#: The model that travels with the package.
DEMO = Widths((32, 64, 128, 128), 128)

#: Input width of attn2.to_k → family.
FAMILY_OF_CONTEXT = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}

ATTENTION_LEAVES = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_LEAVES = (*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
TEXT_LAYERS = 12

_RESNET_LEAVES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

#: diffusers prefix → LDM prefix, of everything outside the resnets.
_LDM_OF_BLOCK = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    **{
        f"down_blocks.{b}.attentions.{j}": f"input_blocks.{3 * b + j + 1}.1"
        for b, j in product(range(3), range(2))
    },
    **{f"down_blocks.{b}.downsamplers.0.conv": f"input_blocks.{3 * b + 3}.0.op" for b in range(3)},
    "mid_block.attentions.0": "middle_block.1",
    **{
        f"up_blocks.{b}.attentions.{j}": f"output_blocks.{3 * b + j}.1"
        for b, j in product(range(1, 4), range(3))
    },
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.upsamplers.0.conv": "output_blocks.8.2.conv",
}

_LDM_OF_RESNET = {
    **{
        f"down_blocks.{b}.resnets.{j}": f"input_blocks.{3 * b + j + 1}.0"
        for b, j in product(range(4), range(2))
    },
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.resnets.1": "middle_block.2",
    **{
        f"up_blocks.{b}.resnets.{j}": f"output_blocks.{3 * b + j}.0"
        for b, j in product(range(4), range(3))
    },
}

_TO_LDM = _LDM_OF_BLOCK | {
    f"{block}.{leaf}": f"{ldm_block}.{ldm_leaf}"
    for block, ldm_block in _LDM_OF_RESNET.items()
    for leaf, ldm_leaf in _RESNET_LEAVES.items()
}
_FROM_LDM = {ldm: name for name, ldm in _TO_LDM.items()}

#: The 16 transformer places, each with its level (index into `Widths.blocks`).
PLACES: dict[str, int] = {
    **{f"down_blocks.{b}.attentions.{j}": b for b in range(3) for j in range(2)},
    "mid_block.attentions.0": 3,
    **{f"up_blocks.{b}.attentions.{j}": 3 - b for b in range(1, 4) for j in range(3)},
}

#: The 64 matrices of the cross-attention.
CROSS_ATTENTION: tuple[str, ...] = tuple(
    f"{place}.transformer_blocks.0.attn2.{leaf}" for place in PLACES for leaf in ATTENTION_LEAVES
)

#: The change that a portable adapter makes, and the 32 matrices through which it acts.
EMBEDDINGS = "embeddings"
READ_EMBEDDINGS: tuple[str, ...] = tuple(
    name for name in CROSS_ATTENTION if name.endswith((".to_k", ".to_v"))
)


def to_ldm(path: str) -> str:
    """The LDM path of a diffusers UNet path, both unprefixed; KeyError where there is none."""
    return _replace_head(path, _TO_LDM)


def from_ldm(path: str) -> str:
    """The diffusers path of an LDM UNet path, both unprefixed; KeyError where there is none."""
    return _replace_head(path, _FROM_LDM)


def ema_keys(key: str) -> tuple[str, str]:
    """The two spellings under which an LDM file may hold the EMA copy of a UNet key.

    Derived forward only: with the dots gone, the way back is ambiguous.
    """
    short = key.removeprefix(LDM_UNET_PREFIX).replace(".", "")
    return f"model_ema.diffusion_model{short}", f"model_ema.{short}"


def unet_shapes(widths: Widths = SD15, in_channels: int = 4) -> dict[str, Shape]:
    """Every linear and convolution module of the UNet → shape of its weight.

    `in_channels` is 9 for inpainting models.
    """
    first, last = widths.blocks[0], widths.blocks[-1]
    time = 4 * first
    shapes: dict[str, Shape] = {
        "conv_in": (first, in_channels, 3, 3),
        "time_embedding.linear_1": (time, first),
        "time_embedding.linear_2": (time, time),
    }
    skips = [first]
    width = first
    for b, out in enumerate(widths.blocks):
        for j in range(2):
            shapes |= _resnet_shapes(f"down_blocks.{b}.resnets.{j}", width, out, time)
            width = out
            skips.append(width)
        if b < 3:
            shapes[f"down_blocks.{b}.downsamplers.0.conv"] = (width, width, 3, 3)
            skips.append(width)
    for j in range(2):
        shapes |= _resnet_shapes(f"mid_block.resnets.{j}", last, last, time)
    for b, out in enumerate(reversed(widths.blocks)):
        for j in range(3):
            shapes |= _resnet_shapes(f"up_blocks.{b}.resnets.{j}", width + skips.pop(), out, time)
            width = out
        if b < 3:
            shapes[f"up_blocks.{b}.upsamplers.0.conv"] = (width, width, 3, 3)
    shapes["conv_out"] = (4, first, 3, 3)
    for place, level in PLACES.items():
        shapes |= _transformer_shapes(place, widths.blocks[level], widths.context)
    return shapes


def text_encoder_shapes(width: int = 768, layers: int = TEXT_LAYERS) -> dict[str, Shape]:
    """The text encoder's linear modules → (out, in)."""
    sizes = {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    return {
        f"{TEXT_LAYERS_PREFIX}encoder.layers.{n}.{leaf}": sizes.get(leaf, (width, width))
        for n in range(layers)
        for leaf in TEXT_LEAVES
    }


@lru_cache
def module_shapes(widths: Widths = SD15, in_channels: int = 4) -> dict[str, Shape]:
    """Everything that an adapter may change → its shape: modules' weights, and the embeddings."""
    embeddings = {EMBEDDINGS: (widths.context, widths.context)}
    return unet_shapes(widths, in_channels) | text_encoder_shapes(widths.context) | embeddings


def same_shape(a: Shape, b: Shape) -> bool:
    """Whether two weights are of one shape; a 1×1 convolution and a matrix are."""
    return _without_ones(a) == _without_ones(b)


def misfits(deltas: Mapping[str, Shape], weights: Mapping[str, Shape]) -> list[str]:
    """A line for each module whose delta belongs to none of a model's `weights`."""
    return [
        f"{name}: changes a weight of {shape}, the model's is {weights.get(name, 'not there')}"
        for name, shape in deltas.items()
        if name not in weights or not same_shape(shape, weights[name])
    ]


@lru_cache
def known_modules() -> frozenset[str]:
    """Canonical names of every module that an SD 1.x adapter may touch."""
    return frozenset(unet_shapes()) | frozenset(text_encoder_shapes())


def is_text(name: str) -> bool:
    return name.startswith(TEXT_PREFIX)


def is_attention(name: str) -> bool:
    """Whether a weight or layer is of self- or cross-attention."""
    return ".attn1." in name or ".attn2." in name or ".self_attn." in name


def kohya_stem(name: str) -> str:
    """ "lora_unet_down_blocks_0_…" or "lora_te_text_model_…"."""
    if is_text(name):
        return "lora_te_" + name.removeprefix(TEXT_PREFIX).replace(".", "_")
    return "lora_unet_" + name.replace(".", "_")


def ldm_stem(name: str) -> str:
    """ "lora_unet_input_blocks_1_1_…": kohya's form under LDM block names."""
    if is_text(name):
        return kohya_stem(name)
    return "lora_unet_" + to_ldm(name).replace(".", "_")


def peft_stem(name: str) -> str:
    """ "unet.down_blocks.0.…"; the text encoder's names have their prefix already."""
    return name if is_text(name) else UNET_PREFIX + name


def attn_procs_stem(name: str) -> str:
    """ "unet.….attn2.processor.to_k_lora"; only attention modules have such a name."""
    if is_text(name):
        return f"{name}.lora_linear_layer"
    place, _, leaf = name.rpartition(".to_")
    return f"{UNET_PREFIX}{place}.processor.to_{leaf.removesuffix('.0')}_lora"


def peft_folder_stem(name: str) -> str:
    """ "base_model.model.down_blocks.0.…": peft's own, of a model apart."""
    return PEFT_FOLDER_PREFIX + name.removeprefix(TEXT_PREFIX)


def comfyui_stem(name: str) -> str:
    """ "diffusion_model.input_blocks.1.1.…": what ComfyUI's extraction writes."""
    unet, text = COMFYUI_PREFIXES
    return text + name.removeprefix(TEXT_PREFIX) if is_text(name) else unet + to_ldm(name)


def lycoris_stem(name: str) -> str:
    """ "lycoris_down_blocks_0_…": LyCORIS's wrapper of any module."""
    return "lycoris_" + name.removeprefix(TEXT_PREFIX).replace(".", "_")


@lru_cache
def module_of_stem() -> dict[str, str]:
    """Every stem by which any scheme but attn-procs calls a module → its canonical name."""
    schemes = (kohya_stem, ldm_stem, peft_stem, peft_folder_stem, comfyui_stem, lycoris_stem)
    table: dict[str, str] = {}
    for name in sorted(known_modules()):
        stems = [name, *(spell(name) for spell in schemes)]
        if is_text(name):
            stems.append(kohya_stem(name).replace("lora_te_", "lora_te1_"))
            # without the level that transformers 5 dropped
            stems += [stem.replace("text_model.", "").replace("text_model_", "") for stem in stems]
        table |= dict.fromkeys(stems, name)
    return table


def parse_stem(stem: str) -> str | None:
    """The canonical name of a module in any scheme; None where SD 1.x has no such module.

    `stem` is a key without its ending (".lora_down.weight", "_lora.down.weight", …).
    """
    if stem == EMBEDDINGS:
        return EMBEDDINGS
    plain = stem.replace(".processor.", ".")
    if plain.endswith(".to_out"):
        plain += ".0"
    return module_of_stem().get(plain)


def _without_ones(shape: Shape) -> Shape:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _replace_head(path: str, table: dict[str, str]) -> str:
    head, tail = path, ""
    while head not in table:
        head, dot, last = head.rpartition(".")
        if not dot:
            raise KeyError(path)
        tail = f".{last}{tail}"
    return table[head] + tail


def _resnet_shapes(prefix: str, wide_in: int, wide_out: int, time: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        f"{prefix}.conv1": (wide_out, wide_in, 3, 3),
        f"{prefix}.time_emb_proj": (wide_out, time),
        f"{prefix}.conv2": (wide_out, wide_out, 3, 3),
    }
    if wide_in != wide_out:
        shapes[f"{prefix}.conv_shortcut"] = (wide_out, wide_in, 1, 1)
    return shapes


def _transformer_shapes(place: str, width: int, context: int) -> dict[str, Shape]:
    block = f"{place}.transformer_blocks.0"
    shapes: dict[str, Shape] = {
        f"{place}.proj_in": (width, width, 1, 1),
        f"{place}.proj_out": (width, width, 1, 1),
        f"{block}.ff.net.0.proj": (8 * width, width),  # GEGLU: value and gate
        f"{block}.ff.net.2": (width, 4 * width),
    }
    for attention, source in (("attn1", width), ("attn2", context)):
        for leaf in ATTENTION_LEAVES:
            wide_in = source if leaf in ("to_k", "to_v") else width
            shapes[f"{block}.{attention}.{leaf}"] = (width, wide_in)
    return shapes
