"""What a bench's `attacks` may say. The defaults are for the embedded model's size."""

from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, model_validator

from sdd_lora.io.strict_yaml import Fraction, Positive, Real, Section, Text, Whole

Rate = Annotated[Real, Field(gt=0)]
Item = TypeVar("Item")


def distinct(values: list[Item]) -> list[Item]:
    """Raises ValueError where one stands twice: its images would count twice, and intervals would
    be narrower than they are."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} stands there twice; expected each once")
    return values


AttackedMethods = Annotated[list[Text], Field(min_length=1), AfterValidator(distinct)]

#: attack's field → its name in tables, and what the report says of it
NAMES = {
    "paraphrase": ("paraphrase", "another name of the thing, which no recipe was trained on"),
    "group_word": ("group word", "the word of the thing's group, which no recipe was trained on"),
    "ring_a_bell": (
        "Ring-A-Bell",
        "words whose encoding is near the prompt's plus the concept's (Tsai et al. 2023); sees the "
        "text encoder alone, so that every method is asked the same",
    ),
    "inversion": (
        "concept inversion",
        "a new word learnt from the base's drawings through the method's own UNet (Pham et al. "
        "2023)",
    ),
    "unlearndiffatk": (
        "UnlearnDiffAtk",
        "words before the prompt, found through the method's own UNet on one drawing of the base's "
        "(Zhang et al. 2023); no detector looks on. Pictures under attack alone are counted, where "
        "the paper counts prompts that need no attack, too",
    ),
}
#: attacks that follow gradients through a method's UNet; the others only need a text to send
GRADIENTS = frozenset({"inversion", "unlearndiffatk"})


class Words(Section):
    """What to say instead: {name in prompts: [other words]}. Where nothing is said, the embedded
    model's vocabulary."""

    words: dict[Text, Annotated[list[Text], Field(min_length=1)]] = Field(default_factory=dict)


class RingABell(Section):
    """Prompts of `length` words; η is `strength`. The paper's population is 200, over 3000
    generations. `pairs` are texts with and without the concept; where there is none, a few short
    sentences with each concept that the prompt names, or with all of them."""

    length: Positive = 16
    strength: Real = 3.0
    population: Annotated[Whole, Field(ge=4)] = 100
    generations: Positive = 150
    mutation: Fraction = 0.25
    crossover: Fraction = 0.5
    pairs: list[tuple[Text, Text]] = Field(default_factory=list)


class Inversion(Section):
    """`pictures` of the base for each prompt, all of them in every step."""

    pictures: Positive = 4
    steps: Positive = 120
    learning_rate: Rate = 0.01


class UnlearnDiffAtk(Section):
    """A prefix of `words`; each step takes the loss at `points` timesteps. The paper's 40
    iterations at each of 50 timesteps are 2000 steps of one point."""

    words: Positive = 5
    steps: Positive = 60
    points: Positive = 8
    learning_rate: Rate = 0.05


class Attacks(Section):
    """The first `targets` erased prompts of the main table, asked in other ways; each attack that
    has a field here is run on each of `methods`."""

    methods: AttackedMethods
    targets: Positive = 10
    paraphrase: Words | None = None
    group_word: Words | None = None
    ring_a_bell: RingABell | None = None
    inversion: Inversion | None = None
    unlearndiffatk: UnlearnDiffAtk | None = None

    @model_validator(mode="after")
    def _has_some(self) -> "Attacks":
        if not self.chosen:
            raise ValueError(f"expected at least one attack: {', '.join(NAMES)}")
        return self

    @property
    def chosen(self) -> dict[str, Any]:
        """The settings of the attacks that are there."""
        found = {name: getattr(self, name) for name in NAMES}
        return {name: settings for name, settings in found.items() if settings is not None}
