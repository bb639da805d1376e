"""The loop: rollout, loss, backward, clip, step, average."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers import DDIMScheduler, UNet2DConditionModel

from sdd_lora.adapter.metrics import Snapshot, TrainingReport
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.atomic import atomic_output
from sdd_lora.progress import progress, warn
from sdd_lora.recipe import Recipe, Training
from sdd_lora.sd.devices import DTYPES
from sdd_lora.training.accelerator import make_accelerator
from sdd_lora.training.ema import decay_at, update_average
from sdd_lora.training.embeddings import Embeddings
from sdd_lora.training.init import SEES_PROMPTS, damping, initialise
from sdd_lora.training.interrupt import InterruptedTwice, whole_steps
from sdd_lora.training.memory import PeakMemory, keep_freed_memory
from sdd_lora.training.nf4 import quantise
from sdd_lora.training.objectives import LatentBatch, make_objective, total_loss
from sdd_lora.training.optimizer import learning_rate, make_optimizer
from sdd_lora.training.pictures import Pictures
from sdd_lora.training.roles import STUDENT, TEACHER, FactorRoles, make_roles
from sdd_lora.training.rollout import Rollout, generator_for

_CHECKPOINT_EVERY_S = 30.0
_CHECKPOINT_EVERY_SAVES = 20  # saving takes at most a twentieth of the time
_PRESERVE_STREAM = 1 << 32  # keeps the choice of kept prompts apart from the trajectories' noise
_LAST_LOSSES = 20  # of which `final_loss` is the mean


#: keeps a training's result so far; called by all processes together
KeepSnapshot = Callable[["Trainer"], None]
#: draws what a training has reached, where it is due
DrawSample = Callable[["Trainer"], None]
#: called after each iteration with their number and {"loss": the iteration's}
Callback = Callable[[int, dict[str, float]], None]


class Trainer:
    """Trains the student; the teacher, its average (for ESD the student itself), is the result.

    Everything that a resumed run needs is in `state_dict`; all randomness derives from
    (seed, iteration, global sample index).
    """

    def __init__(
        self,
        recipe: Recipe,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        embeddings: Embeddings,
        state_path: Path | None = None,
    ) -> None:
        self.recipe, self.state_path = recipe, state_path
        self.accelerator = make_accelerator(recipe.training, state_path)
        self._peak = PeakMemory()
        device = self.accelerator.device
        _place(unet, recipe.training, device)
        if device.type == "cpu":
            keep_freed_memory()
        self.objective = make_objective(recipe.objective)
        self.roles = make_roles(unet, recipe, self.objective)
        self.embeddings = embeddings.to(device)
        self.started_from = None
        if isinstance(self.roles, FactorRoles):
            self.started_from = initialise(self.roles, recipe, self.objective, self.embeddings)
        size, training = unet.config.sample_size, recipe.training
        samples = recipe.rollout.batch * self.accelerator.num_processes
        self.rollout = Rollout(
            self.roles.teacher,
            scheduler,
            recipe.rollout,
            self.objective,
            (unet.config.in_channels, size, size),
            training.seed,
            samples * training.gradient_accumulation,
            device,
        )
        self.training_passes = 0
        self.pictures = None
        if recipe.pictures is not None:
            shape = self.rollout.latent_shape
            self.pictures = Pictures(recipe, self._base_estimate, scheduler, self.embeddings, shape)
        self.parameters = self.roles.parameters
        self.optimizer = self.accelerator.prepare_optimizer(
            make_optimizer(recipe.optimizer, self.parameters)
        )
        self.iteration = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.snapshots: list[Snapshot] = []
        self.interrupted: Callable[[], bool] = lambda: False

    # ── one iteration ────────────────────────────────────────────────────────────────────────

    def step(self) -> float:
        """One optimizer update; returns its loss. Raises SddLoraError where it is not finite."""
        accumulation = self.recipe.training.gradient_accumulation
        mean_loss = 0.0
        for part in range(accumulation):
            samples = self._sample_indices(part)
            batch = self._roll_out(samples)
            with self.roles.student():  # the backward pass too: see Roles.student
                loss = self._loss(batch, samples)
                self.accelerator.backward(loss / accumulation)
            mean_loss += loss.item() / accumulation
        mean_loss = self._mean_over_processes(mean_loss)
        self._check_finite("loss", mean_loss)
        self._clip_gradients()
        self._set_learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.roles.averaged:
            decay = decay_at(self.iteration, self.recipe.ema.decay, self.recipe.ema.warmup)
            update_average(
                self.roles.parameters_of(TEACHER), self.roles.parameters_of(STUDENT), decay
            )
        self.iteration += 1
        self._damp_each_quarter()
        return mean_loss

    def _sample_indices(self, part: int) -> list[int]:
        """Global indices of this process's trajectories within the iteration."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batch = self.recipe.rollout.batch
        first = (part * world + rank) * batch
        return list(range(first, first + batch))

    def _roll_out(self, samples: list[int]) -> LatentBatch:
        prompts = self.objective.rollout_prompts(self.embeddings)
        with self.accelerator.autocast():
            return self.rollout.sample(self.iteration, samples, self.embeddings.empty, prompts)

    def _loss(self, batch: LatentBatch, samples: list[int]) -> torch.Tensor:
        loss = total_loss(
            self.objective,
            self.recipe.preserve,
            self._estimate,
            self._base_estimate,
            batch.z_t,
            batch.t,
            self.embeddings.empty.expand(len(batch.z_t), -1, -1),
            self._erased_prompts(batch),
            self._kept_prompts(samples),
        )
        if self.pictures is not None:
            uses = _uses(samples, self.pictures.settings.batch)
            loss += self.pictures.loss(self._estimate, self.iteration, uses)
        return loss

    def _erased_prompts(self, batch: LatentBatch) -> torch.Tensor:
        """The loss's prompts in turn, at most `rollout.prompts_per_latent` for each latent; of
        fewer prompts none is used twice with a latent: the same pass would be computed again."""
        prompts = self.objective.loss_prompts(self.embeddings)
        times = min(self.recipe.rollout.prompts_per_latent, len(prompts))
        uses = _uses(self.objective.prompt_index(batch), times)
        return prompts[[use % len(prompts) for use in uses]]

    def _kept_prompts(self, samples: list[int]) -> torch.Tensor | None:
        """Kept prompts at random, `rollout.prompts_per_latent` for each latent. With `pictures`
        there are none: they are held on their own drawings; on the concepts' latents, where every
        prompt is to see a blank, preservation would work against that."""
        kept, seed = self.embeddings.kept, self.recipe.training.seed
        if kept is None or self.pictures is not None:
            return None
        uses = _uses(samples, self.recipe.rollout.prompts_per_latent)
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

    def _clip_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        limit = self.recipe.optimizer.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        if self.accelerator.scaler is None:  # fp16's scaler skips such a step by itself
            self._check_finite("gradient's norm", float(norm))

    def _set_learning_rate(self) -> None:
        total = self.recipe.training.iterations
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.iteration, total, self.recipe.optimizer)

    @torch.no_grad()
    def _damp_each_quarter(self) -> None:
        """After each quarter of the training, let the down factors answer less to kept prompts:
        damping costs some erasure; applied this rarely, the student wins it back."""
        strength, total = self.recipe.preserve.damping, self.recipe.training.iterations
        ends_a_quarter = 4 * self.iteration // total > 4 * (self.iteration - 1) // total
        if strength == 0 or self.embeddings.kept is None or not ends_a_quarter:
            return
        matrix = damping(self.embeddings.erased, self.embeddings.kept_and_empty, strength)
        matrix = matrix.to(self.accelerator.device)
        for role in self.roles.distinct:
            for name, factor in self.roles.parameters_of(role).items():
                if name.endswith(SEES_PROMPTS):
                    factor.copy_(factor @ matrix)

    def _mean_over_processes(self, value: float) -> float:
        tensor = torch.tensor(value, device=self.accelerator.device)
        return float(self.accelerator.reduce(tensor, "mean"))

    def _check_finite(self, name: str, value: float) -> None:
        if math.isfinite(value):
            return
        settings = self.recipe.optimizer
        raise SddLoraError(
            f"iteration {self.iteration}: the {name} is {value}. Likely causes: too high a learning"
            f" rate (optimizer.learning_rate is {settings.learning_rate}: try a third of it), fp16 "
            f"overflow (training.precision is {self.recipe.training.precision}: try bf16 or fp32), "
            "or damaged weights in the model."
        )

    # ── the run ──────────────────────────────────────────────────────────────────────────────

    def run(
        self,
        keep: KeepSnapshot | None = None,
        callback: Callback | None = None,
        sample: DrawSample | None = None,
    ) -> TrainingReport:
        """All iterations left, checkpointed; `keep` is called for each snapshot, `callback` and
        `sample` after each iteration, `sample` also where a resumed training starts. Raises
        KeyboardInterrupt with advice on Ctrl-C."""
        total = self.recipe.training.iterations
        if self.state_path is not None:
            self.accelerator.init_trackers("tensorboard")
        try:
            self._iterate(total, keep, callback, sample)
        except InterruptedTwice:
            raise
        except KeyboardInterrupt:
            self.save_state()
            raise KeyboardInterrupt(
                f"interrupted at iteration {self.iteration} of {total}; `resume=True` continues"
            ) from None
        self.save_state()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        last = self.losses[-_LAST_LOSSES:]
        return TrainingReport(
            iterations=total,
            unet_passes=self._total_passes(),
            seconds=round(self.seconds, 2),
            peak_bytes=self._peak.bytes(),
            final_loss=sum(last) / len(last) if last else None,
        )

    def _iterate(
        self,
        total: int,
        keep: KeepSnapshot | None,
        callback: Callback | None,
        sample: DrawSample | None,
    ) -> None:
        started, before, saved = time.monotonic(), self.seconds, time.monotonic()
        pause = _CHECKPOINT_EVERY_S
        with progress("training", total, self.iteration) as advance, whole_steps() as interrupted:
            self.interrupted = interrupted
            if sample:
                sample(self)  # an interruption may have left it out
            while self.iteration < total:
                loss = self.step()
                self.losses.append(loss)
                self.seconds = before + time.monotonic() - started
                rate = self.iteration / self.seconds
                advance(1, f"loss {loss:.4f}  {rate:.2f} it/s")
                self.accelerator.log({"loss": loss}, step=self.iteration)
                every = self.recipe.training.snapshot_every
                if keep and every and self.iteration % every == 0 and self.iteration < total:
                    passes, seconds = self._total_passes(), round(self.seconds, 2)
                    self.snapshots.append(
                        Snapshot(iteration=self.iteration, unet_passes=passes, seconds=seconds)
                    )
                    keep(self)
                if callback:
                    callback(self.iteration, {"loss": loss})
                if sample:
                    begun = time.monotonic()
                    sample(self)
                    started += time.monotonic() - begun
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
        """The result, fp32 on the CPU, named as `Roles.parameters_of` names it."""
        return {n: t.detach().cpu() for n, t in self.roles.parameters_of(TEACHER).items()}

    # ── state ────────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """Everything to resume from, gathered from all processes."""
        scaler = self.accelerator.scaler
        return {
            "training_sha256": self.recipe.training_sha256,
            "started_from": self.started_from and self.started_from.sha256,
            "iterations": self.recipe.training.iterations,
            "iteration": self.iteration,
            "seconds": self.seconds,
            "losses": self.losses,
            "rollouts": gather_object([self.rollout.state_dict()]),
            "pictures": gather_object([self.pictures.state_dict() if self.pictures else None]),
            "training_passes": self.training_passes,
            "snapshots": [snapshot.as_json() for snapshot in self.snapshots],
            "roles": {
                role: {k: v.detach() for k, v in self.roles.parameters_of(role).items()}
                for role in self.roles.distinct
            },
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises BadInput where the state is another recipe's, or another number of processes'."""
        if "training_sha256" not in state:
            raise BadInput(
                f"{self.state_path}: an earlier version of sdd_lora left this state, and trained by"
                " another loss; go on with that version, or start over with `force=True`"
            )
        planned = state.get("iterations", self.recipe.training.iterations)
        if state["training_sha256"] != self.recipe.with_iterations(planned).training_sha256:
            raise BadInput(
                f"{self.state_path}: belongs to another recipe (or other values in it); "
                "train it in another folder, or start over with `force=True`"
            )
        processes = len(state["rollouts"])
        if processes != self.accelerator.num_processes:
            raise BadInput(
                f"{self.state_path}: {processes} processes trained this, and "
                f"{self.accelerator.num_processes} would go on; expected as many"
            )
        if state.get("started_from") != (self.started_from and self.started_from.sha256):
            raise BadInput(
                f"{self.state_path}: went on from another file of the name "
                f"{self.recipe.lora.starts_from}; put that one there, or start over with "
                "`force=True`"
            )
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self._check_length(planned)
        self.losses = list(state["losses"])
        self.rollout.load_state_dict(state["rollouts"][self.accelerator.process_index])
        if self.pictures is not None:
            self.pictures.load_state_dict(state["pictures"][self.accelerator.process_index])
        self.training_passes = state["training_passes"]
        self.snapshots = [Snapshot(**kept) for kept in state.get("snapshots", [])]
        for role in self.roles.distinct:
            tensors = self.roles.parameters_of(role)
            for name, value in state["roles"][role].items():
                tensors[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _check_length(self, planned: int) -> None:
        """Raises BadInput where a resumed training has done more than is asked for; warns where
        another length than the `planned` one changes what the iterations left are."""
        total, settings = self.recipe.training.iterations, self.recipe.optimizer
        if total < self.iteration:
            raise BadInput(
                f"training.iterations: {self.iteration} are done already; expected as many or more"
            )
        if total != planned and settings.schedule != "constant":
            before, now = (
                learning_rate(self.iteration, length, settings) for length in (planned, total)
            )
            warn(
                f"optimizer.schedule: {settings.schedule}: the learning rate was to fall to 0 over "
                f"{planned} iterations; from iteration {self.iteration} on it is that of {total}, "
                f"{now:.3g} instead of {before:.3g}, so the result differs from a run of {total} "
                "from the start"
            )
        if total != planned and self.recipe.preserve.damping:
            warn(f"preserve.damping: from here on applied at the quarters of {total} iterations")

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


def _place(unet: UNet2DConditionModel, training: Training, device: torch.device) -> None:
    """Put the base on its device, in its precision."""
    if training.base_precision == "nf4":
        quantise(unet, device, DTYPES[training.precision])
    else:
        unet.to(device, DTYPES[training.base_precision])
    if training.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()  # diffusers checkpoints in training mode only; SD 1.x has no dropout


def _uses(index: Sequence[int], times: int) -> list[int]:
    """[i] → [i·times, …, i·times + times − 1], for each i."""
    return [i * times + use for i in index for use in range(times)]
