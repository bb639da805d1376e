"""Measures of the embedded model's pictures: is there what was asked for, in that style?"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from sdd_lora.demo.judge import Judge, Verdict, as_pictures, judge_images
from sdd_lora.demo.vocabulary import Noun, groups, nouns, styles
from sdd_lora.errors import BadInput
from sdd_lora.measures.intervals import paired_difference, wilson

_SIDE, _SMOOTH = 64, Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for, as far as the judge's vocabulary goes."""

    nouns: tuple[Noun, ...]
    style: str | None


@dataclass(frozen=True)
class Row:
    """One line of a measurement: a rate before and after, each a fraction of `n` images."""

    name: str
    group: str
    prompts: int
    before: float
    after: float
    n: int
    ci95_before: tuple[float, float]
    ci95_after: tuple[float, float]
    ci95_change: tuple[float, float]


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[re.Pattern, Noun]]:
    """Names of nouns, the longest first, so that "ice cream cone" is not taken for "cone"."""
    named = [(name, noun) for noun in nouns() for name in (*noun.names, *noun.paraphrases)]
    named.sort(key=lambda pair: -len(pair[0]))
    return [(re.compile(rf"\b{re.escape(name)}\b"), noun) for name, noun in named]


def asked_for(prompt: str) -> Asked:
    """The nouns (left to right) and the style that a prompt names."""
    text, found = prompt.lower(), []
    style = None
    for name, entry in styles().items():
        for words in sorted(entry.captions, key=len, reverse=True):
            if words in text:
                style, text = name, text.replace(words, " ")
    for pattern, noun in _patterns():
        if match := pattern.search(text):
            found.append((match.start(), noun))
            text = text[: match.start()] + " " * len(match.group()) + text[match.end() :]
    return Asked(tuple(noun for _, noun in sorted(found, key=lambda pair: pair[0])), style)


def see(judge: Judge, prompts: Sequence[str], images: np.ndarray) -> list[list[Verdict]]:
    """What is in each image (B, 64, 64, 3): one verdict, or one for each half where the prompt asks
    for two things side by side."""
    pictures: list[np.ndarray] = []
    owners: list[int] = []
    for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        parts = _halves(image) if len(asked_for(prompt).nouns) == 2 else [image]
        pictures += parts
        owners += [index] * len(parts)
    seen: list[list[Verdict]] = [[] for _ in prompts]
    for owner, verdict in zip(owners, judge_images(judge, np.stack(pictures)), strict=True):
        seen[owner].append(verdict)
    return seen


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
    """Is all there that a prompt asks for and that is to stay: its nouns, and its style?"""
    staying = {noun.name for noun in asked.nouns if noun not in gone_nouns}
    drawn = staying <= {verdict.noun for verdict in seen}
    styled = asked.style is None or asked.style in gone_styles
    return drawn and (styled or any(verdict.style == asked.style for verdict in seen))


def sized(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images (H, W, 3) uint8 as (B, 64, 64, 3): what the judge knows; those that
    prompts gave sizes of their own are resized."""
    side = (_SIDE, _SIDE)
    return np.stack([
        x if x.shape[:2] == side else np.asarray(Image.fromarray(x).resize(side, _SMOOTH))
        for x in images
    ])  # fmt: skip


@torch.no_grad()
def feature_distances(judge: Judge, images: np.ndarray, base: np.ndarray) -> list[float]:
    """Euclidean distances (B,) between the judge's features of two sets of images
    (B, 64, 64, 3) uint8. They compare rows of one table; they are no FID and no LPIPS."""
    a, b = (judge.features(as_pictures(part)) for part in (images, base))
    return (a - b).norm(dim=1).tolist()


#: prompts, verdicts before, verdicts after, image by image
JudgedImages = tuple[Sequence[str], list[list[Verdict]], list[list[Verdict]]]
#: does what was asked for hold of what was seen?
Holds = Callable[[Asked, list[Verdict]], bool]


def check_concepts(erased: Sequence[str]) -> None:
    """Raises BadInput where no concept is in the judge's vocabulary."""
    if not any(named_by(erased)):
        raise BadInput(f"measure.detector: the judge knows none of the concepts {list(erased)}")


def named_by(concepts: Sequence[str]) -> tuple[set[Noun], set[str]]:
    """Nouns (a group's word stands for all of them) and styles that the concepts name."""
    asked = [asked_for(concept) for concept in concepts]
    gone = {noun for a in asked for noun in a.nouns}
    gone |= {noun for group in groups().values() if group.word in concepts for noun in group.nouns}
    return gone, {a.style for a in asked if a.style and not a.nouns}


def rows(erased: Sequence[str], concept: JudgedImages, kept: JudgedImages) -> list[Row]:
    """Rates before and after; `erased` are the recipe's concepts.

    concept drawn: any erased noun is in the picture; or, where a style is erased, its style.
    noun kept: the noun asked for is there, by group. style kept: the style asked for.
    beside: in prompts for two things, the one that is not erased is there.
    """
    gone_nouns, gone_styles = named_by(erased)
    gone_names = {noun.name for noun in gone_nouns}

    def drawn(_: Asked, seen: list[Verdict]) -> bool:
        return any(v.noun in gone_names or v.style in gone_styles for v in seen)

    out: list[Row] = []
    asked_groups = [
        "style" if gone_styles else a.nouns[0].group if a.nouns else "other"
        for a in map(asked_for, concept[0])
    ]
    for name in dict.fromkeys(asked_groups):
        wanted = [i for i, group in enumerate(asked_groups) if group == name]
        out += _row("concept drawn", name, concept, drawn, wanted)
    prompts = kept[0]
    asked = [asked_for(prompt) for prompt in prompts]
    for name in groups():
        wanted = [i for i, a in enumerate(asked) if [n.group for n in a.nouns] == [name]]
        out += _row("noun kept", name, kept, _noun_there, wanted)
    both = [i for i, a in enumerate(asked) if len(a.nouns) == 2 and set(a.nouns) - gone_nouns]

    def survivor_there(a: Asked, seen: list[Verdict]) -> bool:
        return any(v.noun == n.name for v in seen for n in a.nouns if n not in gone_nouns)

    out += _row("noun kept beside an erased one", "pairs", kept, survivor_there, both)
    styled = [i for i, a in enumerate(asked) if a.style and len(a.nouns) == 1]
    return out + _row("style kept", "all", kept, _style_there, styled)


def _noun_there(asked: Asked, seen: list[Verdict]) -> bool:
    return seen[0].noun == asked.nouns[0].name


def _style_there(asked: Asked, seen: list[Verdict]) -> bool:
    return seen[0].style == asked.style


def _row(name: str, group: str, images: JudgedImages, holds: Holds, chosen: list[int]) -> list[Row]:
    """The row of the chosen images; none where there is nothing to count."""
    prompts, seen_before, seen_after = images
    if not chosen:
        return []
    before = [holds(asked_for(prompts[i]), seen_before[i]) for i in chosen]
    after = [holds(asked_for(prompts[i]), seen_after[i]) for i in chosen]
    return [row_of(name, group, [prompts[i] for i in chosen], before, after)]


def row_of(
    name: str, group: str, prompts: Sequence[str], before: list[bool], after: list[bool]
) -> Row:
    """The row of what holds of images before and after, prompt by prompt."""
    n = len(before)
    _, low, high = paired_difference(before, after)
    return Row(
        name, group, len(set(prompts)), sum(before) / n, sum(after) / n, n,
        wilson(sum(before), n), wilson(sum(after), n), (low, high),
    )  # fmt: skip
