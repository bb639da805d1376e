"""The loop: rollout, loss, backward, clip, step, average."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, UNet2DConditionModel

from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.files import atomic_output
from sdd_lora.progress import progress, warn
from sdd_lora.recipe import Optimizer as OptimizerSettings
from sdd_lora.recipe import Recipe
from sdd_lora.training import objectives
from sdd_lora.training.ema import decay_at, update_average
from sdd_lora.training.roles import STUDENT, TEACHER, Roles
from sdd_lora.training.rollout import Points, Rollout, generator_for

#: bitsandbytes keeps the states of smaller tensors in 32 bits unless told otherwise
_ALWAYS_8BIT = 1
_CHECKPOINT_EVERY_S = 30.0
_PRESERVE_STREAM = 1 << 32  # keeps the choice of kept prompts apart from the trajectories' noise


@dataclass(frozen=True)
class Embeddings:
    """Encoded prompts, each (N, 77, d): ∅ (N = 1), every concept, the joined concepts, the kept."""

    empty: torch.Tensor
    concepts: torch.Tensor
    joined: torch.Tensor
    kept: torch.Tensor | None

    def to(self, device: torch.device) -> "Embeddings":
        kept = None if self.kept is None else self.kept.to(device)
        return Embeddings(
            self.empty.to(device), self.concepts.to(device), self.joined.to(device), kept
        )


@dataclass
class Report:
    """What a finished training took."""

    iterations: int
    unet_passes: int
    seconds: float
    peak_bytes: int
    final_loss: float


class Trainer:
    """Trains the student's factors; the teacher's, their average, are the result.

    Everything that a resumed run needs is in `state_dict`; all randomness derives from
    (seed, iteration, global sample index).
    """

    def __init__(
        self, recipe: Recipe, unet: UNet2DConditionModel, scheduler: DDIMScheduler,
        embeddings: Embeddings, state_path: Path | None = None,
    ) -> None:  # fmt: skip
        training = recipe.training
        self.recipe, self.state_path = recipe, state_path
        AcceleratorState._reset_state()  # else the first recipe's precision binds the process
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(training.precision, training.precision),
            cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
            log_with=None if state_path is None else _tracker(),
            project_dir=None if state_path is None else state_path.parent.parent,
        )
        self._check_processes()
        device = self.accelerator.device
        unet.to(device, _DTYPES[training.base_precision])
        if training.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()  # diffusers checkpoints in training mode only; SD 1.x has no dropout
        self.roles = Roles(unet, recipe.lora, training.seed)
        self.embeddings = embeddings.to(device)
        size = unet.config.sample_size
        self.rollout = Rollout(
            self.roles.teacher, scheduler, recipe.rollout, recipe.objective,
            (unet.config.in_channels, size, size),
        )  # fmt: skip
        self.rollout_batch = recipe.rollout.batch
        self.parameters = list(self.roles.factors(STUDENT).values())
        self.optimizer = self.accelerator.prepare_optimizer(
            make_optimizer(recipe.optimizer, self.parameters)
        )
        self.training_passes = 0
        self.iteration = 0
        self.seconds = 0.0
        self.losses: list[float] = []

    # ── one iteration ────────────────────────────────────────────────────────────────────────

    def step(self) -> float:
        """One optimizer update; returns its loss. Raises SddLoraError where it is not finite."""
        settings = self.recipe.optimizer
        accumulation = self.recipe.training.gradient_accumulation
        loss_sum = 0.0
        for part in range(accumulation):
            samples = self._sample_indices(part)
            points = self._roll_out(samples)
            with self.roles.student():  # the backward pass too: see Roles.student
                loss = self._loss(points, samples)
                self.accelerator.backward(loss / accumulation)
            loss_sum += loss.item() / accumulation
        loss_sum = self._mean_over_processes(loss_sum)
        self._check_finite("loss", loss_sum)
        for parameter in self.parameters:
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        norm = self.accelerator.clip_grad_norm_(self.parameters, settings.max_grad_norm)
        if self.accelerator.scaler is None:  # fp16's scaler skips such a step by itself
            self._check_finite("gradient's norm", float(norm))
        factor = learning_rate_factor(self.iteration, self.recipe.training.iterations, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = decay_at(self.iteration, self.recipe.ema.decay, self.recipe.ema.warmup)
        update_average(self.roles.factors(TEACHER), self.roles.factors(STUDENT), decay)
        self.iteration += 1
        return loss_sum

    def _sample_indices(self, part: int) -> list[int]:
        """Global indices of this process's trajectories within the iteration."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        first = (part * world + rank) * self.rollout_batch
        return list(range(first, first + self.rollout_batch))

    def _roll_out(self, samples: list[int]) -> Points:
        """Paper: towards one concept each. Reference: towards the joined concepts."""
        seed, embeddings = self.recipe.training.seed, self.embeddings
        generators = [generator_for(seed, self.iteration, i) for i in samples]
        paper = self.recipe.objective.variant == "paper"
        prompts = self._in_turn(embeddings.concepts if paper else embeddings.joined, samples)
        with self.accelerator.autocast():
            return self.rollout.sample(embeddings.empty, prompts, generators)

    def _loss(self, points: Points, samples: list[int]) -> torch.Tensor:
        """Paper: c_s is the joined concepts. Reference: one concept at a time."""
        embeddings = self.embeddings
        paper = self.recipe.objective.variant == "paper"
        c_s = self._in_turn(embeddings.joined if paper else embeddings.concepts, samples)
        c_0 = embeddings.empty.expand_as(c_s)
        loss = objectives.sdd(self._estimate, points.z_t, points.t, c_0, c_s)
        self.training_passes += 2 * len(samples)
        if embeddings.kept is not None and self.recipe.preserve.weight > 0:
            c_k = embeddings.kept[self._kept_choice(samples)]
            loss = loss + self.recipe.preserve.weight * objectives.preservation(
                self._estimate, self._base_estimate, points.z_t, points.t, c_k
            )
            self.training_passes += 2 * len(samples)
        return loss

    def _in_turn(self, prompts: torch.Tensor, samples: list[int]) -> torch.Tensor:
        """Iterate over prompts: `concepts[i % len(concepts)]`, i counting trajectories."""
        per_iteration = (
            self.rollout_batch
            * self.accelerator.num_processes
            * self.recipe.training.gradient_accumulation
        )
        rows = [(self.iteration * per_iteration + i) % len(prompts) for i in samples]
        return prompts[rows]

    def _kept_choice(self, samples: list[int]) -> list[int]:
        assert self.embeddings.kept is not None
        count, seed = len(self.embeddings.kept), self.recipe.training.seed
        generators = [generator_for(seed, self.iteration, _PRESERVE_STREAM + i) for i in samples]
        return [int(torch.randint(count, (), generator=g)) for g in generators]

    def _estimate(self, z_t: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """ε in the role that the UNet has now. One autocast block a forward: its cache of cast
        weights must not carry factors cast without gradients into a forward that needs them."""
        with self.accelerator.autocast():
            return self.roles.unet(z_t, t, prompt).sample.float()

    def _base_estimate(
        self, z_t: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor
    ) -> torch.Tensor:
        with self.roles.base():
            return self._estimate(z_t, t, prompt)

    def _mean_over_processes(self, value: float) -> float:
        tensor = torch.tensor(value, device=self.accelerator.device)
        return float(self.accelerator.reduce(tensor, "mean"))

    def _check_processes(self) -> None:
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if asked != self.accelerator.num_processes:
            raise SddLoraError(
                f"{asked} processes were asked for, {self.accelerator.num_processes} came about"
            )

    def _check_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        settings = self.recipe.optimizer
        raise SddLoraError(
            f"iteration {self.iteration}: the {what} is {value}. Likely causes: too high a learning"
            f" rate (optimizer.learning_rate is {settings.learning_rate}: try a third of it), fp16 "
            f"overflow (training.precision is {self.recipe.training.precision}: try bf16 or fp32), "
            "or damaged weights in the model."
        )

    # ── the run ──────────────────────────────────────────────────────────────────────────────

    def run(self) -> Report:
        """All iterations left, checkpointed; raises KeyboardInterrupt with advice on Ctrl-C."""
        total = self.recipe.training.iterations
        started, before, saved = time.monotonic(), self.seconds, time.monotonic()
        if self.state_path is not None:
            self.accelerator.init_trackers("tensorboard")
        try:
            with progress("training", total, self.iteration) as advance, _whole_steps() as pause:
                while self.iteration < total:
                    loss = self.step()
                    self.losses.append(loss)
                    self.seconds = before + time.monotonic() - started
                    rate = self.iteration / self.seconds
                    advance(1, f"loss {loss:.4f}  {rate:.2f} it/s")
                    self.accelerator.log({"loss": loss}, step=self.iteration)
                    if time.monotonic() - saved > _CHECKPOINT_EVERY_S:
                        self.save_state()
                        saved = time.monotonic()
                    pause()
        except KeyboardInterrupt:
            self.save_state()
            raise KeyboardInterrupt(
                f"interrupted at iteration {self.iteration} of {total}; --resume continues"
            ) from None
        self.save_state()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return Report(
            iterations=total,
            unet_passes=self._total_passes(),
            seconds=self.seconds,
            peak_bytes=peak_bytes(),
            final_loss=sum(self.losses[-20:]) / len(self.losses[-20:]),
        )

    def _total_passes(self) -> int:
        passes = torch.tensor(
            self.rollout.unet_passes + self.training_passes, device=self.accelerator.device
        )
        return int(self.accelerator.reduce(passes, "sum"))

    def teacher_factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The result: (down [r, in], up [out, r]) fp32 on the CPU, by module name."""
        factors = self.roles.factors(TEACHER)
        return {
            name: (
                factors[f"{name}.lora_A"].detach().cpu(),
                factors[f"{name}.lora_B"].detach().cpu(),
            )
            for name in self.roles.layers
        }

    # ── state ────────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """All there is to resume from."""
        return {
            "recipe_sha256": self.recipe.sha256,
            "iteration": self.iteration,
            "seconds": self.seconds,
            "losses": self.losses,
            "rollout_passes": self.rollout.unet_passes,
            "training_passes": self.training_passes,
            "student": {k: v.detach() for k, v in self.roles.factors(STUDENT).items()},
            "teacher": {k: v.detach() for k, v in self.roles.factors(TEACHER).items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.accelerator.scaler is None
            else self.accelerator.scaler.state_dict(),
        }  # fmt: skip

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises BadInput where the state is another recipe's."""
        if state["recipe_sha256"] != self.recipe.sha256:
            raise BadInput(
                f"{self.state_path}: belongs to another recipe (or other --set values); "
                "train it in another folder, or start over with --force"
            )
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.losses = list(state["losses"])
        self.rollout.unet_passes = state["rollout_passes"]
        self.training_passes = state["training_passes"]
        for role in (STUDENT, TEACHER):
            for name, factor in self.roles.factors(role).items():
                factor.copy_(state[role][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def save_state(self) -> None:
        """Replace the checkpoint, whole, from the main process."""
        if self.state_path is None or not self.accelerator.is_main_process:
            return
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(self.state_path) as file:
            torch.save(self.state_dict(), file)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one. Raises BadInput where it is damaged."""
        assert self.state_path is not None
        if not self.state_path.exists():
            return  # stopped before its first checkpoint: from the start
        try:
            state = torch.load(self.state_path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise BadInput(f"{self.state_path}: damaged, can't resume from it: {error}") from error
        self.load_state_dict(state)


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_optimizer(
    settings: OptimizerSettings, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """8-bit AdamW of bitsandbytes, its states 8-bit for small tensors too; or torch's AdamW."""
    arguments: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": settings.weight_decay,
    }
    if settings.kind == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            warn(f"bitsandbytes is missing ({error}): using AdamW with 32-bit states instead")
        else:
            return bitsandbytes.optim.AdamW8bit(parameters, min_8bit_size=_ALWAYS_8BIT, **arguments)
    return torch.optim.AdamW(parameters, **arguments)


def learning_rate_factor(iteration: int, iterations: int, settings: OptimizerSettings) -> float:
    """Factor on the learning rate: a pure function of progress."""
    warmup = settings.warmup_iterations
    if iteration < warmup:
        return (iteration + 1) / warmup
    progress_made = (iteration - warmup) / max(1, iterations - warmup)
    if settings.schedule == "linear":
        return 1 - progress_made
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress_made))
    return 1.0


@contextmanager
def _whole_steps() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits for the iteration under way, so that what is saved is whole: the function that
    this yields raises it. A second Ctrl-C doesn't wait, and then nothing is saved."""
    waiting: list[int] = []

    def wait(*_: object) -> None:
        if waiting:
            raise SddLoraError("interrupted twice; --resume continues from the last checkpoint")
        waiting.append(1)

    def pause() -> None:
        if waiting:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield pause
        return
    before = signal.signal(signal.SIGINT, wait)
    try:
        yield pause
    finally:
        signal.signal(signal.SIGINT, before)


def peak_bytes() -> int:
    """Peak memory so far: of the CUDA device where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _tracker() -> str | None:
    from accelerate.utils import is_tensorboard_available

    return "tensorboard" if is_tensorboard_available() else None
