"""Every format of adapter files: read all of them, write four.

| format | key | scale kept in |
|---|---|---|
| kohya | lora_unet_down_blocks_0_….lora_down.weight | .alpha |
| ldm | lora_unet_input_blocks_1_1_….lora_down.weight | .alpha |
| peft | unet.down_blocks.0.….lora_A.weight | header: lora_adapter_metadata |
| attn-procs | unet.….processor.to_k_lora.down.weight | nothing: it is 1 |
| portable | embeddings.lora_down.weight | nothing: it is 1 |
| bare (read only) | down_blocks.0.….lora_A.weight | header: lora_adapter_metadata |
| peft-folder (read) | base_model.model.down_blocks.0.….lora_A.weight | adapter_config.json |
| comfyui (read only) | diffusion_model.input_blocks.1.1.….lora_up.weight | nothing, or .alpha |
| lycoris (read only) | lycoris_down_blocks_0_….lora_down.weight | .alpha |

Written files fold the scale into `up`, so that a reader who overlooks alpha is right all the same
wherever the modules are of one rank.

A portable adapter changes the prompts' embeddings, for any model of their width. No other program
reads it: on a model's weights it becomes an adapter of one of the other formats (`Adapter.on`).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdd_lora import sd1 as names
from sdd_lora.adapter.alphas import PEFT_CONFIG_FILE, WAY_OUT, KnownAlphas, scalar
from sdd_lora.adapter.factors import EmbeddingFactors, Factors
from sdd_lora.errors import BadInput
from sdd_lora.progress import warn

FORMATS = ("kohya", "peft", "ldm", "attn-procs", "portable")

_ENDINGS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
#: peft's, with or without the name that an adapter had in memory: `.lora_A.default.weight`.
_PEFT_ENDING = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
_WRITTEN: dict[str, tuple[Callable[[str], str], str, str]] = {
    "kohya": (names.kohya_stem, ".lora_down.weight", ".lora_up.weight"),
    "ldm": (names.ldm_stem, ".lora_down.weight", ".lora_up.weight"),
    "peft": (names.peft_stem, ".lora_A.weight", ".lora_B.weight"),
    "peft-folder": (names.peft_folder_stem, ".lora_A.weight", ".lora_B.weight"),
    "attn-procs": (names.attn_procs_stem, ".down.weight", ".up.weight"),
    "portable": (str, ".lora_down.weight", ".lora_up.weight"),
}
#: stable-diffusion.cpp takes the rank from the last dimension that isn't 1, as ggml counts them.
_LEAST_KOHYA_RANK = 2

_BY_FIRST_WORD = {f"{names.EMBEDDINGS}.": "portable", "lycoris_": "lycoris"}

#: Endings of keys of what is no plain low-rank delta → what it is.
_OTHER_KINDS = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_magnitude_vector.weight": "DoRA",
    ".lora_magnitude_vector.default.weight": "DoRA",
    **{f".hada_{part}": "LoHa" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": "LoKr" for part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")},
    ".oft_blocks": "OFT",
    ".oft_diag": "OFT",
    ".on_input": "(IA)³",
    ".lora_mid.weight": "a Tucker-decomposed LoCon",
    ".lora_B.bias": "a LoRA with biases",
    ".w_norm": "a trained norm",
    ".b_norm": "a trained norm",
    ".diff": "a full difference",
    ".diff_b": "a full difference",
}
#: Textual inversions that kohya's trainer and A1111 put into a LoRA's file.
_BUNDLED_EMBEDDING = "bundle_emb."
#: Marks in keys that only another family's adapters have, the first that fits counting.
_FAMILY_MARKS = {
    "FLUX": ("double_blocks", "single_blocks", "single_transformer_blocks"),
    "SD 3": ("joint_blocks", "lora_transformer_", "transformer.transformer_blocks"),
    "SDXL": (
        "lora_te2_",
        "text_encoder_2.",
        "add_embedding",
        "label_emb",
        *(f"transformer_blocks{dot}{n}{dot}" for n in range(1, 10) for dot in "._"),
    ),
    "SD 2": ("text_model_encoder_layers_12_", "encoder.layers.12."),
}


def split_key(key: str) -> tuple[str, str] | None:
    """A key's stem and part ("down", "up", "alpha"); None where it is no LoRA key."""
    if found := _PEFT_ENDING.fullmatch(key):
        return found[1], "down" if found[2] == "A" else "up"
    for ending, part in _ENDINGS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), part
    return None


def format_of(keys: Iterable[str]) -> str:
    """The format of a file by its keys; the most frequent one where they are mixed."""
    counted = Counter(format_of_key(key) for key in keys if not key.endswith(".alpha"))
    return counted.most_common(1)[0][0] if counted else "empty"


def looks_like_adapter(keys: Iterable[str]) -> bool:
    """Whether any key is a LoRA's: what tells an adapter from a checkpoint."""
    return any(split_key(key) or key.endswith(tuple(_OTHER_KINDS)) for key in keys)


def group(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, str]]:
    """Canonical module name → part ("down", "up", "alpha") → key, from keys and shapes alone.

    Raises BadInput where a key is unknown (naming the family it belongs to, if that can be told),
    a module is there twice, or a factor is missing.
    """
    modules: dict[str, dict[str, str]] = {}
    unknown = []
    for key in shapes:
        if key.startswith(_BUNDLED_EMBEDDING):
            continue
        split = split_key(key)
        name = names.parse_stem(split[0]) if split else None
        if split is None or name is None:
            unknown.append(key)
        elif split[1] in modules.setdefault(name, {}):
            raise BadInput(f"{name} is there twice, under two spellings; the second is {key}")
        else:
            modules[name][split[1]] = key
    if unknown:
        raise BadInput(_why_unknown(unknown, len(shapes)))
    if not modules:
        raise BadInput("no tensors: there is no adapter in it")
    for name, parts in modules.items():
        for part in ("down", "up"):
            if part not in parts:
                raise BadInput(f"{name}: the factor {part!r} is missing")
    _refuse_other_widths({name: shapes[parts["down"]] for name, parts in modules.items()})
    return modules


def bundled_embeddings(keys: Iterable[str]) -> list[str]:
    """Names of the textual inversions that lie beside an adapter in its file."""
    found = (key.split(".")[1] for key in keys if key.startswith(_BUNDLED_EMBEDDING))
    return list(dict.fromkeys(found))


def known_alphas(
    modules: Mapping[str, Mapping[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    header: Mapping[str, str],
    path: Path | None,
) -> KnownAlphas:
    """The alphas that a file doesn't store beside its factors; peft's configuration beside the
    file is about peft's keys alone."""
    config = None
    if path is not None and format_of(shapes) in ("peft", "bare", "peft-folder"):
        config = path.with_name(PEFT_CONFIG_FILE)
    ranks = {name: shapes[parts["down"]][0] for name, parts in modules.items()}
    return KnownAlphas.of_file(header, config, ranks)


def decode_factors(
    tensors: Mapping[str, Any], header: Mapping[str, str], path: Path | None = None
) -> dict[str, Factors]:
    """Factors per canonical module name, from a file of any format.

    `tensors` are numpy or torch arrays of any float dtype. `path` is the file that they are from.
    Raises BadInput as `group` does, where a value is bad, and for two adapters in one file.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    modules = group(shapes)
    if embeddings := bundled_embeddings(tensors):
        shown = ", ".join(embeddings)
        warn(f"textual inversions beside the adapter are not part of it, and left out: {shown}")
    if names.EMBEDDINGS in modules and len(modules) > 1:
        raise BadInput(
            f"a portable adapter and {len(modules) - 1} modules of one for a model in one file; "
            "expected a file of each"
        )
    alphas = known_alphas(modules, shapes, header, path)
    return {
        name: _factors(name, {part: tensors[key] for part, key in parts.items()}, alphas)
        for name, parts in modules.items()
    }


def arranged(factors: Mapping[str, Factors], format: str) -> dict[str, Factors]:
    """The same deltas as a file of a format holds them: with alpha = rank, but for kohya and ldm,
    which get one alpha for all modules.
    """
    folded = {name: part.folded() for name, part in factors.items()}
    if format not in ("kohya", "ldm"):
        return folded
    return _with_one_alpha(folded, _LEAST_KOHYA_RANK if format == "kohya" else 1)


def encode_factors(factors: Mapping[str, Factors], format: str) -> dict[str, np.ndarray]:
    """Tensors (fp32) of one of `FORMATS`, of factors as `arranged` for it.

    Raises BadInput where the format can't hold a module.
    """
    if format not in _WRITTEN:
        raise BadInput(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    _refuse_other_kind(factors, format)
    if format == "attn-procs":
        _refuse_outside_attention(factors)
    stem_of, down_ending, up_ending = _WRITTEN[format]
    tensors = {}
    for name, part in factors.items():
        stem = stem_of(name)
        tensors[stem + down_ending], tensors[stem + up_ending] = _shaped(part)
        if format in ("kohya", "ldm"):
            tensors[stem + ".alpha"] = np.array(part.alpha, np.float32)
    return tensors


def _with_one_alpha(folded: Mapping[str, Factors], least_rank: int) -> dict[str, Factors]:
    """The same deltas, exactly, with one alpha for all: diffusers mis-scales others.

    Each module keeps its rank as nearly as alpha / rank can be a power of two: alpha is the highest
    rank, or somewhat more where that makes the file smaller.
    """
    ranks = {name: max(part.rank, least_rank) for name, part in folded.items()}
    highest = max(ranks.values())

    def padded(alpha: int) -> dict[str, int]:
        allowed = [alpha >> k for k in range(alpha.bit_length()) if alpha % (1 << k) == 0]
        return {name: min(n for n in allowed if n >= rank) for name, rank in ranks.items()}

    def parameters(alpha: int) -> int:
        wide = {name: sum(part.weight_shape[:2]) for name, part in folded.items()}
        return sum(rank * wide[name] for name, rank in padded(alpha).items())

    steps = [1 << k for k in range(highest.bit_length() + 1)]
    alpha = min((-(-highest // step) * step for step in steps), key=parameters)
    return {
        name: folded[name].padded(rank).with_alpha(float(alpha))
        for name, rank in padded(alpha).items()
    }


class Geometry(NamedTuple):
    """What the shapes of a module's factors say; of a linear module, the kernel is None."""

    rank: int
    kernel: tuple[int, int] | None
    weight_shape: tuple[int, ...]


def geometry_of(name: str, down: tuple[int, ...], up: tuple[int, ...]) -> Geometry:
    """Rank, kernel and the changed weight's shape, however the factors are stored: a convolution's
    may be 2-D where it is 1×1, and a linear module's 4-D, as of a 1×1 convolution.

    Raises BadInput where the shapes are no pair of factors.
    """
    if len(down) not in (2, 4) or len(up) not in (2, 4) or any(n != 1 for n in up[2:]):
        raise BadInput(f"down {down} and up {up}; expected 2-D, or 4-D with a 1×1 up")
    rank, out = down[0], up[0]
    if rank == 0 or up[1] != rank:
        raise BadInput(f"down {down} and up {up} don't fit; expected one rank, of 1 or more")
    kernel = (down[2], down[3]) if len(down) == 4 else (1, 1)
    if kernel == (1, 1) and name not in _convolutions():
        return Geometry(rank, None, (out, down[1]))
    return Geometry(rank, kernel, (out, down[1], *kernel))


@lru_cache
def _convolutions() -> frozenset[str]:
    return frozenset(name for name, shape in names.unet_shapes().items() if len(shape) == 4)


def to_float32(value: Any) -> np.ndarray:
    """A numpy or torch array of any float dtype as numpy fp32; raises BadInput for other kinds."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.is_floating_point():
            value = value.float()
        value = value.numpy()
    require_float(value.dtype)
    return np.asarray(value, np.float32)


def require_float(dtype: np.dtype) -> None:
    """Raises BadInput for whole numbers, truth values and the like."""
    if dtype.kind not in "fV":  # ml_dtypes' types are of kind V or f
        raise BadInput(f"dtype {dtype}; expected a float type")


def _factors(name: str, parts: dict[str, Any], alphas: KnownAlphas) -> Factors:
    try:
        down, up = to_float32(parts["down"]), to_float32(parts["up"])
        geometry = geometry_of(name, down.shape, up.shape)
        stored = parts.get("alpha")
        alpha = alphas.alpha_of(name, geometry.rank) if stored is None else scalar(stored)
        out, rank = up.shape[:2]
        down = down.reshape(rank, math.prod(geometry.weight_shape[1:]))
        kind = EmbeddingFactors if name == names.EMBEDDINGS else Factors
        return kind(down, up.reshape(out, rank), alpha, geometry.kernel)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from error


def _shaped(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """down and up as files hold them: 4-D of a convolution."""
    if factors.kernel is None:
        return factors.down, factors.up
    out, channels, *kernel = factors.weight_shape
    rank = factors.rank
    return factors.down.reshape(rank, channels, *kernel), factors.up.reshape(out, rank, 1, 1)


def format_of_key(key: str) -> str:
    """The format that a key is of."""
    for start, format in _BY_FIRST_WORD.items():
        if key.startswith(start):
            return format
    if key.startswith("lora_"):
        ldm = any(mark in key for mark in ("_input_blocks_", "_middle_block_", "_output_blocks_"))
        return "ldm" if ldm else "kohya"
    if key.startswith(names.COMFYUI_PREFIXES):
        return "comfyui"
    if _PEFT_ENDING.fullmatch(key):
        if key.startswith(names.PEFT_FOLDER_PREFIX):
            return "peft-folder"
        return "peft" if key.startswith((names.UNET_PREFIX, names.TEXT_PREFIX)) else "bare"
    return "attn-procs" if split_key(key) else "unknown"


def _why_unknown(unknown: list[str], count: int) -> str:
    for key in unknown:
        for ending, kind in _OTHER_KINDS.items():
            if key.endswith(ending):
                return f"{key}: {kind}; expected a plain LoRA (up and down factors): {WAY_OUT}"
    for family, marks in _FAMILY_MARKS.items():
        for key in unknown:
            if any(mark in key for mark in marks):
                return f"an adapter for {family}; expected one for SD 1.x (the key {key} tells)"
    shown = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
    return (
        f"{len(unknown)} of {count} keys are no LoRA keys of SD 1.x: {shown}; "
        "a checkpoint is read by bake and extract, not as an adapter"
    )


def _refuse_other_widths(downs: Mapping[str, tuple[int, ...]]) -> None:
    """The cross-attention's input width tells SD 1 from SD 2 and SDXL."""
    for name, shape in downs.items():
        family = names.FAMILY_OF_CONTEXT.get(shape[-1]) if shape else None
        if name.endswith((".attn2.to_k", ".attn2.to_v")) and family in ("SD 2", "SDXL"):
            raise BadInput(
                f"an adapter for {family}; expected one for SD 1.x "
                f"({name} takes {shape[-1]} inputs)"
            )


def _refuse_other_kind(factors: Mapping[str, Factors], format: str) -> None:
    portable = names.EMBEDDINGS in factors
    if portable and format != "portable":
        raise BadInput(
            f"a portable adapter is of no model, and {format} is a format for one; make it one "
            "model's first (adapter_on, or `sdd-lora convert FILE --base MODEL`)"
        )
    if format == "portable" and not portable:
        raise BadInput("an adapter for one model can't be made portable; erase makes such")


def _refuse_outside_attention(factors: Mapping[str, Factors]) -> None:
    outside = [name for name in factors if not names.is_attention(name)]
    if outside:
        raise BadInput(
            f"attn-procs holds attention modules alone; {len(outside)} others are in it, such as "
            f"{outside[0]}; convert to kohya or peft"
        )
