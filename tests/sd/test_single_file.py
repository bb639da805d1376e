"""Single files: no hub is asked, whichever names, parts and prediction type they have."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from sdd_lora import sd1
from sdd_lora.checkpoint.locate import COMMUNITY_FILE, DEMO_FOLDER
from sdd_lora.errors import BadInput
from sdd_lora.sd.clip_tokenizer import clip_tokenizer
from sdd_lora.sd.model import load_base_pipeline, load_training_parts, unet_config
from sdd_lora.sd.prompts import embed
from sdd_lora.sd.single_file import SD15_FOLDER, configuration_of, read_config

TEXT = "cond_stage_model.transformer.text_model."
BARE = TEXT.removesuffix("text_model.")
VAE = "first_stage_model."


@pytest.fixture(scope="module")
def tensors():
    return load_file(COMMUNITY_FILE)


@pytest.fixture(scope="module")
def community():
    return load_base_pipeline("demo-community")


def same(one, other):
    found = other.state_dict()
    return all(torch.equal(tensor, found[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("A Photo  of a cat", [320, 1125, 539, 320, 2368]),
        ("", []),
    ],
)
def test_token_ids_are_clips(text, ids):
    assert clip_tokenizer()(text).input_ids == [49406, *ids, 49407]


def test_the_tokenizer_pads_to_77_with_the_end_token():
    found = clip_tokenizer()("a", padding="max_length").input_ids
    assert found == [49406, 320, *[49407] * 75]


def test_sd1_configurations_have_the_shapes_of_a_full_file():
    assert configuration_of((320, 640, 1280, 1280)) == SD15_FOLDER
    assert configuration_of(tuple(read_config(DEMO_FOLDER, "unet")["block_out_channels"])) == (
        DEMO_FOLDER
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(read_config(SD15_FOLDER, "unet"))
        vae = AutoencoderKL.from_config(read_config(SD15_FOLDER, "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(SD15_FOLDER / "text_encoder"))
    shapes = {name: tuple(t.shape) for name, t in unet.state_dict().items()}
    for module, shape in sd1.unet_shapes(sd1.SD15, 4).items():
        assert shapes[f"{module}.weight"] == shape
    counts = [sum(p.numel() for p in part.parameters()) for part in (unet, vae, text)]
    assert counts == [859_520_964, 83_653_863, 123_060_480]


def test_a_text_encoder_without_text_model_level(tensors, community, tmp_path):
    path = tmp_path / "old.safetensors"
    save_file({k.replace(TEXT, BARE): v for k, v in tensors.items()}, path)
    assert same(load_base_pipeline(str(path)).text_encoder, community.text_encoder)
    assert same(load_training_parts(str(path)).text_encoder, community.text_encoder)


def test_a_text_encoder_that_lacks_a_weight_is_named(tensors, tmp_path):
    path = tmp_path / "old.safetensors"
    kept = {k: v for k, v in tensors.items() if "layers.1.mlp.fc1.weight" not in k}
    save_file({k.replace(TEXT, BARE): v for k, v in kept.items()}, path)
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.fc1\.weight"):
        load_base_pipeline(str(path))


@pytest.fixture
def without_vae(tensors, tmp_path):
    path = tmp_path / "pruned.safetensors"
    save_file({k: v for k, v in tensors.items() if not k.startswith(VAE)}, path)
    return str(path)


def test_a_file_without_vae_asks_for_one_but_trains(without_vae):
    with pytest.raises(BadInput, match=r"holds no VAE.*`vae=MODEL`"):
        load_base_pipeline(without_vae)
    assert load_training_parts(without_vae).unet is not None


@pytest.mark.parametrize("kind", ["model", "folder", "part", "bare file", "prefixed file"])
def test_a_vae_from_a_model_a_folder_or_a_file(tensors, community, without_vae, tmp_path, kind):
    own = {k: v for k, v in tensors.items() if k.startswith(VAE)}
    path = tmp_path / "vae.safetensors"
    save_file({k.removeprefix(VAE) if kind == "bare file" else k: v for k, v in own.items()}, path)
    community.vae.save_pretrained(tmp_path / "alone")
    shutil.copytree(tmp_path / "alone", tmp_path / "whole" / "vae")
    given = {
        "model": "demo-community",
        "folder": tmp_path / "whole",
        "part": tmp_path / "alone",
    }.get(kind, path)
    assert same(load_base_pipeline(without_vae, vae=str(given)).vae, community.vae)


def test_what_is_no_vae_is_bad_input(without_vae, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    for given in (path, tmp_path):
        with pytest.raises(BadInput, match="expected a VAE"):
            load_base_pipeline(without_vae, vae=str(given))


@pytest.mark.parametrize(
    ("keys", "sidecar", "expected"),
    [
        ([], None, "epsilon"),
        (["v_pred"], None, "v_prediction"),
        ([], 'model:\n  params:\n    parameterization: "v"\n', "v_prediction"),
        ([], "model:\n  params:\n    parameterization: eps  # as SD 1\n", "epsilon"),
        ([], "model:\n  params: {}\n", "epsilon"),
    ],
)
def test_the_prediction_type_is_read(tensors, tmp_path, keys, sidecar, expected):
    path = tmp_path / "model.safetensors"
    save_file(tensors | {key: torch.zeros(1) for key in keys}, path)
    if sidecar is not None:
        path.with_suffix(".yaml").write_text(sidecar)
    for scheduler in (
        load_base_pipeline(str(path)).scheduler,
        load_training_parts(str(path)).scheduler,
    ):
        assert scheduler.config.prediction_type == expected


def test_zero_terminal_snr_is_read(tensors, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors | {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, path)
    scheduler = load_base_pipeline(str(path)).scheduler
    assert scheduler.config.rescale_betas_zero_snr
    assert scheduler.alphas_cumprod[-1] == pytest.approx(0, abs=1e-6)


def test_a_prediction_type_can_be_given(community):
    loaded = load_base_pipeline("demo-community", prediction="v_prediction")
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    assert community.scheduler.config.prediction_type == "epsilon"


def test_where_no_file_says_the_prediction_the_unet_is_asked(tensors, tmp_path, caplog):
    good, other = tmp_path / "good.safetensors", tmp_path / "other.safetensors"
    save_file(tensors, good)
    last = "model.diffusion_model.out.2.weight"
    save_file(tensors | {last: -tensors[last]}, other)  # returns the noise's negative
    load_training_parts(str(good))
    assert "predicts" not in caplog.text
    load_training_parts(str(other), "epsilon")
    assert "predicts" not in caplog.text
    load_training_parts(str(other))
    assert "other.safetensors: no file says what its UNet predicts" in caplog.text
    assert "cosine -" in caplog.text


def test_a_model_for_few_steps_is_warned_of_once(tensors, tmp_path, caplog):
    path = tmp_path / "painter-lcm.safetensors"
    save_file(tensors, path)
    unet_config(str(path))
    load_training_parts(str(path))
    assert caplog.text.count("by its name (lcm) made for few steps") == 1


def test_a_consistency_model_is_refused_by_name(tmp_path):
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "lcm")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"time_embedding.cond_proj.weight": torch.zeros(32, 256)}, file)
    for load in (load_base_pipeline, load_training_parts, unet_config):
        with pytest.raises(BadInput, match=r"LCM.*time_cond_proj_dim"):
            load(str(folder))


@pytest.mark.parametrize("limit", [None, 20])
def test_a_tokenizers_own_limit_does_not_matter(tmp_path, limit):
    folder = shutil.copytree(DEMO_FOLDER, tmp_path / "model")
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config | ({} if limit is None else {"model_max_length": limit})))
    parts, demo = load_training_parts(str(folder)), load_training_parts("demo")
    assert parts.tokenizer.model_max_length == 77
    found, expected = (embed(["a bomb"], p.tokenizer, p.text_encoder) for p in (parts, demo))
    assert np.array_equal(found.numpy(), expected.numpy())
