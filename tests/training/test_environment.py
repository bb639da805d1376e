"""A recipe says all of its training: accelerate's settings in the environment change nothing."""

import os

import pytest
from support.trainers import recipe, result, same, trainer

from sdd_lora.training.trainer import Trainer


def trained() -> Trainer:
    made = trainer(recipe(training={"iterations": 2, "seed": 3}))
    made.run()
    return made


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER"),
        ("ACCELERATE_USE_FSDP", "true"),
    ],
)
def test_accelerates_variables_change_no_training(monkeypatch, name, value):
    plain = trained()
    monkeypatch.setenv(name, value)
    made = trained()
    assert os.environ[name] == value
    assert made.losses == plain.losses
    assert same(result(made), result(plain))
