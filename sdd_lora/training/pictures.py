"""Erasure where a picture shows the concept, whatever the prompt says.

What changes to_k and to_v alone redirects guidance: a noised picture of the concept is still
denoised to it, so that a learnt word or a drawing half done brings it back. Here the base draws the
concepts once, and in its noised drawings the student learns to see a blank, under prompts that are
learnt to bring the concept back as well. It takes no pictures beside the model, nor its
autoencoder: all are latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from sdd_lora.errors import BadInput
from sdd_lora.recipe import Recipe
from sdd_lora.training.embeddings import Embeddings
from sdd_lora.training.objectives import Estimate, preservation_loss
from sdd_lora.training.rollout import generator_for, random_int

#: keep the randomness of drawings, and of their use, apart from the trajectories'
_DRAWN, _ERASED, _KEPT, _LEARNT = 2 << 32, 3 << 32, 4 << 32, 5 << 32
_AT_ONCE = 16
#: √ᾱ / √(1 − ᾱ) at most, in the target: nearly clean pictures would make up all of the loss
_MOST_PICTURE = 1.5
#: in more noise a picture can't be told from others: there ∅ and kept prompts are not erased
_SHOWS_BELOW = 700
#: how far a step moves a learnt prompt's shares, their RMS; and steps until it starts over
_LEARNING_RATE, _LEARNING_STEPS = 0.01, 80


@torch.no_grad()
def drawn_by(
    base: Estimate,
    scheduler: DDIMScheduler,
    prompts: Tensor,
    c_0: Tensor,
    guidance_scale: float,
    noise: Tensor,
) -> Tensor:
    """Latents x_0 (N, 4, h, w) that the base draws of prompts (N, 77, d), each from its noise, by
    the scheduler's DDIM timesteps."""
    drawn = []
    for z_start, c in zip(noise.split(_AT_ONCE), prompts.split(_AT_ONCE), strict=True):
        z, both = z_start, torch.cat([c_0.expand_as(c), c])
        for t in scheduler.timesteps.tolist():
            at = torch.full((len(both),), t, device=z.device)
            e_0, e_c = base(torch.cat([z, z]), at, both).chunk(2)
            z = scheduler.step(e_0 + guidance_scale * (e_c - e_0), t, z).prev_sample
        drawn.append(z)
    return torch.cat(drawn)


@dataclass(frozen=True)
class Noised:
    """Noised drawings `z_t` (B, 4, h, w) at `t` (B,), prompts `c` (B, 77, d) for them, their
    `noise`, and the noise estimate `blank` that sees a blank in them, both of z_t's shape."""

    z_t: Tensor
    t: Tensor
    c: Tensor
    noise: Tensor
    blank: Tensor


def picture_loss(
    student: Estimate,
    base: Estimate,
    erased: Noised,
    kept: Noised,
    weight: float,
    learn: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """‖ ε_θ(z_t, t, c) − ε̄ ‖² on drawings of concepts, whatever c says, and `weight` times
    preservation on drawings of what is kept.

    `learn` gets ‖ ε_θ(z_t, t, c) − ε ‖², which is what learnt prompts among c lower.
    """
    e = student(erased.z_t, erased.t, erased.c)
    if learn is not None:
        learn(F.mse_loss(e, erased.noise))
    held = preservation_loss(student, base, kept.z_t, kept.t, kept.c)
    return F.mse_loss(e, erased.blank) + weight * held


class LearntPrompts:
    """Prompts that bring concepts back through the student, learnt beside it: concept inversion
    (Pham et al. 2023, arXiv 2308.01508) in the loop, as STEREO (Srivatsan et al. 2024, arXiv
    2408.16807) has it in rounds.

    A prompt is a mixture of `known` ones (N, 77, d), concepts first, by its `shares` (P, N). It
    starts as one of the concepts, whose drawings it then learns from: the `sought` ones (P).
    """

    def __init__(self, known: Tensor, concepts: int, count: int, seed: int) -> None:
        self.known, self.concepts, self.seed = known, concepts, seed
        self.shares = torch.zeros(count, len(known), device=known.device, requires_grad=True)
        self.steps, self.sought = [0] * count, [0] * count
        for number in range(count):
            self._start(number, -1)

    def prompt(self, number: int) -> Tensor:
        """(77, d), with its gradient."""
        return torch.tensordot(self.shares[number], self.known, 1)

    def learn(self, iteration: int, loss: Tensor) -> None:
        """Lower the loss by a step of each prompt that is in it; its graph stays."""
        self.shares.grad = None  # of the student's last loss, which isn't the prompts'
        (gradient,) = torch.autograd.grad(loss, [self.shares], retain_graph=True)
        size = gradient.square().mean(1, keepdim=True).sqrt()
        with torch.no_grad():
            self.shares -= _LEARNING_RATE * gradient / size.clamp(min=torch.finfo(size.dtype).tiny)
        for number in size.flatten().nonzero().flatten().tolist():
            self.steps[number] += 1
            if self.steps[number] == _LEARNING_STEPS:
                self._start(number, iteration)

    @torch.no_grad()
    def _start(self, number: int, iteration: int) -> None:
        generator = generator_for(self.seed, iteration + 1, _LEARNT + number)
        self.sought[number] = concept = random_int(0, self.concepts, generator)
        self.shares[number] = 0
        self.shares[number, concept] = 1
        self.steps[number] = 0

    def state_dict(self) -> dict[str, Any]:
        shares = self.shares.detach().cpu().clone()
        return {"shares": shares, "steps": list(self.steps), "sought": list(self.sought)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shares.copy_(state["shares"])
        self.steps, self.sought = list(state["steps"]), list(state["sought"])


class Pictures:
    """The base's drawings of the concepts and of the kept prompts, noised anew in each iteration.

    They are drawn when they are first asked for. Drawing n is of prompt n modulo their number. The
    blank x̄ is the mean of the kept drawings: the best guess at a picture that can't be seen.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: Estimate,
        scheduler: DDIMScheduler,
        embeddings: Embeddings,
        latent_shape: tuple[int, int, int],
    ) -> None:
        assert recipe.pictures is not None and embeddings.kept is not None
        if (predicted := scheduler.config.prediction_type) != "epsilon":
            raise BadInput(f"pictures: the model predicts {predicted}; expected epsilon")
        self.settings, self.seed = recipe.pictures, recipe.training.seed
        self.guidance_scale = recipe.objective.guidance_scale
        self.preserve_weight = recipe.preserve.weight
        self.base, self.scheduler, self.latent_shape = base, scheduler, latent_shape
        self.empty, self.concepts, self.others = (
            embeddings.empty,
            embeddings.concepts,
            embeddings.kept,
        )
        self.alphas = scheduler.alphas_cumprod
        self.drawn: dict[str, Tensor] = {}
        known = torch.cat([self.concepts, self.others, self.empty])
        self.learnt = LearntPrompts(known, len(self.concepts), self.settings.learnt, self.seed)

    @property
    def erased(self) -> Tensor:
        """Drawings of the concepts, x_0 (N, 4, h, w)."""
        return self._drawings("erased", self.concepts, self.settings.drawings, 0)

    @property
    def kept(self) -> Tensor:
        """Drawings of the kept prompts, x_0 (M, 4, h, w)."""
        return self._drawings("kept", self.others, self.settings.kept_drawings, 1 << 31)

    @property
    def blank(self) -> Tensor:
        """x̄ (4, h, w)."""
        return self.kept.mean(0)

    def _drawings(self, name: str, prompts: Tensor, times: int, first: int) -> Tensor:
        if name not in self.drawn:
            every = prompts.repeat(times, 1, 1)
            generators = (self._generator(0, _DRAWN + first + n) for n in range(len(every)))
            noise = torch.stack([*map(self._noise, generators)]).to(every.device)
            self.drawn[name] = drawn_by(
                self.base, self.scheduler, every, self.empty, self.guidance_scale, noise
            )
        return self.drawn[name]

    def state_dict(self) -> dict[str, Any]:
        """What is drawn, on the CPU, and the learnt prompts."""
        drawn = {name: x_0.cpu() for name, x_0 in self.drawn.items()}
        return {"drawn": drawn, "learnt": self.learnt.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.empty.device
        self.drawn = {name: x_0.to(device) for name, x_0 in state["drawn"].items()}
        self.learnt.load_state_dict(state["learnt"])

    def sample(self, iteration: int, uses: Sequence[int]) -> tuple[Noised, Noised]:
        """Noised drawings of concepts, and as many of what is kept, one of each for each use."""
        erased = [self._erased_point(iteration, use) for use in uses]
        return _batch(erased), _batch([self._kept_point(iteration, use) for use in uses])

    def loss(self, student: Estimate, iteration: int, uses: Sequence[int]) -> Tensor:
        """`picture_loss` on what `sample` gives, weighed; the learnt prompts in it go a step on."""
        erased, kept = self.sample(iteration, uses)
        learn = partial(self.learnt.learn, iteration) if erased.c.requires_grad else None
        weight = self.preserve_weight
        return self.settings.weight * picture_loss(student, self.base, erased, kept, weight, learn)

    def _erased_point(self, iteration: int, use: int) -> Noised:
        """A concept's drawing under ∅, its own prompt, a kept one, another concept, in turn; where
        prompts are learnt, every third is under one of these instead."""
        g = self._generator(iteration, _ERASED + use)
        turn, learnt, number = use % 4, self.settings.learnt, random_int(0, len(self.erased), g)
        below = _SHOWS_BELOW if turn in (0, 2) else len(self.alphas)
        c = (
            self.empty[0],
            self.concepts[number % len(self.concepts)],
            self.others[random_int(0, len(self.others), g)],
            self.concepts[random_int(0, len(self.concepts), g)],
        )[turn]
        if learnt and use % 3 == 0:
            which, below = random_int(0, learnt, g), len(self.alphas)
            number += self.learnt.sought[which] - number % len(self.concepts)
            c = self.learnt.prompt(which)
        t = self.settings.from_timestep + random_int(0, below - self.settings.from_timestep, g)
        return self._noised(self.erased[number], t, c, g)

    def _kept_point(self, iteration: int, use: int) -> Noised:
        """A kept prompt's drawing: of eight, five under their own prompt, two under ∅ and one under
        another kept prompt."""
        g = self._generator(iteration, _KEPT + use)
        number, other = random_int(0, len(self.kept), g), random_int(0, len(self.others), g)
        own, another = self.others[number % len(self.others)], self.others[other]
        empty = self.empty[0]
        c = (own, empty, own, another, own, empty, own, own)[use % 8]
        return self._noised(self.kept[number], random_int(0, len(self.alphas), g), c, g)

    def _noised(self, x_0: Tensor, t: int, c: Tensor, generator: torch.Generator) -> Noised:
        """z_t = √ᾱ x_0 + √(1 − ᾱ) ε, and ε̄ = ε + √ᾱ / √(1 − ᾱ) · (x_0 − x̄): the noise in z_t if
        the blank x̄ were its picture."""
        alpha = float(self.alphas[t])
        noise = self._noise(generator).to(x_0)
        z_t = alpha**0.5 * x_0 + (1 - alpha) ** 0.5 * noise
        picture = min((alpha / (1 - alpha)) ** 0.5, _MOST_PICTURE)
        at = torch.tensor(t, device=x_0.device)
        return Noised(z_t, at, c, noise, noise + picture * (x_0 - self.blank))

    def _generator(self, iteration: int, number: int) -> torch.Generator:
        return generator_for(self.seed, iteration, number)

    def _noise(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.latent_shape, generator=generator)


def _batch(points: Sequence[Noised]) -> Noised:
    return Noised(*(torch.stack([getattr(p, f.name) for p in points]) for f in fields(Noised)))
