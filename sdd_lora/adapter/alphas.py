"""The alpha of modules whose file stores none: from the header, or from peft's configuration.

| where | fields | written by |
|---|---|---|
| header: `lora_adapter_metadata` | `unet.lora_alpha`, `text_encoder.r`, … | diffusers |
| `adapter_config.json` beside the file | `lora_alpha`, `r`, … | peft |
| header: `lora_alpha` | one number | other trainers |
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdd_lora import sd1 as names
from sdd_lora.adapter.factors import Factors
from sdd_lora.errors import BadInput
from sdd_lora.progress import warn

PEFT_METADATA_KEY = "lora_adapter_metadata"
PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_MODEL_FILE = "adapter_model.safetensors"
_HEADER_ALPHA = "lora_alpha"


@dataclass(frozen=True)
class KnownAlphas:
    """peft's LoraConfig fields, and the `source` that they are from; none where nothing is known.

    `lora_adapter_metadata` has a prefix at each field, of the UNet or of the text encoder.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def of_file(
        cls, header: Mapping[str, str], config: Path | None, ranks: Mapping[str, int]
    ) -> "KnownAlphas":
        """From a file's header, else from `config` where there is one that is about these `ranks`
        by module. Raises BadInput for bad JSON.
        """
        if (text := header.get(PEFT_METADATA_KEY)) is not None:
            return cls(_json_object(text, PEFT_METADATA_KEY), PEFT_METADATA_KEY)
        if config is not None and config.is_file():
            text = config.read_bytes().decode("utf-8", "replace")
            found = cls(_json_object(text, PEFT_CONFIG_FILE), PEFT_CONFIG_FILE)
            if all(found._rank_of(name) in (None, rank) for name, rank in ranks.items()):
                return found
            warn(f"{config}: is about an adapter of other ranks than the one beside it: not used")
        if (text := header.get(_HEADER_ALPHA)) is not None:
            try:
                return cls({_HEADER_ALPHA: float(text)}, _HEADER_ALPHA)
            except ValueError:
                warn(f"the header's {_HEADER_ALPHA} is {text!r:.40}, no number: not used")
        return cls()

    def alpha_of(self, name: str, rank: int) -> float:
        """alpha, such that alpha / rank is the scale: as known, else the rank.

        Raises BadInput where a field is of a wrong type, or says DoRA.
        """
        if not self.fields:
            return float(rank)
        if self._field(name, "use_dora"):
            raise BadInput(f"{self.source}: DoRA, which is no plain delta: {WAY_OUT}")
        alpha = self._patterned(name, "alpha_pattern", self._field(name, "lora_alpha"))
        if alpha is None:
            return float(rank)
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            found = type(alpha).__name__
            raise BadInput(f"{self.source}: lora_alpha is a {found}; expected a number")
        root = float(rank) ** 0.5 if self._field(name, "use_rslora") else 1.0
        try:
            return float(alpha) * root
        except OverflowError as error:
            raise BadInput(f"{self.source}: lora_alpha is beyond any float") from error

    def _rank_of(self, name: str) -> Any:
        return self._patterned(name, "rank_pattern", self._field(name, "r"))

    def _field(self, name: str, field: str) -> Any:
        """A component's entry; `save_lora_adapter` writes the UNet's without a prefix."""
        prefix = names.TEXT_PREFIX if names.is_text(name) else names.UNET_PREFIX
        prefixed = self.source == PEFT_METADATA_KEY and names.is_text(name)
        return self.fields.get(prefix + field, None if prefixed else self.fields.get(field))

    def _patterned(self, name: str, field: str, default: Any) -> Any:
        patterns = self._field(name, field) or {}
        if not isinstance(patterns, dict):
            raise BadInput(f"{self.source}: {field} is no JSON object")
        return next((value for key, value in patterns.items() if self._matches(key, name)), default)

    def _matches(self, pattern: str, name: str) -> bool:
        """peft matches the end of a module's name; what diffusers writes are whole names."""
        plain = pattern.removeprefix("^")
        if not plain.replace(".", "").replace("_", "").isalnum():
            raise BadInput(f"{self.source}: the pattern {pattern!r} is no plain module name")
        return name == plain or name.endswith("." + plain)


#: How an adapter that is no plain LoRA can become one all the same.
WAY_OUT = (
    "merge it into a model with the tool that made it, then `sdd-lora extract` that model "
    "against its base"
)


def peft_metadata(factors: Mapping[str, Factors]) -> str:
    """The header's `lora_adapter_metadata` of the peft format: a LoraConfig per component, JSON.

    The text encoder's modules are named without `text_model.`, a level that transformers 5 dropped
    and that peft, matching endings, doesn't miss in older ones.
    """
    config: dict[str, Any] = {}
    for prefix, component in _components(factors).items():
        config |= {prefix + field: value for field, value in _lora_config(component).items()}
    return json.dumps(config, sort_keys=True)


def peft_config(factors: Mapping[str, Factors], base: str | None) -> str:
    """`adapter_config.json` of a peft folder, for a component's folded factors.

    Raises BadInput where the adapter changes both UNet and text encoder, of which a peft folder
    holds one.
    """
    components = _components(factors)
    if len(components) > 1:
        raise BadInput(
            "a peft folder is of one model, this adapter changes UNet and text encoder; "
            "convert it to a .safetensors file of format peft, which diffusers loads"
        )
    (component,) = components.values()
    config = _lora_config(component) | {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _lora_config(component: Mapping[str, Factors]) -> dict[str, Any]:
    ranks = {name: part.rank for name, part in component.items()}
    ((usual, _),) = Counter(ranks.values()).most_common(1)
    unusual = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _components(factors: Mapping[str, Factors]) -> dict[str, dict[str, Factors]]:
    """ "unet." and "text_encoder." → their modules, named as peft finds them in the model."""
    found: dict[str, dict[str, Factors]] = {}
    for name, part in factors.items():
        prefix = names.TEXT_PREFIX if names.is_text(name) else names.UNET_PREFIX
        found.setdefault(prefix, {})[name.removeprefix(names.TEXT_LAYERS_PREFIX)] = part
    return found


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is no JSON") from error
    if not isinstance(found, dict):
        raise BadInput(f"{where} is no JSON object")
    return found


def scalar(value: Any) -> float:
    """A stored alpha's value, of a float or whole type. Raises BadInput where it isn't one
    number."""
    array = np.asarray(value.detach().cpu().float() if hasattr(value, "detach") else value)
    if array.size != 1:
        raise BadInput(f"alpha has the shape {array.shape}; expected one number")
    if array.dtype.kind not in "fViu":
        raise BadInput(f"alpha is of dtype {array.dtype}; expected a number")
    return float(array.reshape(()).astype(np.float64))
