"""The alpha of a file that stores none beside its factors: known, it is used."""

import json
import logging

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.adapter_making import TO_K, TO_OUT, random_adapter

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.alphas import KnownAlphas
from sdd_lora.adapter.inspect import describe_adapter


def peft_file(folder, prefix="base_model.model.", header=None, rank=4):
    """A peft file of two modules of one rank; alpha is nowhere in it."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name in (TO_K, TO_OUT):
        factors = random_adapter(modules=(name,), rank=rank).factors[name]
        tensors[f"{prefix}{name}.lora_A.weight"] = factors.down
        tensors[f"{prefix}{name}.lora_B.weight"] = factors.up
    save_file(tensors, folder / "adapter_model.safetensors", header)
    return folder / "adapter_model.safetensors"


def scales(path):
    loaded = {name: part.scale for name, part in Adapter.load(path).factors.items()}
    described = describe_adapter(path)
    assert described.scales == pytest.approx(loaded)
    return loaded[TO_K], loaded[TO_OUT]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"r": 4, "lora_alpha": 8}, (2, 2)),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, (4, 4)),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"attn2.to_k": 2}}, (0.5, 1)),
        ({"r": 8, "rank_pattern": {TO_K: 4, TO_OUT: 4}, "lora_alpha": 2}, (0.5, 0.5)),
    ],
)
@pytest.mark.parametrize("prefix", ["base_model.model.", "unet.", ""])
def test_pefts_configuration_beside_the_file_is_read(prefix, config, expected, tmp_path):
    path = peft_file(tmp_path, prefix)
    assert scales(path) == (1, 1)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert scales(path) == expected
    assert describe_adapter(path).alphas_from == "adapter_config.json"
    assert scales(Adapter.load(tmp_path).save(tmp_path / "kohya.safetensors")) == (1, 1)


def test_a_configuration_of_another_adapter_is_named_and_not_used(tmp_path, caplog):
    path = peft_file(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 16, "lora_alpha": 8}))
    with caplog.at_level(logging.WARNING):
        assert scales(path) == (1, 1)
    assert "adapter_config.json" in caplog.text


def test_a_kohya_file_is_not_what_the_configuration_beside_it_is_about(tmp_path):
    path = random_adapter(modules=(TO_K, TO_OUT)).save(tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    assert scales(path) == (1, 1)


def test_lora_alpha_of_the_header_is_read(tmp_path, caplog):
    assert scales(peft_file(tmp_path, header={"lora_alpha": "2"})) == (0.5, 0.5)
    with caplog.at_level(logging.WARNING):
        assert scales(peft_file(tmp_path, header={"lora_alpha": "two"})) == (1, 1)
    assert "lora_alpha" in caplog.text


def test_a_stored_alpha_stands_above_all_others(tmp_path):
    stem = "lora_unet_" + TO_K.replace(".", "_")
    factors = random_adapter(modules=(TO_K,)).factors[TO_K]
    tensors = {f"{stem}.lora_down.weight": factors.down, f"{stem}.lora_up.weight": factors.up}
    tensors[f"{stem}.alpha"] = np.array(2, np.float32)
    save_file(tensors, tmp_path / "a.safetensors", {"lora_alpha": "16"})
    assert Adapter.load(tmp_path / "a.safetensors").factors[TO_K].scale == 0.5


def test_the_rank_is_the_alpha_where_nothing_is_known():
    assert KnownAlphas().alpha_of(TO_K, 4) == 4.0
