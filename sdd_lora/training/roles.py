"""Base, student and teacher are three roles of ONE UNet.

The student is being trained, the teacher is its average, the base is the UNet as it was. A role is
a state of LoRA adapters (`LoraRoles`), a change of the prompts' embeddings (`EmbeddingRoles`) or a
set of values of the trained weights (`WeightRoles`, the papers' own way). It is taken in a `with`
block that restores the role before.
"""

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from sdd_lora.errors import BadInput
from sdd_lora.recipe import ATTENTION, NOXATTN, Lora, Recipe
from sdd_lora.sd1 import EMBEDDINGS, is_attention
from sdd_lora.training.objectives import Objective, is_noxattn

STUDENT, TEACHER, BASE = "student", "teacher", "base"


class Roles(ABC):
    """Switches a UNet between its three roles; outside all blocks it is the student.

    Where the teacher isn't averaged it *is* the student. Weights that are not trained are frozen.
    """

    def __init__(self, unet: UNet2DConditionModel, averaged: bool) -> None:
        self.unet, self.averaged = unet, averaged
        self._active = ""
        unet.requires_grad_(False)

    @property
    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """The student's parameters, for an optimizer."""

    @abstractmethod
    def parameters_of(self, role: str) -> Mapping[str, torch.Tensor]:
        """The trained tensors of STUDENT or TEACHER by name, fp32; to be written in place."""

    @abstractmethod
    def remove(self) -> None:
        """Make the UNet as it was, for the next recipe."""

    @abstractmethod
    def _switch(self, role: str) -> None: ...

    @property
    def distinct(self) -> tuple[str, ...]:
        """The roles that have trained tensors of their own."""
        return (STUDENT, TEACHER) if self.averaged else (STUDENT,)

    @contextmanager
    def student(self) -> Iterator[UNet2DConditionModel]:
        """The UNet in training. The backward pass belongs inside this block: with gradient
        checkpointing, leaving it first would recompute under another role."""
        with self._role(STUDENT):
            yield self.unet

    @contextmanager
    def teacher(self) -> Iterator[UNet2DConditionModel]:
        """The UNet with the average of the trained tensors, without gradients."""
        with self._role(TEACHER), torch.no_grad():
            yield self.unet

    @contextmanager
    def base(self) -> Iterator[UNet2DConditionModel]:
        """The UNet as it was, without gradients."""
        with self._role(BASE), torch.no_grad():
            yield self.unet

    @contextmanager
    def _role(self, role: str) -> Iterator[None]:
        before = self._active
        self._activate(role)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, role: str) -> None:
        if role != self._active:
            self._switch(STUDENT if role == TEACHER and not self.averaged else role)
            self._active = role


class FactorRoles(Roles):
    """Roles by low-rank factors, fp32: what they start as, an average starts as."""

    @abstractmethod
    def parameters_of(self, role: str) -> dict[str, nn.Parameter]: ...

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.parameters_of(STUDENT).values())

    @torch.no_grad()
    def copy_student_to_teacher(self) -> None:
        """Start the average from the student's factors."""
        student = self.parameters_of(STUDENT)
        for name, factor in self.parameters_of(TEACHER).items():
            factor.copy_(student[name])


class LoraRoles(FactorRoles):
    """Roles by adapter: the student's factors, their average, no adapter.

    The factors are fp32 whatever the UNet's dtype; only the student's ever require gradients.
    """

    def __init__(
        self, unet: UNet2DConditionModel, lora: Lora, seed: int, averaged: bool = True
    ) -> None:
        super().__init__(unet, averaged)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=_target_pattern(unet, lora.targets),
            init_lora_weights=True,  # up = 0: the student starts as the base
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks whether a second adapter is meant: it is
            torch.manual_seed(seed)
            for role in self.distinct:
                unet.add_adapter(config, adapter_name=role)
        self.layers: dict[str, LoraLayer] = {
            name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)
        }
        for role in self.distinct:
            for factor in self.parameters_of(role).values():
                factor.data = factor.data.float()
        self.copy_student_to_teacher()
        self._activate(STUDENT)

    def parameters_of(self, role: str) -> dict[str, nn.Parameter]:
        """A role's LoRA factors by name, "module.lora_A" (r, in) and "module.lora_B" (out, r); of a
        convolution (r, in, h, w) and (out, r, 1, 1)."""
        adapter = role if role in self.distinct else STUDENT
        return {
            f"{name}.{side}": getattr(layer, side)[adapter].weight
            for name, layer in self.layers.items()
            for side in ("lora_A", "lora_B")
        }

    def remove(self) -> None:
        self.unet.unload_lora()

    def _switch(self, role: str) -> None:
        for layer in self.layers.values():
            # skip layers already in this state: peft's setters touch every parameter
            if layer.disable_adapters != (role == BASE):
                layer.enable_adapters(role != BASE)
            if role != BASE and layer.active_adapters != [role]:
                layer.set_adapter(role)
            if role == TEACHER:  # peft makes an active adapter trainable: only the student may be
                for factors in (layer.lora_A, layer.lora_B):
                    factors[TEACHER].weight.requires_grad_(False)


class EmbeddingChange(nn.Module):
    """A change of prompts' embeddings, e ↦ (I + scale · B D) e: D (r, d), B (d, r), fp32."""

    def __init__(self, down: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(down.clone())
        self.lora_B = nn.Parameter(torch.zeros_like(down.T))
        self.scale = scale

    def forward(self, prompts: torch.Tensor) -> torch.Tensor:
        change = nn.functional.linear(prompts.to(self.lora_A.dtype), self.lora_A)
        return prompts + (self.scale * nn.functional.linear(change, self.lora_B)).to(prompts.dtype)


class EmbeddingRoles(FactorRoles):
    """Roles by the prompts that the UNet is given: changed by the student's B and D, by their
    average, or as they are.

    Cross-attention sees a prompt through W e alone, for W among to_k and to_v: one change of e
    stands for ΔW = scale · W B D of all of them.
    """

    def __init__(
        self, unet: UNet2DConditionModel, lora: Lora, seed: int, averaged: bool = True
    ) -> None:
        super().__init__(unet, averaged)
        width: int = unet.config.cross_attention_dim
        noise = torch.rand(lora.rank, width, generator=torch.Generator().manual_seed(seed))
        down = ((2 * noise - 1) / width**0.5).to(unet.device)  # as peft's random start
        for role in self.distinct:  # parts of the UNet, so that they go where it goes
            unet.add_module(_module_of(role), EmbeddingChange(down, lora.alpha / lora.rank))
        for change in self.parameters_of(TEACHER).values():
            change.requires_grad_(not averaged)
        self._hook = unet.register_forward_pre_hook(self._change, with_kwargs=True)
        self._activate(STUDENT)

    def parameters_of(self, role: str) -> dict[str, nn.Parameter]:
        """A role's factors: D "embeddings.lora_A" (r, d) and B "embeddings.lora_B" (d, r)."""
        change = self._change_of(role)
        return {f"{EMBEDDINGS}.{side}": getattr(change, side) for side in ("lora_A", "lora_B")}

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return float(self._change_of(STUDENT).scale)

    def remove(self) -> None:
        self._hook.remove()
        for role in self.distinct:
            delattr(self.unet, _module_of(role))

    def _switch(self, role: str) -> None:
        """Nothing: `_change` asks which role is active."""

    def _change_of(self, role: str) -> EmbeddingChange:
        change: EmbeddingChange = getattr(
            self.unet, _module_of(role if role in self.distinct else STUDENT)
        )
        return change

    def _change(
        self, unet: nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, Any]
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]] | None:
        if self._active == BASE:
            return None
        z_t, t, *others = inputs  # pipelines name the prompts, the trainer doesn't
        prompts = others[0] if others else named["encoder_hidden_states"]
        unnamed = {key: value for key, value in named.items() if key != "encoder_hidden_states"}
        return (z_t, t, self._change_of(self._active)(prompts)), unnamed


def _module_of(role: str) -> str:
    """The name that a role's `EmbeddingChange` has in the UNet."""
    return f"{EMBEDDINGS}_of_{role}"


class WeightRoles(Roles):
    """Roles by weights, the papers' own way: each role has values of the trained parameters, and
    taking it points the UNet's parameters at them. All other weights are shared.

    `parameters_of` names weights as the UNet does. Memory: one fp32 copy of the trained weights
    beside the base's own, two where there is an average.
    """

    def __init__(
        self, unet: UNet2DConditionModel, objective: Objective, averaged: bool = True
    ) -> None:
        super().__init__(unet, averaged)
        self._parameters = {
            name: parameter for name, parameter in unet.named_parameters() if objective.trains(name)
        }
        if not self._parameters:
            raise BadInput("the UNet has none of the weights that this objective trains")
        self._dtypes = {name: parameter.dtype for name, parameter in self._parameters.items()}
        base = {name: parameter.data.float() for name, parameter in self._parameters.items()}
        student = {name: value.clone() for name, value in base.items()}
        teacher = {n: v.clone() for n, v in student.items()} if averaged else student
        self._values = {BASE: base, STUDENT: student, TEACHER: teacher}
        self._activate(STUDENT)
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._parameters.values())

    def parameters_of(self, role: str) -> dict[str, torch.Tensor]:
        return self._values[role]

    def remove(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = self._values[BASE][name].to(self._dtypes[name])

    def _switch(self, role: str) -> None:
        for name, value in self._values[role].items():
            self._parameters[name].data = value


def make_roles(unet: UNet2DConditionModel, recipe: Recipe, objective: Objective) -> Roles:
    """The roles that a recipe's `parameters` ask for."""
    averaged = objective.averaged and recipe.ema.decay > 0
    if recipe.parameters == "full":
        return WeightRoles(unet, objective, averaged)
    if recipe.parameters == "embeddings":
        return EmbeddingRoles(unet, recipe.lora, recipe.training.seed, averaged)
    return LoraRoles(unet, recipe.lora, recipe.training.seed, averaged)


def _target_pattern(unet: UNet2DConditionModel, targets: Sequence[str]) -> str:
    """A pattern of the modules that `lora.targets` names. Raises BadInput where there is none."""
    wholes = {NOXATTN: is_noxattn, ATTENTION: is_attention}
    leaves = tuple(f".attn2.{t}" for t in targets if t not in wholes)
    groups = [wholes[t] for t in targets if t in wholes]
    names = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and (name.removesuffix(".0").endswith(leaves) or any(member(name) for member in groups))
    ]
    if not names:
        raise BadInput(f"the UNet has no layers to adapt: no {', '.join(targets)}")
    return "|".join(map(re.escape, names))
