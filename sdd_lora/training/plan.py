"""The resources that a training will take: memory by part, UNet passes, arithmetic.

Nothing is allocated. The UNet is built of fake tensors (shapes without values) at its true size,
and one rollout's forward and one loss with its backward pass are run on it; what they would hold in
memory is counted operation by operation, with CUDA's autocast. A kernel's own workspace (a
convolution's) is not seen.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from sdd_lora.io.strict_yaml import Overrides
from sdd_lora.recipe import Recipe
from sdd_lora.sd.devices import DTYPES
from sdd_lora.training.memory import memory_savers
from sdd_lora.training.nf4 import NF4_BYTES, cast, linear_layers
from sdd_lora.training.objectives import Objective, make_objective, total_loss
from sdd_lora.training.optimizer import state_bytes
from sdd_lora.training.pictures import Noised, picture_loss
from sdd_lora.training.roles import STUDENT, TEACHER, Roles, make_roles

#: operations → their arithmetic; torch's own registry knows the other devices' attention kernels
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *rest, **named: sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *rest, **named: sdpa_backward_flop_count(
            grad.shape, q.shape, k.shape, v.shape
        )
    ),
}


class Account(TorchDispatchMode):
    """Counts, while it is active, floating-point operations (`flops`) and the bytes of the tensors
    made, from the operation that makes them until they are freed: `live` now, `peak` at most.

    torch's FlopCounterMode won't do for both: its hooks keep the tensors that checkpointing frees.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        arguments = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        known = {id(x.untyped_storage()) for x in arguments}
        made = func(*args, **kwargs)
        if count := _FLOPS.get(func.overloadpacket):
            self.flops += count(*args, **kwargs, out_val=made)
        for tensor in tree_iter(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in known:  # else a view, or changed in place
                    self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass(frozen=True)
class Footprint:
    """Bytes by part, at the moment of the iteration when they are most.

    `loss_activations` are the loss's graph and what its backward pass works with; a rollout, which
    needs no graph, works with `rollout_activations` at another time. Passes count samples through
    the UNet, in an iteration; `forward_flops` is the arithmetic of one sample's forward, and
    `cost_in_forwards` an iteration's in units of it.
    """

    base: int
    adapter: int
    average: int
    optimizer: int
    gradients: int
    loss_activations: int
    rollout_activations: int
    rollout_passes: float
    loss_passes: int
    forward_flops: int
    cost_in_forwards: float
    parameters: int
    trained: int

    @property
    def total(self) -> int:
        """Peak bytes of tensors; a device's context and libraries come on top."""
        held = self.base + self.adapter + self.average + self.optimizer
        return held + max(self.gradients + self.loss_activations, self.rollout_activations)

    @property
    def passes(self) -> float:
        """UNet passes of an iteration, for the rollout and the loss."""
        return self.rollout_passes + self.loss_passes


def footprint(recipe: Recipe, config: Mapping[str, Any]) -> Footprint:
    """The footprint of training `recipe` on a UNet of diffusers' `config`, on one device."""
    training, rollout = recipe.training, recipe.rollout
    packed = training.base_precision == "nf4"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(config)).eval()
        if packed:
            cast(unet, DTYPES[training.precision])
        else:
            unet.to(DTYPES[training.base_precision])
        if training.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()  # as the trainer does
        if training.precision != "fp32":
            norms_as_on_cuda(unet)
        saved, unpacked = _nf4(unet) if packed else (0, 0)
        base = _bytes(unet.parameters()) - saved
        parameters = sum(p.numel() for p in unet.parameters())
        objective = make_objective(recipe.objective)
        roles = make_roles(unet, recipe, objective)
    rehearsal = _Rehearsal(recipe, objective, roles)
    with FakeTensorMode():
        stage = _Stage(unet)
        with Account() as rollout_account:
            stage(rehearsal.roll_out)
        with Account() as loss_account:
            stage(rehearsal.loss_and_backward)
    gradients = _bytes(p.grad for p in stage.tensors.values() if p.grad is not None)
    student = roles.parameters_of(STUDENT)
    trained = sum(p.numel() for p in student.values())
    average = _bytes(roles.parameters_of(TEACHER).values()) if roles.averaged else 0
    adapter = _bytes(student.values())
    forward = rollout_account.flops // (objective.passes_per_step * rollout.batch)
    accumulation = training.gradient_accumulation
    rollout_passes = passes_of_a_point(recipe) * rollout.batch * accumulation
    return Footprint(
        base=base,
        adapter=adapter,
        average=average,
        optimizer=state_bytes(recipe.optimizer.kind, [p.shape for p in student.values()]),
        gradients=gradients,
        loss_activations=loss_account.peak - gradients + unpacked,
        rollout_activations=rollout_account.peak + unpacked,
        rollout_passes=rollout_passes,
        loss_passes=rehearsal.loss_passes * accumulation,
        forward_flops=forward,
        cost_in_forwards=rollout_passes + accumulation * loss_account.flops / forward,
        parameters=parameters,
        trained=trained,
    )


class _Stage:
    """Runs functions while the UNet's parameters, without a device, are fake ones on the CPU: only
    there do autocast and the attention kernels choose as they do in earnest."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._module = _Caller(unet)
        self.tensors = {
            f"unet.{name}": torch.empty(p.shape, dtype=p.dtype).requires_grad_(p.requires_grad)
            for name, p in unet.named_parameters()
        }

    def __call__(self, function: Callable[[], None]) -> None:
        torch.func.functional_call(self._module, self.tensors, (function,))


def norms_as_on_cuda(unet: UNet2DConditionModel) -> None:
    """Have norms compute, and answer, in fp32, as CUDA's autocast does and the CPU's doesn't: what
    follows them up to the next product is in fp32 too."""
    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = partial(_group_norm_in_fp32, module)  # type: ignore[method-assign]
        elif isinstance(module, torch.nn.LayerNorm):
            module.forward = partial(_layer_norm_in_fp32, module)  # type: ignore[method-assign]


def _group_norm_in_fp32(norm: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x.float(), norm.num_groups, norm.weight.float(), norm.bias.float())


def _layer_norm_in_fp32(norm: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float())


class _Caller(torch.nn.Module):
    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, function: Callable[[], None]) -> None:
        function()


class _Rehearsal:
    """One iteration's forwards and backward pass in the trainer's roles, precision and sizes."""

    def __init__(self, recipe: Recipe, objective: Objective, roles: Roles) -> None:
        self.recipe, self.objective, self.roles = recipe, objective, roles
        self.loss_passes = 0

    def roll_out(self) -> None:
        with self.roles.teacher():
            batch = self.objective.passes_per_step * self.recipe.rollout.batch
            self._forward(*self._inputs(batch))

    def loss_and_backward(self) -> None:
        recipe = self.recipe
        z, t, c_0 = self._inputs(recipe.rollout.batch)
        prompts = recipe.rollout.prompts_per_latent
        erased = min(prompts, self.objective.loss_prompt_count(recipe.concepts))
        c = c_0.repeat_interleave(erased, dim=0)
        held = recipe.preserve.any and recipe.pictures is None
        c_k = c_0.repeat_interleave(prompts, dim=0) if held else None
        with self.roles.student():
            loss = total_loss(
                self.objective,
                recipe.preserve,
                self._estimate,
                self._base_estimate,
                z,
                t,
                c_0,
                c,
                c_k,
            )
            if recipe.pictures is not None:
                batch = recipe.pictures.batch * recipe.rollout.batch
                loss = loss + recipe.pictures.weight * self._picture_loss(batch)
            loss.backward()

    def _picture_loss(self, batch: int) -> torch.Tensor:
        assert self.recipe.pictures is not None
        z, t, c = self._inputs(batch)
        c.requires_grad_(self.recipe.pictures.learnt > 0)
        noised, weight = Noised(z, t, c, z, z), self.recipe.preserve.weight

        def learn(loss: torch.Tensor) -> None:
            torch.autograd.grad(loss, [c], retain_graph=True)

        some = learn if c.requires_grad else None
        return picture_loss(self._estimate, self._base_estimate, noised, noised, weight, some)

    def _inputs(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self.roles.unet.config
        size = config.sample_size
        return (
            torch.empty(batch, config.in_channels, size, size),
            torch.empty(batch, dtype=torch.int64),
            torch.empty(batch, 77, config.cross_attention_dim),
        )

    def _estimate(self, z: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        self.loss_passes += len(z)
        return self._forward(z, t, c)

    def _base_estimate(self, z: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        with self.roles.base():
            return self._estimate(z, t, c)

    def _forward(self, z: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        dtype = DTYPES[self.recipe.training.precision]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return self.roles.unet(z, t, c).sample.float()


def passes_of_a_point(recipe: Recipe) -> float:
    """UNet passes of one trajectory for one training point, on average.

    Of N points spread evenly, the last one's number of steps is ((x + (N − 1)D) // N) + 1 for x
    uniform in 0 … D − 1 (see Rollout).
    """
    points, depths = recipe.rollout.timesteps_per_trajectory, recipe.rollout.steps - 1
    last_steps = [(x + (points - 1) * depths) // points + 1 for x in range(depths)]
    passes_per_step = make_objective(recipe.objective).passes_per_step
    return passes_per_step * sum(last_steps) / depths / points


def passes_of_drawings(recipe: Recipe) -> int:
    """UNet passes of what the base draws before the training (training/pictures.py)."""
    if recipe.pictures is None:
        return 0
    erased = len(recipe.concepts) * recipe.pictures.drawings
    kept = len(recipe.preserve.prompts) + (recipe.preserve.vocabulary or 0)
    drawings = erased + kept * recipe.pictures.kept_drawings
    return 2 * recipe.rollout.steps * drawings


def _nf4(unet: UNet2DConditionModel) -> tuple[int, int]:
    """(bytes that packing the linear layers saves, those of the largest one while unpacked)."""
    weights = [unet.get_parameter(f"{name}.weight") for name in linear_layers(unet)]
    packed = math.ceil(sum(w.numel() for w in weights) * NF4_BYTES)
    return _bytes(weights) - packed, max(_bytes([w]) for w in weights)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True)
class Saving:
    """A change of the recipe (dotted names → values), its costs in words, and the plan with it."""

    changes: Overrides
    costs: str
    plan: Footprint


def fit(recipe: Recipe, config: Mapping[str, Any], plan: Footprint, most: int) -> list[Saving]:
    """The fewest memory savers, cheapest first, that bring a training's total to `most` bytes;
    `plan` is its footprint as it is.

    An empty list where it fits as it is. Where nothing brings it that low, all that help: then the
    last one's total is still above `most`.
    """
    taken: list[Saving] = []
    for changes, costs in memory_savers(recipe):
        if plan.total <= most:
            break
        changed = _changed(recipe, changes)
        smaller = footprint(changed, config)
        if smaller.total < plan.total:
            more = smaller.cost_in_forwards / plan.cost_in_forwards - 1
            taken.append(Saving(changes, f"{costs}; {100 * more:+.1f} % arithmetic", smaller))
            recipe, plan = changed, smaller
    return taken


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with those fields, checked again."""
    fields = recipe.model_dump(mode="json")
    for name, value in changes.items():
        section, key = name.split(".")
        fields[section][key] = value
    return Recipe.model_validate(fields)
