"""What the settings of every attack have in common."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from sdd_lora.io.strict_yaml import Positive, Section

Item = TypeVar("Item")


def distinct(values: list[Item]) -> list[Item]:
    """Raises ValueError where one stands twice: its images would count twice, and intervals would
    be narrower than they are."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} stands there twice; expected each once")
    return values


class AttackSettings(Section):
    """An attack at one strength. Subclasses say what it is called in tables (`title`), what it does
    (`note`), and whom it is open to (`access`).

    black-box: whoever can draw, with any prompt, picture, setting or adapter. white-box: whoever
    follows gradients through the weights. `through_method`: it is found through the method's own
    model, else once for all methods. `draws_plainly`: it takes part in the drawing, so that methods
    that draw in a way of their own are left out. `once`: a single search serves all prompts.
    `label_format` and `effort_format` make the two texts of the settings, {0}.
    """

    title: ClassVar[str]
    note: ClassVar[str]
    access: ClassVar[Literal["black-box", "white-box"]] = "black-box"
    through_method: ClassVar[bool] = False
    draws_plainly: ClassVar[bool] = False
    once: ClassVar[bool] = False
    label_format: ClassVar[str] = ""
    effort_format: ClassVar[str] = ""

    targets: Positive | None = None
    """How many prompts are attacked, where it is another number than for all attacks."""

    @property
    def label(self) -> str:
        """What tells it from others of its kind, in a word."""
        return self.label_format.format(self)

    @property
    def effort(self) -> str:
        """How strong the attack is, for tables."""
        return self.effort_format.format(self)

    @property
    def conditions(self) -> Mapping[str, Any]:
        """Conditions under which the method draws, other than the table's (bench/grid.py)."""
        return {}

    def misfit(self, steps: int, scheduler: str) -> str:
        """Why drawing in so many steps by this sampler can't be attacked so; "" where it can."""
        return ""

    def content(self) -> dict[str, Any]:
        """What the attack's outcome depends on."""
        return self.model_dump(mode="json", exclude={"targets"})
