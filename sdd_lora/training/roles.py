"""Base, student and teacher are three roles of ONE UNet: adapter states of it.

The student is the LoRA being trained, the teacher holds the average of its factors, the base is the
UNet with its adapters off. A role is taken in a `with` block that always restores what was there.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from sdd_lora.errors import BadInput
from sdd_lora.recipe import Lora

STUDENT, TEACHER = "student", "teacher"


class Roles:
    """Adds student and teacher adapters to a UNet and switches between the three roles.

    The UNet's own weights are frozen; the adapters' factors are fp32 whatever the UNet's dtype.
    Only the student's factors ever require gradients.
    """

    def __init__(self, unet: UNet2DConditionModel, lora: Lora, seed: int) -> None:
        self.unet = unet
        unet.requires_grad_(False)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=_target_pattern(lora.targets),
            init_lora_weights=True,  # up = 0: the student starts as the base
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            unet.add_adapter(config, adapter_name=STUDENT)
            with warnings.catch_warnings():  # peft asks whether a second adapter is meant: it is
                warnings.simplefilter("ignore")
                unet.add_adapter(config, adapter_name=TEACHER)
        self.layers: dict[str, LoraLayer] = {
            name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)
        }
        if not self.layers:
            raise BadInput("the UNet has no cross-attention (attn2) layers to adapt")
        for role in (STUDENT, TEACHER):
            for factor in self.factors(role).values():
                factor.data = factor.data.float()
        with torch.no_grad():
            student = self.factors(STUDENT)
            for name, factor in self.factors(TEACHER).items():
                factor.copy_(student[name])
        self._switch(STUDENT, enabled=True)

    def factors(self, role: str) -> dict[str, nn.Parameter]:
        """A role's LoRA factors by name, "module.lora_A" [r, in] and "module.lora_B" [out, r]."""
        return {
            f"{name}.{side}": getattr(layer, side)[role].weight
            for name, layer in self.layers.items()
            for side in ("lora_A", "lora_B")
        }

    @contextmanager
    def student(self) -> Iterator[UNet2DConditionModel]:
        """The UNet with the adapter in training. The backward pass belongs inside this block:
        with gradient checkpointing, leaving it first would recompute under another role."""
        with self._role(STUDENT, enabled=True):
            yield self.unet

    @contextmanager
    def teacher(self) -> Iterator[UNet2DConditionModel]:
        """The UNet with the averaged adapter."""
        with self._role(TEACHER, enabled=True):
            yield self.unet

    @contextmanager
    def base(self) -> Iterator[UNet2DConditionModel]:
        """The UNet as it was, its adapters off."""
        with self._role(STUDENT, enabled=False):
            yield self.unet

    def remove(self) -> None:
        """Take both adapters off: the UNet is as it was, for the next recipe."""
        self.unet.unload_lora()

    @contextmanager
    def _role(self, adapter: str, enabled: bool) -> Iterator[None]:
        before = self._current
        self._switch(adapter, enabled)
        try:
            yield
        finally:
            self._switch(*before)

    def _switch(self, adapter: str, enabled: bool) -> None:
        for layer in self.layers.values():
            layer.enable_adapters(enabled)
            layer.set_adapter(adapter)
        # peft makes the adapter it activates trainable: only the student may be
        for factor in self.factors(STUDENT).values():
            factor.requires_grad_(True)
        for factor in self.factors(TEACHER).values():
            factor.requires_grad_(False)
        self._current = (adapter, enabled)


def _target_pattern(targets: Sequence[str]) -> str:
    names = "|".join(re.escape("to_out.0" if t == "to_out" else t) for t in targets)
    return rf".*attn2\.({names})"
