"""The loop: resuming bit for bit, what is trained, what a failure says."""

import mmap
import os
import signal
from itertools import pairwise

import pytest
import torch
from accelerate.utils import AutocastKwargs
from support.small import ddim, embeddings, small_unet

from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.recipe import Optimizer, Recipe
from sdd_lora.training import trainer as trainer_module
from sdd_lora.training.roles import STUDENT, TEACHER
from sdd_lora.training.trainer import (
    Trainer,
    learning_rate_factor,
    make_optimizer,
    memory_advice,
)


def recipe(**changes):
    fields = {
        "name": "test",
        "model": "none",
        "concepts": ["a", "b", "c"],
        "lora": {"rank": 2},
        "ema": {"decay": 0.9, "warmup": True},
        "rollout": {"steps": 4, "batch": 2},
        "training": {"iterations": 6, "seed": 3},
    }
    return Recipe.model_validate(fields | changes)


def trainer(settings, path=None, **prompts):
    return Trainer(settings, small_unet(), ddim(), embeddings(**prompts), path)


def result(trained):
    return {name: tensor.clone() for name, tensor in trained.teacher_tensors().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


ESD = {"ema": {"decay": 0.0}}
FULL = {"parameters": "full", "lora": {}}
WAYS = {
    "8-bit": {},
    "adamw": {"optimizer": {"kind": "adamw"}},
    "points": {"rollout": {"steps": 7, "batch": 2, "points": 3}},
    "accumulation": {
        "rollout": {"steps": 7, "batch": 2, "points": 3},
        "training": {"iterations": 6, "gradient_accumulation": 2},
    },
    "prompts": {"rollout": {"steps": 4, "batch": 2, "prompts": 3}},
    "checkpointing": {"training": {"iterations": 6, "gradient_checkpointing": True}},
    "bf16": {"training": {"iterations": 6, "precision": "bf16", "base_precision": "bf16"}},
    "nf4": {"training": {"iterations": 6, "base_precision": "nf4"}},
    "full": FULL | {"optimizer": {"learning_rate": 1e-4}},
    "esd-x": ESD | {"objective": {"kind": "esd-x", "eta": 3.0}},
    "esd-u": ESD | FULL | {"objective": {"kind": "esd-u", "eta": 1.0}},
    "esd-u-lora": ESD
    | {
        "objective": {"kind": "esd-u", "eta": 1.0},
        "lora": {"targets": ["noxattn"]},
        "training": {"iterations": 6, "base_precision": "nf4", "gradient_checkpointing": True},
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, way):
    settings = recipe(**WAYS[way])
    whole = trainer(settings)
    whole.run()
    first = trainer(settings, tmp_path / "state" / "state.pt")
    for _ in range(3):
        first.step()
    first.save_state()
    first.step()  # lost by the kill
    second = trainer(settings, tmp_path / "state" / "state.pt")
    second.resume()
    assert second.iteration == 3
    second.run()
    assert same(result(whole), result(second))
    start = trainer(settings)
    assert not same(result(whole), result(start))
    assert whole._total_passes() == second._total_passes() > 0


def test_ctrl_c_leaves_a_state_and_says_so(tmp_path, monkeypatch):
    settings = recipe()
    interrupted = trainer(settings, tmp_path / "state" / "state.pt")
    step = interrupted.step

    def stop_at_two():
        if interrupted.iteration == 2:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(interrupted, "step", stop_at_two)
    with pytest.raises(KeyboardInterrupt, match="iteration 2 of 6; --resume"):
        interrupted.run()
    resumed = trainer(settings, tmp_path / "state" / "state.pt")
    resumed.resume()
    assert resumed.iteration == 2


def test_ctrl_c_within_a_step_waits_for_its_end(tmp_path, monkeypatch):
    settings = recipe()
    interrupted = trainer(settings, tmp_path / "state" / "state.pt")
    update = trainer_module.update_average

    def interrupt(*arguments):
        if interrupted.iteration == 2:
            os.kill(os.getpid(), signal.SIGINT)
        update(*arguments)

    monkeypatch.setattr(trainer_module, "update_average", interrupt)
    with pytest.raises(KeyboardInterrupt, match="iteration 3 of 6"):
        interrupted.run()
    monkeypatch.undo()
    resumed, whole = trainer(settings, tmp_path / "state" / "state.pt"), trainer(settings)
    resumed.resume()
    resumed.run()
    whole.run()
    assert same(result(whole), result(resumed))


def test_a_run_stopped_before_its_first_checkpoint_starts_over(tmp_path):
    trained = trainer(recipe(), tmp_path / "state.pt")
    trained.resume()
    assert trained.iteration == 0


def test_a_damaged_or_foreign_state_is_bad_input(tmp_path):
    path = tmp_path / "state.pt"
    path.write_bytes(b"PK\x03\x04 not much of a zip")
    with pytest.raises(BadInput, match="damaged"):
        trainer(recipe(), path).resume()
    trainer(recipe(), path).save_state()
    with pytest.raises(BadInput, match="another recipe"):
        trainer(recipe(lora={"rank": 3}), path).resume()


def test_the_states_of_small_tensors_are_8_bit():
    trained = trainer(recipe())
    trained.step()
    states = trained.optimizer.state.values()
    assert len(states) == len(trained.parameters)
    assert all(s["state1"].dtype == s["state2"].dtype == torch.uint8 for s in states)
    assert any(p.numel() < 4096 for p in trained.parameters)


def test_the_teacher_follows_the_student_and_the_base_stays():
    trained = trainer(recipe())
    before = {k: v.clone() for k, v in trained.roles.unet.state_dict().items()}
    trained.step()
    after = trained.roles.unet.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and all("lora" in k for k in moved)
    student, teacher = trained.roles.trained(STUDENT), trained.roles.trained(TEACHER)
    assert any(not torch.equal(student[k], teacher[k]) for k in student)


@pytest.mark.parametrize(
    ("way", "kept", "passes"),
    [
        ("8-bit", 2, 4),
        ("8-bit", 0, 2),
        ("prompts", 2, 10),
        ("full", 2, 4),
        ("esd-x", 0, 3),
        ("esd-u", 2, 5),
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
        lambda module, inputs: roles.append(trained.roles._current)
    )
    trained.step()
    assert roles[-3:] == ["base", "base", "student"] and set(roles[:-3]) == {"teacher"}
    student, teacher = trained.roles.trained(STUDENT), trained.roles.trained(TEACHER)
    assert all(student[name] is teacher[name] for name in student)


def test_esds_loss_is_at_the_concept_that_the_latents_were_drawn_for():
    rollout = {"steps": 7, "batch": 2, "points": 3}
    trained = trainer(recipe(**WAYS["esd-x"] | {"rollout": rollout}))
    for _ in range(4):
        samples = trained._sample_indices(0)
        points = trained._roll_out(samples)
        drawn = trained.embeddings.concepts[[n % 3 for n in points.trajectories]]
        assert torch.equal(trained._prompts_of_loss(points), drawn)
        trained.iteration += 1


def test_each_latent_serves_several_concepts_and_kept_prompts(monkeypatch):
    trained = trainer(recipe(objective={"variant": "reference"}, **WAYS["prompts"]), kept=5)
    calls = []
    estimate = trained._estimate
    monkeypatch.setattr(
        trained, "_estimate", lambda z, t, c: calls.append((z, t, c)) or estimate(z, t, c)
    )
    trained.step()
    (z_empty, _, _), (z, t, c), _, (z_kept, _, c_kept) = calls  # ∅, concept, base, kept
    assert torch.equal(z_empty, z[::3])
    for latent in (0, 3):
        assert torch.equal(z[latent], z[latent + 1]) and torch.equal(z[latent], z[latent + 2])
        assert len(set(t[latent : latent + 3].tolist())) == 1
        concepts = {tuple(prompt.flatten().tolist()) for prompt in c[latent : latent + 3]}
        assert len(concepts) == 3
    assert not torch.equal(z[0], z[3]) and torch.equal(z, z_kept)
    assert len({tuple(prompt.flatten().tolist()) for prompt in c_kept}) > 1


def test_preservation_changes_what_is_learnt():
    settings = recipe(
        training={"iterations": 30}, preserve={"weight": 10.0}, optimizer={"learning_rate": 1e-2}
    )
    free, held = trainer(settings, kept=0), trainer(settings, kept=2)
    free.run()
    held.run()

    def drift(trained):
        """How far the teacher's estimates on the kept prompts are from the base's."""
        z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        inputs = (z, torch.tensor([500, 500]), embeddings().kept)
        with torch.no_grad():
            with trained.roles.base() as unet:
                base = unet(*inputs).sample
            with trained.roles.teacher() as unet:
                return (unet(*inputs).sample - base).pow(2).mean().item()

    assert 0 < drift(held) < 0.7 * drift(free)


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


@pytest.mark.parametrize("way", ["8-bit", "full", "esd-u"])
def test_bf16_trains_fp32_parameters(way):
    fields = WAYS[way] | {
        "training": {"iterations": 2, "precision": "bf16", "base_precision": "bf16"}
    }
    trained = trainer(recipe(**fields))
    before = result(trained)
    trained.run()
    assert not same(before, result(trained))
    assert {f.dtype for f in trained.parameters} == {torch.float32}
    assert trained.roles.unet.conv_out.weight.dtype == torch.bfloat16


def test_fp16_without_a_gpu_is_bad_input():
    with pytest.raises(BadInput, match="fp16 needs a GPU; expected bf16"):
        trainer(recipe(training={"precision": "fp16"}))


def with_scaler(trained, scale, autocast=False):
    """What accelerate sets up for fp16 on a GPU, here on the CPU."""
    accelerator = trained.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.autocast_handler = AutocastKwargs(enabled=autocast)
    accelerator._optimizers.clear()
    trained.optimizer = accelerator.prepare_optimizer(trained.optimizer.optimizer)


@pytest.mark.parametrize("norm", [1e-4, 1e9])
def test_a_scaled_gradient_is_unscaled_before_it_is_clipped(norm):
    results = []
    for scale in (None, 1024.0):
        trained = trainer(recipe(optimizer={"kind": "adamw", "max_grad_norm": norm}))
        if scale:
            with_scaler(trained, scale)
        caught = []
        clip = trained.accelerator.clip_grad_norm_
        trained.accelerator.clip_grad_norm_ = lambda p, n, c=caught, f=clip: (
            c.append(f(p, n)) or c[-1]
        )
        for _ in range(3):
            trained.step()
        results.append((torch.stack(caught), result(trained)))
    (norms, plain), (scaled_norms, scaled) = results
    assert torch.allclose(norms, scaled_norms, rtol=1e-3)
    assert all(torch.allclose(plain[name], scaled[name], atol=1e-5) for name in plain)


def test_a_step_that_overflows_is_left_out_and_the_scale_shrinks():
    trained = trainer(recipe(optimizer={"kind": "adamw"}))
    with_scaler(trained, 1024.0)
    before, backward = result(trained), trained.accelerator.backward

    def overflowing(loss):
        backward(loss)
        trained.parameters[0].grad[0] = float("inf")

    trained.accelerator.backward = overflowing
    trained.step()
    assert same(before, result(trained))
    assert trained.accelerator.scaler.get_scale() == 512.0
    trained.accelerator.backward = backward
    trained.step()
    assert not same(before, result(trained))


def test_fp16_autocast_trains_fp32_factors():
    trained = trainer(recipe(training={"iterations": 2}, optimizer={"kind": "adamw"}))
    with_scaler(trained, 1024.0, autocast=True)
    seen = []
    trained.roles.unet.conv_in.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    before = result(trained)
    trained.run()
    assert set(seen) == {torch.float16}
    assert {f.dtype for f in trained.parameters} == {torch.float32}
    assert not same(before, result(trained))
    assert all(torch.isfinite(t).all() for t in result(trained).values())


def raising(error):
    def fails(*_, **__):
        raise error

    return fails


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
     RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
     RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"),
     MemoryError()],
    ids=["CUDA", "Linux", "Windows", "MPS", "Python"],
)  # fmt: skip
def test_out_of_memory_gives_advice(monkeypatch, error):
    trained = trainer(recipe())
    monkeypatch.setattr(trained, "_estimate", raising(error))
    with pytest.raises(SddLoraError) as caught, memory_advice(trained.recipe):
        trained.run()
    message = str(caught.value)
    assert "out of memory at" in message
    for step in ("--set rollout.batch=1", "training.gradient_accumulation=2",
                 "--set training.gradient_checkpointing=true",
                 "--set training.base_precision=bf16"):  # fmt: skip
        assert step in message
    assert "parameters=lora" not in message and "adamw8bit" not in message


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), memory_advice(recipe()):
        raise RuntimeError("shapes cannot be multiplied")


def test_a_second_ctrl_c_leaves_the_last_checkpoint_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "state" / "state.pt"
    interrupted = trainer(recipe(), path)
    interrupted.step()
    interrupted.save_state()
    before = path.read_bytes()

    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer_module, "update_average", twice)
    with pytest.raises(KeyboardInterrupt, match="twice; --resume continues from the last"):
        interrupted.run()
    assert path.read_bytes() == before


def test_saving_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    trained = trainer(recipe(training={"iterations": 100}), tmp_path / "state" / "state.pt")
    now, saved = [0.0], []

    def step():
        now[0] += 10
        trained.iteration += 1
        return 1.0

    def save():
        saved.append(now[0])
        now[0] += 5

    monkeypatch.setattr(trained, "step", step)
    monkeypatch.setattr(trained, "save_state", save)
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: now[0])
    trained.run()
    assert saved[0] == 40
    assert {after - before for before, after in pairwise(saved[:-1])} == {115}  # not the last


def test_a_second_training_of_a_process_has_a_peak_of_its_own():
    """Or none, where the platform can't tell."""
    size = 400_000_000
    with mmap.mmap(-1, size) as held:  # a tensor's memory would stay with the process
        for _ in range(400):
            held.write(b"x" * (size // 400))
        first = trainer(recipe(training={"iterations": 1})).run().peak_bytes
    second = trainer(recipe(training={"iterations": 1})).run().peak_bytes
    assert first is None or first > size
    assert second is None or second < first - 0.9 * size


def test_where_no_peak_can_be_reset_only_the_first_training_has_one(monkeypatch):
    monkeypatch.setattr(trainer_module, "reset_peak", lambda: False)
    monkeypatch.setattr(Trainer, "_one_was_here", False)
    peaks = [trainer(recipe(training={"iterations": 1})).run().peak_bytes for _ in range(2)]
    assert peaks[0] > 0 and peaks[1] is None


def test_another_number_of_processes_is_bad_input(tmp_path):
    trained = trainer(recipe(), tmp_path / "state.pt")
    trained.step()
    state = trained.state_dict()
    state["rollouts"] *= 2
    with pytest.raises(BadInput, match="2 processes trained this, and 1 would go on"):
        trainer(recipe(), tmp_path / "state.pt").load_state_dict(state)


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
            c.extend(p.grad.clone() for p in t.parameters), m()
        )  # fmt: skip
        trained.step()
        gradients.append(torch.cat([g.flatten() for g in caught]))
    assert gradients[0].any()
    assert torch.allclose(gradients[0], gradients[1], atol=1e-7, rtol=1e-4)


def test_learning_rates_follow_their_schedules():
    constant = Optimizer(warmup_iterations=4)
    assert [learning_rate_factor(i, 10, constant) for i in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    linear = Optimizer(schedule="linear")
    assert [learning_rate_factor(i, 4, linear) for i in range(4)] == [1, 0.75, 0.5, 0.25]
    cosine = Optimizer(schedule="cosine")
    assert learning_rate_factor(0, 8, cosine) == 1
    assert learning_rate_factor(4, 8, cosine) == pytest.approx(0.5)


def test_without_bitsandbytes_adamw_serves_and_says_so(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    made = make_optimizer(Optimizer(), [torch.nn.Parameter(torch.zeros(3))])
    assert type(made) is torch.optim.AdamW
    assert "bitsandbytes is missing" in caplog.text
