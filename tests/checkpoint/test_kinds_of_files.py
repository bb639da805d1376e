"""Files are told apart by their content, whatever their names, and the remedy is said."""

import shutil

import numpy as np
import pytest
import torch
from support import checkpoint_models as models

from sdd_lora import sd1
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.describe import describe_model, require_sd1
from sdd_lora.checkpoint.layout import read_any_header
from sdd_lora.checkpoint.locate import locate, locate_file
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import read_tensors
from sdd_lora.io.torch_zip import is_torch_file

ADAPTERS = [(models.adapter(), 1.0)]
UNET = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4265380512\n",
            "lfs pull",
        ),
        (b"<!DOCTYPE html><html><title>Log in</title></html>", "log in"),
        (b'{"error":"Unauthorized"}', "server's error"),
        (b"GGUF\3\0\0\0" + bytes(64), "GGUF"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\3" + bytes(64), "unpack"),
    ],
)
def test_a_file_that_is_something_else_is_named_with_the_remedy(tmp_path, content, remedy):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    for read in (describe_model, Adapter.load):
        with pytest.raises(BadInput, match=remedy):
            read(path)


@pytest.mark.parametrize("low_bytes", [0x0280, 0x0580, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, low_bytes):
    """The length of a header stands in the first bytes, where a pickle or a zip has its mark."""
    tensors = {"x": np.ones(2, np.float32)}
    short = models.write(tmp_path / "short.safetensors", tensors, {"note": ""})
    note = "x" * (low_bytes - read_any_header(short).data_start + 8)
    path = models.write(tmp_path / "m.safetensors", tensors, {"note": note})
    assert int.from_bytes(path.read_bytes()[:2], "little") == low_bytes
    assert not is_torch_file(path) and read_any_header(path).tensors.keys() == tensors.keys()


def test_names_say_nothing_of_the_content(tmp_path):
    tensors = models.ldm_tensors()
    upper = models.write(tmp_path / "M.SAFETENSORS", tensors)
    named_ckpt = models.write(tmp_path / "m.ckpt", tensors)
    pickled = tmp_path / "pickled.safetensors"
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, pickled)
    outputs = []
    for n, path in enumerate((upper, named_ckpt, pickled)):
        out = bake(path, ADAPTERS, tmp_path / f"{n}.SAFETENSORS").output
        outputs.append({key: value.tobytes() for key, value in read_tensors(out)[0].items()})
    assert outputs[0] == outputs[1] == outputs[2]
    folder = models.write_folder(tmp_path / "folder")
    (folder / "unet" / UNET).rename(
        folder
        / "unet"
        / UNET.replace(".saf", ".SAF")
        .upper()
        .replace("DIFFUSION_PYTORCH_MODEL", "diffusion_pytorch_model")
    )
    assert require_sd1(folder).copies == ("weights",)


def test_an_adapter_is_read_whatever_its_name(tmp_path):
    adapter = models.adapter()
    saved = adapter.save(tmp_path / "a.safetensors", dtype="fp32")
    shutil.copy(saved, tmp_path / "a.pt")
    state = {key: torch.from_numpy(value) for key, value in adapter.to_state_dict("kohya").items()}
    torch.save(state, tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        assert Adapter.load(tmp_path / name).factors.keys() == adapter.factors.keys()


@pytest.mark.parametrize(
    ("wrapper", "layout"),
    [("module.", "ldm"), ("_orig_mod.", "unet"), ("module._orig_mod.", "folder")],
)
def test_wrapped_names_are_edited_and_stay(tmp_path, wrapper, layout):
    """Of a model saved inside DataParallel or torch.compile."""
    key = models.checkpoint_key(models.K0) if layout == "ldm" else f"{models.K0}.weight"
    tensors = models.ldm_tensors(ema=True) if layout == "ldm" else models.states()["unet"]
    wrapped = {wrapper + name: value for name, value in tensors.items()}
    if layout == "folder":
        source, out = models.write_folder(tmp_path / "m"), tmp_path / "o"
        models.write(source / "unet" / UNET, wrapped)
        read, written = source / "unet" / UNET, out / "unet" / UNET
    else:
        source = read = models.write(tmp_path / "m.safetensors", wrapped)
        out = written = tmp_path / "o.safetensors"
    report = bake(source, ADAPTERS, out)
    assert len(report.copies) == (2 if layout == "ldm" else 1)
    before, after = read_tensors(read)[0], read_tensors(written)[0]
    assert before.keys() == after.keys()
    np.testing.assert_allclose(
        after[wrapper + key] - before[wrapper + key],
        ADAPTERS[0][0].factors[models.K0].delta(),
        atol=1e-6,
    )


def test_a_folder_saved_with_lora_layers_in_it_is_named(tmp_path):
    """As diffusers' save_pretrained leaves it after fuse_lora, without unload_lora_weights."""
    folder = models.write_folder(tmp_path / "m")
    tensors = {
        name.replace(".to_k.", ".to_k.base_layer."): value
        for name, value in models.states()["unet"].items()
    }
    tensors[f"{models.K0}.lora_A.default.weight"] = np.ones((4, 128), np.float32)
    tensors[f"{models.K0}.lora_B.default.weight"] = np.ones((32, 4), np.float32)
    models.write(folder / "unet" / UNET, tensors)
    with pytest.raises(BadInput, match="unload_lora_weights"):
        require_sd1(folder)
    assert describe_model(folder).family == "lora-inside"


def test_a_quantised_model_is_named(tmp_path):
    """bitsandbytes' NF4: packed bytes, and the state of the quantisation beside them."""
    tensors = models.ldm_tensors()
    for module in sd1.CROSS_ATTENTION:
        key = models.checkpoint_key(module)
        tensors[key] = np.zeros((tensors[key].size // 2, 1), np.uint8)
        tensors[f"{key}.absmax"] = np.zeros(8, np.float32)
        tensors[f"{key}.quant_state.bitsandbytes__nf4"] = np.zeros(8, np.uint8)
    path = models.write(tmp_path / "m.safetensors", tensors)
    with pytest.raises(BadInput, match="quantised"):
        require_sd1(path)
    assert describe_model(path).family == "quantised"


def test_a_hub_caches_folder_stands_for_its_snapshot(tmp_path):
    root = tmp_path / "models--someone--sd"
    snapshot = models.write_folder(root / "snapshots" / "0a1b")
    assert locate(root) == locate_file(root) == snapshot
    models.write_folder(root / "snapshots" / "2c3d")
    with pytest.raises(BadInput, match="snapshots"):
        locate(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("2c3d")
    assert locate(root) == root / "snapshots" / "2c3d"
    assert bake(root, ADAPTERS, tmp_path / "o").copies == ("unet: weights",)
