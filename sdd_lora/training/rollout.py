"""Where training points come from: the teacher samples trajectories, with stops on their way."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel

from sdd_lora.recipe import Objective
from sdd_lora.recipe import Rollout as RolloutSettings


@dataclass(frozen=True)
class Points:
    """Training points: latents `z_t` (B, 4, h, w) at timesteps `t` (B,), int64.

    `trajectories` (B) are the numbers of those they come from, and say which prompt those went
    towards; `turns` (B) go on from one point of a trajectory to the next.
    """

    z_t: torch.Tensor
    t: torch.Tensor
    trajectories: list[int]
    turns: list[int]


@dataclass
class Trajectory:
    """One way from pure noise towards a prompt: where it stops, how far it has come.

    `stops[j]` solver steps lead to its j-th training point, whose loss is taken at `t[j]`.
    `number` counts trajectories over the run, `born` is the iteration it started in.
    """

    born: int
    number: int
    solver: Any
    stops: list[int]
    t: list[int]
    z: torch.Tensor
    steps: int = 0

    @property
    def timestep(self) -> int:
        """The timestep that z belongs to."""
        return int(self.solver.timesteps[self.steps])

    def advance(self, e: torch.Tensor) -> None:
        """One solver step along the noise estimate `e` (4, h, w)."""
        step = self.solver.step(e.unsqueeze(0), self.timestep, self.z.unsqueeze(0))
        self.z, self.steps = step.prev_sample.squeeze(0), self.steps + 1


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

    `points` = N > 1: a trajectory is not thrown away after its point but goes on in the next
    iteration, through N points spread evenly over its timesteps at a random offset, so that every t
    is as frequent as with one. The samples of a batch are at different points of N, so the batch
    stays full and covers the range of t in every iteration. Each step is the teacher's of that
    iteration: the oldest step of a trajectory comes from a teacher N − 1 updates old.

    `dpmsolver++`: the solver's few timesteps are shifted from trajectory to trajectory, so that t
    still takes every value; it starts at the noisiest one always. `reference` needs no bins then.

    `unet_passes` counts samples through the UNet: two a guided step, one where t / 1000 lies
    outside `guidance_interval`.
    """

    def __init__(
        self, teacher: Callable[[], AbstractContextManager[UNet2DConditionModel]],
        scheduler: DDIMScheduler, settings: RolloutSettings, objective: Objective,
        latent_shape: tuple[int, int, int], seed: int = 0, samples_per_iteration: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.teacher, self.scheduler, self.latent_shape = teacher, scheduler, latent_shape
        self.settings, self.objective = settings, objective
        self.seed, self.samples_per_iteration, self.device = seed, samples_per_iteration, device
        self.timestep_count = scheduler.config.num_train_timesteps
        scheduler.set_timesteps(settings.steps)
        self._multistep = DPMSolverMultistepScheduler.from_config(scheduler.config)
        self._carried: dict[int, Trajectory] = {}
        self.unet_passes = 0

    @torch.no_grad()
    def sample(
        self, iteration: int, samples: Sequence[int], c_0: torch.Tensor, prompts: torch.Tensor
    ) -> Points:
        """An iteration's points: one for each global sample index in `samples` (B).

        Trajectories go towards `prompts` (N, 77, d), one each, in turn.
        """
        points = self.settings.points
        phases = [(iteration + sample) % points for sample in samples]
        ways = [self._trajectory(iteration, i, p) for i, p in zip(samples, phases, strict=True)]
        goals = [way.stops[phase] for way, phase in zip(ways, phases, strict=True)]
        towards = prompts[[way.number % len(prompts) for way in ways]]
        with self.teacher() as unet:
            while going := [i for i, way in enumerate(ways) if way.steps < goals[i]]:
                z = torch.stack([ways[i].z for i in going])
                e = self._guided(unet, z, [ways[i].timestep for i in going], c_0, towards[going])
                for i, e_i in zip(going, e, strict=True):
                    ways[i].advance(e_i)
        for sample, way, phase in zip(samples, ways, phases, strict=True):
            self._carried.pop(sample, None)
            if phase < points - 1:
                self._carried[sample] = way
        return Points(
            torch.stack([way.z for way in ways]),
            torch.tensor([w.t[p] for w, p in zip(ways, phases, strict=True)], device=self.device),
            [way.number for way in ways],
            [way.number + phase for way, phase in zip(ways, phases, strict=True)],
        )

    def state_dict(self) -> dict[str, Any]:
        """What the trajectories under way can't be derived from; latents on the CPU."""
        return {
            "unet_passes": self.unet_passes,
            "carried": {
                sample: {
                    "born": way.born, "steps": way.steps, "z": way.z.cpu(),
                    "outputs": [x.cpu() for x in _outputs(way.solver) if x is not None],
                }
                for sample, way in self._carried.items()
            },
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.unet_passes = state["unet_passes"]
        self._carried = {}
        for sample, saved in state["carried"].items():
            way = self._start(saved["born"], sample)
            way.z, way.steps = saved["z"].to(self.device), saved["steps"]
            if outputs := [x.to(self.device) for x in saved["outputs"]]:
                way.solver.model_outputs[-len(outputs) :] = outputs
                way.solver.lower_order_nums = len(outputs)
            self._carried[sample] = way

    def _trajectory(self, iteration: int, sample: int, phase: int) -> Trajectory:
        """The one that this sample is on, or a new one. Those of the first iteration begin in the
        middle of their N points, each sample at another one."""
        born = max(0, iteration - phase)
        carried = self._carried.get(sample)
        return carried if carried and carried.born == born else self._start(born, sample)

    def _start(self, born: int, sample: int) -> Trajectory:
        """A trajectory at its noise; all its random choices are made here.

        Of `depths` equally likely numbers of steps, N evenly spaced ones: (x + jD) // N for x
        uniform in 0 … D − 1 are distinct, and each number of steps is as likely as any other.
        """
        points, depths = self.settings.points, self.settings.steps - 1
        generator = generator_for(self.seed, born, sample)
        offset = _randint(0, depths, generator)
        stops = [(offset + j * depths) // points + 1 for j in range(points)]
        z = torch.randn(self.latent_shape, generator=generator) * self.scheduler.init_noise_sigma
        solver = self._solver(generator)
        t = [self._timestep(int(solver.timesteps[stop]), generator) for stop in stops]
        turn = (born + sample % points) // points
        number = turn * self.samples_per_iteration + sample
        return Trajectory(born, number, solver, stops, t, z.to(self.device))

    def _solver(self, generator: torch.Generator) -> DDIMScheduler | DPMSolverMultistepScheduler:
        """DDIM keeps nothing between steps; a multistep solver belongs to one trajectory.

        Its timesteps: T − 1, then evenly spaced down to 0, shifted up by a random part of a step.
        """
        if self.settings.solver == "ddim":
            return self.scheduler
        last, steps = self.timestep_count - 1, self.settings.steps
        shift = float(torch.rand((), generator=generator, dtype=torch.float64))
        shifted = [int(last - (k - shift) * last / (steps - 1)) for k in range(1, steps)]
        solver = copy.copy(self._multistep)
        solver.set_timesteps(timesteps=[last, *shifted])
        return solver

    def _guided(
        self, unet: UNet2DConditionModel, z: torch.Tensor, timesteps: Sequence[int],
        c_0: torch.Tensor, c_p: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """ẽ = ε(∅) + s_g · (ε(c_p) − ε(∅)), all estimates in one forward; ε(c_p) alone outside the
        guidance interval."""
        s_g, (low, high) = self.objective.guidance_scale, self.settings.guidance_interval
        t = torch.tensor(timesteps, device=z.device)
        if self.objective.kind == "sdd" and self.objective.variant == "reference" and s_g <= 1:
            return self._estimate(unet, z, t, c_0.expand_as(c_p))  # as their code does
        guided = [i for i, x in enumerate(timesteps) if low <= x / self.timestep_count <= high]
        e = self._estimate(
            unet, torch.cat([z[guided], z]), torch.cat([t[guided], t]),
            torch.cat([c_0.expand_as(c_p[guided]), c_p]),
        )  # fmt: skip
        e_0, e_p = e[: len(guided)], e[len(guided) :]
        e_p[guided] = e_0 + s_g * (e_p[guided] - e_0)
        return e_p

    def _estimate(
        self, unet: UNet2DConditionModel, z: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        self.unet_passes += len(z)
        return unet(z, t, prompt).sample.float()

    def _timestep(self, t: int, generator: torch.Generator) -> int:
        if self.objective.variant == "paper" or self.settings.solver != "ddim":
            return t
        width = self.timestep_count // self.settings.steps
        low = t // width * width
        return _randint(low, min(low + width, self.timestep_count), generator)


def _outputs(solver: Any) -> list[torch.Tensor | None]:
    """What a multistep solver remembers of earlier steps."""
    return getattr(solver, "model_outputs", [])


def _randint(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator))
