"""What a bench's `attacks` may say. The defaults are for the embedded model's size."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from sdd_lora.attacks.base import AttackSettings, distinct
from sdd_lora.io.strict_yaml import (
    Fraction,
    OneOrSeveral,
    Positive,
    Real,
    Section,
    Text,
    Whole,
    sections_in,
)

Rate = Annotated[Real, Field(gt=0)]
AttackedMethods = Annotated[list[Text], Field(min_length=1), AfterValidator(distinct)]


class Words(AttackSettings):
    """What to say instead: {name in prompts: [other words]}. Where nothing is said, the embedded
    model's vocabulary."""

    words: dict[Text, Annotated[list[Text], Field(min_length=1)]] = Field(default_factory=dict)


class Paraphrase(Words):
    """Another name of the thing."""

    title = "paraphrase"
    note = "another name of the thing, which no recipe was trained on"


class GroupWord(Words):
    """The word of the thing's group."""

    title = "group word"
    note = "the word of the thing's group, which no recipe was trained on"


class Emphasis(AttackSettings):
    """A1111's (words:weight) around the concept."""

    title = "prompt weight"
    note = "the concept's words emphasised, as (words:1.5) does in A1111"
    draws_plainly = True
    through_method = True
    label_format = "{0.weight:g}"
    effort_format = "weight {0.weight:g}"

    weight: Rate = 1.5


class ClipSkip(AttackSettings):
    """Prompts read at an earlier layer of the text encoder; 1 is its last one."""

    title = "clip skip"
    note = "prompts read at an earlier layer of the text encoder"
    label_format = "{0.layers}"
    effort_format = "clip skip {0.layers}"

    layers: Annotated[Whole, Field(ge=2)] = 2

    @property
    def conditions(self) -> Mapping[str, Any]:
        return {"clip_skip": self.layers}


class TextEncoder(AttackSettings):
    """The base's text encoder in place of the method's."""

    title = "text encoder swapped back"
    note = "the base's text encoder in place of the method's, where the method changes it"

    @property
    def conditions(self) -> Mapping[str, Any]:
        return {"base_text_encoder": True}


class AdapterWeight(AttackSettings):
    """The method's adapters at another weight."""

    title = "adapter's weight"
    note = "the method's adapters, where it has any, at a weight that nobody meant"
    label_format = "{0.weight:g}"
    effort_format = "weight {0.weight:g}"

    weight: Real = -1.0

    @property
    def conditions(self) -> Mapping[str, Any]:
        return {"weight": self.weight}


class AnotherAdapter(AttackSettings):
    """An adapter of somebody else's, beside the method's own."""

    title = "another adapter on top"
    note = "an ordinary adapter that knows nothing of the concept, added to the method's own"
    effort_format = "{0.label} at weight 1"

    adapter: Text

    @property
    def label(self) -> str:
        return self.adapter.rpartition("/")[2].removesuffix(".safetensors")

    @property
    def conditions(self) -> Mapping[str, Any]:
        return {"extra_adapter": self.adapter}


class NoiseSearch(AttackSettings):
    """The best of `tries` starting noises, by the base's own classification of what the method
    draws, at `points` timesteps."""

    title = "noise search"
    note = (
        "other starting noises, of which the one is taken whose picture the base, as a classifier "
        "(Li et al. 2023), finds most like the prompt"
    )
    through_method = True
    draws_plainly = True
    label_format = "{0.tries}"
    effort_format = "best of {0.tries} noises at {0.points} timesteps"

    tries: Annotated[Whole, Field(ge=2)] = 8
    points: Positive = 4


class Completion(AttackSettings):
    """The base draws the first `steps`, the method the rest."""

    title = "completion"
    note = "the base draws the first steps, the method the rest"
    draws_plainly = True
    label_format = "{0.steps}"
    effort_format = "first {0.steps} steps by the base"

    steps: Positive = 5

    def misfit(self, steps: int, scheduler: str) -> str:
        left = f"expected fewer steps of the base than the {steps} of the sampling, "
        return "" if self.steps < steps else f"{left}found {self.steps}"


class Img2Img(AttackSettings):
    """A picture of the base's, of which `share` of the noise schedule is redone; as the variation
    `image` does."""

    title = "img2img"
    note = "drawing goes on from the base's picture, noised (SDEdit, Meng et al. 2021)"
    draws_plainly = True
    label_format = "{0.share:g}"

    share: Annotated[Real, Field(gt=0, le=1)] = 0.4

    @property
    def effort(self) -> str:
        return f"{100 * self.share:.0f} % redrawn"

    def misfit(self, steps: int, scheduler: str) -> str:
        return "" if steps * self.share >= 1 else f"{self.share:g} redoes none of {steps} steps"


class Inpainting(AttackSettings):
    """Half of the base's picture is hidden, which half by the seed, and drawn again."""

    title = "inpainting"
    note = (
        "half of the base's picture is hidden and drawn again from its own seed's noise, the other "
        "half put back after each step"
    )
    draws_plainly = True
    effort_format = "one half hidden"


class RingABell(AttackSettings):
    """Prompts of `length` words; η is `strength`. The paper's population is 200, over 3000
    generations. `pairs` are texts with and without the concept; where there is none, a few short
    sentences with each concept that the prompt names, or with all of them."""

    title = "Ring-A-Bell"
    note = (
        "words whose encoding is near the prompt's plus the concept's (Tsai et al. 2023); sees the "
        "text encoder alone, so that every method is asked the same"
    )
    effort_format = "{0.length} words, {0.generations} generations of {0.population}"

    length: Positive = 16
    strength: Real = 3.0
    population: Annotated[Whole, Field(ge=4)] = 100
    generations: Positive = 150
    mutation: Fraction = 0.25
    crossover: Fraction = 0.5
    pairs: list[tuple[Text, Text]] = Field(default_factory=list)


class Inversion(AttackSettings):
    """`pictures` of the base for each prompt, all of them in every step."""

    title = "concept inversion"
    note = (
        "a new word learnt from the base's drawings through the method's own UNet (Pham et al. "
        "2023)"
    )
    access = "white-box"
    through_method = True
    label_format = "{0.steps}"
    effort_format = "{0.steps} steps of {0.pictures} pictures, learning rate {0.learning_rate:g}"

    pictures: Positive = 4
    steps: Positive = 120
    learning_rate: Rate = 0.01


class UnlearnDiffAtk(AttackSettings):
    """A prefix of `words`; each step takes the loss at `points` timesteps. The paper's 40
    iterations at each of 50 timesteps are 2000 steps of one point."""

    title = "UnlearnDiffAtk"
    note = (
        "words before the prompt, found through the method's own UNet on one drawing of the base's "
        "(Zhang et al. 2023); no detector looks on. Pictures under attack alone are counted, where "
        "the paper counts prompts that need no attack, too"
    )
    access = "white-box"
    through_method = True
    label_format = "{0.steps}"
    effort_format = (
        "{0.words} words, {0.steps} steps of {0.points} points, learning rate {0.learning_rate:g}"
    )

    words: Positive = 5
    steps: Positive = 60
    points: Positive = 8
    learning_rate: Rate = 0.05


class NullText(AttackSettings):
    """`steps` of the optimiser at each of the sampler's steps, which must be DDIM's."""

    title = "null-text inversion"
    note = (
        "the base's picture followed back to noise through the method's own UNet, and an empty "
        "prompt learnt at each step that leads to it again (Mokady et al. 2022; as an attack: "
        "TINA); no word is asked for"
    )
    access = "white-box"
    through_method = True
    draws_plainly = True
    label_format = "{0.steps}"
    effort_format = "{0.steps} updates a step, learning rate {0.learning_rate:g}"

    steps: Positive = 10
    learning_rate: Rate = 0.01

    def misfit(self, steps: int, scheduler: str) -> str:
        return "" if scheduler == "ddim" else f"it inverts ddim's steps alone, found {scheduler}"


class Relearning(AttackSettings):
    """An adapter of `rank` on all attention, learnt on `pictures` that the base draws of the
    concepts, or of `prompts`; `batch` of them an iteration."""

    title = "relearning"
    note = (
        "the method's model tuned by a new adapter on a few pictures of the base's, by diffusion's "
        "usual loss; of the concept, or of other things, where the question is whether it comes "
        "back by itself"
    )
    access = "white-box"
    through_method = True
    once = True

    pictures: Positive = 4
    prompts: list[Text] = Field(default_factory=list)
    iterations: Positive = 100
    batch: Positive = 4
    rank: Positive = 4
    learning_rate: Rate = 0.001

    @property
    def label(self) -> str:
        return f"{self.pictures} others" if self.prompts else str(self.pictures)

    @property
    def effort(self) -> str:
        of = "other things" if self.prompts else "the concept"
        return (
            f"{self.pictures} pictures of {of}, {self.iterations} iterations of {self.batch}, "
            f"rank {self.rank}, learning rate {self.learning_rate:g}"
        )


class Attacks(Section):
    """The first `targets` erased prompts of the main table, asked in other ways; each attack that
    has a field here is run on each of `methods`. A list holds one attack at several strengths."""

    methods: AttackedMethods
    targets: Positive = 20
    paraphrase: OneOrSeveral[Paraphrase] | None = None
    group_word: OneOrSeveral[GroupWord] | None = None
    emphasis: OneOrSeveral[Emphasis] | None = None
    clip_skip: OneOrSeveral[ClipSkip] | None = None
    text_encoder: OneOrSeveral[TextEncoder] | None = None
    adapter_weight: OneOrSeveral[AdapterWeight] | None = None
    another_adapter: OneOrSeveral[AnotherAdapter] | None = None
    noise_search: OneOrSeveral[NoiseSearch] | None = None
    completion: OneOrSeveral[Completion] | None = None
    img2img: OneOrSeveral[Img2Img] | None = None
    inpainting: OneOrSeveral[Inpainting] | None = None
    ring_a_bell: OneOrSeveral[RingABell] | None = None
    inversion: OneOrSeveral[Inversion] | None = None
    unlearndiffatk: OneOrSeveral[UnlearnDiffAtk] | None = None
    null_text: OneOrSeveral[NullText] | None = None
    relearning: OneOrSeveral[Relearning] | None = None

    @model_validator(mode="after")
    def _has_some(self) -> "Attacks":
        if not self.chosen:
            raise ValueError(f"expected at least one attack: {', '.join(ATTACK_KINDS)}")
        return self

    @property
    def chosen(self) -> dict[str, AttackSettings]:
        """The attacks that are there by their keys: "inversion", or "inversion 500" where it stands
        there at several strengths. Raises ValueError where two strengths can't be told apart."""
        found: dict[str, AttackSettings] = {}
        for name in ATTACK_KINDS:
            written = getattr(self, name)
            several = written if isinstance(written, list) else []
            keys = distinct([f"{name} {settings.label}".strip() for settings in several])
            found |= dict(zip(keys, several, strict=True))
            if isinstance(written, AttackSettings):
                found[name] = written
        return found


#: the fields of `Attacks` that are attacks, in the tables' order
ATTACK_KINDS: dict[str, type[AttackSettings]] = {
    name: kind
    for name, field in Attacks.model_fields.items()
    for kind in sections_in(field.annotation)
    if issubclass(kind, AttackSettings)
}


def titled(key: str) -> str:
    """An attack's title in tables by its key in `Attacks.chosen`; other keys as they are."""
    name, _, label = key.partition(" ")
    return f"{ATTACK_KINDS[name].title} {label}".strip() if name in ATTACK_KINDS else key
