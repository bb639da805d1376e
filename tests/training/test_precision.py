"""bf16 and fp16: fp32 parameters, gradients scaled and unscaled."""

import pytest
import torch
from accelerate.utils import AutocastKwargs
from support.trainers import WAYS, recipe, result, same, trainer

from sdd_lora.errors import BadInput


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
