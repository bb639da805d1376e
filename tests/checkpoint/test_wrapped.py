"""Models within models: which tensors of a trainer's file are the model."""

import numpy as np
import pytest
import torch
from support import checkpoint_models as models

from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.layout import read_any_header
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import read_tensors

ADAPTERS = [(models.adapter(), 1.0)]
K0 = models.checkpoint_key(models.K0)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in models.ldm_tensors().items()}


def baked(tmp_path, content) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    torch.save(content, tmp_path / "m.ckpt")
    report = bake(tmp_path / "m.ckpt", ADAPTERS, tmp_path / "o.safetensors", force=True)
    return read_tensors(tmp_path / "o.safetensors")[0], report.left_out


def test_the_outermost_level_of_tensors_is_the_model(tmp_path, tensors):
    text = {key: value for key, value in tensors.items() if key.startswith("cond_stage_model.")}
    inner = {"state_dict": tensors | {"state_dict": text}, "global_step": torch.tensor(7)}
    written, left_out = baked(tmp_path, inner)
    assert written.keys() == tensors.keys() and set(left_out) == {"global_step", "state_dict"}
    assert not np.array_equal(written[K0], tensors[K0].numpy())


@pytest.mark.parametrize("name", ["model", "module", "model_state_dict", "params"])
def test_trainers_wrap_a_model_in_other_names(tmp_path, tensors, name):
    content = {name: tensors, "optimizer": {"state": {}}, "model_ema": dict(tensors)}
    written, left_out = baked(tmp_path, content)
    assert written.keys() == tensors.keys() and set(left_out) == {"optimizer", "model_ema"}


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_two_whole_models_are_ambiguous(tmp_path, tensors, where):
    second = {key: value * 2 for key, value in tensors.items() if value.is_floating_point()}
    if where == "inside":
        content = {"state_dict": tensors | {"state_dict": second}}
    else:
        content = {"state_dict": tensors, "model": second}
    torch.save(content, tmp_path / "m.ckpt")
    with pytest.raises(BadInput, match="two models"):
        read_any_header(tmp_path / "m.ckpt")
