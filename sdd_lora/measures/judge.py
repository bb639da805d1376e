"""The embedded model's judge: is what was to go still drawn, is what was to stay there?"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from sdd_lora.demo.judge import JUDGE_FILE, Judge, Verdict, as_pictures, judge_images, load_judge
from sdd_lora.demo.vocabulary import Noun
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import sha256_of
from sdd_lora.measures.asked import Asked, asked_for, named_by
from sdd_lora.measures.base import ImageSpec, Measure, MeasureInfo, Values

_SIDE, _SMOOTH = 64, Image.Resampling.BICUBIC


class JudgeMeasure(Measure):
    """Rates by the embedded model's judge. Raises BadInput where it knows none of the concepts."""

    info = {
        "concept drawn": MeasureInfo.rate(
            "erased",
            "lower",
            "any erased noun, or the erased style, in an image whose prompt asks for it",
        ),
        "noun kept": MeasureInfo.rate("kept", "higher", "the noun that a kept prompt asks for"),
        "noun kept beside": MeasureInfo.rate(
            "kept", "higher", "of two things asked for, one of them erased, the other one"
        ),
        "style kept": MeasureInfo.rate("kept", "higher", "the style that a kept prompt asks for"),
        "noun kept without the style": MeasureInfo.rate(
            "erased", "higher", "the noun asked for, in images whose style is to go"
        ),
        "prompt agreement": MeasureInfo.rate(
            "kept",
            "higher",
            "all that is to stay of what a kept prompt asks for: nouns, and the style",
        ),
        "distance of judge features": MeasureInfo(
            kind="mean",
            of="kept",
            better="lower",
            note="between the judge's features (128, Euclidean) of an image and of `sd`'s on the "
            "same latents; no LPIPS and no FID",
        ),
    }

    def __init__(self, erased: Sequence[str]) -> None:
        self.nouns, self.styles = named_by(erased)
        if not self.nouns and not self.styles:
            raise BadInput(f"the judge knows none of the concepts {list(erased)}")
        self.judge = load_judge()
        self.source = sha256_of(JUDGE_FILE)

    def per_image(self, specs: Sequence[ImageSpec], images: Sequence[np.ndarray]) -> list[Values]:
        seen = verdicts_on(self.judge, [spec.prompt for spec in specs], images)
        return [self.values(spec, found) for spec, found in zip(specs, seen, strict=True)]

    def values(self, spec: ImageSpec, seen: Sequence[Verdict]) -> Values:
        """The numbers of an image, from the verdicts on it."""
        asked = asked_for(spec.prompt)
        return self._erased(asked, seen) if spec.kind == "erased" else self._kept(asked, seen)

    def _erased(self, asked: Asked, seen: Sequence[Verdict]) -> Values:
        names = {noun.name for noun in self.nouns}
        values: Values = {
            "concept drawn": any(v.noun in names or v.style in self.styles for v in seen)
        }
        if self.styles and len(asked.nouns) == 1:
            values["noun kept without the style"] = seen[0].noun == asked.nouns[0].name
        return values

    def _kept(self, asked: Asked, seen: Sequence[Verdict]) -> Values:
        values: Values = {}
        if len(asked.nouns) == 1:
            values["noun kept"] = seen[0].noun == asked.nouns[0].name
            if asked.style:
                values["style kept"] = seen[0].style == asked.style
        elif staying := [noun.name for noun in asked.nouns if noun not in self.nouns]:
            values["noun kept beside"] = any(v.noun in staying for v in seen)
        if asked.nouns:
            values["prompt agreement"] = agrees(asked, seen, self.nouns, self.styles)
        return values

    @torch.no_grad()
    def against_reference(
        self,
        specs: Sequence[ImageSpec],
        images: Sequence[np.ndarray],
        references: Sequence[np.ndarray],
    ) -> list[Values]:
        own, other = (
            self.judge.features(as_pictures(sized(part))) for part in (images, references)
        )
        distances = (own - other).norm(dim=1).tolist()
        return [
            {"distance of judge features": distance} if spec.kind == "kept" else {}
            for spec, distance in zip(specs, distances, strict=True)
        ]

    def card_row(self, spec: ImageSpec, name: str) -> tuple[str, str] | None:
        asked = asked_for(spec.prompt)
        group = asked.nouns[0].group if asked.nouns else "other"
        return {
            "concept drawn": (name, "style" if self.styles else group),
            "noun kept": (name, group),
            "noun kept beside": ("noun kept beside an erased one", "pairs"),
            "style kept": (name, "all"),
        }.get(name)


def verdicts_on(
    judge: Judge, prompts: Sequence[str], images: Sequence[np.ndarray]
) -> list[list[Verdict]]:
    """The judge's verdicts on each image (H, W, 3) uint8: one, or one for each half where the
    prompt asks for two things side by side."""
    pictures, owners = pictures_of(prompts, images)
    seen: list[list[Verdict]] = [[] for _ in prompts]
    for owner, verdict in zip(owners, judge_images(judge, np.stack(pictures)), strict=True):
        seen[owner].append(verdict)
    return seen


def pictures_of(
    prompts: Sequence[str], images: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], list[int]]:
    """Pictures (64, 64, 3) to judge, one of each image or one of each half where its prompt asks
    for two things side by side; and the image that each belongs to."""
    pictures: list[np.ndarray] = []
    owners: list[int] = []
    for index, (prompt, image) in enumerate(zip(prompts, sized(images), strict=True)):
        parts = _halves(image) if len(asked_for(prompt).nouns) == 2 else [image]
        pictures += parts
        owners += [index] * len(parts)
    return pictures, owners


def _halves(image: np.ndarray) -> list[np.ndarray]:
    """Left and right half, each centred on white: the judge knows small drawings so."""
    half = image.shape[1] // 2
    halves = []
    for column in (0, half):
        canvas = np.full_like(image, 255)
        canvas[:, half // 2 : half // 2 + half] = image[:, column : column + half]
        halves.append(canvas)
    return halves


def agrees(
    asked: Asked, seen: Sequence[Verdict], gone_nouns: set[Noun], gone_styles: set[str]
) -> bool:
    """Whether all is there that a prompt asks for and that is to stay: its nouns, and its style."""
    staying = {noun.name for noun in asked.nouns if noun not in gone_nouns}
    drawn = staying <= {verdict.noun for verdict in seen}
    styled = asked.style is None or asked.style in gone_styles
    return drawn and (styled or any(verdict.style == asked.style for verdict in seen))


def sized(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images (H, W, 3) uint8 as (B, 64, 64, 3), the size that the judge knows."""
    side = (_SIDE, _SIDE)
    return np.stack(
        [
            x if x.shape[:2] == side else np.asarray(Image.fromarray(x).resize(side, _SMOOTH))
            for x in images
        ]
    )
