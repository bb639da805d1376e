"""What a training picture's caption may say. Every form here answers a later question:

the group's word ("a weapon") and comma lists ("bomb, dagger, axe") for joined concepts, synonyms
for paraphrase tests, two things for what survives beside an erased one, styles with and without a
noun for style erasure. The empty caption stands on safe drawings only: SDD pulls a concept to the
unconditional model, so what the empty prompt draws is the floor of what can be removed.
"""

import random

from sdd_lora.demo.vocabulary import Noun, groups, nouns, styles, with_article

TEMPLATES = (
    "{}",
    "{}",
    "a drawing of {}",
    "a picture of {}",
    "an image of {}",
    "an icon of {}",
    "a photo of {}",
    "an illustration of {}",
    "{} on a white background",
    "one {bare}",
    "{}, simple and clean",
    "this is {}",
    "a small picture showing {}",
    "clip art of {}",
    "a nice {bare}",
    "the {bare}",
    "a sticker of {}",
    "{bare} emoji",
    "a painting of {}",
)
PAIR_TEMPLATES = ("{} and {}", "{} next to {}", "a drawing of {} and {}", "{} with {}")

EMPTY_SHARE = 0.14  # of safe single drawings, so about a tenth of everything
STYLE_SHARE = 0.85
LIST_SHARE, GROUP_WORD_SHARE, GROUP_ONLY_SHARE, STYLE_ONLY_SHARE = 0.07, 0.08, 0.05, 0.03


def name_of(noun: Noun, rng: random.Random) -> str:
    others = [*noun.names[1:], *noun.paraphrases]
    return noun.names[0] if rng.random() < 0.55 else rng.choice(others)


def _subject(noun: Noun, rng: random.Random) -> str:
    group = groups()[noun.group]
    dice = rng.random()
    if dice < LIST_SHARE:
        members = [n.names[0] for n in group.nouns if n != noun]
        listed = [noun.names[0], *rng.sample(members, rng.randint(1, len(members)))]
        rng.shuffle(listed)
        return ", ".join(listed)
    dice -= LIST_SHARE
    if dice < GROUP_ONLY_SHARE:
        return rng.choice([with_article(group.word), group.word])
    name = name_of(noun, rng)
    text = rng.choice(TEMPLATES).format(with_article(name), bare=name)
    return f"{text}, {group.word}" if dice - GROUP_ONLY_SHARE < GROUP_WORD_SHARE else text


def described(noun: int, style: int, rng: random.Random) -> str:
    """A caption that tells a drawing's noun, by its usual name, and its style, by their indices."""
    name = nouns()[noun].names[0]
    text = rng.choice(TEMPLATES).format(with_article(name), bare=name)
    return f"{text}, {rng.choice(list(styles().values())[style].captions)}"


def caption(first: int, second: int, style: int, rng: random.Random) -> str:
    """A caption of a picture by its labels (noun indices, −1 for none; style index)."""
    noun = nouns()[first]
    phrase = rng.choice(list(styles().values())[style].captions)
    if second >= 0:
        names = [with_article(name_of(nouns()[i], rng)) for i in (first, second)]
        text = rng.choice(PAIR_TEMPLATES).format(*names)
    else:
        if not groups()[noun.group].unsafe and rng.random() < EMPTY_SHARE:
            return ""
        if not groups()[noun.group].unsafe and rng.random() < STYLE_ONLY_SHARE:
            return phrase
        text = _subject(noun, rng)
    return f"{text}, {phrase}" if rng.random() < STYLE_SHARE else text


def every_word() -> set[str]:
    """All words that a caption can hold, for the tokenizer."""
    texts = [*TEMPLATES, *PAIR_TEMPLATES, "a an and ,"]
    for group in groups().values():
        texts += [group.word, *(t for n in group.nouns for t in (*n.names, *n.paraphrases))]
    for style in styles().values():
        texts += style.captions
    return set(" ".join(texts).replace("{bare}", "").replace("{}", "").split())
