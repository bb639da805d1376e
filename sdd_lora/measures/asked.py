"""What a prompt asks for, as far as the embedded model's vocabulary goes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from sdd_lora.demo.vocabulary import Noun, groups, nouns, plural, styles


@dataclass(frozen=True)
class Asked:
    """The nouns (left to right) and the style that a prompt names."""

    nouns: tuple[Noun, ...]
    style: str | None


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[re.Pattern[str], Noun]]:
    """Names of nouns, the longest first, so that "ice cream cone" is not taken for "cone"."""
    named = [(name, noun) for noun in nouns() for name in (*noun.names, *noun.paraphrases)]
    named += [(plural(name), noun) for name, noun in named]
    named.sort(key=lambda pair: -len(pair[0]))
    return [(re.compile(rf"\b{re.escape(name)}\b"), noun) for name, noun in named]


def asked_for(prompt: str) -> Asked:
    """The nouns and the style that a prompt names."""
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


def named_by(concepts: Sequence[str]) -> tuple[set[Noun], set[str]]:
    """Nouns (a group's word stands for all of them) and styles that the concepts name."""
    asked = [asked_for(concept) for concept in concepts]
    gone = {noun for a in asked for noun in a.nouns}
    gone |= {noun for group in groups().values() if group.word in concepts for noun in group.nouns}
    return gone, {a.style for a in asked if a.style and not a.nouns}


def kept_concept(name: str, prompt: str) -> str | None:
    """The concept of which a kept rate says whether it stayed; None for other measures."""
    asked = asked_for(prompt)
    if name == "noun kept":
        return " and ".join(noun.name for noun in asked.nouns)
    return f"{asked.style} style" if name == "style kept" else None
