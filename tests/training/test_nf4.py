"""The base in 4 bits, on the CPU."""

import sys

import pytest
import torch
from support.small import ddim, embeddings, small_unet

from sdd_lora.errors import BadInput
from sdd_lora.recipe import Recipe
from sdd_lora.training.nf4 import linear_layers, quantise
from sdd_lora.training.plan import footprint
from sdd_lora.training.trainer import Trainer

RECIPE = "name: x\nmodel: demo\nconcepts: [a, b, c]\noptimizer: {kind: adamw}\n"
NF4 = {"training.base_precision": "nf4", "rollout.steps": 3, "training.iterations": 3}


def inputs():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.tensor([500]),
        torch.randn(1, 77, 16, generator=generator),
    )


def trainer_of(**changes):
    recipe = Recipe.parse(RECIPE, overrides=NF4 | changes)
    return Trainer(recipe, small_unet(), ddim(), embeddings())


def test_the_packed_base_draws_nearly_the_same():
    plain, packed = small_unet(), small_unet()
    quantise(packed, torch.device("cpu"), torch.float32)
    assert linear_layers(packed) == []
    with torch.no_grad():
        e, e_packed = plain(*inputs()).sample, packed(*inputs()).sample
    assert 1e-4 < float((e - e_packed).norm() / e.norm()) < 0.3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_moves_the_adapter_and_not_the_base(checkpointing):
    trainer = trainer_of(**{"training.gradient_checkpointing": checkpointing})
    with trainer.roles.base() as unet:
        before = unet(*inputs()).sample
    trainer.run()
    with trainer.roles.base() as unet:
        assert torch.equal(unet(*inputs()).sample, before)
    with trainer.roles.teacher() as unet:
        assert not torch.equal(unet(*inputs()).sample, before)
    assert all(x.dtype == torch.float32 for x in trainer.teacher_tensors().values())


@pytest.mark.parametrize("kind", ["sdd", "esd-x"])
def test_it_computes_in_half_precision_too(kind):
    trainer = trainer_of(**{"training.precision": "bf16", "objective.kind": kind})
    assert 0 < trainer.step() < 10


def test_checkpointing_changes_no_loss():
    losses = [trainer_of(**{"training.gradient_checkpointing": c}).step() for c in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_plan_knows_the_packed_size():
    recipe = Recipe.parse(RECIPE, overrides=NF4)
    unet = trainer_of().roles.unet
    held = 0
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            continue
        held += parameter.numel() * parameter.element_size()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            held += state.absmax.numel() * state.absmax.element_size()
    assert footprint(recipe, small_unet().config).base == pytest.approx(held, rel=0.02)


def test_whole_weights_are_not_trained_in_4_bits():
    with pytest.raises(BadInput, match="4 bits"):
        Recipe.parse(RECIPE, overrides={"parameters": "full", "training.base_precision": "nf4"})


def test_without_bitsandbytes_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(BadInput, match="needs bitsandbytes"):
        trainer_of()
