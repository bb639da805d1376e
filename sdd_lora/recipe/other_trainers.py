"""LECO's, sliders' and ai-toolkit's files as recipes.

Such a file is known by its shape, which no recipe has. Settings with a counterpart are taken over,
differences are named, and parts that this tool has no way to do are refused by name.
Formats: LECO (p1atdev 2023), concept sliders (Gandikota et al. 2023), ai-toolkit's slider job.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from sdd_lora.errors import BadInput
from sdd_lora.io.strict_yaml import read_yaml
from sdd_lora.io.text import read_text

_PRECISIONS = {
    "fp32": "fp32",
    "float": "fp32",
    "float32": "fp32",
    "fp16": "fp16",
    "float16": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
}
#: their optimizers → ours, with torch's and bitsandbytes' default of the decay
_OPTIMIZERS: dict[str, dict[str, str | float]] = {
    "adamw": {"kind": "adamw", "weight_decay": 0.01},
    "adamw8bit": {"kind": "adamw8bit", "weight_decay": 0.01},
    "lion8bit": {"kind": "lion8bit"},
    "adafactor": {"kind": "adafactor"},
    "prodigy": {"kind": "prodigy"},
}
_SCHEDULES = ("constant", "linear", "cosine")
#: sliders' `training_method` → our objective
_METHODS = {"full": "leco", "xattn": "esd-x", "noxattn": "esd-u"}
_SD1_SIZE = 512


class _Strict(BaseModel):
    """A part whose every field changes what is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Open(BaseModel):
    """A part with fields that this tool has no use for; they are named."""

    model_config = ConfigDict(extra="allow", frozen=True)


class _LecoPrompt(_Strict):
    target: str
    positive: str | None = None
    unconditional: str = ""
    neutral: str | None = None
    action: Literal["erase", "enhance"] = "erase"
    guidance_scale: float = 1.0
    resolution: int = _SD1_SIZE
    dynamic_resolution: bool = False
    dynamic_crops: bool = False
    bucketing: bool = False
    batch_size: int = 1


class _LecoModel(_Open):
    name_or_path: str
    v2: bool = False
    v_pred: bool = False
    clip_skip: int | None = None


class _LecoNetwork(_Open):
    type: str = "lierla"
    rank: int = 4
    alpha: float = 1.0
    training_method: str = "full"


class _LecoTrain(_Open):
    precision: str = "bfloat16"
    iterations: int = 500
    lr: float = 1e-4
    optimizer: str = "adamw"
    lr_scheduler: str = "constant"
    max_denoising_steps: int = 50
    noise_scheduler: str = "ddim"


class _LecoSave(_Open):
    name: str = "untitled"


class _LecoConfig(_Open):
    prompts_file: str
    pretrained_model: _LecoModel
    network: _LecoNetwork = _LecoNetwork()
    train: _LecoTrain | None = None
    save: _LecoSave | None = None


class _SliderTarget(_Strict):
    target_class: str = ""
    positive: str = ""
    negative: str = ""
    multiplier: float = 1.0
    weight: float = 1.0
    shuffle: bool = False


class _Anchor(_Strict):
    prompt: str
    neg_prompt: str = ""
    multiplier: float = 1.0


class _Slider(_Open):
    targets: list[_SliderTarget]
    anchors: list[_Anchor] = []


class _ToolkitNetwork(_Open):
    linear: int = 4
    linear_alpha: float | None = None
    conv: int | None = None


class _ToolkitTrain(_Open):
    steps: int = 1000
    lr: float = 1e-6
    optimizer: str = "adamw"
    lr_scheduler: str = "constant"
    gradient_checkpointing: bool = True
    train_unet: bool = True
    train_text_encoder: bool = False
    max_denoising_steps: int = 50
    batch_size: int = 1
    dtype: str = "fp32"
    noise_scheduler: str = "ddpm"
    noise_offset: float = 0.0


class _ToolkitModel(_Open):
    name_or_path: str
    is_v_pred: bool = False


class _ToolkitProcess(_Open):
    type: str
    model: _ToolkitModel
    slider: _Slider
    network: _ToolkitNetwork = _ToolkitNetwork()
    train: _ToolkitTrain = _ToolkitTrain()


class _ToolkitConfig(_Open):
    name: str
    process: list[dict[str, JsonValue]]


@dataclass
class Translated:
    """The fields of a recipe, as its YAML would have them, and what differs from the other tool."""

    fields: dict[str, Any]
    differences: list[str] = field(default_factory=list)

    def add_training(
        self, where: str, train: _LecoTrain | _ToolkitTrain, precision: str, iterations: int
    ) -> None:
        """What both tools call by the same names."""
        kept = _looked_up(_PRECISIONS, precision, f"{where}: precision")
        optimizer = _looked_up(_OPTIMIZERS, train.optimizer.lower(), f"{where}: optimizer")
        schedule = train.lr_scheduler
        if schedule not in _SCHEDULES:
            raise BadInput(
                f"{where}: lr_scheduler: {schedule}: expected one of {', '.join(_SCHEDULES)}"
            )
        self.fields["optimizer"] = optimizer | {"learning_rate": train.lr, "schedule": schedule}
        self.fields.setdefault("rollout", {})["steps"] = train.max_denoising_steps
        self.fields["training"] = {
            "iterations": iterations,
            "precision": kept,
            "base_precision": kept,
        }
        if train.noise_scheduler != "ddim":
            self.differences.append(f"latents are sampled by DDIM, not by {train.noise_scheduler}")
        self.differences.append("gradients are clipped to optimizer.max_grad_norm, 1")


def translated(text: str, path: Path) -> Translated | None:
    """Another tool's file as a recipe; None where it isn't of a known shape.

    Raises BadInput for a part that this tool can't do, named as the file names it.
    """
    value = read_yaml(text, str(path)).value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(v, dict) and "target" in v for v in value)
    ):
        found = _of_prompts(_prompts(value, path), str(path))
        found.fields |= {"name": _name(path.stem)}
        found.add_training(str(path), _LecoTrain(), _LecoTrain().precision, _LecoTrain().iterations)
        return found
    if isinstance(value, dict) and {"prompts_file", "pretrained_model"} <= value.keys():
        return _of_leco(_checked(_LecoConfig, value, str(path)), path)
    if isinstance(value, dict) and {"job", "config"} <= value.keys():
        return _of_toolkit(_checked(_ToolkitConfig, value["config"], f"{path}: config"), path)
    return None


def _of_leco(config: _LecoConfig, path: Path) -> Translated:
    model, network, train = config.pretrained_model, config.network, config.train or _LecoTrain()
    _refuse(f"{path}: pretrained_model", v2=model.v2)
    prompts_path = _beside(path, config.prompts_file)
    text = read_text(prompts_path, "LECO's list of prompts")
    content = read_yaml(text, str(prompts_path)).value
    found = _of_prompts(_prompts(content, prompts_path), str(prompts_path))
    save = config.save or _LecoSave()
    where = f"{path}: network: training_method"
    kind = _looked_up(_METHODS, network.training_method, where)
    found.fields["objective"]["kind"] = kind
    found.fields |= {
        "name": _name(path.stem if save.name == "untitled" else save.name),
        "model": model.name_or_path,
        "lora": {"rank": network.rank, "alpha": network.alpha},
    }
    found.add_training(f"{path}: train", train, train.precision, train.iterations)
    if network.training_method == "full":
        found.differences.append(
            "attention alone is adapted; LECO adapts all linear layers of its blocks"
        )
    if network.type == "c3lier" and kind != "esd-u":
        found.differences.append("no convolutions are adapted (network.type: c3lier)")
    if model.v_pred:
        found.fields["prediction"] = "v_prediction"
    if model.clip_skip is not None:
        found.fields["clip_skip"] = model.clip_skip
    found.differences += _unused(
        ("", config), ("pretrained_model", model), ("network", network), ("train", train),
        ("save", save),
    )  # fmt: skip
    return found


def _of_prompts(prompts: list[_LecoPrompt], where: str) -> Translated:
    """The concepts of prompts that LECO's loss would erase from themselves towards ∅."""
    scales, sizes = set(), {prompt.batch_size for prompt in prompts}
    for number, prompt in enumerate(prompts, 1):
        place = f"{where}: prompt {number}"
        scale = prompt.guidance_scale if prompt.action == "erase" else -prompt.guidance_scale
        if scale <= 0:
            raise BadInput(
                f"{place}: action: {prompt.action} at guidance_scale {prompt.guidance_scale:g} "
                "strengthens a concept, which this tool doesn't do; expected action: erase"
            )
        positive = prompt.target if prompt.positive is None else prompt.positive
        if not prompt.target.strip() or positive != prompt.target:
            raise BadInput(
                f"{place}: target: {prompt.target!r}, positive: {positive!r}: a concept is erased "
                "from its own prompt; expected the same text in both"
            )
        neutral = prompt.unconditional if prompt.neutral is None else prompt.neutral
        for name, text in (("unconditional", prompt.unconditional), ("neutral", neutral)):
            if text.strip():
                raise BadInput(
                    f"{place}: {name}: {text!r}: a concept is trained towards the empty prompt; "
                    f"expected {name}: ''. erase puts another in its place, with `into=WORD`"
                )
        scales.add(scale)
    if len(scales) > 1:
        raise BadInput(
            f"{where}: guidance_scale: expected one for all prompts (objective.eta), found "
            f"{', '.join(f'{scale:g}' for scale in sorted(scales))}; a file each trains them apart"
        )
    found = Translated(
        {
            "concepts": list(dict.fromkeys(prompt.target for prompt in prompts)),
            "objective": {"kind": "leco", "eta": scales.pop()},
            "rollout": {"batch": max(sizes)},
        }
    )
    if len(sizes) > 1:
        found.differences.append(f"batch_size is {max(sizes)} for all prompts (rollout.batch)")
    resolutions = {prompt.resolution for prompt in prompts} - {_SD1_SIZE}
    if resolutions or any(p.dynamic_resolution or p.dynamic_crops or p.bucketing for p in prompts):
        found.differences.append("latents have the model's own size, whatever resolution says")
    return found


def _of_toolkit(config: _ToolkitConfig, path: Path) -> Translated:
    if len(config.process) != 1 or config.process[0].get("type") != "slider":
        types = ", ".join(str(process.get("type")) for process in config.process) or "none"
        raise BadInput(f"{path}: process: expected one of type slider, found {types}")
    process = _checked(_ToolkitProcess, config.process[0], f"{path}: process")
    model, network, train, slider = process.model, process.network, process.train, process.slider
    others = {k: bool(v) for k, v in (model.model_extra or {}).items() if k.startswith("is_")}
    architecture = (model.model_extra or {}).get("arch")
    _refuse(f"{path}: model", **others, arch=architecture not in (None, "sd1", "sd15"))
    _refuse(
        f"{path}: train",
        train_text_encoder=train.train_text_encoder,
        noise_offset=train.noise_offset != 0,
    )
    _refuse(f"{path}: network", conv=network.conv)
    if not train.train_unet:
        raise BadInput(f"{path}: train: train_unet: false: the UNet is all that is trained here")
    alpha = network.linear if network.linear_alpha is None else network.linear_alpha
    found = Translated(
        {
            "name": _name(config.name),
            "model": model.name_or_path,
            "concepts": [_erased(t, f"{path}: slider: {t.negative!r}") for t in slider.targets],
            "preserve": {"prompts": [anchor.prompt for anchor in slider.anchors]},
            "objective": {"kind": "leco", "eta": 1.0},
            "lora": {"rank": network.linear, "alpha": alpha},
            "rollout": {"batch": train.batch_size},
        },
        ["an eraser is trained at weight 1; a slider is also trained the other way at weight -1"],
    )
    found.add_training(f"{path}: train", train, train.dtype, train.steps)
    found.fields["training"]["gradient_checkpointing"] = train.gradient_checkpointing
    if model.is_v_pred:
        found.fields["prediction"] = "v_prediction"
    if any(t.weight != 1 or t.multiplier != 1 or t.shuffle for t in slider.targets):
        found.differences.append("targets' weight, multiplier and shuffle are not taken over")
    if any(anchor.neg_prompt or anchor.multiplier != 1 for anchor in slider.anchors):
        found.differences.append(
            "anchors are kept by preserve.weight; neg_prompt and multiplier are not taken over"
        )
    found.differences += _unused(
        ("", process), ("model", model), ("network", network), ("train", train), ("slider", slider)
    )
    return found


def _erased(target: _SliderTarget, where: str) -> str:
    """What a slider's target erases at weight 1. Raises BadInput where it does more than erase."""
    if target.positive.strip():
        raise BadInput(
            f"{where}: positive: {target.positive!r}: strengthens a concept, which this tool "
            "doesn't do; expected positive: '' and the concept to erase in negative"
        )
    if target.target_class.strip() not in ("", target.negative.strip()):
        raise BadInput(
            f"{where}: target_class: {target.target_class!r}: a concept is erased from its own "
            "prompt; expected the same text as in negative, or ''"
        )
    return target.negative.strip()


def _refuse(where: str, **found: Any) -> None:
    """Raises BadInput for the first setting that is on."""
    for name, value in found.items():
        if value:
            raise BadInput(f"{where}: {name}: not to be had here: only Stable Diffusion 1.x's UNet")


def _unused(*parts: tuple[str, _Open]) -> list[str]:
    """One line that names all settings without a counterpart."""
    names = [
        f"{section}.{name}" if section else name
        for section, part in parts
        for name in part.model_extra or {}
    ]
    return [f"not taken over: {', '.join(names)}"] if names else []


def _prompts(value: Any, path: Path) -> list[_LecoPrompt]:
    if not isinstance(value, list) or not value:
        raise BadInput(f"{path}: expected LECO's list of prompts, each with a target")
    return [_checked(_LecoPrompt, entry, f"{path}: prompt {i}") for i, entry in enumerate(value, 1)]


M = TypeVar("M", bound=BaseModel)


def _checked(kind: type[M], value: Any, where: str) -> M:
    """Raises BadInput with the first field that is wrong."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = ".".join(map(str, problem["loc"]))
        unknown = problem["type"] == "extra_forbidden"
        message = "has no counterpart here" if unknown else problem["msg"]
        raise BadInput(f"{where}: {name}: {message}") from None


V = TypeVar("V")


def _looked_up(known: dict[str, V], name: str, where: str) -> V:
    if name not in known:
        raise BadInput(f"{where}: {name}: expected one of {', '.join(known)}")
    return known[name]


def _beside(config: Path, name: str) -> Path:
    """A file named in a config: from its folder, or as LECO does from the current one."""
    candidates = [config.parent / name, Path(name), config.parent / Path(name).name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise BadInput(f"{config}: prompts_file: {candidates[0]}: no such file")


def _name(text: str) -> str:
    """A recipe's name of any text."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "from-another-tool"
