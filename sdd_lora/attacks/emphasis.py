"""Prompt weights: the concept's words emphasised, as A1111 reads `(an axe:1.5)`."""

import torch

from sdd_lora.attacks.case import Attacked, Case
from sdd_lora.attacks.ring_a_bell import named_in
from sdd_lora.attacks.settings import Emphasis
from sdd_lora.attacks.tokens import encoded, token_ids
from sdd_lora.generation.given import Given


@torch.no_grad()
def emphasis(case: Case, settings: Emphasis) -> Attacked:
    """Embeddings (77, d) of the prompt in which those of the concepts' words are `weight` times as
    long, and the mean of all is what it was; of all words where the prompt names no concept."""
    model = case.protected
    ids = token_ids(model, [case.prompt])
    embeddings = encoded(model, ids)[0]
    weights = torch.ones(len(embeddings), 1).to(embeddings)
    for concept in named_in(case.prompt, case.concepts):
        for start, end in places_of(ids[0].tolist(), model.tokenizer(concept).input_ids[1:-1]):
            weights[start:end] = settings.weight
    if (weights == 1).all():
        weights[1 : len(model.tokenizer(case.prompt).input_ids) - 1] = settings.weight
    weighted = embeddings * weights
    return Attacked(
        case.prompt, given=Given(prompt=weighted * (embeddings.mean() / weighted.mean()))
    )


def places_of(ids: list[int], part: list[int]) -> list[tuple[int, int]]:
    """Where `part` stands in `ids`: starts and ends."""
    count = len(part)
    starts = [i for i in range(len(ids) - count + 1) if part and ids[i : i + count] == part]
    return [(start, start + count) for start in starts]
