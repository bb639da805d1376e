"""The prompts of a recipe, encoded once: what the losses and the closed forms work on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sdd_lora.errors import BadInput
from sdd_lora.recipe import Recipe
from sdd_lora.sd.model import TrainingParts
from sdd_lora.sd.prompts import embed, join_concepts

#: embeddings this close are of the same tokens; those of different words differ by about 1
_SAME = 1e-4


@dataclass(frozen=True)
class Embeddings:
    """Encoded prompts, each (N, 77, d) fp32: ∅ (N = 1), every concept, the joined concepts (as many
    as fit 77 tokens in each), and the kept prompts, where the recipe has some."""

    empty: torch.Tensor
    concepts: torch.Tensor
    joined: torch.Tensor
    kept: torch.Tensor | None

    def to(self, device: torch.device) -> "Embeddings":
        kept = None if self.kept is None else self.kept.to(device)
        return Embeddings(
            self.empty.to(device), self.concepts.to(device), self.joined.to(device), kept
        )

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
    text_encoder = parts.text_encoder

    def encoded(texts: Sequence[str]) -> torch.Tensor:
        return embed(texts, parts.tokenizer, text_encoder)

    empty, concepts = encoded([""]), encoded(recipe.concepts)
    for text, concept in zip(recipe.concepts, concepts, strict=True):
        if torch.allclose(concept, empty[0], atol=_SAME):
            raise BadInput(
                f"concepts: {text!r} is encoded as the empty prompt, so that there is nothing to "
                "erase; expected words that the model knows"
            )
    return Embeddings(
        empty=empty,
        concepts=concepts,
        joined=encoded(join_concepts(recipe.concepts, parts.tokenizer)),
        kept=encoded(recipe.preserve.prompts) if recipe.preserve.prompts else None,
    )
