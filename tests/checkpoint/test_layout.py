"""Whatever a MODEL is, its description comes from headers alone; what it is not is named."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import checkpoint_models as models

from sdd_lora import sd1 as names
from sdd_lora.checkpoint.describe import describe_model, require_sd1
from sdd_lora.checkpoint.layout import open_checkpoint
from sdd_lora.demo.build.ldm import as_ldm
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import TensorInfo

EMBEDDED = ((32, 64, 128, 128), 128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.write_folder(tmp_path_factory.mktemp("models") / "folder")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp8"])
def test_a_single_file(tmp_path, dtype):
    path = models.write(tmp_path / "m.safetensors", models.cast(models.ldm_tensors(), dtype))
    found = require_sd1(path)
    assert (found.family, found.layout, found.missing) == ("sd1", "ldm", ())
    assert (found.unet_widths, found.context_width) == EMBEDDED
    assert found.small and not found.has_ema and not found.inpainting and not found.legacy
    code = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "fp8": "F8_E4M3"}[dtype]
    assert found.dtypes == {code: len(models.ldm_tensors())}


@pytest.mark.parametrize("spelling", [0, 1])
def test_ema_copies_are_found_in_both_spellings(tmp_path, spelling):
    path = models.write(tmp_path / "m.safetensors", models.ldm_tensors(True, spelling))
    found = require_sd1(path)
    assert found.has_ema
    weights, ema, _ = open_checkpoint(path).weight_sets
    assert ema.locations.keys() == weights.locations.keys()


def test_missing_parts_inpainting_and_unprefixed_text(tmp_path):
    tensors = models.ldm_tensors()
    tensors = {k: v for k, v in tensors.items() if not k.startswith("first_stage_model")}
    key = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[key] = np.zeros((32, 9, 3, 3), np.float32)
    tensors = {k.replace("text_model.", ""): v for k, v in tensors.items()}
    path = models.write(tmp_path / "m.safetensors", tensors)
    found = require_sd1(path)
    assert found.inpainting and found.missing == ("vae",)
    text = open_checkpoint(path).weight_sets[-1]
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj" in text.locations


def test_a_text_encoder_under_both_names_is_two_copies(tmp_path):
    tensors = models.ldm_tensors()
    tensors |= {k.replace("text_model.", ""): v for k, v in tensors.items() if "text_model." in k}
    first, second = open_checkpoint(models.write(tmp_path / "m.safetensors", tensors)).weight_sets[
        1:
    ]
    assert first.component == second.component == "text_encoder"
    assert first.locations.keys() == second.locations.keys()
    assert not set(first.locations.values()) & set(second.locations.values())


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_unet_only_files_in_ldm_names(tmp_path, prefix):
    tensors = {prefix + names.to_ldm(key): value for key, value in models.states()["unet"].items()}
    found = require_sd1(models.write(tmp_path / "m.safetensors", tensors))
    assert (found.layout, found.missing) == ("ldm", ("vae", "text_encoder"))


def test_unet_only_files_in_diffusers_names(tmp_path):
    found = require_sd1(models.write(tmp_path / "m.safetensors", models.states()["unet"]))
    assert (found.layout, found.missing) == ("unet", ("vae", "text_encoder"))


def test_folders(folder):
    found = require_sd1(folder)
    assert (found.layout, found.missing, found.copies) == ("diffusers", (), ("weights",))
    assert (found.unet_widths, found.context_width) == EMBEDDED
    assert require_sd1(folder / "unet").layout == "unet"


def test_every_variant_is_a_copy_and_shards_are_one(tmp_path):
    models.write_folder(tmp_path / "m", shard="5MB")
    models.write_folder(tmp_path / "m", variant="fp16", shard="5MB")
    found = require_sd1(tmp_path / "m")
    assert set(found.copies) == {"sharded weights", "sharded variant fp16"}


@pytest.mark.parametrize("shard", [None, "5MB"])
def test_what_is_loaded_without_a_variant_comes_first(tmp_path, shard):
    models.write_folder(tmp_path / "m", shard=shard)
    for variant in ("fp16", "a"):
        for file in list((tmp_path / "m" / "unet").glob("*.safetensors")):
            if ".fp16" not in file.name:
                stem = "diffusion_pytorch_model"
                other = file.name.replace(stem, f"{stem}.{variant}")
                (file.parent / other).write_bytes(file.read_bytes())
    first, *others = (weights.label for weights in open_checkpoint(tmp_path / "m").weight_sets[:3])
    assert first == ("sharded weights" if shard else "weights")
    assert all("variant" in label for label in others) and len(others) == 2


def test_a_lost_shard_is_named(tmp_path):
    models.write_folder(tmp_path / "m", shard="5MB")
    lost = sorted((tmp_path / "m" / "unet").glob("*-00001-of-*"))[0]
    lost.unlink()
    with pytest.raises(BadInput, match=lost.name):
        describe_model(tmp_path / "m")


def test_sd15_itself_is_complete_by_its_list_of_keys(tmp_path):
    """The exporter and the layout, held against the keys and shapes of a real file."""
    listed = models.full_size_keys()
    unet = {k: v for k, v in listed.items() if k.startswith(names.LDM_UNET_PREFIX)}
    with torch.device("meta"):
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        exported = as_ldm(
            UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).state_dict(),
            AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ).state_dict(),
            CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
            ).state_dict(),
        )
    found = {key: tuple(tensor.shape) for key, tensor in exported.items()}
    buffers = ("alphas_", "betas", "log_one", "posterior_", "sqrt_")
    expected = {k: shape for k, (shape, _) in listed.items() if not k.startswith(buffers)}
    expected.pop("cond_stage_model.transformer.text_model.embeddings.position_ids")
    found.pop("cond_stage_model.transformer.text_model.embeddings.position_ids", None)
    assert found == expected
    assert len(unet) == 686


def without(tensors, ending):
    return {k: v for k, v in tensors.items() if not k.endswith(ending)}


def reshaped(tensors, ending):
    return {k: v[:1] if k.endswith(ending) else v for k, v in tensors.items()}


def sd2(tensors):
    """Linear projections instead of 1×1 convolutions."""
    return {k: v[..., 0, 0] if ".proj_in.weight" in k else v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (sd2, "Stable Diffusion 2"),
        (lambda t: {k: v for k, v in t.items() if "output_blocks.11.1" not in k}, "structure"),
        (lambda t: {k: v for k, v in t.items() if "diffusion_model" not in k}, "no UNet"),
        (lambda t: {"double_blocks.0.img_attn.qkv.weight": np.zeros(3)}, "Flux"),
        (lambda t: {"joint_blocks.0.context_block.attn.qkv.weight": np.zeros(3)}, "Diffusion 3"),
        (lambda t: t | {"control_model.input_blocks.0.0.weight": np.zeros(3)}, "ControlNet"),
        (lambda t: models.adapter().to_state_dict("kohya"), "adapter"),
        (lambda t: t | {k.removeprefix("model."): v for k, v in t.items()}, "one more copy"),
        (lambda t: {"weight": np.zeros(3)}, "no UNet"),
        (lambda t: without(t, "input_blocks.1.0.in_layers.2.weight"), "complete"),
        (lambda t: reshaped(t, "input_blocks.1.0.in_layers.2.weight"), "shape"),
    ],
)
def test_what_is_no_sd1_is_named(tmp_path, change, named):
    path = models.write(tmp_path / "m.safetensors", change(models.ldm_tensors()))
    with pytest.raises(BadInput, match=named):
        require_sd1(path)


def test_sdxl_by_its_blocks(tmp_path):
    blocks = {
        f"model.diffusion_model.{block}.1.transformer_blocks.{n}.attn2.to_k.weight": (640, 2048)
        for block in ("input_blocks.4", "input_blocks.7", "middle_block")
        for n in range(2)
    }
    tensors = {k: np.zeros(s, np.float16) for k, s in blocks.items()}
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = np.zeros((320, 4, 3, 3), np.float16)
    assert describe_model(models.write(tmp_path / "xl.safetensors", tensors)).family == "sdxl"


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz_mutated_headers_raise_one_clear_error_or_read(tmp_path, data):
    """A longer run by hand: --hypothesis-seed=random and a larger max_examples."""
    tensors = {"conv_in.weight": np.zeros((2, 4, 1, 1), np.float16), "a.weight": np.zeros(3)}
    content = bytearray(models.write(tmp_path / "good", tensors, {"format": "pt"}).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.safetensors"
    path.write_bytes(content[: len(content) - data.draw(st.integers(0, 3))])
    try:
        describe_model(path)
    except BadInput as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["nothing", "empty folder", "autoencoder", "broken index"])
def test_what_is_missing_or_damaged(tmp_path, name):
    if name == "empty folder":
        (tmp_path / "m").mkdir()
    if name == "autoencoder":
        vae = tmp_path / "m" / "vae"
        vae.mkdir(parents=True)
        models.write(vae / "diffusion_pytorch_model.safetensors", models.states()["vae"])
    if name == "broken index":
        models.write_folder(tmp_path / "m", shard="5MB")
        (tmp_path / "m/unet/diffusion_pytorch_model.safetensors.index.json").write_text("[")
    with pytest.raises(BadInput, match=str(tmp_path / "m")):
        describe_model(tmp_path / "m")


def test_no_torch_is_imported(tmp_path):
    path = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    code = (
        "import sys; from sdd_lora.checkpoint.describe import describe_model; "
        f"print(describe_model({str(path)!r}).family, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["sd1", "False"]


def test_the_header_of_a_4_gb_file_takes_no_time(tmp_path):
    """A sparse file of the true size; the budget includes the interpreter's start."""
    import struct
    import time

    tensors, offset = {}, 0
    for key, (shape, dtype) in models.full_size_keys().items():
        code = dtype or "F32"
        size = int(np.prod(shape)) * (8 if code == "I64" else 4)
        tensors[key] = TensorInfo(code, shape, offset, offset := offset + size)
    header = json.dumps(
        {
            k: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start, t.end]}
            for k, t in tensors.items()
        }
    ).encode()
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset)
    started = time.process_time()
    found = require_sd1(path)
    assert time.process_time() - started < 0.4
    assert found.unet_widths == names.SD15.blocks and not found.small
