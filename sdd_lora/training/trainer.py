"""The loop: rollout, loss, backward, clip, step, average."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, gather_object
from diffusers import DDIMScheduler, UNet2DConditionModel

from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.atomic import atomic_output
from sdd_lora.io.strict_yaml import as_options
from sdd_lora.progress import progress, warn
from sdd_lora.recipe import Optimizer as OptimizerSettings
from sdd_lora.recipe import Recipe
from sdd_lora.training import objectives
from sdd_lora.training.closed_form import ClosedForm
from sdd_lora.training.directions import concept_directions, damping
from sdd_lora.training.ema import decay_at, update_average
from sdd_lora.training.memory import (
    is_out_of_memory,
    keep_freed_memory,
    peak_bytes,
    reset_peak,
)
from sdd_lora.training.nf4 import quantise
from sdd_lora.training.roles import SEES_PROMPTS, STUDENT, TEACHER, LoraRoles, make_roles
from sdd_lora.training.rollout import Points, Rollout, generator_for
from sdd_lora.training.savings import savings

#: bitsandbytes keeps the states of smaller tensors in 32 bits unless told otherwise
_ALWAYS_8BIT = 1
_CHECKPOINT_EVERY_S = 30.0
_CHECKPOINT_EVERY_SAVES = 20  # saving takes at most a twentieth of the time
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

    def directions(self, rank: int) -> torch.Tensor:
        """Where concepts, each and joined, differ most from kept prompts and ∅: (rank, d)."""
        return concept_directions(*self._erased_and_kept(), rank)

    def closed_form(self, concepts: torch.Tensor, weight: float) -> ClosedForm:
        """What erases `concepts` and keeps kept prompts, so much weighed, and ∅."""
        return ClosedForm.of(concepts, self._erased_and_kept()[1], self.empty, weight)

    def damping(self, strength: float) -> torch.Tensor:
        """What down factors are multiplied by, to answer less to kept prompts and ∅: (d, d)."""
        return damping(*self._erased_and_kept(), strength).to(self.empty.device)

    def _erased_and_kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        kept = self.empty if self.kept is None else torch.cat([self.kept, self.empty])
        return torch.cat([self.concepts, self.joined]), kept


@dataclass
class Report:
    """What a finished training took; `peak_bytes` is None where an earlier training in the same
    process hides it."""

    iterations: int
    unet_passes: int
    seconds: float
    peak_bytes: int | None
    final_loss: float


class Trainer:
    """Trains the student; the teacher, its average (for ESD the student itself), is the result.

    Everything that a resumed run needs is in `state_dict`; all randomness derives from
    (seed, iteration, global sample index).
    """

    _one_was_here = False  # in this process

    def __init__(
        self, recipe: Recipe, unet: UNet2DConditionModel, scheduler: DDIMScheduler,
        embeddings: Embeddings, state_path: Path | None = None,
    ) -> None:  # fmt: skip
        training = recipe.training
        self.recipe, self.state_path = recipe, state_path
        on_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
        if training.precision == "fp16" and not on_gpu:
            raise BadInput("training.precision: fp16 needs a GPU; expected bf16 or fp32 here")
        AcceleratorState._reset_state()  # else the first recipe's precision binds the process
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(training.precision, training.precision),
            cpu=not on_gpu,
            log_with=None if state_path is None else _tracker(),
            project_dir=None if state_path is None else state_path.parent.parent,
        )
        self._check_processes()
        self._peak_is_own = reset_peak() or not Trainer._one_was_here
        Trainer._one_was_here = True
        device = self.accelerator.device
        if training.base_precision == "nf4":
            quantise(unet, device, DTYPES[training.precision])
        else:
            unet.to(device, DTYPES[training.base_precision])
        if training.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()  # diffusers checkpoints in training mode only; SD 1.x has no dropout
        if device.type == "cpu":
            keep_freed_memory()
        self.roles = make_roles(unet, recipe)
        self.embeddings = embeddings.to(device)
        if isinstance(self.roles, LoraRoles):
            self._start(self.roles)
        self.damping = None
        if embeddings.kept is not None and recipe.preserve.damping > 0:
            self.damping = self.embeddings.damping(recipe.preserve.damping)
        size = unet.config.sample_size
        self.rollout_batch = recipe.rollout.batch
        self.rollout = Rollout(
            self.roles.teacher, scheduler, recipe.rollout, recipe.objective,
            (unet.config.in_channels, size, size), training.seed,
            self.rollout_batch * self.accelerator.num_processes * training.gradient_accumulation,
            device,
        )  # fmt: skip
        self.parameters = self.roles.parameters
        self.optimizer = self.accelerator.prepare_optimizer(
            make_optimizer(recipe.optimizer, self.parameters)
        )
        self.training_passes = 0
        self.iteration = 0
        self.seconds = 0.0
        self.losses: list[float] = []

    @torch.no_grad()
    def _start(self, roles: LoraRoles) -> None:
        """Put the factors where `lora.init` says, in all processes where the first one's are:
        eigenvectors' signs may differ from machine to machine."""
        lora, embeddings = self.recipe.lora, self.embeddings
        if lora.init == "random":  # from the seed alone
            return
        if lora.init == "concepts":
            roles.start_along(embeddings.directions(lora.rank))
        else:
            weight = self.recipe.preserve.weight
            roles.start_at(embeddings.closed_form(self._erased_prompts(), weight))
        for role in (STUDENT, TEACHER):
            for factor in roles.trained(role).values():
                factor.copy_(broadcast(factor.data))

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
        if self.roles.averaged:
            decay = decay_at(self.iteration, self.recipe.ema.decay, self.recipe.ema.warmup)
            update_average(self.roles.trained(TEACHER), self.roles.trained(STUDENT), decay)
        self.iteration += 1
        if self.damping is not None and self._ends_a_quarter():
            self._damp(self.damping)
        return loss_sum

    def _ends_a_quarter(self) -> bool:
        """Of the training: the student has time to make good what damping takes from erasure."""
        total = self.recipe.training.iterations
        return 4 * self.iteration // total > 4 * (self.iteration - 1) // total

    @torch.no_grad()
    def _damp(self, damping: torch.Tensor) -> None:
        """Let the down factors of student and teacher answer less to kept prompts."""
        for role in (STUDENT, TEACHER) if self.roles.averaged else (STUDENT,):
            for name, factor in self.roles.trained(role).items():
                if name.endswith(SEES_PROMPTS):
                    factor.copy_(factor @ damping)

    def _sample_indices(self, part: int) -> list[int]:
        """Global indices of this process's trajectories within the iteration."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        first = (part * world + rank) * self.rollout_batch
        return list(range(first, first + self.rollout_batch))

    def _roll_out(self, samples: list[int]) -> Points:
        """Towards one concept each; in SDD's reference towards the joined concepts."""
        objective, embeddings = self.recipe.objective, self.embeddings
        joined = objective.kind == "sdd" and objective.variant == "reference"
        prompts = embeddings.joined if joined else embeddings.concepts
        with self.accelerator.autocast():
            return self.rollout.sample(self.iteration, samples, embeddings.empty, prompts)

    def _erased_prompts(self) -> torch.Tensor:
        """SDD's paper: the joined concepts. Its reference, and ESD: one concept at a time."""
        objective, embeddings = self.recipe.objective, self.embeddings
        joined = objective.kind == "sdd" and objective.variant == "paper"
        return embeddings.joined if joined else embeddings.concepts

    def _prompts_of_loss(self, points: Points) -> torch.Tensor:
        """For SDD in turn; for ESD the concept that the latents were drawn for."""
        prompts = self._erased_prompts()
        is_sdd = self.recipe.objective.kind == "sdd"
        turns = points.turns if is_sdd else points.trajectories
        uses = _uses(turns, self.recipe.rollout.prompts)
        return prompts[[use % len(prompts) for use in uses]]

    def _loss(self, points: Points, samples: list[int]) -> torch.Tensor:
        c_0 = self.embeddings.empty.expand(len(points.z_t), -1, -1)
        return objectives.total(
            self.recipe.objective, self.recipe.preserve, self._estimate, self._base_estimate,
            points.z_t, points.t, c_0, self._prompts_of_loss(points), self._kept_prompts(samples),
        )  # fmt: skip

    def _kept_prompts(self, samples: list[int]) -> torch.Tensor | None:
        """Kept prompts at random, one for each use of a latent."""
        kept, seed = self.embeddings.kept, self.recipe.training.seed
        if kept is None:
            return None
        uses = _uses(samples, self.recipe.rollout.prompts)
        generators = [generator_for(seed, self.iteration, _PRESERVE_STREAM + i) for i in uses]
        return kept[[int(torch.randint(len(kept), (), generator=g)) for g in generators]]

    def _estimate(self, z_t: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """ε in the role that the UNet has now. One autocast block a forward: its cache of cast
        weights must not carry factors cast without gradients into a forward that needs them."""
        self.training_passes += len(z_t)
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
        """All iterations left, checkpointed. Raises KeyboardInterrupt with advice on Ctrl-C."""
        total = self.recipe.training.iterations
        if self.state_path is not None:
            self.accelerator.init_trackers("tensorboard")
        try:
            self._iterate(total)
        except _InterruptedTwice:
            raise
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
            peak_bytes=peak_bytes() if self._peak_is_own else None,
            final_loss=sum(self.losses[-20:]) / len(self.losses[-20:]),
        )

    def _iterate(self, total: int) -> None:
        started, before, saved = time.monotonic(), self.seconds, time.monotonic()
        pause = _CHECKPOINT_EVERY_S
        with progress("training", total, self.iteration) as advance, _whole_steps() as interrupted:
            while self.iteration < total:
                loss = self.step()
                self.losses.append(loss)
                self.seconds = before + time.monotonic() - started
                rate = self.iteration / self.seconds
                advance(1, f"loss {loss:.4f}  {rate:.2f} it/s")
                self.accelerator.log({"loss": loss}, step=self.iteration)
                due = time.monotonic() - saved > pause
                due, stop = self._any_process(due, interrupted())
                if due:
                    saving = time.monotonic()
                    self.save_state()
                    saved = time.monotonic()
                    pause = max(_CHECKPOINT_EVERY_S, _CHECKPOINT_EVERY_SAVES * (saved - saving))
                if stop:
                    raise KeyboardInterrupt

    def _any_process(self, *flags: bool) -> tuple[bool, ...]:
        """Which flags some process has raised: saving and stopping are done together."""
        if self.accelerator.num_processes == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
        return tuple(bool(count > 0) for count in self.accelerator.reduce(raised, "sum"))

    def _total_passes(self) -> int:
        passes = torch.tensor(
            self.rollout.unet_passes + self.training_passes, device=self.accelerator.device
        )
        return int(self.accelerator.reduce(passes, "sum"))

    def teacher_tensors(self) -> dict[str, torch.Tensor]:
        """The result, fp32 on the CPU: factors by "module.lora_A" and "module.lora_B", or whole
        weights by the UNet's own names."""
        return {n: t.detach().cpu() for n, t in self.roles.trained(TEACHER).items()}

    def teacher_factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The result of a LoRA training: (down [r, in], up [out, r]), by module name; of a
        convolution (down [r, in, h, w], up [out, r, 1, 1])."""
        factors = self.teacher_tensors()
        modules = [name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")]
        return {name: (factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]) for name in modules}

    # ── state ────────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """All there is to resume from, gathered from all processes."""
        return {
            "recipe_sha256": self.recipe.sha256,
            "iteration": self.iteration,
            "seconds": self.seconds,
            "losses": self.losses,
            "rollouts": gather_object([self.rollout.state_dict()]),
            "training_passes": self.training_passes,
            "student": {k: v.detach() for k, v in self.roles.trained(STUDENT).items()},
            "teacher": {k: v.detach() for k, v in self.roles.trained(TEACHER).items()}
            if self.roles.averaged else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self.accelerator.scaler is None
            else self.accelerator.scaler.state_dict(),
        }  # fmt: skip

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises BadInput where the state is another recipe's, or another number of processes'."""
        if state["recipe_sha256"] != self.recipe.sha256:
            raise BadInput(
                f"{self.state_path}: belongs to another recipe (or other --set values); "
                "train it in another folder, or start over with --force"
            )
        processes = len(state["rollouts"])
        if processes != self.accelerator.num_processes:
            raise BadInput(
                f"{self.state_path}: {processes} processes trained this, and "
                f"{self.accelerator.num_processes} would go on; expected as many"
            )
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.losses = list(state["losses"])
        self.rollout.load_state_dict(state["rollouts"][self.accelerator.process_index])
        self.training_passes = state["training_passes"]
        for role in (STUDENT, TEACHER):
            tensors = self.roles.trained(role)
            for name, value in state[role].items():
                tensors[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def save_state(self) -> None:
        """Replace the checkpoint, whole, by the main process. All processes call this together."""
        if self.state_path is None:
            return
        state = self.state_dict()
        if self.accelerator.is_main_process:
            self.state_path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_output(self.state_path) as file:
                torch.save(state, file)

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


def _uses(turns: Sequence[int], times: int) -> list[int]:
    """Turns of a latent that is used several `times`: those from turn · times on."""
    return [turn * times + use for turn in turns for use in range(times)]


#: a recipe's precisions
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
def memory_advice(recipe: Recipe) -> Iterator[None]:
    """Where memory runs out in the block: SddLoraError, with what of the recipe to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        steps = [f"{as_options(changes)} ({costs})" for changes, costs in savings(recipe)]
        if recipe.parameters == "full":
            steps.append("--set parameters=lora")
        advice = f"Try, in this order: {'; '.join(steps)}" if steps else "Nothing here takes less"
        raise SddLoraError(
            f"out of memory at {peak_bytes() / 1e9:.1f} GB. {advice}; or close other programs that "
            "hold memory"
        ) from error


class _InterruptedTwice(KeyboardInterrupt):
    """Within an iteration, whose state is not to be saved."""


@contextmanager
def _whole_steps() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the iteration under way, so that what is saved is whole: the function that
    this yields says whether it came. A second Ctrl-C doesn't wait, and then nothing is saved."""
    waiting: list[int] = []

    def wait(*_: object) -> None:
        if waiting:
            raise _InterruptedTwice(
                "interrupted twice; --resume continues from the last checkpoint"
            )
        waiting.append(1)

    def interrupted() -> bool:
        return bool(waiting)

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, wait)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _tracker() -> str | None:
    from accelerate.utils import is_tensorboard_available

    return "tensorboard" if is_tensorboard_available() else None
