"""What stands for a concept, and for everything else: prompts from words alone."""

import random
from collections.abc import Collection, Sequence
from itertools import islice

from transformers import CLIPTokenizer

from sdd_lora.errors import BadInput
from sdd_lora.sd.prompts import token_count

#: A concept as a thing, in wordings and media.
THINGS = (
    "{}",
    "{a}",
    "the {}",
    "a picture of {a}",
    "a photo of {a}",
    "a drawing of {a}",
    "an illustration of {a}",
    "a painting of {a}",
)
#: A concept in company: {w} stays when the concept goes. A style is met so.
COMPANY = ("{w}, {}", "{w} in the style of {}", "a picture of {w}, {}")
_SHORTEST_WORD = 3
_SEED = 0


def whole_words(
    tokenizer: CLIPTokenizer, most: int | None = None, shortest: int = _SHORTEST_WORD
) -> list[str]:
    """Words that are one token, the most frequent first: byte-pair encoding merges them first."""
    ends = sorted((i, t) for t, i in tokenizer.get_vocab().items() if t.endswith("</w>"))
    words = (token.removesuffix("</w>") for _, token in ends)
    plain = (w for w in words if len(w) >= shortest and w.isascii() and w.isalpha())
    return list(islice(plain, most))


def with_a(words: str) -> str:
    """ "axe" → "an axe"."""
    return f"{'an' if words[:1].lower() in tuple('aeiou') else 'a'} {words}"


def fill(template: str, words: Sequence[str]) -> list[str]:
    """A template of `THINGS` with each of the words."""
    return [template.format(word, a=with_a(word)) for word in words]


def in_company(concept: str, others: Sequence[str]) -> list[str]:
    """A concept beside each of other words, in each template of `COMPANY`."""
    return [t.format(concept, w=with_a(other)) for t in COMPANY for other in others]


def left_alone(others: Sequence[str]) -> list[str]:
    """The prompts of `in_company` without the concept."""
    alone = [t.removesuffix(" in the style of {}").removesuffix(", {}") for t in COMPANY]
    return [t.format(w=with_a(other)) for t in alone for other in others]


def contexts(words: Sequence[str], count: int) -> list[tuple[str, set[str]]]:
    """Prompts of words in other words' company, which "a WORD" doesn't show, and their words:
    `count` in made-up styles ("a tree, garden style"), half as many side by side. The same words
    give the same prompts."""
    draw = random.Random(_SEED)
    found = []
    for i in range(count):
        thing, *style = draw.choices(words, k=2 + i % 2)
        found.append((f"{with_a(thing)}, {' '.join(style)} style", {thing, *style}))
    for _ in range(count // 2):
        pair = draw.choices(words, k=2)
        found.append((" and ".join(map(with_a, pair)), set(pair)))
    return found


def wordings(concepts: Sequence[str], others: Sequence[str]) -> list[str]:
    """Concepts in each template of `THINGS`, and beside each of other words."""
    things = [prompt for template in THINGS for prompt in fill(template, concepts)]
    return things + [p for concept in concepts for p in in_company(concept, others)]


def kept_prompts(words: Sequence[str], gone: Collection[str], count: int) -> list[str]:
    """`count` prompts of words, alone or in each other's company, or all there are; none shows a
    word that is `gone`. The same words give the same prompts."""
    alone = [(with_a(word), {word}) for word in words]
    shown = [*alone, *contexts(words, 2 * len(alone))]
    stay = [prompt for prompt, members in shown if members.isdisjoint(gone)]
    return random.Random(_SEED).sample(stay, min(count, len(stay)))


def sample_company(words: Sequence[str], most: int) -> list[str]:
    """Some of the words, the same of the same ones."""
    return random.Random(_SEED).sample(list(words), min(most, len(words)))


def require_readable(
    argument: str, phrases: Sequence[str], tokenizer: CLIPTokenizer, most_tokens: int
) -> list[str]:
    """Phrases without spaces around them, each once. Raises BadInput, naming the `argument` that
    they are, for one that the model reads nothing in, or that makes a prompt of more than
    `most_tokens`."""
    named = list(dict.fromkeys(phrase.strip() for phrase in phrases))
    for phrase in named:
        ids = tokenizer(phrase, add_special_tokens=False).input_ids
        if not phrase or not ids or set(ids) <= {tokenizer.unk_token_id, tokenizer.eos_token_id}:
            raise BadInput(f"{argument} {phrase!r}: the model reads nothing in it; use other words")
        longest = COMPANY[-1].format(phrase, w="an illustration")
        if (count := token_count(tokenizer, longest)) > most_tokens:
            raise BadInput(
                f"{argument} {phrase[:60]!r}: too long: {count} tokens in a sentence, expected "
                f"{most_tokens} at most; name it in fewer words"
            )
    return named
