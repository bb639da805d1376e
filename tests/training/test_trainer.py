"""An iteration: what is trained, on which prompts, at what cost."""

import pytest
import torch
from support.small import embeddings, small_unet
from support.trainers import WAYS, recipe, result, same, trainer

from sdd_lora.errors import SddLoraError
from sdd_lora.training.roles import STUDENT, TEACHER


def test_the_teacher_follows_the_student_and_the_base_stays():
    trained = trainer(recipe())
    before = {k: v.clone() for k, v in trained.roles.unet.state_dict().items()}
    trained.step()
    after = trained.roles.unet.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all("lora" in k for k in moved)
    student, teacher = trained.roles.parameters_of(STUDENT), trained.roles.parameters_of(TEACHER)
    assert any(not torch.equal(student[k], teacher[k]) for k in student)


@pytest.mark.parametrize(
    ("way", "kept", "passes"),
    [
        ("8-bit", 2, 6),
        ("8-bit", 0, 2),
        ("prompts", 2, 10),
        ("full", 2, 6),
        ("esd-x", 0, 3),
        ("esd-u", 2, 7),
    ],
)
def test_unet_passes_are_counted_as_made(way, kept, passes):
    trained = trainer(recipe(**WAYS[way]), kept=kept)
    counted = []
    trained.roles.unet.register_forward_pre_hook(
        lambda module, inputs: counted.append(len(inputs[0]))
    )
    trained.step()
    assert trained.training_passes == passes * 2
    assert trained.rollout.unet_passes + trained.training_passes == sum(counted)


def test_full_training_changes_its_weights_alone_and_gives_the_base_back():
    for way, part in (("full", ".attn2."), ("esd-u", "")):
        trained = trainer(recipe(**WAYS[way]))
        untouched = small_unet().state_dict()
        trained.step()
        moved = {
            k for k, v in trained.teacher_tensors().items() if not torch.equal(v, untouched[k])
        }
        assert moved and all(part in name for name in moved)
        trained.roles.remove()
        state = trained.roles.unet.state_dict()
        assert state.keys() == untouched.keys()
        assert all(torch.equal(state[name], untouched[name]) for name in untouched)


def test_esds_latents_are_drawn_by_the_student_and_its_target_is_the_bases():
    trained = trainer(recipe(**WAYS["esd-x"]), kept=0)
    roles = []
    trained.roles.unet.register_forward_pre_hook(
        lambda module, inputs: roles.append(trained.roles._active)
    )
    trained.step()
    assert roles[-3:] == ["base", "base", "student"] and set(roles[:-3]) == {"teacher"}
    student, teacher = trained.roles.parameters_of(STUDENT), trained.roles.parameters_of(TEACHER)
    assert all(student[name] is teacher[name] for name in student)


def test_esds_loss_is_at_the_concept_that_the_latents_were_drawn_for():
    rollout = {"steps": 7, "batch": 2, "points": 3}
    trained = trainer(recipe(**WAYS["esd-x"] | {"rollout": rollout}))
    for _ in range(4):
        samples = trained._sample_indices(0)
        batch = trained._roll_out(samples)
        drawn = trained.embeddings.concepts[[n % 3 for n in batch.trajectories]]
        assert torch.equal(trained._erased_prompts(batch), drawn)
        trained.iteration += 1


def test_each_latent_serves_several_concepts_and_kept_prompts(monkeypatch):
    trained = trainer(recipe(objective={"variant": "reference"}, **WAYS["prompts"]), kept=5)
    calls = []
    estimate = trained._estimate
    monkeypatch.setattr(
        trained, "_estimate", lambda z, t, c: calls.append((z, t, c)) or estimate(z, t, c)
    )
    trained.step()
    (z_empty, _, _), (z, t, c), _, (z_kept, _, c_kept), *held = calls  # ∅, concept, base, kept
    assert [len(z) for z, _, _ in held] == [2, 2]  # ∅ is kept too
    assert torch.equal(z_empty, z[::3])
    for latent in (0, 3):
        assert torch.equal(z[latent], z[latent + 1]) and torch.equal(z[latent], z[latent + 2])
        assert len(set(t[latent : latent + 3].tolist())) == 1
        concepts = {tuple(prompt.flatten().tolist()) for prompt in c[latent : latent + 3]}
        assert len(concepts) == 3
    assert not torch.equal(z[0], z[3]) and torch.equal(z, z_kept)
    assert len({tuple(prompt.flatten().tolist()) for prompt in c_kept}) > 1


def test_a_prompt_is_used_once_with_a_latent():
    """One concept three times would be the same pass three times."""
    settings = {"rollout": {"steps": 4, "batch": 2, "prompts": 3}}
    for objective in ({"variant": "paper"}, {"variant": "reference"}):
        trained = trainer(recipe(objective=objective, **settings), concepts=1, kept=0)
        trained.step()
        assert trained.training_passes == 2 * (1 + 1)


def test_kept_prompts_are_held_to_the_base_and_the_empty_one_with_them():
    """A kept prompt that is far from ∅ holds nothing of ∅ by itself."""
    drifts = []
    for weight in (0.0, 10.0):
        settings = recipe(
            training={"iterations": 30},
            preserve={"weight": weight},
            optimizer={"learning_rate": 1e-2},
        )
        trained = trainer(settings, kept=1)
        trained.run()
        z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        prompts = torch.cat([embeddings().empty, embeddings(kept=1).kept])
        inputs = (z, torch.tensor([500, 500]), prompts)
        with torch.no_grad():
            with trained.roles.base() as unet:
                base = unet(*inputs).sample
            with trained.roles.teacher() as unet:
                drift = (unet(*inputs).sample - base).pow(2).mean(dim=(1, 2, 3))
        drifts.append(drift.tolist())
    (empty_free, kept_free), (empty_held, kept_held) = drifts
    assert 0 < empty_held < 0.5 * empty_free
    assert 0 < kept_held < 0.7 * kept_free


def test_the_variants_differ():
    results = []
    for variant in ("paper", "reference"):
        trained = trainer(recipe(objective={"variant": variant}))
        trained.run()
        results.append(result(trained))
    assert not same(*results)


def test_a_loss_that_is_not_finite_stops_with_advice(monkeypatch):
    trained = trainer(recipe())
    monkeypatch.setattr(
        trained, "_estimate", lambda z, t, c: trained.roles.unet(z * float("nan"), t, c).sample
    )
    with pytest.raises(SddLoraError, match=r"iteration 0: the loss is nan.*learning_rate"):
        trained.step()


def test_accumulation_sees_each_trajectory_once():
    """Two parts of two trajectories are the gradient of one batch of four."""
    gradients = []
    for batch, parts in ((4, 1), (2, 2)):
        trained = trainer(
            recipe(
                rollout={"steps": 4, "batch": batch},
                training={"iterations": 1, "seed": 3, "gradient_accumulation": parts},
                optimizer={"kind": "adamw", "learning_rate": 1e-30, "max_grad_norm": 1e9},
            )
        )
        caught = []
        monkey = trained.optimizer.step
        trained.optimizer.step = lambda c=caught, t=trained, m=monkey: (
            c.extend(p.grad.clone() for p in t.parameters),
            m(),
        )
        trained.step()
        gradients.append(torch.cat([g.flatten() for g in caught]))
    assert gradients[0].any()
    assert torch.allclose(gradients[0], gradients[1], atol=1e-7, rtol=1e-4)
