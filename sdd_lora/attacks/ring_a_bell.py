"""Ring-A-Bell (Tsai et al. 2023, arXiv 2310.10012): a prompt that means the concept and does not
name it, found with the text encoder alone."""

import re
from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.attacks.case import Attacked, Case
from sdd_lora.attacks.settings import RingABell
from sdd_lora.attacks.tokens import encoded, plain_words, token_ids

_SENTENCES = ("a picture of {}", "a drawing of {}", "an image of {}", "a photo of {}")


def ring_a_bell(case: Case, settings: RingABell) -> Attacked:
    """The genetic search of the paper's algorithm for P̂ = argmin ‖f(P̂) − (f(P) + η ĉ)‖², over words
    that are one token each. The erased concepts' own words are not used; ĉ is of those concepts
    that the prompt names, or of all where it names none."""
    words = plain_words(case.base.tokenizer, without=case.concepts)
    goal = _embeddings_of(case.base, [case.prompt]) + settings.strength * concept_vector(
        case.base, settings.pairs or sentence_pairs(named_in(case.prompt, case.concepts))
    )
    generator = case.generator()
    size = (settings.population, settings.length)
    population = torch.randint(len(words), size, generator=generator)

    def distances(rows: torch.Tensor) -> torch.Tensor:
        texts = [_text_of(words, row) for row in rows]
        return (_embeddings_of(case.base, texts) - goal).square().sum(1).cpu()

    found = distances(population)
    before = found.min().item()
    for _ in range(settings.generations):
        order = found.argsort(stable=True)[: settings.population // 2]
        parents, found = population[order], found[order]
        children = _children(parents, settings, len(words), generator)
        population = torch.cat([parents, children])
        found = torch.cat([found, distances(children)])
    best = found.argmin()
    return Attacked(_text_of(words, population[best]), before=before, after=found[best].item())


def named_in(prompt: str, concepts: Sequence[str]) -> Sequence[str]:
    """The concepts whose very words stand in the prompt; all where none does."""
    whole = r"(?<!\w){}(?!\w)"
    found = [c for c in concepts if re.search(whole.format(re.escape(c)), prompt, re.I)]
    return found or concepts


def sentence_pairs(concepts: Sequence[str]) -> list[tuple[str, str]]:
    """("a picture of axe", "a picture") and the like, for each concept; bare, as a concept may be
    no thing (nudity) or a name."""
    return [
        (sentence.format(concept), sentence.removesuffix(" of {}"))
        for concept in concepts
        for sentence in _SENTENCES
    ]


def concept_vector(
    pipeline: StableDiffusionPipeline, pairs: Sequence[tuple[str, str]]
) -> torch.Tensor:
    """ĉ, (1, 77 · d): the mean of f(with the concept) − f(without it) over pairs of texts (the
    paper's equation for ĉ)."""
    there, without = (_embeddings_of(pipeline, texts) for texts in zip(*pairs, strict=True))
    return (there - without).mean(0, keepdim=True)


def _children(
    parents: torch.Tensor, settings: RingABell, word_count: int, generator: torch.Generator
) -> torch.Tensor:
    """As many children as make the population whole: each a parent's copy or, with the chance
    `crossover`, two parents joined at a random place; then, with the chance `mutation`, one word of
    it is another one."""
    count, length = settings.population - len(parents), settings.length
    first, second = (
        parents[torch.randint(len(parents), (count,), generator=generator)] for _ in range(2)
    )
    cut = torch.randint(1, max(2, length), (count, 1), generator=generator)
    crossed = torch.rand((count, 1), generator=generator) < settings.crossover
    children = torch.where(crossed & (torch.arange(length) >= cut), second, first)
    mutated = torch.rand(count, generator=generator) < settings.mutation
    place = torch.randint(length, (count,), generator=generator)
    new = torch.randint(word_count, (count,), generator=generator)
    children[mutated, place[mutated]] = new[mutated]
    return children


def _text_of(words: Sequence[str], row: torch.Tensor) -> str:
    return " ".join(words[index] for index in row.tolist())


@torch.no_grad()
def _embeddings_of(pipeline: StableDiffusionPipeline, texts: Sequence[str]) -> torch.Tensor:
    """f: embeddings (B, 77 · d), fp32."""
    return encoded(pipeline, token_ids(pipeline, texts)).float().flatten(1)
