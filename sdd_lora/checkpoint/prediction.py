"""What a UNet predicts, by its scheduler's file, a YAML beside it or its own header.

A v-prediction model that is sampled or trained as one that predicts noise gives pictures of noise,
and its weights alone don't tell the two apart.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sdd_lora.checkpoint.history import HISTORY_KEY
from sdd_lora.checkpoint.layout import Checkpoint
from sdd_lora.io.atomic import atomic_output
from sdd_lora.progress import warn

PredictionType = Literal["epsilon", "v_prediction"]

_SCHEDULER = Path("scheduler", "scheduler_config.json")
#: Spellings of LDM configurations, ModelSpec and diffusers.
_SPELLINGS: dict[str, PredictionType] = {
    "eps": "epsilon",
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
}
#: samplers of models that draw in few steps, and words by which people name such models
_FEW_STEP_SAMPLERS = ("LCMScheduler", "TCDScheduler")
_FEW_STEP_WORDS = re.compile(
    r"(?<![a-z])(lcm|turbo|lightning|hyper(-?sd)?|tcd|dmd2?)(?![a-z])", re.IGNORECASE
)
#: where A1111's merger, ModelSpec and `bake` keep the names of what went into a file
_INGREDIENT_KEYS = ("sd_merge_models", "sd_merge_recipe", "modelspec.merged_from", HISTORY_KEY)
_METADATA_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")


@dataclass(frozen=True)
class Prediction:
    """A UNet's target, and whether its noise schedule ends in pure noise; None where nothing says.

    `few_steps`: by which sign it is an LCM, Turbo or like model, merged into SD 1.x; "" for none.
    `guidance_embedding`: whether the UNet takes the guidance scale as an input, as distilled LCM
    models do (`time_cond_proj_dim`); they are not sampled with two passes a step.
    """

    kind: PredictionType | None
    zero_terminal_snr: bool | None
    guidance_embedding: bool
    few_steps: str = ""


def prediction_of(checkpoint: Checkpoint) -> Prediction:
    """Read the prediction of a model. A file beside it that can't be read is warned of."""
    path = checkpoint.path
    keys = {key for header in checkpoint.headers.values() for key in header.tensors}
    guided = any(key.endswith(".cond_proj.weight") for key in keys)
    if path.is_dir():
        scheduler = _content(path / _SCHEDULER)
        kind = _SPELLINGS.get(str(scheduler.get("prediction_type")))
        zero = scheduler.get("rescale_betas_zero_snr")
        sampler = str(scheduler.get("_class_name"))
        downloaded = path.parent.name == "snapshots"  # the hub's cache: the repository's folder
        sign = few_step_name(path.parents[1].name if downloaded else path.name)
        if sampler in _FEW_STEP_SAMPLERS:
            sign = f"scheduler {sampler}"
        return Prediction(kind, None if zero is None else bool(zero), guided, sign)
    marked: PredictionType | None = "v_prediction" if "v_pred" in keys else None
    (header,) = checkpoint.headers.values()
    named = [_SPELLINGS.get(header.metadata.get(key, "").lower()) for key in _METADATA_KEYS]
    configured = _parameterization(_content(config_of(path)))
    kind = configured or marked or next(filter(None, named), None)
    title = header.metadata.get("modelspec.title", "")
    sign = few_step_name(path.stem) or few_step_name(title)
    merged = " ".join(header.metadata.get(key, "") for key in _INGREDIENT_KEYS)
    if not sign and (found := _FEW_STEP_WORDS.search(merged)):
        sign = f"record of what was merged into it ({found[0]})"
    return Prediction(kind, True if "ztsnr" in keys else None, guided, sign)


def few_step_name(name: str) -> str:
    """ "dreamshaper_8LCM" → "name (LCM)"; "" where a name says nothing of few steps."""
    found = _FEW_STEP_WORDS.search(name)
    return f"name ({found[0]})" if found else ""


def config_of(file: Path) -> Path:
    """The LDM configuration that user interfaces read beside a single file."""
    other = file.with_suffix(".yml")
    return other if other.is_file() else file.with_suffix(".yaml")


def copy_config(model: Path, output: Path) -> str | None:
    """Give a written file the configuration of the one that it was made from.

    Returns a warning where another configuration stands in the way.
    """
    source, target = config_of(model), config_of(output)
    if not source.is_file() or source == target:
        return None
    if target.is_file():
        if target.read_bytes() == source.read_bytes():
            return None
        return f"{target}: user interfaces read it, and it is not the model's own, {source}"
    with open(source, "rb") as read, atomic_output(target) as written:
        shutil.copyfileobj(read, written)
    return None


def _content(file: Path) -> Mapping[str, Any]:
    """A JSON or YAML mapping; empty where there is none."""
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        first = " ".join(str(error).split())[:100]
        warn(f"{file}: not read, so the model's prediction type may be missed: {first}")
        return {}
    return content if isinstance(content, Mapping) else {}


def _parameterization(config: Mapping[str, Any]) -> PredictionType | None:
    """`model.params.parameterization` of an LDM configuration."""
    for level in ("model", "params"):
        inner = config.get(level)
        config = inner if isinstance(inner, Mapping) else {}
    return _SPELLINGS.get(str(config.get("parameterization")).lower())
