"""Paraphrases and group words: what was erased, by names that no recipe was trained on."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from sdd_lora.attacks.case import Attacked, Case
from sdd_lora.attacks.settings import Words
from sdd_lora.demo.vocabulary import Noun, groups, nouns, with_article
from sdd_lora.errors import BadInput
from sdd_lora.measures.asked import named_by


def paraphrase(case: Case, settings: Words) -> Attacked:
    """Another name: "an axe" → "a chopper tool"."""
    return Attacked(reworded(case.prompt, case.seed, paraphrases(case.concepts, settings)))


def group_word(case: Case, settings: Words) -> Attacked:
    """The group's word: "an axe" → "a weapon"."""
    return Attacked(reworded(case.prompt, case.seed, group_words(case.concepts, settings)))


def paraphrases(concepts: Sequence[str], settings: Words) -> dict[str, list[str]]:
    """Name → other names, none of them a concept that is erased."""
    return settings.words or _of_vocabulary(concepts, lambda noun: noun.paraphrases)


def group_words(concepts: Sequence[str], settings: Words) -> dict[str, list[str]]:
    """Name → its group's word, unless that is a concept that is erased."""
    return settings.words or _of_vocabulary(concepts, lambda noun: [groups()[noun.group].word])


def reworded(prompt: str, seed: int, words: Mapping[str, Sequence[str]]) -> str:
    """The prompt with the first name that it holds, and its article, in other words; the seed says
    in which ones. Raises BadInput where it holds none."""
    for name in sorted(words, key=len, reverse=True):  # "ice cream cone" before "cone"
        match = re.search(rf"\b(an? )?{re.escape(name)}\b", prompt)
        if match:
            new = words[name][seed % len(words[name])]
            new = with_article(new) if match.group(1) else new
            return prompt[: match.start()] + new + prompt[match.end() :]
    raise BadInput(
        f"no other words for {prompt!r}: expected one of {', '.join(words) or 'no name'} in it; "
        "say what to call it under `words`: {name: [other words]}"
    )


def _of_vocabulary(
    concepts: Sequence[str], of: Callable[[Noun], Iterable[str]]
) -> dict[str, list[str]]:
    gone = named_by(concepts)[0]
    found = {
        name: [words for words in of(noun) if words not in concepts]
        for noun in nouns()
        if noun in gone
        for name in noun.names
    }
    return {name: words for name, words in found.items() if words}
