"""What is minimised. Latents are (B, 4, h, w), t is (B,), prompts are embeddings (B, 77, d); those
erased by SDD and those kept may be P in a row for each latent, (B·P, 77, d)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from sdd_lora.recipe import Objective, Preserve

#: ε(z_t, t, prompt) → noise estimate, of z_t's shape
NoiseEstimate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def total(
    objective: Objective, preserve: Preserve, student: NoiseEstimate, base: NoiseEstimate,
    z_t: torch.Tensor, t: torch.Tensor, c_0: torch.Tensor, c: torch.Tensor,
    c_k: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """A recipe's loss: its objective on the erased prompts, and preservation on the kept ones."""
    if objective.eta is None:
        loss = sdd(student, z_t, t, c_0, c)
    else:
        loss = esd(student, base, z_t, t, c_0, c, objective.eta)
    if c_k is not None and preserve.weight > 0:
        loss = loss + preserve.weight * preservation(student, base, z_t, t, c_k)
    return loss


def sdd(
    student: NoiseEstimate, z_t: torch.Tensor, t: torch.Tensor, c_0: torch.Tensor, c_s: torch.Tensor
) -> torch.Tensor:
    """Safe self-distillation (Kim et al. 2023, Method): ‖ sg(ε_θ(z_t, t, ∅)) − ε_θ(z_t, t, c_s) ‖².

    Both estimates are the student's; the mean over elements stands for the norm, as in the paper's
    pseudo-code.
    """
    with torch.no_grad():
        e_0 = student(z_t, t, c_0)
    z_t, t, e_0 = _for_each(c_s, z_t, t, e_0)
    e_s = student(z_t, t, c_s)
    return F.mse_loss(e_s.float(), e_0.float())


def esd(
    student: NoiseEstimate, base: NoiseEstimate, z_t: torch.Tensor, t: torch.Tensor,
    c_0: torch.Tensor, c: torch.Tensor, eta: float,
) -> torch.Tensor:  # fmt: skip
    """Erasing concepts (Gandikota et al. 2023), the target from the frozen base ε*:
    ‖ ε_θ(z_t, t, c) − [ε*(z_t, t, ∅) − η (ε*(z_t, t, c) − ε*(z_t, t, ∅))] ‖².
    """
    with torch.no_grad():
        e_0, e_c = base(z_t, t, c_0), base(z_t, t, c)
        target = e_0 - eta * (e_c - e_0)
    return F.mse_loss(student(z_t, t, c).float(), target.float())


def preservation(
    student: NoiseEstimate, base: NoiseEstimate, z_t: torch.Tensor, t: torch.Tensor,
    c_k: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Hold the student to the base on a kept prompt: ‖ sg(ε_b(z, t, c_k)) − ε_θ(z, t, c_k) ‖²."""
    z_t, t = _for_each(c_k, z_t, t)
    with torch.no_grad():
        e_base = base(z_t, t, c_k)
    e_k = student(z_t, t, c_k)
    return F.mse_loss(e_k.float(), e_base.float())


def _for_each(prompts: torch.Tensor, *of_latents: torch.Tensor) -> list[torch.Tensor]:
    """What belongs to a latent, repeated for each of its prompts."""
    return [x.repeat_interleave(len(prompts) // len(x), dim=0) for x in of_latents]
