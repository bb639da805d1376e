"""The prompts of recipes/bench/demo-*held-out.yaml, from the wordings that are held out; run this
file to write them anew:

python tests/support/held_out_prompts.py
"""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from sdd_lora.demo.vocabulary import (
    Noun,
    groups,
    held_out_nouns,
    nouns,
    plural,
    styles,
    with_article,
    wordings_of_prompts,
)

FOLDER = Path(__file__).parents[2] / "recipes" / "bench" / "prompts"


def prompts() -> dict[str, list[str]]:
    """Name of a file → its prompts; those to choose snapshots by have nothing that is held out."""
    weapons = groups()["weapons"].nouns
    safe = [noun for noun in nouns() if noun.group != "weapons"]
    named = [noun for noun in safe if noun not in held_out_nouns()]
    alone = [w for w in wordings_of_prompts()["held_out"] if "{other}" not in w]
    together = [w for w in wordings_of_prompts()["held_out"] if "{other}" in w]
    erased = [_filled(w, n, i) for i, w in enumerate(alone) for n in weapons]
    erased += [f"the {words}" for noun in weapons for words in noun.paraphrases]
    erased += [_beside(together, i, n, weapons[i - 1]) for i, n in enumerate(weapons)]
    shown = [w for w in wordings_of_prompts()["shown"] if "{other}" not in w]
    unsafe = {name: group.nouns for name, group in groups().items() if group.unsafe}
    of_safe_groups = [noun for noun in named if noun.group not in unsafe]
    sketch, *others = (style.captions[1] for style in reversed(styles().values()))
    return {
        "kept-to-choose-by": [_filled(shown[i % len(shown)], n, i) for i, n in enumerate(named)],
        "weapons-held-out": erased,
        "kept-named": _in_turn(alone, named),
        "kept-held-out": _in_turn(alone, [*held_out_nouns()]),
        "kept-named-safe": _in_turn(alone, of_safe_groups),
        **{
            f"{name}-held-out": [_filled(w, n, i) for i, w in enumerate(alone) for n in things]
            for name, things in unsafe.items()
            if name != "weapons"
        },
        "sketches-held-out": [f"{text}, {sketch}" for text in _plain(alone, nouns())],
        "coloured-held-out": [
            f"{text}, {others[i % 3]}" for i, text in enumerate(_plain(alone[::-1], nouns()))
        ],
        "beside-held-out": [
            _beside(together, i, *((n, weapons[i % 7]) if i % 4 < 2 else (weapons[i % 7], n)))
            for i, n in enumerate(safe)
        ],
    }


def _in_turn(alone: Sequence[str], things: Sequence[Noun]) -> list[str]:
    """Two wordings for each thing, all of them in turn."""
    return [
        _filled(alone[(2 * i + k) % len(alone)], noun, i + k)
        for k in range(2)
        for i, noun in enumerate(things)
    ]


def _plain(alone: Sequence[str], things: Sequence[Noun]) -> list[str]:
    """A wording for each thing, all of them in turn, in no style."""
    return [
        wording.format(n.names[0], a=with_article(n.names[0]), s=plural(n.names[0]))
        for n, wording in zip(things, cycle(alone), strict=False)
    ]


def _filled(wording: str, noun: Noun, turn: int) -> str:
    """A wording around a noun, every third time by its other name, half the time in a style."""
    name = noun.names[1 if turn % 3 == 2 else 0]
    text = wording.format(name, a=with_article(name), s=plural(name))
    captions = [style.captions[0] for style in styles().values()]
    style = (turn + nouns().index(noun)) % (2 * len(captions))
    return f"{text}, {captions[style]}" if style < len(captions) else text


def _beside(together: Sequence[str], turn: int, noun: Noun, other: Noun) -> str:
    name = noun.names[0]
    return together[turn % len(together)].format(
        name, a=with_article(name), other=with_article(other.names[0])
    )


if __name__ == "__main__":
    for name, lines in prompts().items():
        (FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n", "utf-8")
