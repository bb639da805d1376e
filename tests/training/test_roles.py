"""Three roles of one UNet: what they restore, what they leave alone."""

import pytest
import torch

from sdd_lora.recipe import Lora
from sdd_lora.training.roles import STUDENT, TEACHER, Roles
from tests.small import small_unet


@pytest.fixture
def roles():
    made = Roles(small_unet(), Lora(rank=2, targets=["to_q", "to_k", "to_v", "to_out"]), seed=0)
    with torch.no_grad():
        for name, factor in made.factors(STUDENT).items():
            if name.endswith("lora_B"):
                factor.normal_()
    return made


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 77, 16)


def estimate(unet, inputs):
    return unet(*inputs).sample


def test_all_64_matrices_are_adapted(roles):
    assert len(roles.layers) == 64


def test_the_three_roles_give_three_outputs_and_the_base_is_the_untouched_unet(roles, inputs):
    with torch.no_grad():
        for name, factor in roles.factors(TEACHER).items():
            if name.endswith("lora_B"):
                factor.normal_()
        with roles.student() as unet:
            student = estimate(unet, inputs)
        with roles.teacher() as unet:
            teacher = estimate(unet, inputs)
        with roles.base() as unet:
            base = estimate(unet, inputs)
        untouched = estimate(small_unet(), inputs)
    assert not torch.allclose(student, base, atol=1e-4)
    assert not torch.allclose(teacher, base, atol=1e-4)
    assert not torch.allclose(student, teacher, atol=1e-4)
    assert torch.equal(base, untouched)


def test_a_role_restores_what_was_there_when_the_block_fails(roles, inputs):
    with torch.no_grad(), roles.student() as unet:
        before = estimate(unet, inputs)
        with pytest.raises(RuntimeError), roles.base(), roles.teacher():
            raise RuntimeError
        assert torch.equal(before, estimate(unet, inputs))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_student_alone(roles, inputs, checkpointing):
    if checkpointing:
        roles.unet.enable_gradient_checkpointing()
        roles.unet.train()
    with roles.teacher(), torch.no_grad():
        estimate(roles.unet, inputs)
    with roles.student() as unet:
        with torch.no_grad(), roles.base():
            target = estimate(unet, inputs)
        (estimate(unet, inputs) - target).pow(2).mean().backward()
    assert all(f.grad is not None and f.grad.any() for f in roles.factors(STUDENT).values())
    with_gradient = {id(p) for p in roles.unet.parameters() if p.grad is not None}
    assert with_gradient == {id(f) for f in roles.factors(STUDENT).values()}


def test_checkpointing_changes_no_gradient(inputs):
    gradients = []
    for checkpointing in (False, True):
        roles = Roles(small_unet(), Lora(rank=2), seed=0)
        if checkpointing:
            roles.unet.enable_gradient_checkpointing()
            roles.unet.train()
        with roles.student() as unet:
            estimate(unet, inputs).pow(2).mean().backward()
        gradients.append(torch.cat([f.grad.flatten() for f in roles.factors(STUDENT).values()]))
    assert gradients[0].any()
    assert torch.allclose(*gradients, atol=1e-7)


def test_removed_roles_leave_the_unet_as_it_was(roles, inputs):
    roles.remove()
    with torch.no_grad():
        assert torch.equal(estimate(roles.unet, inputs), estimate(small_unet(), inputs))
    assert roles.unet.state_dict().keys() == small_unet().state_dict().keys()
