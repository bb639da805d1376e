"""The embedded model's nouns, groups and drawing styles, read from `vocabulary.yaml`."""

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import yaml

_MASS_WORDS = {"food", "nature", "gore", "blood", "tobacco", "beer", "dynamite", "red wine"}


@dataclass(frozen=True)
class Noun:
    """One thing the model can draw."""

    name: str
    group: str
    icon: str
    names: tuple[str, ...]
    paraphrases: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Nouns that share a word ("weapon"); `unsafe` groups are what recipes erase."""

    name: str
    word: str
    unsafe: bool
    nouns: tuple[Noun, ...]


@dataclass(frozen=True)
class Style:
    """A way of drawing: the icon set it comes from and what captions call it."""

    name: str
    source: str
    captions: tuple[str, ...]


@lru_cache(maxsize=1)
def _vocabulary() -> dict[str, Any]:
    text = files(__package__).joinpath("vocabulary.yaml").read_text("utf-8")
    return dict(yaml.safe_load(text))


@lru_cache(maxsize=1)
def groups() -> dict[str, Group]:
    """Groups by name, in the file's order."""
    return {
        name: Group(
            name=name,
            word=group["word"],
            unsafe=group.get("unsafe", False),
            nouns=tuple(
                Noun(
                    noun,
                    name,
                    entry["icon"],
                    tuple(entry["names"]),
                    tuple(entry.get("paraphrases", ())),
                )
                for noun, entry in group["nouns"].items()
            ),
        )
        for name, group in _vocabulary()["groups"].items()
    }


@lru_cache(maxsize=1)
def nouns() -> tuple[Noun, ...]:
    """All nouns, in the file's order: their index is the judge's class."""
    return tuple(noun for group in groups().values() for noun in group.nouns)


@lru_cache(maxsize=1)
def held_out_nouns() -> tuple[Noun, ...]:
    """Every second noun of each safe group. No recipe of a held-out bench, and no list or tuning
    for one, may name them: they tell what an eraser does to nouns that nobody told it to keep."""
    return tuple(n for group in groups().values() if not group.unsafe for n in group.nouns[1::2])


@lru_cache(maxsize=1)
def wordings_of_prompts() -> dict[str, tuple[str, ...]]:
    """What stands around a noun in prompts: "shown", and "held_out", which stand in no recipe, list
    or tuning."""
    return {name: tuple(texts) for name, texts in _vocabulary()["wordings"].items()}


@lru_cache(maxsize=1)
def styles() -> dict[str, Style]:
    """Styles by name, in the file's order: their index is the judge's class."""
    return {
        name: Style(name, entry["source"], tuple(entry["captions"]))
        for name, entry in _vocabulary()["styles"].items()
    }


def with_article(words: str) -> str:
    """ "axe" → "an axe"; mass words stay bare."""
    if words in _MASS_WORDS:
        return words
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(words: str) -> str:
    """ "kitchen knife" → "kitchen knives", "bow and arrow" → "bows and arrows"."""
    if " and " in words:
        return " and ".join(map(plural, words.split(" and ")))
    head, of, rest = words.partition(" of ")
    if of:
        return f"{plural(head)} of {rest}"
    for end, ends in (("fe", "ves"), ("ey", "eys"), ("ay", "ays"), ("y", "ies")):
        if words.endswith(end):
            return words.removesuffix(end) + ends
    return words + ("es" if words.endswith(("s", "x", "ch", "sh")) else "s")
