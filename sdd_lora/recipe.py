"""What to erase, from what, how: a YAML file, strict and typed, all its errors reported at once."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sdd_lora.errors import BadInput
from sdd_lora.io.strict_yaml import (
    Count,
    Positive,
    Real,
    Section,
    Seed,
    Switch,
    Text,
    Whole,
    parse_strictly,
    write_yaml,
)


def _only(value: Any) -> BeforeValidator:
    """A field that is gone, still read where it holds its only `value`."""

    def check(found: Any) -> Any:
        if found != value:
            raise ValueError(
                f"is gone: trials found no use for it; leave it away (found {found!r})"
            )
        return value

    return BeforeValidator(check)


class Preserve(Section):
    """Prompts on which the student is held to the base.

    `damping` lets an adapter's to_k and to_v answer less to these prompts after each quarter of the
    training, all of them at once and without a UNet pass: see training/directions.py.
    """

    prompts: list[str] = []
    weight: Annotated[Real, Field(ge=0)] = 1.0
    damping: Annotated[Real, Field(ge=0)] = 0.0


class Objective(Section):
    """The loss. `paper` is the pseudo-code, `reference` the authors' released code.

    `esd-x` changes the cross-attention, `esd-u` what is outside it; both push away from the concept
    by `eta` (1 where nothing is written; 3 in the "-3" rows of the SDD paper).
    """

    kind: Literal["sdd", "esd-x", "esd-u"] = "sdd"
    variant: Literal["paper", "reference"] = "paper"
    guidance_scale: Real = 3.0
    eta: Annotated[Real, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _eta_is_esds(self) -> "Objective":
        if self.kind == "sdd" and self.eta is not None:
            raise ValueError("eta belongs to esd-x and esd-u; sdd has no such number")
        if self.kind != "sdd" and self.eta is None:
            raise ValueError(f"{self.kind} needs an eta, such as 1.0")
        return self


#: of `lora.targets`: all layers that ESD-u trains, by its authors' name
NOXATTN = "noxattn"


class Lora(Section):
    """The adapter: low-rank factors on the cross-attention (attn2) matrices named here.

    `noxattn` stands for what esd-u trains: every linear layer and convolution but those of the
    cross-attention, the time embedding and the output.

    `init: concepts` starts to_k's and to_v's down factors in the directions where the concepts'
    embeddings differ most from those of the kept prompts and ∅; `closed-form` starts both factors
    where the concepts' keys and values are nearest to ∅'s and those of kept prompts stay, weighed
    by `preserve.weight` (training/closed_form.py); `random` starts as peft does.
    """

    rank: Positive = 4
    alpha: Annotated[Real, Field(gt=0)] = 4.0
    targets: Annotated[
        list[Literal["to_q", "to_k", "to_v", "to_out", "noxattn"]], Field(min_length=1)
    ] = ["to_k", "to_v"]  # fmt: skip
    init: Literal["random", "concepts", "closed-form"] = "random"

    @model_validator(mode="after")
    def _fields_fit(self) -> "Lora":
        if self.init != "random" and not {"to_k", "to_v"} & set(self.targets):
            raise ValueError(
                f"init: {self.init} starts to_k and to_v, which see prompts: expected one of them "
                "in targets, or init: random"
            )
        return self


class Ema(Section):
    """The teacher: an average of the student's factors. Warm-up: min(decay, (1+t)/(10+t))."""

    decay: Annotated[Real, Field(ge=0, lt=1)] = 0.999
    warmup: Switch = False


class Optimizer(Section):
    """How the student's factors are updated."""

    kind: Literal["adamw8bit", "adamw"] = "adamw8bit"
    learning_rate: Annotated[Real, Field(gt=0)] = 1.0e-3
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[Real, Field(gt=0)] = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_iterations: Count = 0


class Rollout(Section):
    """How the teacher samples the latents z_t: `batch` trajectories at once.

    Each trajectory gives `points` training points, one an iteration, spread evenly over its
    timesteps. Each point is used with `prompts` concepts, and as many kept prompts: a pass for the
    loss is cheap beside the steps that led there.
    """

    steps: Annotated[Whole, Field(ge=2, le=999)] = 50
    points: Positive = 1
    prompts: Positive = 1
    batch: Positive = 1
    # of earlier recipes; trials found no use for another value
    solver: Annotated[Any, _only("ddim"), Field(exclude=True)] = "ddim"
    guidance_interval: Annotated[Any, _only([0.0, 1.0]), Field(exclude=True)] = [0.0, 1.0]

    @model_validator(mode="after")
    def _fields_fit(self) -> "Rollout":
        if self.points >= self.steps:
            raise ValueError(
                f"{self.points} points need more than {self.steps} steps: each has a timestep "
                "of its own, and none has the noisiest"
            )
        return self


class Training(Section):
    """Length, precision, seed.

    `base_precision: nf4` keeps the base's linear layers in 4 bits and its other layers in
    `precision`.
    """

    iterations: Positive = 1500
    gradient_accumulation: Positive = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    base_precision: Literal["fp32", "bf16", "fp16", "nf4"] = "fp32"
    gradient_checkpointing: Switch = False
    seed: Seed = 0

    @model_validator(mode="after")
    def _precisions_fit(self) -> "Training":
        if self.base_precision not in ("fp32", "nf4", self.precision):
            raise ValueError(
                f"base_precision {self.base_precision} needs precision {self.base_precision} too"
            )
        return self


class MeasurePrompts(Section):
    """Prompts that ask for what is erased, and prompts that must not change."""

    concept: list[str] = []
    kept: list[str] = []


class Measure(Section):
    """What the card will say: `images` of each kind of prompt, drawn before and after.

    A kind is the concept's prompts, and each group of kept ones that the detector tells apart.
    `transfer` names further models on which the adapter is measured in the same way.
    """

    prompts: MeasurePrompts = MeasurePrompts()
    images: Positive = 32
    steps: Annotated[Whole, Field(gt=0, le=999)] = 25
    guidance: Real = 5.0
    detector: Literal["judge", "nudenet", "open_nsfw", "none"] = "none"
    seed: Seed = 1000
    transfer: list[str] = []


class Recipe(Section):
    """A whole recipe. Field names and defaults are those of the recipe files.

    `concepts` may be given as the name of a text file, one concept a line, beside the recipe.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: Text
    concepts: Annotated[list[Text], Field(min_length=1)]
    preserve: Preserve = Preserve()
    objective: Objective = Objective()
    parameters: Literal["lora", "full"] = "lora"
    lora: Lora = Lora()
    ema: Ema = Ema()
    optimizer: Optimizer = Optimizer()
    rollout: Rollout = Rollout()
    training: Training = Training()
    measure: Measure = Measure()
    preset: Literal["paper", "fast", "demo"] = "paper"

    @model_validator(mode="after")
    def _sections_fit(self) -> "Recipe":
        kind = self.objective.kind
        if kind != "sdd" and (self.ema.decay != 0 or self.ema.warmup):
            raise ValueError(
                f"{kind} keeps no average: expected ema: {{decay: 0, warmup: false}}, "
                "or no ema at all"
            )
        if kind != "sdd" and self.rollout.prompts > 1:
            raise ValueError(f"{kind} takes latents drawn for its concept: expected prompts: 1")
        if self.parameters == "full" and self.lora != Lora():
            raise ValueError("parameters: full trains the weights themselves: leave lora away")
        if self.parameters == "full" and self.training.base_precision == "nf4":
            raise ValueError(
                "parameters: full trains the weights themselves, which 4 bits can't hold: expected "
                "another training.base_precision, or parameters: lora"
            )
        if kind != "sdd" and self.lora.init == "closed-form":
            raise ValueError(
                f"lora.init: closed-form starts where SDD leads, {kind} goes elsewhere: expected "
                "another init"
            )
        sees_prompts = self.parameters == "lora" and {"to_k", "to_v"} & set(self.lora.targets)
        if self.preserve.damping and not sees_prompts:
            raise ValueError(
                "preserve.damping changes an adapter's to_k and to_v, which see prompts: expected "
                "one of them in lora.targets, or damping: 0"
            )
        noxattn = [NOXATTN] if kind == "esd-u" else [t for t in self.lora.targets if t != NOXATTN]
        if self.parameters == "lora" and self.lora.targets != noxattn:
            raise ValueError(
                f"lora.targets: {kind} changes what is "
                f"{'outside' if kind == 'esd-u' else 'in'} the cross-attention: expected "
                f"{noxattn or ['to_k', 'to_v']}, found {self.lora.targets}"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> "Recipe":
        """Read a recipe file; `overrides` maps dotted names to values ("ema.decay": 0.99).

        Raises BadInput with every problem and its line.
        """
        path = Path(path)
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"{path}: expected a recipe (YAML text), can't read it: {error}"
            ) from error
        return cls.parse(text, where=str(path), folder=path.parent, overrides=overrides)

    @classmethod
    def parse(
        cls, text: str, where: str = "recipe", folder: Path = Path(),
        overrides: dict[str, Any] | None = None,
    ) -> "Recipe":  # fmt: skip
        """Like `load`, from a string."""

        def prepared(fields: dict[str, Any]) -> dict[str, Any]:
            for dotted, value in (overrides or {}).items():
                _set(fields, dotted.split("."), value)
            _read_lists(fields, folder)
            return _with_defaults(fields)

        return parse_strictly(cls, text, where, prepared, overrides or {})

    def to_yaml(self) -> str:
        """The complete recipe, defaults filled in."""
        return write_yaml(self)

    def content(self) -> dict[str, Any]:
        """All fields as artefacts store them and `sha256` hashes them: fields that are gone stay
        there with their only value, so that no artefact changes its identity."""
        gone = {"solver": self.rollout.solver, "guidance_interval": self.rollout.guidance_interval}
        fields = self.model_dump(mode="json")
        return fields | {"rollout": gone | fields["rollout"]}

    @property
    def sha256(self) -> str:
        """SHA-256 of the recipe's content, whatever its comments and layout."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()


#: named sets of fields, overridden by what a recipe writes; `paper` is the defaults above
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # Starts where the objective leads (training/closed_form.py), which leaves the training little
    # to do: small steps, and of a trajectory's passes as much use as the demo allows, three points
    # and three prompts of both kinds each (tests/benchmarks/bench_fewer_passes.py). It wants
    # `preserve.prompts`: what is not named there goes too where it is near. Untried at full size.
    "fast": {
        "lora": {"init": "closed-form"},
        "ema": {"decay": 0.99, "warmup": True},
        "optimizer": {"learning_rate": 5.0e-4},
        "rollout": {"steps": 10, "points": 3, "prompts": 3},
        "training": {"iterations": 200},
    },
    "demo": {
        "objective": {"variant": "reference"},
        "preserve": {"weight": 6.0},
        "lora": {"rank": 8, "alpha": 8.0, "init": "closed-form"},
        "ema": {"decay": 0.96, "warmup": True},
        "optimizer": {"learning_rate": 5.0e-4},
        "rollout": {"steps": 10, "points": 3, "batch": 4, "prompts": 3},
        "training": {"iterations": 40},
        "measure": {"detector": "judge", "images": 16, "guidance": 3.0},
    },
}  # fmt: skip

_ESD: dict[str, Any] = {
    "objective": {"eta": 1.0},
    "lora": {"init": "random"},
    "ema": {"decay": 0.0, "warmup": False},
    "rollout": {"prompts": 1},
}
#: what one field's value implies for others, on top of the preset, below what a recipe writes
IMPLIED: dict[tuple[tuple[str, ...], str], dict[str, Any]] = {
    (("objective", "kind"), "esd-x"): _ESD,
    (("objective", "kind"), "esd-u"): _ESD | {"lora": {"init": "random", "targets": [NOXATTN]}},
    # learning rate of both papers; whole weights move further a step than a product of factors
    (("parameters",), "full"): {
        "lora": Lora().model_dump(),
        "preserve": {"damping": 0.0},
        "optimizer": {"learning_rate": 1.0e-5},
    },
}


def _set(fields: dict, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if fields.get(key) is None:
            fields[key] = {}
        fields = fields[key]
        if not isinstance(fields, dict):
            raise BadInput(f"--set {'.'.join(keys)}: {key} holds a value, not fields")
    fields[keys[-1]] = value


def _with_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """What is written, on top of what it implies, on top of the preset."""
    preset = fields.get("preset", "paper")
    defaults = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    for (path, value), implied in IMPLIED.items():
        if _at(fields, path) == value:
            defaults = _merged(defaults, implied)
    return _merged(defaults, fields)


def _at(fields: Any, path: Sequence[str]) -> Any:
    for key in path:
        fields = fields.get(key) if isinstance(fields, dict) else None
    return fields


def _merged(base: dict, over: dict) -> dict:
    """`over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _read_lists(fields: dict, folder: Path) -> None:
    """Where a list of prompts may stand, put a text file's lines in the place of its name."""
    preserve, measure = fields.get("preserve"), fields.get("measure")
    measured = measure.get("prompts") if isinstance(measure, dict) else None
    places = [
        (fields, "concepts"),
        (preserve, "prompts"),
        (measured, "concept"),
        (measured, "kept"),
    ]
    for section, key in places:
        if not isinstance(section, dict) or not isinstance(section.get(key), str | list):
            continue
        entries = section[key] if isinstance(section[key], list) else [section[key]]
        section[key] = [
            line
            for entry in entries
            for line in (_lines(folder / entry, key) if _names_a_file(entry) else [entry])
        ]


def _names_a_file(entry: Any) -> bool:
    return isinstance(entry, str) and entry.lower().endswith(".txt")


def _lines(path: Path, key: str) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{key}: {path}: can't read the list, one a line: {error}") from error
    return [line.strip() for line in lines if line.strip()]
