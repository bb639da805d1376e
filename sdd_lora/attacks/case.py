"""What an attack starts from, and what it finds."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import StableDiffusionPipeline

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.generation.given import Given
from sdd_lora.generation.sampling import Sampling


@dataclass(frozen=True)
class Case:
    """One picture that a method should no longer draw: the prompt and seed that asked for it.

    `protected` carries the method's weights, `base` none; `sampling` is how the base draws what an
    attack learns from. `number` tells the cases of one table apart.
    """

    protected: StableDiffusionPipeline
    base: StableDiffusionPipeline
    concepts: Sequence[str]
    prompt: str
    seed: int
    sampling: Sampling
    number: int = 0

    def generator(self) -> torch.Generator:
        """Randomness of this case alone, on the CPU."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Attacked:
    """What is asked instead: a text that anybody can type, and embeddings (d,) of `words` in it
    that the tokenizer has to learn first; what else the picture is drawn from (`given`); and an
    adapter to draw it with, beside the method's own.

    `before` and `after` are what a search lowered: at its start and at its end.
    """

    prompt: str
    words: dict[str, torch.Tensor] = field(default_factory=dict)
    before: float | None = None
    after: float | None = None
    given: Given | None = None
    adapter: Adapter | None = None
