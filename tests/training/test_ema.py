"""The average against its closed form."""

import pytest
import torch

from sdd_lora.training.ema import decay_at, update_average


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_has_its_closed_form(warmup):
    torch.manual_seed(0)
    values = torch.randn(30, 5, dtype=torch.float64)
    average = {"x": values[0].clone()}
    for update, value in enumerate(values[1:]):
        update_average(average, {"x": value}, decay_at(update, 0.9, warmup))
    weights = [decay_at(update, 0.9, warmup) for update in range(29)]
    expected = values[0] * torch.tensor(weights, dtype=torch.float64).prod()
    for update, value in enumerate(values[1:]):
        later = torch.tensor(weights[update + 1 :], dtype=torch.float64).prod()
        expected = expected + (1 - weights[update]) * later * value
    assert not torch.allclose(average["x"], values[0])
    assert torch.allclose(average["x"], expected)


def test_without_warmup_the_share_of_the_start_is_m_to_the_n():
    average = {"x": torch.ones(1, dtype=torch.float64)}
    for update in range(1500):
        update_average(
            average, {"x": torch.zeros(1, dtype=torch.float64)}, decay_at(update, 0.999, False)
        )
    assert average["x"].item() == pytest.approx(0.999**1500)  # the paper's 22 %


def test_other_names_are_an_error():
    with pytest.raises(AssertionError):
        update_average({"x": torch.zeros(1)}, {"y": torch.zeros(1)}, 0.9)
