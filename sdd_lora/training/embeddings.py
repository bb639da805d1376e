"""The prompts of a recipe, encoded once: what the losses and the closed forms work on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import CLIPTextModel

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.errors import BadInput
from sdd_lora.recipe import Recipe
from sdd_lora.sd.model import TextParts, TrainingParts, text_fingerprint
from sdd_lora.sd.prompts import embed, join_concepts, skipped
from sdd_lora.training.erase import VOCABULARY, erase
from sdd_lora.training.words import kept_prompts, sample_company, whole_words, wordings

#: embeddings this close are of the same tokens; those of different words differ by about 1
_SAME = 1e-4
#: kept words beside which a concept is met, of `wordings`
_COMPANIONS = 3


@dataclass(frozen=True)
class Embeddings:
    """Encoded prompts, each (N, 77, d) fp32: ∅ (N = 1), every concept, the joined concepts (as many
    as fit 77 tokens in each), and the kept prompts, where the recipe has some."""

    empty: torch.Tensor
    concepts: torch.Tensor
    joined: torch.Tensor
    kept: torch.Tensor | None
    #: where `lora.init: words` starts: the portable adapter of `erase`
    eraser: Adapter | None = None

    def to(self, device: torch.device) -> "Embeddings":
        kept = None if self.kept is None else self.kept.to(device)
        concepts, joined = self.concepts.to(device), self.joined.to(device)
        return Embeddings(self.empty.to(device), concepts, joined, kept, self.eraser)

    @property
    def erased(self) -> torch.Tensor:
        """The concepts, each and joined."""
        return torch.cat([self.concepts, self.joined])

    @property
    def kept_and_empty(self) -> torch.Tensor:
        """The kept prompts and ∅."""
        return self.empty if self.kept is None else torch.cat([self.kept, self.empty])


def encode_prompts(recipe: Recipe, parts: TrainingParts) -> Embeddings:
    """Encode a recipe's concepts and kept prompts with the text encoder of `parts`.

    Raises BadInput for a concept that is encoded as ∅, such as "<|endoftext|>".
    """
    assert parts.text_encoder is not None
    with skipped(parts.text_encoder, recipe.clip_skip or 1) as text_encoder:
        return _encoded(recipe, parts, text_encoder)


def _encoded(recipe: Recipe, parts: TrainingParts, text_encoder: CLIPTextModel) -> Embeddings:
    def encoded(texts: Sequence[str]) -> torch.Tensor:
        return embed(texts, parts.tokenizer, text_encoder)

    eraser, known, gone = None, whole_words(parts.tokenizer, VOCABULARY), set()
    if recipe.lora.init == "words" or recipe.preserve.vocabulary:
        reader = TextParts(parts.tokenizer, text_encoder, text_fingerprint(text_encoder))
        if recipe.lora.init == "words":
            rank = recipe.lora.rank
            eraser = erase(recipe.concepts, recipe.model, rank=rank, text=reader).adapter
        # "axe, noto style": to go are the axe's words, and those near to it, not the style's
        things = [*dict.fromkeys(concept.partition(",")[0] for concept in recipe.concepts)]
        near = erase(things, recipe.model, text=reader).near
        gone = {*near, *(word for thing in things for word in thing.lower().split())}
    company = sample_company([word for word in known if word not in gone], _COMPANIONS)
    asked = wordings(recipe.concepts, company) if recipe.wordings else recipe.concepts
    kept = recipe.preserve.prompts + kept_prompts(known, gone, recipe.preserve.vocabulary or 0)
    empty, concepts = encoded([""]), encoded(asked)
    for text, concept in zip(asked, concepts, strict=True):
        if torch.allclose(concept, empty[0], atol=_SAME):
            raise BadInput(
                f"concepts: {text!r} is encoded as the empty prompt, so that there is nothing to "
                "erase; expected words that the model knows"
            )
    return Embeddings(
        empty=empty,
        concepts=concepts,
        joined=encoded(join_concepts(recipe.concepts, parts.tokenizer)),
        kept=encoded(kept) if kept else None,
        eraser=eraser,
    )
