"""How far noise estimates go when a UNet is changed: a measure of erasure without pictures."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from sdd_lora.measures.judge import asked_for
from sdd_lora.recipe import ObjectiveSettings, RolloutSettings
from sdd_lora.training.rollout import Rollout

Role = Callable[[], AbstractContextManager[UNet2DConditionModel]]

LATENTS = RolloutSettings(steps=10)
BATCH = 16
SEED = 500_000  # no training uses it


class Probe:
    """Latents on the base's way to prompts, (N, 4, h, w), and what the base estimates there.

    `texts` are the prompts, `embedded` (N, 77, d) and `empty` (1, 77, d) their embeddings.
    """

    def __init__(
        self,
        base: Role,
        scheduler: DDIMScheduler,
        texts: Sequence[str],
        embedded: torch.Tensor,
        empty: torch.Tensor,
    ) -> None:
        self.texts, self.embedded = list(texts), embedded
        with base() as unet:
            config = unet.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        rollout = Rollout(base, scheduler, LATENTS, ObjectiveSettings(), shape, SEED, len(texts))
        batches = torch.arange(len(texts)).split(BATCH)
        points = [rollout.sample(0, batch.tolist(), empty, embedded) for batch in batches]
        self.z_t, self.t = torch.cat([p.z_t for p in points]), torch.cat([p.t for p in points])
        self.e_0 = self._estimate(base, empty.expand_as(embedded))
        self.e_c = self._estimate(base, embedded)
        self.scale = _squares(self.e_c - self.e_0)

    def distances(self, role: Role) -> tuple[torch.Tensor, torch.Tensor]:
        """‖ε(c) − ε_b(∅)‖² and ‖ε(c) − ε_b(c)‖², (N,) each, for the base's ε_b."""
        e = self._estimate(role, self.embedded)
        return _squares(e - self.e_0), _squares(e - self.e_c)

    def parts(self, distances: torch.Tensor, of: Callable[[str], str]) -> dict[str, float]:
        """Their sums over prompts of the same kind, as parts of ‖ε_b(c) − ε_b(∅)‖²."""
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for text, distance, scale in zip(self.texts, distances, self.scale, strict=True):
            sums[of(text)][0] += float(distance)
            sums[of(text)][1] += float(scale)
        return {kind: distance / scale for kind, (distance, scale) in sums.items()}

    @torch.no_grad()
    def _estimate(self, role: Role, prompts: torch.Tensor) -> torch.Tensor:
        batches = (x.split(BATCH) for x in (self.z_t, self.t, prompts))
        with role() as unet:
            return torch.cat([unet(*batch).sample for batch in zip(*batches, strict=True)])


def _squares(x: torch.Tensor) -> torch.Tensor:
    return x.square().flatten(1).sum(1)


def group_of(text: str) -> str:
    return asked_for(text).nouns[0].group


def noun_of(text: str) -> str:
    return asked_for(text).nouns[0].name


def of_one_thing(texts: Sequence[str]) -> list[str]:
    return [text for text in texts if len(asked_for(text).nouns) == 1]
