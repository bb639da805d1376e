"""Every format of adapter files: read all of them, write four.

| format | key | scale kept in |
|---|---|---|
| kohya | lora_unet_down_blocks_0_….lora_down.weight | .alpha |
| ldm | lora_unet_input_blocks_1_1_….lora_down.weight | .alpha |
| peft | unet.down_blocks.0.….lora_A.weight | header: lora_adapter_metadata |
| bare | down_blocks.0.….lora_A.weight (read only) | header: lora_adapter_metadata |
| attn-procs | unet.….processor.to_k_lora.down.weight | nothing: it is 1 |

Written files fold the scale into `up`, so that a reader who overlooks alpha is right all the same.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sdd_lora import sd1 as names
from sdd_lora.adapter.factors import Factors
from sdd_lora.errors import BadInput

FORMATS = ("kohya", "peft", "ldm", "attn-procs")
PEFT_METADATA_KEY = "lora_adapter_metadata"

_ENDINGS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
_WRITTEN: dict[str, tuple[Callable[[str], str], str, str]] = {
    "kohya": (names.kohya_stem, ".lora_down.weight", ".lora_up.weight"),
    "ldm": (names.ldm_stem, ".lora_down.weight", ".lora_up.weight"),
    "peft": (names.peft_stem, ".lora_A.weight", ".lora_B.weight"),
    "attn-procs": (names.attn_procs_stem, ".down.weight", ".up.weight"),
}

#: Endings of keys of what is no plain low-rank delta → what it is.
_OTHER_KINDS = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_magnitude_vector.weight": "DoRA",
    **{f".hada_{part}": "LoHa" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": "LoKr" for part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")},
    ".oft_blocks": "OFT",
    ".lora_mid.weight": "a Tucker-decomposed LoCon",
    ".lora_B.bias": "a LoRA with biases",
    ".diff": "a full difference",
    ".diff_b": "a full difference",
}
#: Marks in keys that only another family's adapters have, the first that fits counting.
_FAMILY_MARKS = {
    "FLUX": ("double_blocks", "single_blocks", "single_transformer_blocks"),
    "SD 3": ("joint_blocks", "lora_transformer_", "transformer.transformer_blocks"),
    "SDXL": ("lora_te1_", "lora_te2_", "text_encoder_2.", "add_embedding", "label_emb",
             *(f"transformer_blocks{dot}{n}{dot}" for n in range(1, 10) for dot in "._")),
    "SD 2": ("text_model_encoder_layers_12_", "encoder.layers.12."),
}  # fmt: skip


def split_key(key: str) -> tuple[str, str] | None:
    """A key's stem and part ("down", "up", "alpha"); None where it is no LoRA key."""
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


def decode_factors(tensors: Mapping[str, Any], header: Mapping[str, str]) -> dict[str, Factors]:
    """Factors per canonical module name, from a file of any format.

    `tensors` are numpy or torch arrays of any float dtype. Raises BadInput as `group` does, and
    where a value is bad.
    """
    modules = group({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    alphas = PeftAlphas(header)
    return {
        name: _factors(name, {part: tensors[key] for part, key in parts.items()}, alphas)
        for name, parts in modules.items()
    }


def encode_factors(factors: Mapping[str, Factors], format: str) -> dict[str, np.ndarray]:
    """Tensors (fp32) of one of `FORMATS`.

    kohya and ldm get one rank for all modules and alpha = rank: diffusers mis-scales files whose
    alphas differ. Raises BadInput where the format can't hold a module.
    """
    if format not in FORMATS:
        raise BadInput(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    if format == "attn-procs":
        _refuse_outside_attention(factors)
    folded = {name: part.folded() for name, part in factors.items()}
    if format in ("kohya", "ldm"):
        rank = max(part.rank for part in folded.values())
        folded = {name: part.padded(rank) for name, part in folded.items()}
    stem_of, down_ending, up_ending = _WRITTEN[format]
    tensors = {}
    for name, part in folded.items():
        stem = stem_of(name)
        tensors[stem + down_ending], tensors[stem + up_ending] = _shaped(part)
        if format in ("kohya", "ldm"):
            tensors[stem + ".alpha"] = np.array(part.alpha, np.float32)
    return tensors


def peft_metadata(factors: Mapping[str, Factors]) -> str:
    """The header's `lora_adapter_metadata` of the peft format: a LoraConfig per component, JSON.

    The text encoder's modules are named without `text_model.`, a level that transformers 5 dropped
    and that peft, matching endings, doesn't miss in older ones.
    """
    config: dict[str, Any] = {}
    for prefix, component in _components(factors).items():
        ranks = {name: part.rank for name, part in component.items()}
        ((usual, _),) = Counter(ranks.values()).most_common(1)
        unusual = {name: rank for name, rank in ranks.items() if rank != usual}
        fields = {
            "r": usual, "lora_alpha": usual, "rank_pattern": unusual, "alpha_pattern": unusual,
            "target_modules": sorted(ranks), "lora_dropout": 0.0, "bias": "none",
        }  # fmt: skip
        config |= {prefix + field: value for field, value in fields.items()}
    return json.dumps(config, sort_keys=True)


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


def scalar(value: Any) -> float:
    """alpha's value. Raises BadInput where it isn't one number."""
    array = to_float32(value)
    if array.size != 1:
        raise BadInput(f"alpha has the shape {array.shape}; expected one number")
    return float(array.reshape(()))


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


class PeftAlphas:
    """What `lora_adapter_metadata` says about scales."""

    def __init__(self, header: Mapping[str, str]) -> None:
        text = header.get(PEFT_METADATA_KEY)
        if text is None:
            self.config: dict[str, Any] | None = None
            return
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{PEFT_METADATA_KEY} of the header is no JSON") from error
        if not isinstance(config, dict):
            raise BadInput(f"{PEFT_METADATA_KEY} of the header is no JSON object")
        self.config = config

    def alpha_of(self, name: str, rank: int, stored: Any = None) -> float:
        """alpha, such that alpha / rank is the scale: as `stored` beside the factors, else as the
        header says, else the rank.
        """
        if stored is not None:
            return scalar(stored)
        if self.config is None:
            return float(rank)
        if self._field(name, "use_dora"):
            raise BadInput("DoRA, which is no plain delta: it can't be added to other adapters")
        alpha = self._field(name, "lora_alpha")
        patterns = self._field(name, "alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise BadInput(f"{PEFT_METADATA_KEY}: alpha_pattern is no JSON object")
        alpha = next((value for key, value in patterns.items() if _matches(key, name)), alpha)
        if alpha is None:
            return float(rank)
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            found = type(alpha).__name__
            raise BadInput(f"{PEFT_METADATA_KEY}: lora_alpha is a {found}; expected a number")
        root = float(rank) ** 0.5 if self._field(name, "use_rslora") else 1.0
        try:
            return float(alpha) * root
        except OverflowError as error:
            raise BadInput(f"{PEFT_METADATA_KEY}: lora_alpha is beyond any float") from error

    def _field(self, name: str, field: str) -> Any:
        """A component's entry; `save_lora_adapter` writes the UNet's without a prefix."""
        assert self.config is not None
        prefix = names.TEXT_PREFIX if names.is_text(name) else names.UNET_PREFIX
        bare = None if names.is_text(name) else self.config.get(field)
        return self.config.get(prefix + field, bare)


def _matches(pattern: str, name: str) -> bool:
    """peft matches the end of a module's name; what diffusers writes are whole names."""
    plain = pattern.removeprefix("^")
    if not plain.replace(".", "").replace("_", "").isalnum():
        raise BadInput(f"{PEFT_METADATA_KEY}: alpha_pattern {pattern!r} is no plain module name")
    return name == plain or name.endswith("." + plain)


def _factors(name: str, parts: dict[str, Any], alphas: PeftAlphas) -> Factors:
    try:
        down, up = to_float32(parts["down"]), to_float32(parts["up"])
        geometry = geometry_of(name, down.shape, up.shape)
        alpha = alphas.alpha_of(name, geometry.rank, parts.get("alpha"))
        out, rank = up.shape[:2]
        down = down.reshape(rank, math.prod(geometry.weight_shape[1:]))
        return Factors(down, up.reshape(out, rank), alpha, geometry.kernel)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from error


def _shaped(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """down and up as files hold them: 4-D of a convolution."""
    if factors.kernel is None:
        return factors.down, factors.up
    out, channels, *kernel = factors.weight_shape
    rank = factors.rank
    return factors.down.reshape(rank, channels, *kernel), factors.up.reshape(out, rank, 1, 1)


def _components(factors: Mapping[str, Factors]) -> dict[str, dict[str, Factors]]:
    """ "unet." and "text_encoder." → their modules, named as peft finds them in the model."""
    found: dict[str, dict[str, Factors]] = {}
    for name, part in factors.items():
        prefix = names.TEXT_PREFIX if names.is_text(name) else names.UNET_PREFIX
        found.setdefault(prefix, {})[name.removeprefix(names.TEXT_LAYERS_PREFIX)] = part
    return found


def format_of_key(key: str) -> str:
    """The format that a key is of."""
    if key.startswith("lora_"):
        ldm = any(mark in key for mark in ("_input_blocks_", "_middle_block_", "_output_blocks_"))
        return "ldm" if ldm else "kohya"
    if ".lora_A." in key or ".lora_B." in key:
        return "peft" if key.startswith((names.UNET_PREFIX, names.TEXT_PREFIX)) else "bare"
    return "attn-procs" if split_key(key) else "unknown"


def _why_unknown(unknown: list[str], count: int) -> str:
    for key in unknown:
        for ending, kind in _OTHER_KINDS.items():
            if key.endswith(ending):
                return f"{key}: {kind}; expected a plain LoRA (up and down factors)"
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


def _refuse_outside_attention(factors: Mapping[str, Factors]) -> None:
    outside = [name for name in factors if not names.is_attention(name)]
    if outside:
        raise BadInput(
            f"attn-procs holds attention modules alone; {len(outside)} others are in it, such as "
            f"{outside[0]}; convert to kohya or peft"
        )
