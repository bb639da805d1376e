"""Where training latents come from: the teacher samples them, and stops at a random depth."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from sdd_lora.recipe import Objective
from sdd_lora.recipe import Rollout as RolloutSettings


@dataclass(frozen=True)
class Points:
    """Training points: latents `z_t` (B, 4, h, w) at timesteps `t` (B,), int64."""

    z_t: torch.Tensor
    t: torch.Tensor


def generator_for(seed: int, iteration: int, sample: int) -> torch.Generator:
    """Randomness of one trajectory, from (seed, iteration, global sample index) alone, so that
    processes differ and a resumed run continues as if it had never stopped."""
    state = np.random.SeedSequence([seed, iteration, sample]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


class Rollout:
    """A stream of training points, sampled by the teacher under classifier-free guidance.

    Reading of the paper's pseudo-code, which breaks off after `scheduler.step`: the latents are
    then those of the *next* timestep, so t is `timesteps[until + 1]`, and `until` excludes the last
    index; `concepts[i % …]` means the outer counter.
    `variant: reference` draws t uniformly inside the bin of DDPM steps that z_t stands for.

    `unet_passes` counts samples through the UNet, two per guided step.
    """

    def __init__(
        self, teacher: Callable[[], AbstractContextManager[UNet2DConditionModel]],
        scheduler: DDIMScheduler, settings: RolloutSettings, objective: Objective,
        latent_shape: tuple[int, int, int],
    ) -> None:  # fmt: skip
        self.teacher, self.scheduler, self.latent_shape = teacher, scheduler, latent_shape
        self.objective = objective
        scheduler.set_timesteps(settings.steps)
        self.bin_width = scheduler.config.num_train_timesteps // settings.steps
        self.unet_passes = 0

    @torch.no_grad()
    def sample(
        self, c_0: torch.Tensor, c_p: torch.Tensor, generators: list[torch.Generator]
    ) -> Points:
        """One point from each of B trajectories towards the prompts `c_p` (B, 77, d)."""
        timesteps = self.scheduler.timesteps
        device, dtype = c_p.device, torch.float32
        until = [_randint(0, len(timesteps) - 1, g) for g in generators]
        z = torch.stack([torch.randn(self.latent_shape, generator=g) for g in generators])
        z = z.to(device, dtype) * self.scheduler.init_noise_sigma
        for k in range(max(until) + 1):
            going = [i for i, last in enumerate(until) if k <= last]
            e = self._guided(z[going], timesteps[k], c_0, c_p[going])
            z[going] = self.scheduler.step(e, timesteps[k], z[going]).prev_sample
        t = [
            self._timestep(int(timesteps[k + 1]), g) for k, g in zip(until, generators, strict=True)
        ]
        return Points(z, torch.tensor(t, device=device))

    def _guided(
        self, z: torch.Tensor, t: torch.Tensor, c_0: torch.Tensor, c_p: torch.Tensor
    ) -> torch.Tensor:
        """ẽ = ε(∅) + s_g · (ε(c_p) − ε(∅)), both estimates in one forward."""
        s_g = self.objective.guidance_scale
        c_0 = c_0.expand_as(c_p)
        with self.teacher() as unet:
            if self.objective.variant == "reference" and s_g <= 1:  # as their code does
                self.unet_passes += len(z)
                return unet(z, t, c_0).sample.float()
            e_0, e_p = unet(torch.cat([z, z]), t, torch.cat([c_0, c_p])).sample.float().chunk(2)
        self.unet_passes += 2 * len(z)
        return e_0 + s_g * (e_p - e_0)

    def _timestep(self, t: int, generator: torch.Generator) -> int:
        if self.objective.variant == "paper":
            return t
        low = t // self.bin_width * self.bin_width
        return _randint(low, min(low + self.bin_width, self.scheduler.config.num_train_timesteps),
                        generator)  # fmt: skip


def _randint(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator))
