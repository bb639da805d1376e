"""The optimizer's states and learning rates."""

import pytest
import torch
from support.trainers import recipe, trainer

from sdd_lora.recipe import Optimizer
from sdd_lora.training.optimizer import learning_rate, make_optimizer


def test_the_states_of_small_tensors_are_8_bit():
    trained = trainer(recipe())
    trained.step()
    states = trained.optimizer.state.values()
    assert len(states) == len(trained.parameters)
    assert all(s["state1"].dtype == s["state2"].dtype == torch.uint8 for s in states)
    assert any(p.numel() < 4096 for p in trained.parameters)


def test_learning_rates_follow_their_schedules():
    constant = Optimizer(learning_rate=1.0, warmup_iterations=4)
    assert [learning_rate(i, 10, constant) for i in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    linear = Optimizer(learning_rate=1.0, schedule="linear")
    assert [learning_rate(i, 4, linear) for i in range(4)] == [1, 0.75, 0.5, 0.25]
    cosine = Optimizer(learning_rate=1.0, schedule="cosine")
    assert learning_rate(0, 8, cosine) == 1
    assert learning_rate(4, 8, cosine) == pytest.approx(0.5)


def test_without_bitsandbytes_adamw_serves_and_says_so(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    made = make_optimizer(Optimizer(), [torch.nn.Parameter(torch.zeros(3))])
    assert type(made) is torch.optim.AdamW
    assert "bitsandbytes is missing" in caplog.text
