"""The text encoder with and without the level `text_model`, which transformers 5 dropped."""

import numpy as np
import pytest
from support import checkpoint_models as models

from sdd_lora import sd1
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.detect import find_adapter
from sdd_lora.checkpoint.extract import extract

ADAPTER = models.adapter(text=True)
PREFIX = sd1.LDM_TEXT_PREFIX


def without_level(tensors):
    return {key.replace(f"{PREFIX}text_model.", PREFIX): value for key, value in tensors.items()}


def with_level(tensors):
    bare = without_level(tensors)
    return {key.replace(PREFIX, f"{PREFIX}text_model."): value for key, value in bare.items()}


@pytest.mark.parametrize("names", [with_level, without_level])
def test_single_files_and_folders_are_baked_and_compared(tmp_path, names):
    file = models.write(tmp_path / "m.safetensors", names(models.ldm_tensors()))
    other = models.write(tmp_path / "x.safetensors", with_level(models.ldm_tensors()))
    folder = models.write_folder(tmp_path / "folder")
    stored = folder / "text_encoder" / "model.safetensors"
    text = {
        (f"text_model.{key}" if names is with_level else key): value
        for key, value in (
            (key.removeprefix("text_model."), value)
            for key, value in models.states()["text_encoder"].items()
        )
    }
    models.write(stored, text, {"format": "pt"})
    for model in (file, folder):
        out = bake(model, [(ADAPTER, 1.0)], tmp_path / f"baked{model.suffix}").output
        assert find_adapter(out, ADAPTER, other).strength == pytest.approx(1, abs=1e-3)
        found = extract(out, other, rank=4)
        assert found.adapter.factors.keys() == ADAPTER.factors.keys() and not found.not_compared
        name = next(name for name in ADAPTER.factors if sd1.is_text(name))
        np.testing.assert_allclose(
            found.adapter.factors[name].delta(), ADAPTER.factors[name].delta(), atol=1e-5
        )
