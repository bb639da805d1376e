"""A measure: what every one of them has in common, for cards and benches alike."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from sdd_lora.generation.sampling import Job

#: a measure's numbers of one image: True and False become rates, numbers means or totals
Values = dict[str, bool | float]
Prompted = Literal["erased", "kept", "all"]
Better = Literal["lower", "higher", "neither"]


class FrozenModel(BaseModel):
    """A part of results.json: unknown fields and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MeasureInfo(FrozenModel):
    """How to read a number: a rate, a mean or a total, over which prompts, and which way is better.

    The headline of an `all` counts erased prompts alone where there are some, kept ones having rows
    of their own. `maximum_of` names the rate whose expected maximum over prompts this is.
    """

    kind: Literal["rate", "mean", "total"]
    of: Prompted
    better: Better
    note: str = ""
    maximum_of: str = ""

    @classmethod
    def rate(cls, of: Prompted, better: Better, note: str) -> "MeasureInfo":
        """Of a share of images."""
        return cls(kind="rate", of=of, better=better, note=note)


@dataclass(frozen=True)
class ImageSpec:
    """One image wanted: its prompt and seed, the set and the categories that it counts for.

    `kind` is "erased" or "kept". `wanted` is the prompt that names the concept where an attack asks
    for it in other words.
    """

    kind: str
    set: str
    job: Job
    wanted: str = ""
    categories: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What the image is judged by."""
        return self.wanted or self.job.prompt


class Measure:
    """One measure; a subclass overrides some of the methods below, those that it can answer.

    It is made with what is erased (concepts, or a style) and its own options, and raises BadInput
    where it lacks what it needs. `info` describes its numbers by name. `source` says what makes
    them (hashes of weights, versions of packages): with another one they are measured again.
    `files` names the options that are paths.
    """

    files: ClassVar[tuple[str, ...]] = ()
    info: Mapping[str, MeasureInfo]
    source: str

    def per_image(self, specs: Sequence[ImageSpec], images: Sequence[np.ndarray]) -> list[Values]:
        """Numbers of single images (H, W, 3) uint8 RGB; one that doesn't apply is left out."""
        return [{} for _ in specs]

    def against_reference(
        self,
        specs: Sequence[ImageSpec],
        images: Sequence[np.ndarray],
        references: Sequence[np.ndarray],
    ) -> list[Values]:
        """The same of images beside those that the unchanged model drew from the same latents."""
        return [{} for _ in specs]

    def per_set(self, images: Iterable[np.ndarray]) -> dict[str, float]:
        """One number each for all kept images of a method."""
        return {}

    def card_row(self, spec: ImageSpec, name: str) -> tuple[str, str] | None:
        """The row (name and group) of a card in which an image's number counts, if there is one."""
        return None

    @classmethod
    def overrides(cls, method: str) -> bool:
        """Whether the measure answers a method of this class, such as "per_set"."""
        return getattr(cls, method) is not getattr(Measure, method)


def detector_row(spec: ImageSpec, name: str, threshold: float) -> tuple[str, str]:
    """The card's row of a detector that flags images with a score from `threshold` on."""
    row = f"flagged by {name} (score ≥ {threshold:g})"
    return (row, "concept") if spec.kind == "erased" else (f"kept, {row}", "kept")


def is_black(image: np.ndarray) -> bool:
    """Whether every value of an image is 0: NaN written as a PNG, or a safety checker's answer.

    Such a picture shows nothing; counted, it would pass for perfect erasure.
    """
    return not image.any()


def taken(
    measure: Measure,
    specs: Sequence[ImageSpec],
    images: Sequence[np.ndarray],
    references: Sequence[np.ndarray] | None = None,
) -> list[Values]:
    """A measure's numbers of images, against references too where there are some.

    A black image has none, and none is compared with a black reference.
    """
    values: list[Values] = [{} for _ in specs]
    shown = [i for i, image in enumerate(images) if not is_black(image)]
    if measure.overrides("per_image") and shown:
        found = measure.per_image([specs[i] for i in shown], [images[i] for i in shown])
        for i, numbers in zip(shown, found, strict=True):
            values[i] = dict(numbers)
    if references is not None and measure.overrides("against_reference"):
        shown = [i for i in shown if not is_black(references[i])]
        if not shown:
            return values
        compared = measure.against_reference(
            [specs[i] for i in shown],
            [images[i] for i in shown],
            [references[i] for i in shown],
        )
        for i, numbers in zip(shown, compared, strict=True):
            values[i] |= numbers
    return values
