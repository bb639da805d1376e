"""The losses: one class for each objective, and the preservation that goes with any of them.

Latents z_t are (B, 4, h, w), timesteps t are (B,), prompts are embeddings (B, 77, d). The prompts c
of a loss may be P in a row for each latent, (B·P, 77, d).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sdd_lora.recipe import ObjectiveSettings, Preserve
from sdd_lora.sd1 import is_attention
from sdd_lora.training.embeddings import Embeddings

#: ε(z_t, t, prompt) → noise estimate, fp32, of z_t's shape
Estimate = Callable[[Tensor, Tensor, Tensor], Tensor]
#: characters of joined concepts that fit 77 tokens: four of English to a token
_CHARACTERS_OF_A_PROMPT = 300


@dataclass(frozen=True)
class LatentBatch:
    """Latents `z_t` (B, 4, h, w) at timesteps `t` (B,), int64, for one loss.

    `trajectories` (B) are the numbers of the trajectories that the latents come from: trajectory n
    was guided to prompt n mod N of the rollout's. `prompt_index` (B) counts on from one point of a
    trajectory to the next.
    """

    z_t: Tensor
    t: Tensor
    trajectories: list[int]
    prompt_index: list[int]


@dataclass(frozen=True)
class Objective(ABC):
    """What a training minimises, on which prompts, and which weights it changes.

    `guidance_scale` is the rollout's s_g. `t_in_bin`: t is drawn inside the bin of DDPM timesteps
    that z_t stands for, as the released code of both papers does (`variant: reference`).
    """

    guidance_scale: float
    t_in_bin: bool

    #: whether the teacher, which samples z_t and is the result, is an average of the student
    averaged: ClassVar[bool]

    def rollout_prompts(self, embeddings: Embeddings) -> Tensor:
        """Prompts (N, 77, d) that trajectories are guided to, one each, in turn."""
        return embeddings.concepts

    def loss_prompts(self, embeddings: Embeddings) -> Tensor:
        """Prompts c (N, 77, d) of the loss, in turn."""
        return embeddings.concepts

    def loss_prompt_count(self, concepts: Sequence[str]) -> int:
        """The number N of `loss_prompts`, for a plan, which has no tokenizer."""
        return len(concepts)

    def start_prompts(self, embeddings: Embeddings) -> Tensor:
        """Prompts (N, 77, d) that a start in closed form erases."""
        return self.loss_prompts(embeddings)

    def prompt_index(self, batch: LatentBatch) -> list[int]:
        """Which prompt of the loss each latent gets, modulo N."""
        return batch.prompt_index

    @property
    def passes_per_step(self) -> int:
        """UNet passes of a rollout's step: ε(∅) and ε(c_p), or one of them."""
        return 2

    def trains(self, name: str) -> bool:
        """Whether `name`, of a UNet's weight, is among those changed with `parameters: full`."""
        return ".attn2." in name

    @abstractmethod
    def loss(
        self, student: Estimate, base: Estimate, z_t: Tensor, t: Tensor, c_0: Tensor, c: Tensor
    ) -> Tensor:
        """The loss of the student on prompts c; `base` is the frozen base model, c_0 is ∅.

        The mean over elements stands for the squared norm, as in the papers' code.
        """


class SDD(Objective):
    """Safe self-distillation (Kim et al. 2023), by the paper's pseudo-code: z_t is guided to one
    concept at a time, the loss has all of them joined, c_s."""

    averaged = True

    def loss_prompts(self, embeddings: Embeddings) -> Tensor:
        return embeddings.joined

    def loss_prompt_count(self, concepts: Sequence[str]) -> int:
        return math.ceil(len(", ".join(concepts)) / _CHARACTERS_OF_A_PROMPT)  # about

    def start_prompts(self, embeddings: Embeddings) -> Tensor:
        return embeddings.erased

    def loss(
        self, student: Estimate, base: Estimate, z_t: Tensor, t: Tensor, c_0: Tensor, c: Tensor
    ) -> Tensor:
        """‖ sg(ε_θ(z_t, t, ∅)) − ε_θ(z_t, t, c_s) ‖² (Method): both estimates are the student's."""
        with torch.no_grad():
            e_0 = student(z_t, t, c_0)
        z_t, t, e_0 = _for_each_prompt(c, z_t, t, e_0)
        e_s = student(z_t, t, c)
        return F.mse_loss(e_s, e_0)


class SDDReference(SDD):
    """SDD as its authors released it: z_t is guided to the joined concepts, the loss has one
    concept at a time; with s_g ≤ 1 the rollout goes without a prompt."""

    def rollout_prompts(self, embeddings: Embeddings) -> Tensor:
        return embeddings.joined

    def loss_prompts(self, embeddings: Embeddings) -> Tensor:
        return embeddings.concepts

    def loss_prompt_count(self, concepts: Sequence[str]) -> int:
        return len(concepts)

    def start_prompts(self, embeddings: Embeddings) -> Tensor:
        return embeddings.concepts

    @property
    def passes_per_step(self) -> int:
        return 2 if self.guidance_scale > 1 else 1


@dataclass(frozen=True)
class ESDx(Objective):
    """Erasing concepts from the cross-attention (Gandikota et al. 2023, ESD-x): the student itself
    samples z_t, and the loss is taken at the concept that z_t was guided to."""

    eta: float

    averaged = False

    def prompt_index(self, batch: LatentBatch) -> list[int]:
        return batch.trajectories

    def loss(
        self, student: Estimate, base: Estimate, z_t: Tensor, t: Tensor, c_0: Tensor, c: Tensor
    ) -> Tensor:
        """‖ ε_θ(z_t, t, c) − [ε*(z_t, t, ∅) − η (ε*(z_t, t, c) − ε*(z_t, t, ∅))] ‖², with ε* the
        base."""
        with torch.no_grad():
            e_0, e_c = base(z_t, t, c_0), base(z_t, t, c)
            target = e_0 - self.eta * (e_c - e_0)
        return F.mse_loss(student(z_t, t, c), target)


class ESDu(ESDx):
    """ESD-u: ESD's loss on all weights outside the cross-attention."""

    def trains(self, name: str) -> bool:
        return is_noxattn(name)


class LECO(ESDx):
    """LECO (p1atdev 2023): ESD's loss on the matrices of self- and cross-attention.

    In its words: ‖ target − [neutral − guidance_scale · (positive − unconditional)] ‖², where
    target is the student's ε at the concept, positive the base's, neutral and unconditional the
    base's at ∅ (its defaults), and guidance_scale is η.
    """

    def trains(self, name: str) -> bool:
        return is_attention(name)


def make_objective(settings: ObjectiveSettings) -> Objective:
    """The objective that a recipe names."""
    common = settings.guidance_scale, settings.variant == "reference"
    if settings.kind == "sdd":
        return (SDD if settings.variant == "paper" else SDDReference)(*common)
    assert settings.eta is not None
    return {"esd-x": ESDx, "esd-u": ESDu, "leco": LECO}[settings.kind](*common, settings.eta)


def total_loss(
    objective: Objective,
    preserve: Preserve,
    student: Estimate,
    base: Estimate,
    z_t: Tensor,
    t: Tensor,
    c_0: Tensor,
    c: Tensor,
    c_k: Tensor | None,
) -> Tensor:
    """A recipe's loss: its objective on the erased prompts c, preservation on the kept ones c_k.

    ∅ is kept with them: ε(∅) is in every guided estimate, so that its drift moves kept prompts too.
    """
    loss = objective.loss(student, base, z_t, t, c_0, c)
    if c_k is not None and preserve.weight > 0:
        for kept in (c_k, c_0):
            loss = loss + preserve.weight * preservation_loss(student, base, z_t, t, kept)
    return loss


def preservation_loss(
    student: Estimate, base: Estimate, z_t: Tensor, t: Tensor, c_k: Tensor
) -> Tensor:
    """Hold the student to the base on kept prompts: ‖ ε*(z_t, t, c_k) − ε_θ(z_t, t, c_k) ‖²."""
    z_t, t = _for_each_prompt(c_k, z_t, t)
    with torch.no_grad():
        e_base = base(z_t, t, c_k)
    return F.mse_loss(student(z_t, t, c_k), e_base)


def is_noxattn(name: str) -> bool:
    """Whether ESD-u trains a weight or layer of the UNet, by diffusers' name: `noxattn` in its
    authors' code is all but the cross-attention, the time embedding and the output layers."""
    outside = ("time_embedding", "conv_norm_out", "conv_out")
    return ".attn2." not in name and not name.startswith(outside)


def _for_each_prompt(prompts: Tensor, *of_latents: Tensor) -> list[Tensor]:
    """Tensors of B latents, repeated for each of a latent's P prompts: (B, …) → (B·P, …)."""
    return [x.repeat_interleave(len(prompts) // len(x), dim=0) for x in of_latents]
