"""Where training points come from: the teacher samples trajectories, with stops on their way."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from sdd_lora.recipe import RolloutSettings
from sdd_lora.training.objectives import LatentBatch, Objective

#: timesteps in a bin of the papers' released code, whose rollouts have 50 steps of 1000
_LARGEST_BIN = 20


@dataclass
class Trajectory:
    """A sampling run from pure noise towards one prompt.

    `stop_steps[j]` DDIM steps lead to its j-th training point, whose loss is taken at `t[j]`; `z`
    (4, h, w) is the latent after `steps` steps. `number` counts trajectories over the training.
    """

    start_iteration: int
    number: int
    stop_steps: list[int]
    t: list[int]
    z: torch.Tensor
    steps: int = 0


def generator_for(seed: int, iteration: int, sample: int) -> torch.Generator:
    """Randomness of one trajectory, from (seed, iteration, global sample index) alone, so that
    processes differ and a resumed run continues as if it had never stopped."""
    state = np.random.SeedSequence([seed, iteration, sample]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


class Rollout:
    """A stream of training points, sampled by the teacher under classifier-free guidance.

    The paper's pseudo-code, read with care: it breaks off after `scheduler.step`, so that the
    latents belong to the *next* timestep. Here t is that one, `timesteps[until + 1]`, and `until`
    excludes the last index. `concepts[i % …]` means the outer counter. An objective with `t_in_bin`
    draws t uniformly inside the bin of DDPM timesteps that z_t stands for.

    `timesteps_per_trajectory` = N > 1: a trajectory goes on in the next iteration, through N points
    spread evenly over its timesteps at a random offset, so that every t is as frequent as with one.
    The samples of a batch are at different points of N, so that a batch covers the range of t. Each
    step is the teacher's of that iteration: the oldest step of a trajectory comes from a teacher
    N − 1 updates old.

    `unet_passes` counts samples through the UNet, two a guided step.
    """

    def __init__(
        self,
        teacher: Callable[[], AbstractContextManager[UNet2DConditionModel]],
        scheduler: DDIMScheduler,
        settings: RolloutSettings,
        objective: Objective,
        latent_shape: tuple[int, int, int],
        seed: int = 0,
        samples_per_iteration: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.teacher, self.scheduler, self.latent_shape = teacher, scheduler, latent_shape
        self.settings, self.objective = settings, objective
        self.seed, self.samples_per_iteration, self.device = seed, samples_per_iteration, device
        scheduler.set_timesteps(settings.steps)
        self.timesteps: list[int] = scheduler.timesteps.tolist()
        self.in_progress: dict[int, Trajectory] = {}
        self.unet_passes = 0

    @torch.no_grad()
    def sample(
        self, iteration: int, samples: Sequence[int], c_0: torch.Tensor, prompts: torch.Tensor
    ) -> LatentBatch:
        """One training point for each global sample index in `samples` (B).

        Trajectories are guided to `prompts` (N, 77, d), one each, in turn; c_0 is ∅ (1, 77, d).
        """
        points = self.settings.timesteps_per_trajectory
        phases = [(iteration + sample) % points for sample in samples]
        trajectories = [
            self._trajectory(iteration, sample, phase)
            for sample, phase in zip(samples, phases, strict=True)
        ]
        stops = [x.stop_steps[phase] for x, phase in zip(trajectories, phases, strict=True)]
        c_p = prompts[[x.number % len(prompts) for x in trajectories]]
        with self.teacher() as unet:
            while active := [i for i, x in enumerate(trajectories) if x.steps < stops[i]]:
                self._step(unet, [trajectories[i] for i in active], c_0, c_p[active])
        for sample, trajectory, phase in zip(samples, trajectories, phases, strict=True):
            self.in_progress.pop(sample, None)
            if phase < points - 1:
                self.in_progress[sample] = trajectory
        t = [x.t[phase] for x, phase in zip(trajectories, phases, strict=True)]
        return LatentBatch(
            z_t=torch.stack([x.z for x in trajectories]),
            t=torch.tensor(t, device=self.device),
            trajectories=[x.number for x in trajectories],
            prompt_index=[x.number + phase for x, phase in zip(trajectories, phases, strict=True)],
        )

    def state_dict(self) -> dict[str, Any]:
        """The state that no seed gives back: trajectories in progress, their latents on the CPU."""
        return {
            "unet_passes": self.unet_passes,
            "in_progress": {
                sample: {"start_iteration": x.start_iteration, "steps": x.steps, "z": x.z.cpu()}
                for sample, x in self.in_progress.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.unet_passes = state["unet_passes"]
        self.in_progress = {}
        for sample, saved in state["in_progress"].items():
            trajectory = self._start(saved["start_iteration"], sample)
            trajectory.z, trajectory.steps = saved["z"].to(self.device), saved["steps"]
            self.in_progress[sample] = trajectory

    def _trajectory(self, iteration: int, sample: int, phase: int) -> Trajectory:
        """The trajectory that this sample is on, or a new one. The trajectories of the first
        iteration begin in the middle of their N points, each sample at another point."""
        start_iteration = max(0, iteration - phase)
        known = self.in_progress.get(sample)
        if known and known.start_iteration == start_iteration:
            return known
        return self._start(start_iteration, sample)

    def _start(self, start_iteration: int, sample: int) -> Trajectory:
        """A trajectory at its noise; all its random choices are made here.

        Of `depths` equally likely numbers of steps, N evenly spaced ones: (x + jD) // N for x
        uniform in 0 … D − 1 are distinct, and each number of steps is as likely as any other.
        """
        points, depths = self.settings.timesteps_per_trajectory, self.settings.steps - 1
        generator = generator_for(self.seed, start_iteration, sample)
        offset = random_int(0, depths, generator)
        stop_steps = [(offset + j * depths) // points + 1 for j in range(points)]
        z = torch.randn(self.latent_shape, generator=generator) * self.scheduler.init_noise_sigma
        t = [self._loss_timestep(self.timesteps[steps], generator) for steps in stop_steps]
        turn = (start_iteration + sample % points) // points
        number = turn * self.samples_per_iteration + sample
        return Trajectory(start_iteration, number, stop_steps, t, z.to(self.device))

    def _loss_timestep(self, t: int, generator: torch.Generator) -> int:
        """The t of the loss on a latent that belongs to timestep `t` of the scheduler."""
        if not self.objective.t_in_bin:
            return t
        timesteps = self.scheduler.config.num_train_timesteps
        width = min(timesteps // self.settings.steps, _LARGEST_BIN)
        low = t // width * width
        return random_int(low, min(low + width, timesteps), generator)

    def _step(
        self,
        unet: UNet2DConditionModel,
        trajectories: Sequence[Trajectory],
        c_0: torch.Tensor,
        c_p: torch.Tensor,
    ) -> None:
        """One DDIM step of each trajectory, all estimates in one forward."""
        z = torch.stack([x.z for x in trajectories])  # (B, 4, h, w)
        timesteps = [self.timesteps[x.steps] for x in trajectories]
        e = self._guided(unet, z, torch.tensor(timesteps, device=z.device), c_0, c_p)
        for trajectory, t, e_i in zip(trajectories, timesteps, e, strict=True):
            step = self.scheduler.step(e_i.unsqueeze(0), t, trajectory.z.unsqueeze(0))
            trajectory.z = step.prev_sample.squeeze(0)
            trajectory.steps += 1

    def _guided(
        self,
        unet: UNet2DConditionModel,
        z: torch.Tensor,
        t: torch.Tensor,
        c_0: torch.Tensor,
        c_p: torch.Tensor,
    ) -> torch.Tensor:
        """ẽ = ε(∅) + s_g · (ε(c_p) − ε(∅)); ε(∅) alone where a step is one pass."""
        c_0 = c_0.expand_as(c_p)
        if self.objective.passes_per_step == 1:
            return self._estimate(unet, z, t, c_0)
        both = self._estimate(unet, torch.cat([z, z]), torch.cat([t, t]), torch.cat([c_0, c_p]))
        e_0, e_p = both.chunk(2)
        return e_0 + self.objective.guidance_scale * (e_p - e_0)

    def _estimate(
        self, unet: UNet2DConditionModel, z: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        self.unet_passes += len(z)
        return unet(z, t, prompt).sample.float()


def random_int(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number from `low` up to `high`, not included."""
    return int(torch.randint(low, high, (), generator=generator))
