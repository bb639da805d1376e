"""Base, student and teacher are three roles of ONE UNet.

The student is what is being trained, the teacher its average, the base the UNet as it was. What
tells them apart is a LoRA adapter's state (`LoraRoles`) or the trained weights themselves
(`WeightRoles`, the papers' own way). A role is taken in a `with` block that always restores what
was there.
"""

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from sdd_lora.errors import BadInput
from sdd_lora.recipe import NOXATTN, Lora, Objective, Recipe
from sdd_lora.training.closed_form import ClosedForm

STUDENT, TEACHER, BASE = "student", "teacher", "base"
#: names of the factors that prompts' embeddings go into
SEES_PROMPTS = (".to_k.lora_A", ".to_v.lora_A")


class Roles(ABC):
    """Switches a UNet between its three roles; outside all blocks it is the student.

    Where the teacher isn't averaged it *is* the student. What is not trained is frozen.
    """

    def __init__(self, unet: UNet2DConditionModel, averaged: bool) -> None:
        self.unet, self.averaged = unet, averaged
        self._current = ""
        unet.requires_grad_(False)

    @property
    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer of the student is given."""

    @abstractmethod
    def trained(self, role: str) -> Mapping[str, torch.Tensor]:
        """The student's or the teacher's trained tensors by name, fp32; to be written in place."""

    @abstractmethod
    def remove(self) -> None:
        """Make the UNet what it was, for the next recipe."""

    @abstractmethod
    def _switch(self, role: str) -> None: ...

    @contextmanager
    def student(self) -> Iterator[UNet2DConditionModel]:
        """The UNet in training. The backward pass belongs inside this block: with gradient
        checkpointing, leaving it first would recompute under another role."""
        with self._role(STUDENT):
            yield self.unet

    @contextmanager
    def teacher(self) -> Iterator[UNet2DConditionModel]:
        """The UNet with the average of what is trained, for use without gradients."""
        with self._role(TEACHER), torch.no_grad():
            yield self.unet

    @contextmanager
    def base(self) -> Iterator[UNet2DConditionModel]:
        """The UNet as it was, for use without gradients."""
        with self._role(BASE), torch.no_grad():
            yield self.unet

    @contextmanager
    def _role(self, role: str) -> Iterator[None]:
        before = self._current
        self._take(role)
        try:
            yield
        finally:
            self._take(before)

    def _take(self, role: str) -> None:
        if role != self._current:
            self._switch(STUDENT if role == TEACHER and not self.averaged else role)
            self._current = role


class LoraRoles(Roles):
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
        self._adapters = [STUDENT, TEACHER] if averaged else [STUDENT]
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft asks whether a second adapter is meant: it is
            torch.manual_seed(seed)
            for adapter in self._adapters:
                unet.add_adapter(config, adapter_name=adapter)
        self.layers: dict[str, LoraLayer] = {
            name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)
        }
        for adapter in self._adapters:
            for factor in self.trained(adapter).values():
                factor.data = factor.data.float()
        with torch.no_grad():
            student = self.trained(STUDENT)
            for name, factor in self.trained(TEACHER).items():
                factor.copy_(student[name])
        self._take(STUDENT)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.trained(STUDENT).values())

    @torch.no_grad()
    def start_along(self, directions: torch.Tensor) -> None:
        """Give the down factors of to_k and to_v the rows `directions` (rank, d), in every role."""
        for adapter in self._adapters:
            for name, factor in self.trained(adapter).items():
                if name.endswith(SEES_PROMPTS):
                    factor.copy_(directions)

    @torch.no_grad()
    def start_at(self, closed_form: ClosedForm) -> None:
        """Give to_k and to_v their factors in closed form, in every role but the base."""
        for name, layer in self.layers.items():
            if not f"{name}.lora_A".endswith(SEES_PROMPTS):
                continue
            base = layer.get_base_layer()
            whole = torch.eye(base.in_features, dtype=self.unet.dtype, device=self.unet.device)
            weight = base(whole).T  # packed in 4 bits or not
            for adapter in self._adapters:
                down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                new_down, new_up = closed_form.factors(weight, len(down))
                down.copy_(new_down)
                up.copy_(new_up / layer.scaling[adapter])

    def trained(self, role: str) -> dict[str, nn.Parameter]:
        """A role's LoRA factors by name, "module.lora_A" [r, in] and "module.lora_B" [out, r]; of a
        convolution [r, in, h, w] and [out, r, 1, 1]."""
        adapter = role if role in self._adapters else STUDENT
        return {
            f"{name}.{side}": getattr(layer, side)[adapter].weight
            for name, layer in self.layers.items()
            for side in ("lora_A", "lora_B")
        }

    def remove(self) -> None:
        self.unet.unload_lora()

    def _switch(self, role: str) -> None:
        for layer in self.layers.values():  # what is so already, peft would set all over again
            if layer.disable_adapters != (role == BASE):
                layer.enable_adapters(role != BASE)
            if role != BASE and layer.active_adapters != [role]:
                layer.set_adapter(role)
            if role == TEACHER:  # peft makes what it activates trainable: only the student may be
                for factors in (layer.lora_A, layer.lora_B):
                    factors[TEACHER].weight.requires_grad_(False)


class WeightRoles(Roles):
    """Roles by weights, the papers' own way: each role has values of the trained parameters, and
    taking it points the UNet's parameters at them. All other weights are shared.

    `trained` names weights as the UNet does. Memory: one fp32 copy of what is trained beside the
    base's own values, two where there is an average.
    """

    def __init__(
        self, unet: UNet2DConditionModel, objective: Objective, averaged: bool = True
    ) -> None:
        super().__init__(unet, averaged)
        self._parameters = {
            name: parameter
            for name, parameter in unet.named_parameters()
            if is_trained(name, objective)
        }
        if not self._parameters:
            raise BadInput(f"the UNet has none of the weights that {objective.kind} trains")
        self._dtypes = {name: parameter.dtype for name, parameter in self._parameters.items()}
        base = {name: parameter.data.float() for name, parameter in self._parameters.items()}
        student = {name: value.clone() for name, value in base.items()}
        teacher = {n: v.clone() for n, v in student.items()} if averaged else student
        self._values = {BASE: base, STUDENT: student, TEACHER: teacher}
        self._take(STUDENT)
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._parameters.values())

    def trained(self, role: str) -> dict[str, torch.Tensor]:
        return self._values[role]

    def remove(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = self._values[BASE][name].to(self._dtypes[name])

    def _switch(self, role: str) -> None:
        for name, value in self._values[role].items():
            self._parameters[name].data = value


def make_roles(unet: UNet2DConditionModel, recipe: Recipe) -> Roles:
    """The roles that a recipe's `parameters` ask for."""
    averaged = recipe.ema.decay > 0
    if recipe.parameters == "full":
        return WeightRoles(unet, recipe.objective, averaged)
    return LoraRoles(unet, recipe.lora, recipe.training.seed, averaged)


def is_trained(name: str, objective: Objective) -> bool:
    """Is this weight of the UNet (diffusers' name) among those that an objective trains in full?

    SDD and ESD-x: the cross-attention, every name with `attn2`. ESD-u, `noxattn` in its authors'
    code: all that is neither cross-attention nor the time embedding nor the output layers.
    """
    return _is_noxattn(name) if objective.kind == "esd-u" else ".attn2." in name


def _is_noxattn(name: str) -> bool:
    return ".attn2." not in name and not name.startswith(_LEFT_BY_ESD_U)


_LEFT_BY_ESD_U = ("time_embedding.", "conv_norm_out.", "conv_out.")


def _target_pattern(unet: UNet2DConditionModel, targets: Sequence[str]) -> str:
    """A pattern of the modules that `lora.targets` names. Raises BadInput where there is none."""
    leaves = tuple(".attn2." + ("to_out.0" if t == "to_out" else t) for t in targets)
    names = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and (_is_noxattn(f"{name}.weight") if NOXATTN in targets else name.endswith(leaves))
    ]
    if not names:
        raise BadInput(f"the UNet has no layers to adapt: no {', '.join(targets)}")
    return "|".join(map(re.escape, names))
