"""A whole recipe: what to erase, from what, how; every error at once, with its line."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from sdd_lora.errors import BadInput
from sdd_lora.io.strict_yaml import (
    Overrides,
    Positive,
    Section,
    Switch,
    Text,
    at,
    merged_fields,
    parse_strictly,
    put,
    write_yaml,
)
from sdd_lora.io.text import read_text
from sdd_lora.progress import warn
from sdd_lora.recipe.other_trainers import translated
from sdd_lora.recipe.presets import IMPLIED, PRESETS
from sdd_lora.recipe.sections import (
    EARLIER_NAMES,
    KINDS,
    NOXATTN,
    Ema,
    LaterFields,
    Lora,
    MeasureSettings,
    ObjectiveSettings,
    Optimizer,
    PictureSettings,
    Preserve,
    RolloutSettings,
    Training,
    listed,
    names_a_file,
    names_an_adapter,
)

#: where a list of prompts may stand
_LISTS = (
    ("concepts",),
    ("preserve", "prompts"),
    ("measure", "prompts", "concept"),
    ("measure", "prompts", "kept"),
)
#: either name of a renamed field → the other, which it takes the place of
_OTHER_NAME = EARLIER_NAMES | {old: new for new, old in EARLIER_NAMES.items()}


def _concepts(value: Any) -> Any:
    """Concepts as a list; a text with commas may be one concept or several."""
    if isinstance(value, str) and "," in value:
        parts = ", ".join(part.strip() for part in value.split(","))
        raise ValueError(
            f"{value!r} is one text: expected a list, [{parts}] for several concepts, "
            f"or [{value!r}] for one with a comma"
        )
    return listed(value)


def _prediction(value: Any) -> Any:
    """`v` is short for v_prediction."""
    return "v_prediction" if value == "v" else value


class Recipe(LaterFields):
    """A whole recipe. Field names and defaults are those of the recipe files.

    What a recipe leaves open comes from its preset, and from the values that other fields imply, in
    Python as in a file.
    """

    _later = ("pictures", "prediction", "clip_skip", "wordings")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Of the run and the adapter: letters, digits, `.`, `_` and `-`."""

    model: Text
    """The base: `demo`, a diffusers folder, one `.safetensors` or `.ckpt` file, or a hub id."""

    prediction: Annotated[
        Literal["epsilon", "v_prediction"] | None, BeforeValidator(_prediction)
    ] = None
    """What the UNet predicts, where the model's files don't say it, or say it wrongly: its noise
    (`epsilon`, what nearly all of SD 1.x do), or `v_prediction`."""

    clip_skip: Positive | None = None
    """Which layer of the text encoder reads prompts, in training and measuring, as user interfaces
    count: 1, the default, is the last, 2 the one before, which many fine-tunes were made with."""

    concepts: Annotated[list[Text], Field(min_length=1), BeforeValidator(_concepts)]
    """What to erase: a list of texts, or of names of text files beside the recipe, one concept a
    line. `variant: paper` joins as many as the text encoder reads, rotating through all of them."""

    wordings: Switch | None = None
    """Take each concept in the wordings of `sdd-lora erase`, alone and beside other words, instead
    of as it is written."""

    preserve: Preserve = Preserve()
    pictures: PictureSettings | None = None
    objective: ObjectiveSettings = ObjectiveSettings()

    parameters: Literal["lora", "embeddings", "full"] = "lora"
    """What is trained: an adapter (`lora`); one change of the prompts' embeddings, e ↦ (I + B D) e,
    in place of all to_k and to_v, a portable adapter of a few kB (`embeddings`); or as in the
    papers the weights themselves, for comparison (`full`)."""

    lora: Lora = Lora()
    ema: Ema = Ema()
    optimizer: Optimizer = Optimizer()
    rollout: RolloutSettings = RolloutSettings()
    training: Training = Training()
    measure: MeasureSettings = MeasureSettings()

    preset: Literal["paper", "fast", "demo", "sd15"] = "paper"
    """A named set of the fields above, overridden by what is written: `paper` is the defaults,
    `fast` starts in closed form and needs preserve.prompts, `demo` suits the embedded model,
    `sd15` Stable Diffusion 1.5 on a small card."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, fields: Any) -> Any:
        """What is written, on top of what it implies, on top of the preset. A recipe as `to_yaml`
        writes it leaves nothing open: what it lacks came later, and is off there."""
        if not isinstance(fields, dict):
            return fields
        written = {
            name: value.model_dump(exclude_unset=True) if isinstance(value, Section) else value
            for name, value in fields.items()
        }
        if _is_complete(cls, written):
            return written
        preset = written.get("preset", "paper")
        filled = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        for (path, value), implied in IMPLIED.items():
            if at(written, path) == value:
                filled = merged_fields(filled, implied, _OTHER_NAME)
        return merged_fields(filled, written, _OTHER_NAME)

    @model_validator(mode="after")
    def _sections_fit(self) -> "Recipe":
        name, kind = self.objective.kind, KINDS[self.objective.kind]
        is_lora, targets = self.parameters != "full", set(self.lora.targets)
        beside = NOXATTN if self.pictures else "to_"
        inside = [t for t in self.lora.targets if t.startswith(("to_", beside))]
        expected = [kind.layers] if kind.layers else inside or ["to_k", "to_v"]
        kept = {text.strip().casefold() for text in self.preserve.prompts}
        both = [concept for concept in self.concepts if concept.casefold() in kept]
        contradictions = [
            (
                not kind.distils and self.ema != Ema(decay=0),
                f"{name} keeps no average: expected ema: {{decay: 0, warmup: false}}, or no ema at "
                "all",
            ),
            (
                not kind.distils and self.rollout.prompts_per_latent > 1,
                f"{name} takes latents drawn for its concept: expected prompts_per_latent: 1",
            ),
            (
                not kind.distils and self.lora.init == "closed-form",
                f"lora.init: closed-form starts where SDD leads, {name} goes elsewhere: expected "
                "another init",
            ),
            (
                self.training.iterations == 0 and self.lora.init not in ("closed-form", "words"),
                "training.iterations: 0 leaves the base as it is, unless lora.init: closed-form or "
                "words changes it",
            ),
            (
                is_lora and self.lora.targets != expected,
                f"lora.targets: {name} changes what is {kind.place}: expected "
                f"{expected}, found {self.lora.targets}",
            ),
            (
                not is_lora and self.lora != Lora(),
                "parameters: full trains the weights themselves: leave lora away",
            ),
            (
                not is_lora and self.training.base_precision == "nf4",
                "parameters: full trains the weights themselves, which 4 bits can't hold: expected "
                "another training.base_precision, or parameters: lora",
            ),
            (
                self.parameters == "embeddings"
                and (targets != {"to_k", "to_v"} or self.lora.init in ("concepts", "closed-form")),
                "parameters: embeddings changes what every to_k and to_v sees: expected lora.init: "
                "random, words or a portable adapter, and lora.targets left alone",
            ),
            (
                self.parameters == "embeddings" and self.preserve.damping > 0,
                "preserve.damping turns an adapter's to_k and to_v; parameters: embeddings has "
                "none: expected damping: 0",
            ),
            (
                self.preserve.damping > 0 and not (is_lora and {"to_k", "to_v"} & targets),
                "preserve.damping changes an adapter's to_k and to_v, which see prompts: expected "
                "one of them in lora.targets, or damping: 0",
            ),
            (
                self.pictures is not None and not self.preserve.any,
                "pictures: draws kept prompts too: expected preserve.prompts or "
                "preserve.vocabulary, what the model is to draw as before",
            ),
            (
                bool(both),
                f"concepts: {', '.join(both[:9])}: stands in preserve.prompts too, which holds it "
                "as it is: expected it in one of the two",
            ),
        ]
        for found, message in contradictions:
            if found:
                raise ValueError(message)
        return self

    def __repr__(self) -> str:
        trained = f"rank {self.lora.rank}" if self.parameters != "full" else "whole weights"
        return (
            f"Recipe({self.name!r} on {self.model!r}: {self.objective.kind}, {trained}, "
            f"{len(self.concepts)} concepts, {self.training.iterations} iterations)"
        )

    def __str__(self) -> str:
        return repr(self)

    @classmethod
    def of(cls, given: "Recipe | str | Path") -> "Recipe":
        """A recipe as it is, or of a file."""
        return given if isinstance(given, Recipe) else cls.load(given)

    @classmethod
    def load(cls, path: str | Path, overrides: Overrides | None = None) -> "Recipe":
        """Read a recipe file; `overrides` maps dotted names to values ("ema.decay": 0.99).

        LECO's, sliders' and ai-toolkit's files are read too, with a warning for each difference.

        Raises BadInput with every problem and its line.
        """
        path = Path(path)
        text = read_text(path, "a recipe (YAML text)")
        where = str(path)
        if (other := translated(text, path)) is not None:
            text, where = yaml.safe_dump(other.fields), f"{path}, read as a recipe"
            if "model" not in other.fields | (overrides or {}):
                raise BadInput(f'{path}: LECO\'s list of prompts: add `overrides["model"]=MODEL`')
            for difference in other.differences:
                warn(f"{path}: {difference}")
        return cls.parse(text, where=where, folder=path.parent, overrides=overrides)

    @classmethod
    def parse(
        cls,
        text: str,
        where: str = "recipe",
        folder: Path = Path(),
        overrides: Overrides | None = None,
    ) -> "Recipe":
        """Like `load`, from a string."""

        def prepared(fields: dict[str, Any]) -> dict[str, Any]:
            if {"methods", "measures"} <= fields.keys():
                raise BadInput(f"{where}: a bench, which `sdd-lora evaluate` takes, not a recipe")
            put(fields, overrides or {}, _OTHER_NAME)
            _read_lists(fields, folder)
            _find_adapter(fields, folder)
            return fields

        return parse_strictly(cls, text, where, prepared, overrides or {})

    def to_yaml(self) -> str:
        """The complete recipe, defaults filled in."""
        return write_yaml(self)

    def content(self) -> dict[str, Any]:
        """All fields as artefacts store them and `sha256` hashes them.

        Renamed fields have their earlier names there, and fields that are gone their only value, so
        that artefacts keep their bytes and their identity. An adapter to go on from goes by its
        name: where it lies tells of a disk, and the metadata has its hash.
        """
        fields = self.model_dump(mode="json")
        fields["measure"].pop("every", None)  # draws on the way, and changes no result
        if self.lora.starts_from:
            fields["lora"]["init"] = f"./{Path(self.lora.starts_from).name}"
        rollout = {EARLIER_NAMES.get(key, key): value for key, value in fields["rollout"].items()}
        interval = {"guidance_interval": self.rollout.guidance_interval}
        return fields | {"rollout": {"solver": self.rollout.solver} | rollout | interval}

    def with_iterations(self, iterations: int) -> "Recipe":
        """The same training, of another length."""
        training = self.training.model_copy(update={"iterations": iterations})
        return self.model_copy(update={"training": training})

    @property
    def training_sha256(self) -> str:
        """SHA-256 of the fields that a training depends on: all but `measure`."""
        return self.model_copy(update={"measure": MeasureSettings()}).sha256

    @property
    def sha256(self) -> str:
        """SHA-256 of the recipe's content, whatever its comments and layout."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()


def _is_complete(section: type[Section], written: Any) -> bool:
    """Whether all of a section's fields are written, but for those that came later or are gone."""
    if not isinstance(written, dict):
        return False
    for name, field in section.model_fields.items():
        if field.exclude or name in getattr(section, "_later", ()):
            continue
        key = name if name in written else _OTHER_NAME.get(name, name)
        part: Any = field.annotation
        is_section = isinstance(part, type) and issubclass(part, Section)
        if key not in written or (is_section and not _is_complete(part, written[key])):
            return False
    return True


def _read_lists(fields: dict[str, Any], folder: Path) -> None:
    """Where a list of prompts may stand, put a text file's lines in the place of its name."""
    for *sections, key in _LISTS:
        section = at(fields, sections)
        found = at(section, [key])
        entries: list[Any] = found if isinstance(found, list) else [found]
        if any(map(names_a_file, entries)):
            section[key] = [
                line
                for entry in entries
                for line in (_lines(folder / entry, key) if names_a_file(entry) else [entry])
            ]


def _find_adapter(fields: dict[str, Any], folder: Path) -> None:
    """Make the path of an adapter in `lora.init`, relative to the recipe, one from the root."""
    init = at(fields, ["lora", "init"])
    if names_an_adapter(init):
        fields["lora"]["init"] = str((folder / init).absolute())


def _lines(path: Path, key: str) -> list[str]:
    lines = read_text(path, f"a list for {key}, one a line").split("\n")
    return [line.strip() for line in lines if line.strip()]
