"""A bench: which methods are measured on which model, how; a YAML file, strict like a recipe."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, PrivateAttr, model_validator

from sdd_lora.attacks.settings import Attacks
from sdd_lora.bench.sections import (
    BenchSampling,
    Choice,
    Methods,
    Name,
    PromptSets,
    Quick,
    Seeds,
    TrainedBy,
    Uce,
    VariationOf,
    WordsRow,
)
from sdd_lora.errors import BadInput
from sdd_lora.io.plugins import is_plugin
from sdd_lora.io.strict_yaml import Real, Section, Text, parse_strictly, put
from sdd_lora.io.text import read_text
from sdd_lora.recipe import Recipe

#: fields of a bench that all its images depend on
_FIXED = ("model", "concepts", "style", "concept", "prompts", "seeds", "sampling")
#: sections that only recipes have
_OF_RECIPES = {"preset", "objective", "lora", "training", "preserve", "measure"}
#: what the attacks' images go by where variations have their names
ATTACK_VARIATION = "attacks"
#: what the images go by that a snapshot is chosen by
CHOICE_VARIATION = "choice"
#: rows of the table in their order → what the report says of them
METHOD_TEXTS = {
    "sd": "the model as it is",
    "neg": "the concept as negative prompt",
    "sld-weak": "Safe Latent Diffusion, weak",
    "sld-medium": "Safe Latent Diffusion, medium",
    "sld-strong": "Safe Latent Diffusion, strong",
    "sld-max": "Safe Latent Diffusion, max",
    "sega": "semantic guidance away from the concept",
    "esd-x-1": "ESD on cross-attention, η 1",
    "esd-x-3": "ESD on cross-attention, η 3",
    "esd-u-1": "ESD on all but cross-attention, η 1",
    "esd-u-3": "ESD on all but cross-attention, η 3",
    "esd-x-1-lora": "ESD on cross-attention as an adapter, η 1",
    "esd-u-1-lora": "ESD on all but cross-attention as an adapter, η 1",
    "esd-x-1-preserve": "ESD on cross-attention, η 1, other prompts held",
    "leco": "LECO: ESD's loss on all attention, as an adapter of rank 4",
    "leco-preserve": "LECO, other prompts held",
    "uce": "UCE: cross-attention edited in closed form",
    "sdd-full": "SDD, all of cross-attention, as its authors did",
    "sdd": "SDD as an adapter",
    "sdd-preserve": "SDD as an adapter, other prompts held",
    "closed-form": "an adapter solved over the prompts in closed form, untrained",
    "closed-form-sdd": "an adapter from a closed form, then SDD, other prompts held",
    "words": "an adapter from words alone, a projection, untrained",
    "words-sdd": "an adapter from words alone, then SDD, other words held",
    "words-solved": "adapters from words, solved as one",
    "sdd-gated": "the adapter, its strength by the prompt's similarity",
    "stack": "several adapters, summed exactly",
    "baked": "adapters baked into a checkpoint",
}


class Bench(Section):
    """A whole bench.

    `recipes` names what is trained, `adapters` what a method carries, {name: weight} or [name], a
    name being one under `recipes`, a file, a run's folder, or a hub id; `weights` a file of a whole
    UNet or a part of one. A method that is trained under its own name needs no entry in `adapters`.
    `models` names another MODEL, such as a fine-tune or one that never saw what is erased, `images`
    a folder of images that were drawn elsewhere, `code` a function of the user's own
    (`module:name` or `file.py:name`) that draws as those in `sdd_lora.generation.methods` do.
    `uce` says how the row of that name is made, `words` which rows are made from words alone,
    `choice` how a trained row's snapshot is chosen. `measures` are names, or names with options.
    `concept` is the text that neg, SLD and SEGA work against; where it is missing, all concepts
    joined. `attacks` are run where they are written.
    """

    name: Name
    model: Text
    concepts: list[Text] = Field(default_factory=list)
    style: Text | None = None
    concept: Text | None = None
    prompts: PromptSets
    seeds: Seeds = Seeds()
    sampling: BenchSampling = BenchSampling()
    methods: Methods
    measures: Annotated[dict[Text, dict[str, Any]], Field(min_length=1)]
    recipes: dict[Name, TrainedBy] = Field(default_factory=dict)
    adapters: dict[Name, dict[Text, Real]] = Field(default_factory=dict)
    weights: dict[Name, Text] = Field(default_factory=dict)
    models: dict[Name, Text] = Field(default_factory=dict)
    images: dict[Name, Text] = Field(default_factory=dict)
    code: dict[Name, Text] = Field(default_factory=dict)
    uce: Uce | None = None
    words: dict[Name, WordsRow] = Field(default_factory=dict)
    choice: Choice | None = None
    variations: dict[Name, VariationOf] = Field(default_factory=dict)
    attacks: Attacks | None = None
    quick: Quick = Quick()

    _folder: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _is_whole(self) -> "Bench":
        if bool(self.concepts) == bool(self.style):
            raise ValueError("expected either concepts or a style, what is erased")
        for method in self.every_method:
            if method not in METHOD_TEXTS and not self.has_weights(method):
                known = ", ".join(METHOD_TEXTS)
                raise ValueError(
                    f"method {method}: expected one of {known}; or a name of your own under "
                    "recipes, adapters, weights, words, models, images or code"
                )
        if self.seeds.erased + (self.seeds.kept if self.prompts.kept else 0) == 0:
            raise ValueError("seeds: expected images, of erased or of kept prompts, found none")
        return self

    @model_validator(mode="after")
    def _rows_fit(self) -> "Bench":
        for name, code in self.code.items():
            if not is_plugin(code):
                raise ValueError(f"code.{name}: expected module:name or file.py:name, found {code}")
        for name, row in self.words.items():
            if lost := [part for part in row.solved if part not in self.words]:
                raise ValueError(f"words.{name}: solved: {lost[0]}: no row under words")
        for method in self.choice.methods if self.choice else ():
            if method not in self.recipes or method not in self.methods:
                raise ValueError(f"choice: {method}: expected rows of the table under recipes")
        return self

    @model_validator(mode="after")
    def _variations_fit(self) -> "Bench":
        for name, by in ((ATTACK_VARIATION, "the attacks"), (CHOICE_VARIATION, "the choice")):
            if name in self.variations:
                raise ValueError(f"variations.{name}: taken by {by}; choose another name")
        for name, variation in self.variations.items():
            for value in variation.values if variation.field == "image" else ():
                if isinstance(value, float) and self.sampling.steps * value < 1:
                    steps = self.sampling.steps
                    raise ValueError(f"variations.{name}: {value} redoes none of {steps} steps")
        return self

    @model_validator(mode="after")
    def _can_be_attacked(self) -> "Bench":
        if self.attacks and not self.seeds.erased:
            raise ValueError("attacks: expected erased prompts to attack; seeds.erased is 0")
        for key, settings in self.attacks.chosen.items() if self.attacks else ():
            if problem := settings.misfit(self.sampling.steps, self.sampling.scheduler):
                raise ValueError(f"attacks: {key}: {problem}")
        return self

    @classmethod
    def load(
        cls, path: str | Path, *, quick: bool = False, overrides: dict[str, Any] | None = None
    ) -> "Bench":
        """Read a bench; `quick` applies its `quick` section, `overrides` maps dotted names to
        values. Raises BadInput with every problem and its line."""
        path = Path(path)
        text = read_text(path, "a bench (YAML text)")
        return cls.parse(text, str(path), path.parent, quick=quick, overrides=overrides)

    @classmethod
    def parse(
        cls,
        text: str,
        where: str = "bench",
        folder: Path = Path(),
        *,
        quick: bool = False,
        overrides: dict[str, Any] | None = None,
    ) -> "Bench":
        """Like `load`, from a string."""

        def prepared(fields: dict[str, Any]) -> dict[str, Any]:
            if _OF_RECIPES & fields.keys() and not {"methods", "measures"} & fields.keys():
                raise BadInput(f"{where}: a recipe, which `sdd-lora train` takes, not a bench")
            if quick:
                _quicken(fields)
            put(fields, overrides or {})
            if "measures" in fields:
                fields["measures"] = _named(fields["measures"], f"{where}: measures", {})
            if isinstance(adapters := fields.get("adapters"), dict):
                fields["adapters"] = {
                    method: _named(parts, f"{where}: adapters.{method}", 1.0)
                    for method, parts in adapters.items()
                }
            return fields

        bench = parse_strictly(cls, text, where, prepared, overrides or {})
        bench._folder = folder
        return bench

    @property
    def every_method(self) -> list[str]:
        """The table's, the variations' and the attacked ones."""
        varied = [m for variation in self.variations.values() for m in variation.methods]
        return [*self.methods, *varied, *(self.attacks.methods if self.attacks else [])]

    @property
    def erased(self) -> list[str]:
        """What is to go: the concepts, or the style."""
        return self.concepts or [str(self.style)]

    @property
    def against(self) -> str:
        """The text that inference-time methods work against."""
        return self.concept or ", ".join(self.erased)

    def has_weights(self, method: str) -> bool:
        sources = (
            *(self.recipes, self.adapters, self.weights, self.models),
            *(self.words, self.images, self.code),
        )
        return any(method in named for named in sources) or (
            method == "uce" and self.uce is not None
        )

    def file(self, name: str) -> Path:
        """A file that the bench names, beside it."""
        return self._folder / name

    def recipe(self, name: str) -> Recipe:
        """The recipe that trains `name`, without a measurement of its own: the bench measures."""
        trained = self.trainings[name]
        seed = {"training.seed": trained.seeds[0]} if trained.seeds else {}
        changes = {"model": self.model} | trained.set | seed
        nothing: dict[str, Any] = {
            "measure.detector": "none",
            "measure.transfer": [],
            "measure.attacks": None,
        }
        return Recipe.load(self.file(trained.file), changes | nothing)

    @property
    def trainings(self) -> dict[str, TrainedBy]:
        """What is trained, by name: `recipes`, and each again for every further seed of its own."""
        further = {
            f"{name}.seed-{seed}": trained.model_copy(update={"seeds": [seed]})
            for name, trained in self.recipes.items()
            for seed in trained.seeds[1:]
        }
        return self.recipes | further

    def trainings_of(self, method: str) -> list[str]:
        """The names of a row's trainings, one a seed."""
        seeds = self.recipes[method].seeds if method in self.recipes else []
        return [method, *(f"{method}.seed-{seed}" for seed in seeds[1:])]

    def to_yaml(self) -> str:
        """The complete bench, defaults filled in."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @property
    def sha256_of_images(self) -> str:
        """SHA-256 of what images depend on; methods, measures and variations may be added."""
        fixed = self.model_dump(mode="json", include=set(_FIXED))
        del fixed["sampling"]["batch"]
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _named(entries: Any, where: str, default: Any) -> Any:
    """[a, {b: x}] → {a: default, b: x}; what is no list is left for the field's own check."""
    if not isinstance(entries, list):
        return entries
    found: dict[Any, Any] = {}
    for entry in entries:
        if not isinstance(entry, str | dict):
            raise BadInput(f"{where}: expected a name, or {{name: …}}, found {entry!r}")
        named = entry if isinstance(entry, dict) else {entry: default}
        if twice := [name for name in named if name in found]:
            raise BadInput(f"{where}: {twice[0]} stands there twice; expected each once")
        found |= named
    return found


def _quicken(fields: dict[str, Any]) -> None:
    """Put the fields of `quick` on top; recipes get theirs too, but a row that is not trained stays
    so. What has not the shape for that is left for the field's own check."""
    quick = fields.get("quick")
    if not isinstance(quick, dict):
        raise BadInput("`quick=True`: this bench has no `quick` section saying what to leave out")
    fields["name"] = f"{fields.get('name')}-quick"
    if isinstance(changes := quick.get("bench"), dict):
        put(fields, changes)
    recipes, changes = fields.get("recipes"), quick.get("recipes")
    if isinstance(recipes, dict) and isinstance(changes, dict):
        for trained in recipes.values():
            if isinstance(trained, dict) and isinstance(trained.get("set", {}), dict):
                own = trained.get("set", {})
                length = "training.iterations"
                untrained = {length: 0} if own.get(length) == 0 else {}
                trained["set"] = own | changes | untrained


def chosen(bench: Bench, methods: Sequence[str] | None) -> Bench:
    """The bench with fewer methods, in variations and attacks too. Raises BadInput for one that it
    lacks."""
    if not methods:
        return bench
    there = bench.every_method
    if unknown := [m for m in methods if m not in there]:
        raise BadInput(
            f"`methods={', '.join(unknown)}`: not in this bench; expected some of "
            f"{', '.join(dict.fromkeys(there))}"
        )
    variations = {}
    for name, variation in bench.variations.items():
        if kept := [m for m in variation.methods if m in methods]:
            variations[name] = variation.model_copy(update={"methods": kept})
    wanted = [m for m in bench.methods if m in methods]
    if not wanted:
        raise BadInput(
            f"`methods={', '.join(methods)}`: in variations or attacks only; expected one of the "
            f"table's rows too: {', '.join(bench.methods)}"
        )
    choice = bench.choice
    if choice is not None:
        own = [m for m in choice.methods if m in wanted]
        choice = choice.model_copy(update={"methods": own}) if own else None
    attacks = bench.attacks
    if attacks is not None:
        attacked = [m for m in attacks.methods if m in methods]
        attacks = attacks.model_copy(update={"methods": attacked}) if attacked else None
    return bench.model_copy(
        update={
            "methods": wanted,
            "variations": variations,
            "choice": choice,
            "attacks": attacks,
        }
    )


def with_own_rows(bench: Bench, own: Mapping[str, str]) -> Bench:
    """The bench with rows of the user's own below its own, each name with the field that holds it;
    attacked with the others where the weights of their UNets are known."""
    changes: dict[str, Any] = {"methods": [*bench.methods, *own]}
    if bench.attacks:
        of_weights = [name for name, field in own.items() if field in ("adapters", "weights")]
        attacked = list(dict.fromkeys([*bench.attacks.methods, *of_weights]))
        changes["attacks"] = bench.attacks.model_copy(update={"methods": attacked})
    return bench.model_copy(update=changes)


def limited(bench: Bench, limit: int | None) -> Bench:
    """The bench with at most `limit` images of each kind (erased, kept) a row."""
    if limit is None:
        return bench
    seeds = {"erased": min(limit, bench.seeds.erased), "kept": min(limit, bench.seeds.kept)}
    return bench.model_copy(update={"seeds": bench.seeds.model_copy(update=seeds)})
