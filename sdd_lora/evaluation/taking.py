"""Measures as a bench takes them: values of single images, which tables turn into rows."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from sdd_lora.demo.judge import load_judge
from sdd_lora.evaluation.measures import judge as judging
from sdd_lora.evaluation.results import MeasureInfo


class Measure(Protocol):
    """`info` describes the numbers it gives. `values` gives them for images (H, W, 3) uint8, each
    with its line of images.jsonl (kind, set, prompt, seed); a number that doesn't apply is left
    out. True and False become rates, other numbers means."""

    info: dict[str, MeasureInfo]

    def values(
        self, lines: Sequence[dict[str, Any]], images: Sequence[np.ndarray]
    ) -> list[dict[str, bool | float]]: ...


class JudgeValues:
    """The embedded model's judge: is what was to go still drawn, is what was to stay there?"""

    info = {  # noqa: RUF012
        "concept drawn": MeasureInfo(
            kind="rate", of="erased", better="lower",
            note="any erased noun, or the erased style, in an image whose prompt asks for it",
        ),
        "noun kept": MeasureInfo(
            kind="rate", of="kept", better="higher", note="the noun that a kept prompt asks for",
        ),
        "noun kept beside": MeasureInfo(
            kind="rate", of="kept", better="higher",
            note="of two things asked for, one of them erased, the other one",
        ),
        "style kept": MeasureInfo(
            kind="rate", of="kept", better="higher", note="the style that a kept prompt asks for",
        ),
        "noun kept without the style": MeasureInfo(
            kind="rate", of="erased", better="higher",
            note="the noun asked for, in images whose style is to go",
        ),
    }  # fmt: skip

    def __init__(self, erased: Sequence[str]) -> None:
        judging.check_concepts(erased)
        self.nouns, self.styles = judging.named_by(erased)
        self.judge = load_judge()

    def values(
        self, lines: Sequence[dict[str, Any]], images: Sequence[np.ndarray]
    ) -> list[dict[str, bool | float]]:
        prompts = [line["prompt"] for line in lines]
        seen = judging.see(self.judge, prompts, np.stack(images))
        return [
            self._erased(asked, found) if line["kind"] == "erased" else self._kept(asked, found)
            for line, asked, found in zip(lines, map(judging.asked_for, prompts), seen, strict=True)
        ]

    def _erased(self, asked: judging.Asked, seen: list[judging.Verdict]) -> dict[str, bool | float]:
        names = {noun.name for noun in self.nouns}
        values: dict[str, bool | float] = {
            "concept drawn": any(v.noun in names or v.style in self.styles for v in seen)
        }
        if self.styles and len(asked.nouns) == 1:
            values["noun kept without the style"] = seen[0].noun == asked.nouns[0].name
        return values

    def _kept(self, asked: judging.Asked, seen: list[judging.Verdict]) -> dict[str, bool | float]:
        values: dict[str, bool | float] = {}
        if len(asked.nouns) == 1:
            values["noun kept"] = seen[0].noun == asked.nouns[0].name
            if asked.style:
                values["style kept"] = seen[0].style == asked.style
        elif staying := [noun.name for noun in asked.nouns if noun not in self.nouns]:
            values["noun kept beside"] = any(v.noun in staying for v in seen)
        return values


def concept_of(line: dict[str, Any]) -> str:
    """What a prompt asks for, as far as the judge's vocabulary goes; else the name of its set."""
    nouns = judging.asked_for(line["prompt"]).nouns
    return " and ".join(noun.name for noun in nouns) or line["set"]


MEASURES: dict[str, Callable[..., Measure]] = {"judge": JudgeValues}
