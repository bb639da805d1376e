"""Three roles of one UNet: what they restore, what they leave alone."""

import pytest
import torch
from support.small import small_unet

from sdd_lora.recipe import Lora
from sdd_lora.training.objectives import LECO, SDD, ESDu, ESDx
from sdd_lora.training.roles import BASE, STUDENT, TEACHER, EmbeddingRoles, LoraRoles, WeightRoles

SDD_PAPER = SDD(guidance_scale=3.0, t_in_bin=False)
ESD_U = ESDu(guidance_scale=3.0, t_in_bin=False, eta=1.0)


@pytest.fixture
def roles():
    made = LoraRoles(small_unet(), Lora(rank=2, targets=["to_q", "to_k", "to_v", "to_out"]), seed=0)
    with torch.no_grad():
        for name, factor in made.parameters_of(STUDENT).items():
            if name.endswith("lora_B"):
                factor.normal_()
    return made


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 77, 16)


@pytest.fixture
def change():
    made = EmbeddingRoles(small_unet(), Lora(rank=2, alpha=6), seed=0)
    with torch.no_grad():
        made.parameters_of(STUDENT)["embeddings.lora_B"].normal_()
    return made


def estimate(unet, inputs):
    return unet(*inputs).sample


def test_all_64_matrices_are_adapted(roles):
    assert len(roles.layers) == 64


def test_esd_u_as_an_adapter_adapts_every_layer_whose_weight_it_trains():
    unet = small_unet()
    expected = {
        name.removesuffix(".weight")
        for name, weight in unet.named_parameters()
        if ESD_U.trains(name) and weight.ndim > 1
    }
    roles = LoraRoles(unet, Lora(rank=2, targets=["noxattn"]), seed=0)
    assert set(roles.layers) == expected and len(expected) > 100


def test_layers_outside_the_cross_attention_stand_beside_matrices_of_it():
    outside = LoraRoles(small_unet(), Lora(rank=2, targets=["noxattn"]), seed=0)
    inside = LoraRoles(small_unet(), Lora(rank=2, targets=["to_k", "to_out"]), seed=0)
    both = LoraRoles(small_unet(), Lora(rank=2, targets=["noxattn", "to_k", "to_out"]), seed=0)
    assert set(both.layers) == {*outside.layers, *inside.layers}


def test_leco_adapts_the_eight_matrices_of_each_blocks_attention():
    unet = small_unet()
    trained = [n for n, _ in unet.named_parameters() if LECO(3.0, False, 1.0).trains(n)]
    roles = LoraRoles(unet, Lora(rank=2, targets=["attention"]), seed=0)
    assert set(roles.layers) == {n.removesuffix(".weight") for n in trained if "bias" not in n}
    assert len(roles.layers) == 128


def test_the_three_roles_give_three_outputs_and_the_base_is_the_untouched_unet(roles, inputs):
    with torch.no_grad():
        for name, factor in roles.parameters_of(TEACHER).items():
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
    assert all(f.grad is not None and f.grad.any() for f in roles.parameters_of(STUDENT).values())
    with_gradient = {id(p) for p in roles.unet.parameters() if p.grad is not None}
    assert with_gradient == {id(f) for f in roles.parameters_of(STUDENT).values()}


def test_checkpointing_changes_no_gradient(inputs):
    gradients = []
    for checkpointing in (False, True):
        roles = LoraRoles(small_unet(), Lora(rank=2), seed=0)
        if checkpointing:
            roles.unet.enable_gradient_checkpointing()
            roles.unet.train()
        with roles.student() as unet:
            estimate(unet, inputs).pow(2).mean().backward()
        gradients.append(
            torch.cat([f.grad.flatten() for f in roles.parameters_of(STUDENT).values()])
        )
    assert gradients[0].any()
    assert torch.allclose(*gradients, atol=1e-7)


def test_removed_roles_leave_the_unet_as_it_was(roles, inputs):
    roles.remove()
    with torch.no_grad():
        assert torch.equal(estimate(roles.unet, inputs), estimate(small_unet(), inputs))
    assert roles.unet.state_dict().keys() == small_unet().state_dict().keys()


@pytest.fixture(params=[SDD_PAPER, ESD_U], ids=["sdd", "esd-u"])
def weights(request):
    """Roles by weights, the three of them different."""
    made = WeightRoles(small_unet(), request.param)
    with torch.no_grad():
        for role in (STUDENT, TEACHER):
            for value in made.parameters_of(role).values():
                value.add_(torch.randn(value.shape), alpha=0.1)
    return made


def test_which_weights_the_papers_train():
    names = [name for name, _ in small_unet().named_parameters()]
    cross = {name for name in names if SDD_PAPER.trains(name)}
    assert cross == {name for name in names if "attn2" in name} and len(cross) == 16 * 5
    assert cross == {name for name in names if ESDx(3.0, False, eta=1.0).trains(name)}
    outside = {name for name in names if ESD_U.trains(name)}
    assert not outside & cross
    assert {name.split(".")[0] for name in set(names) - outside - cross} == {
        "time_embedding",
        "conv_norm_out",
        "conv_out",
    }
    for part in ("conv_in.weight", "resnets.0.time_emb_proj.weight", "attn1.to_q.weight"):
        assert any(part in name for name in outside)


@torch.no_grad()
def test_roles_by_weights_give_three_outputs_over_one_unet(weights, inputs):
    with weights.student() as unet:
        student = estimate(unet, inputs)
    with weights.teacher() as unet:
        teacher = estimate(unet, inputs)
    with weights.base() as unet:
        base = estimate(unet, inputs)
    assert torch.equal(base, estimate(small_unet(), inputs))
    assert not torch.allclose(student, base, atol=1e-4)
    assert not torch.allclose(teacher, base, atol=1e-4)
    assert not torch.allclose(student, teacher, atol=1e-4)
    with pytest.raises(RuntimeError), weights.base(), weights.teacher():
        raise RuntimeError
    assert torch.equal(student, estimate(weights.unet, inputs))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_weights_are_the_students(weights, inputs, checkpointing):
    """Taking the base between forward and backward changes nothing."""
    gradients = []
    if checkpointing:
        weights.unet.enable_gradient_checkpointing()
        weights.unet.train()
    for between in (False, True):
        with weights.student() as unet:
            loss = estimate(unet, inputs).pow(2).mean()
            if between:
                with weights.base():
                    target = estimate(unet, inputs)
                    assert not target.requires_grad
            loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in weights.parameters]))
        assert {id(p) for p in unet.parameters() if p.grad is not None} == {
            id(p) for p in weights.parameters
        }
        for parameter in weights.parameters:
            parameter.grad = None
    assert gradients[0].any()
    assert torch.equal(*gradients)


def test_an_optimizer_moves_the_students_weights_alone(weights, inputs):
    before = {
        r: {n: v.clone() for n, v in weights.parameters_of(r).items()} for r in (BASE, TEACHER)
    }
    student = {name: value.clone() for name, value in weights.parameters_of(STUDENT).items()}
    with weights.student() as unet:
        estimate(unet, inputs).pow(2).mean().backward()
    torch.optim.SGD(weights.parameters, lr=1.0).step()
    assert any(not torch.equal(student[n], v) for n, v in weights.parameters_of(STUDENT).items())
    for role, values in before.items():
        assert all(torch.equal(values[n], v) for n, v in weights.parameters_of(role).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removed_weights_leave_the_unet_as_it_was(inputs, dtype):
    roles = WeightRoles(small_unet().to(dtype), SDD_PAPER)
    with torch.no_grad():
        for value in roles.parameters_of(STUDENT).values():
            assert value.dtype == torch.float32
            value.add_(1)
    roles.remove()
    for name, parameter in small_unet().to(dtype).named_parameters():
        found = roles.unet.get_parameter(name)
        assert found.dtype == dtype and torch.equal(found, parameter)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_without_an_average_the_teacher_is_the_student(inputs, kind):
    if kind == "lora":
        roles = LoraRoles(small_unet(), Lora(rank=2), seed=0, averaged=False)
    else:
        roles = WeightRoles(small_unet(), SDD_PAPER, averaged=False)
    with torch.no_grad():
        for value in roles.parameters_of(STUDENT).values():
            value.normal_()
        with roles.teacher() as unet:
            teacher = estimate(unet, inputs)
        with roles.student() as unet:
            assert torch.equal(teacher, estimate(unet, inputs))
        with roles.base() as unet:
            assert torch.equal(estimate(unet, inputs), estimate(small_unet(), inputs))
    assert len(
        {t.data_ptr() for r in (STUDENT, TEACHER) for t in roles.parameters_of(r).values()}
    ) == len(roles.parameters_of(STUDENT))


def test_a_change_of_embeddings_is_a_change_of_every_to_k_and_to_v(change, inputs):
    with change.student() as unet, torch.no_grad():
        changed = estimate(unet, inputs)
    with change.base() as unet:
        before = estimate(unet, inputs)
    with change.teacher() as unet:
        assert torch.equal(estimate(unet, inputs), before)  # its B is 0 yet
    down, up = change.parameters_of(STUDENT).values()
    change.remove()
    assert torch.equal(estimate(unet, inputs), before)
    with torch.no_grad():
        for name, module in unet.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                module.weight += module.weight @ (6 / 2 * up @ down)
        assert (estimate(unet, inputs) - changed).abs().max() < 1e-5
    assert not any("embeddings_of" in name for name, _ in unet.named_modules())


def test_only_the_students_change_of_embeddings_is_trained(change, inputs):
    with change.student() as unet:
        estimate(unet, inputs).square().mean().backward()
    assert all(factor.grad.abs().sum() > 0 for factor in change.parameters)
    trained = [name for name, p in change.unet.named_parameters() if p.requires_grad]
    assert trained == ["embeddings_of_student.lora_A", "embeddings_of_student.lora_B"]


@torch.no_grad()
def test_a_change_of_embeddings_is_made_where_a_pipeline_names_the_prompts(change, inputs):
    z_t, t, prompts = inputs
    named = change.unet(z_t, t, encoder_hidden_states=prompts).sample
    assert torch.equal(named, estimate(change.unet, inputs))
    with change.base() as unet:
        assert not torch.equal(named, estimate(unet, inputs))
