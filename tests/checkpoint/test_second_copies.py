"""Second copies of a model's weights: edited, or left out and named; never passed by in silence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import checkpoint_models as models

from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.describe import describe_model
from sdd_lora.checkpoint.undo import unbake
from sdd_lora.io.safetensors import read_tensors

ADAPTERS = [(models.adapter(), 1.0)]
UNET = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    return models.write_folder(tmp_path / "model")


def edit_of(before: Path, after: Path) -> np.ndarray:
    key = f"{models.K0}.weight"
    return read_tensors(after)[0][key] - read_tensors(before)[0][key]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def with_ema_folder(folder: Path) -> None:
    """As diffusers' `--use_ema` saves a second UNet."""
    shutil.copytree(folder / "unet", folder / "unet_ema")
    tensors, metadata = read_tensors(folder / "unet" / UNET)
    models.write(folder / "unet_ema" / UNET, {k: v * 1.01 for k, v in tensors.items()}, metadata)


def test_unet_ema_is_edited_with_the_unet_and_undone(folder, tmp_path):
    with_ema_folder(folder)
    assert describe_model(folder).has_ema
    out, undo = tmp_path / "out", tmp_path / "undo"
    assert len(bake(folder, ADAPTERS, out, undo=undo).copies) == 2
    edits = [edit_of(folder / name / UNET, out / name / UNET) for name in ("unet", "unet_ema")]
    assert np.abs(edits[0]).max() > 0 and np.allclose(*edits, atol=1e-6)
    unbake(out, undo, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)


def test_ema_drop_leaves_unet_ema_out(folder, tmp_path):
    with_ema_folder(folder)
    report = bake(folder, ADAPTERS, tmp_path / "out", ema="drop")
    assert report.left_out == ("unet_ema",) and not (tmp_path / "out" / "unet_ema").exists()


@pytest.mark.parametrize(
    ("copy", "named"),
    [
        (f"checkpoint-500/unet/{UNET}", "checkpoint-500"),
        ("checkpoint-500/model.safetensors", "checkpoint-500"),  # as accelerate names it
        (
            f"unet/{UNET.replace('model.', 'model_ema.')}",
            "unet/diffusion_pytorch_model_ema.safetensors",
        ),
    ],
)
def test_other_copies_are_named_and_left_out(folder, tmp_path, copy, named):
    (folder / copy).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "unet" / UNET, folder / copy)
    (folder / "samples").mkdir()
    (folder / "samples" / "note.json").write_text(json.dumps({}))
    assert describe_model(folder).unread == (named,)
    report = bake(folder, ADAPTERS, tmp_path / "out")
    assert report.left_out == (named,) and not (tmp_path / "out" / named).exists()
    assert (tmp_path / "out" / "samples" / "note.json").exists()


def test_a_checkpoint_in_the_folder_is_named_when_baked_in_place(folder):
    shutil.copytree(folder / "unet", folder / "checkpoint-500" / "unet")
    report = bake(folder, ADAPTERS, in_place=True)
    assert any("checkpoint-500" in warning for warning in report.warnings)
