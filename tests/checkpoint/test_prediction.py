"""The prediction type of a model, wherever it is written."""

import json

import numpy as np
import pytest
from support import checkpoint_models as models
from support.adapter_making import random_adapter

from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.describe import require_sd1
from sdd_lora.io.safetensors import read_tensors

V_YAML = "model:\n  target: ldm.LatentDiffusion\n  params:\n    parameterization: {}\n"
MARK = np.zeros(0, np.float32)


@pytest.mark.parametrize(
    ("marks", "metadata", "config", "expected"),
    [
        ({}, {}, None, (None, None)),
        ({}, {}, "v", ("v_prediction", None)),
        ({}, {}, "eps", ("epsilon", None)),
        ({"v_pred": MARK}, {}, None, ("v_prediction", None)),
        ({"v_pred": MARK, "ztsnr": MARK}, {}, None, ("v_prediction", True)),
        ({}, {"modelspec.prediction_type": "v"}, None, ("v_prediction", None)),
        ({}, {"modelspec.predict_key": "epsilon"}, None, ("epsilon", None)),
    ],
)
@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_of_a_single_file(tmp_path, marks, metadata, config, expected, suffix):
    path = models.write(tmp_path / "m.safetensors", models.ldm_tensors() | marks, metadata)
    if config is not None:
        path.with_suffix(suffix).write_text(V_YAML.format(config))
    found = require_sd1(path).prediction
    assert (found.kind, found.zero_terminal_snr) == expected


def test_of_a_folder(tmp_path):
    folder = models.write_folder(tmp_path / "m")
    assert require_sd1(folder).prediction.kind == "epsilon"
    config = folder / "scheduler" / "scheduler_config.json"
    content = json.loads(config.read_text()) | {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    }
    config.write_text(json.dumps(content))
    found = require_sd1(folder).prediction
    assert (found.kind, found.zero_terminal_snr) == ("v_prediction", True)


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("dreamshaper_8LCM", "name (LCM)"),
        ("sd-turbo-v1", "name (turbo)"),
        ("epic_Hyper-SD", "name (Hyper-SD)"),
        ("hyperrealistic", ""),
        ("calcmodel", ""),
    ],
)
def test_a_model_for_few_steps_is_known_by_its_name(tmp_path, name, sign):
    path = models.write(tmp_path / f"{name}.safetensors", models.ldm_tensors())
    assert require_sd1(path).prediction.few_steps == sign
    folder = models.write_folder(tmp_path / f"models--a--{name}" / "snapshots" / "0a1b")
    assert require_sd1(folder).prediction.few_steps == sign


def test_a_model_for_few_steps_is_known_by_its_sampler(tmp_path):
    folder = models.write_folder(tmp_path / "m")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "LCMScheduler"}))
    assert require_sd1(folder).prediction.few_steps == "scheduler LCMScheduler"


@pytest.mark.parametrize(
    ("metadata", "sign"),
    [
        ({"sd_merge_models": '{"4f1c": {"name": "dream_8LCM.safetensors"}}'}, "LCM"),
        ({"sd_merge_recipe": '{"type": "webui", "custom_name": "sd turbo mix"}'}, "turbo"),
        ({"modelspec.merged_from": "sd-v1-5, hyper-sd"}, "hyper-sd"),
        ({"sd_merge_models": '{"4f1c": {"name": "hyperrealistic.safetensors"}}'}, ""),
    ],
)
def test_a_model_for_few_steps_is_known_by_what_was_merged_into_it(tmp_path, metadata, sign):
    path = models.write(tmp_path / "m.safetensors", models.ldm_tensors(), metadata)
    told = f"record of what was merged into it ({sign})" if sign else ""
    assert require_sd1(path).prediction.few_steps == told


def test_a_model_for_few_steps_is_known_by_the_adapter_that_was_baked_into_it(tmp_path):
    lcm = random_adapter(name="lcm-lora-sdv1-5")
    bake("demo-community", [lcm], out=tmp_path / "m.safetensors")
    sign = require_sd1(tmp_path / "m.safetensors").prediction.few_steps
    assert sign == "record of what was merged into it (lcm)"


def test_a_config_that_can_not_be_read_is_warned_of(tmp_path, caplog):
    path = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    path.with_suffix(".yaml").write_text("model: [")
    assert require_sd1(path).prediction.kind is None
    assert "m.yaml" in caplog.text


def test_a_baked_file_gets_the_configuration_of_its_model(tmp_path, caplog):
    path = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    path.with_suffix(".yaml").write_text(V_YAML.format("v"))
    out = tmp_path / "o.safetensors"
    bake(path, [(models.adapter(), 1.0)], out)
    assert out.with_suffix(".yaml").read_bytes() == path.with_suffix(".yaml").read_bytes()
    out.with_suffix(".yaml").write_text("mine")
    report = bake(path, [(models.adapter(), 1.0)], out, force=True)
    assert out.with_suffix(".yaml").read_text() == "mine"
    assert any("o.yaml" in warning for warning in report.warnings)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.time_embed", "time_embedding"])
def test_a_guidance_embedding_is_named_and_can_be_baked(tmp_path, prefix):
    in_diffusers_names = prefix == "time_embedding"
    tensors = models.states()["unet"] if in_diffusers_names else models.ldm_tensors()
    key = f"{prefix}.cond_proj.weight"
    tensors |= {key: np.ones((32, 8), np.float32)}
    path = models.write(tmp_path / "m.safetensors", tensors)
    assert require_sd1(path).prediction.guidance_embedding
    bake(path, [(models.adapter(), 1.0)], tmp_path / "o.safetensors")
    assert np.array_equal(read_tensors(tmp_path / "o.safetensors")[0][key], tensors[key])
