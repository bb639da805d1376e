"""Refusals before anything is written, and what an output may replace."""

import numpy as np
import pytest
from support import checkpoint_models as models

from sdd_lora import sd1 as names
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.detect import find_adapter, history_of_model
from sdd_lora.checkpoint.history import sidecar_of
from sdd_lora.checkpoint.undo import unbake
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io.safetensors import read_tensors

LDM_K0 = models.checkpoint_key(models.K0)


@pytest.mark.parametrize(
    ("change", "adapter", "named"),
    [
        ({}, models.adapter(widths=names.SD15), "32 of the adapters' 32 modules"),
        ({LDM_K0: np.zeros((32, 128), np.int8)}, models.adapter(), "I8"),
        ({LDM_K0.replace(".weight", ".scale_weight"): np.ones(1)}, models.adapter(), "by a scale"),
        ({"double_blocks.0.x": np.zeros(1)}, models.adapter(), "Flux"),
        ({}, Adapter({}), "no module"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, adapter, named):
    source = models.write(tmp_path / "m.safetensors", models.ldm_tensors() | change)
    with pytest.raises(BadInput, match=named):
        bake(source, [(adapter, 1.0)], out=tmp_path / "o.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_damaged_weight_is_named(tmp_path, value):
    tensors = models.ldm_tensors()
    tensors[LDM_K0] = tensors[LDM_K0].copy()
    tensors[LDM_K0][3, 5] = value
    source = models.write(tmp_path / "m.safetensors", tensors)
    before = source.read_bytes()
    for how in ({"out": tmp_path / "o.safetensors"}, {"in_place": True}):
        with pytest.raises(BadInput, match=f"{LDM_K0}: holds NaN"):
            bake(source, [(models.adapter(), 1.0)], **how)
    with pytest.raises(BadInput, match="can't be compared"):
        find_adapter(source, models.adapter(), source)
    assert [p.name for p in tmp_path.iterdir()] == [source.name]
    assert source.read_bytes() == before


def test_outputs_that_stand_in_the_way(tmp_path):
    source = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    other = models.write(tmp_path / "o.safetensors", {"x": np.zeros(1)})
    (tmp_path / "link.safetensors").symlink_to(source)
    adapters = [(models.adapter(), 1.0)]
    with pytest.raises(BadInput, match="`force=True`"):
        bake(source, adapters, out=other)
    for same in (source, tmp_path / "link.safetensors"):
        with pytest.raises(BadInput, match="input itself"):
            bake(source, adapters, out=same, force=True)
    with pytest.raises(BadInput, match="named"):
        bake(source, adapters, out=tmp_path / "o.ckpt")
    with pytest.raises(BadInput, match="can't write"):
        bake(source, adapters, out=tmp_path / "no" / "o.safetensors")
    for undo in (source, tmp_path / "p.safetensors"):
        with pytest.raises(BadInput, match="undo file"):
            bake(source, adapters, out=tmp_path / "p.safetensors", undo=undo, force=True)
    with pytest.raises(BadInput, match="travels with the package"):
        bake("demo", adapters, in_place=True)
    for both in ({"out": None}, {"out": other, "in_place": True}):
        with pytest.raises(BadInput, match="either"):
            bake(source, adapters, **both)
    for weight in (0.0, float("nan"), float("inf")):
        with pytest.raises(BadInput, match="finite weight"):
            bake(source, [(models.adapter(), weight)], out=tmp_path / "p.safetensors")
    bake(source, adapters, out=other, force=True)
    assert LDM_K0 in read_tensors(other)[0]


def test_a_folder_that_holds_the_input_is_not_replaced(tmp_path):
    folder = models.write_folder(tmp_path / "folder")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match="would replace"):
        bake(folder / "unet", [(models.adapter(), 1.0)], out=folder, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_replaced_file_takes_its_sidecar_with_it(tmp_path, monkeypatch):
    a, b = models.adapter(name="a"), models.adapter(seed=1, leaves=("to_q",), name="b")
    source = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    out = models.write(tmp_path / "o.safetensors", models.ldm_tensors())
    monkeypatch.setattr("sdd_lora.checkpoint.in_place.insert_space", lambda *_: False)
    bake(out, [(a, 1.0)], in_place=True)
    assert sidecar_of(out).exists()
    bake(source, [(a, 1.0), (b, 1.0)], out=out, force=True)  # its to_k is what the sidecar knows
    (record,) = history_of_model(out)
    assert [known.name for known in record.adapters] == ["a", "b"]


def test_too_little_disk_is_seen_before_writing(tmp_path, monkeypatch):
    import shutil

    source = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    size = source.stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size - 1))
    with pytest.raises(SddLoraError, match="too little disk"):
        bake(source, [(models.adapter(), 1.0)], out=tmp_path / "o.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("foreign", ["thesis.txt", "unet/train.py", "checkpoint-500/notes.md"])
def test_force_deletes_no_folder_of_other_files(tmp_path, foreign):
    folder = models.write_folder(tmp_path / "model")
    adapters, out, undo = [(models.adapter(), 1.0)], tmp_path / "out", tmp_path / "undo"
    baked = bake(folder, adapters, out=tmp_path / "baked", undo=undo).output
    for _ in range(2):  # a model in a model's place
        bake(folder, adapters, out=out, force=True)
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_text("mine")
    for write in (
        lambda: bake(folder, adapters, out=out, force=True),
        lambda: unbake(baked, undo, out, force=True),
    ):
        with pytest.raises(BadInput):
            write()
    assert (out / foreign).read_text() == "mine"


def test_force_replaces_no_folder_that_only_looks_like_a_model(tmp_path):
    folder, mine = models.write_folder(tmp_path / "model"), tmp_path / "mine"
    (mine / "unet").mkdir(parents=True)
    (mine / "unet" / "data.json").write_text("{}")
    with pytest.raises(BadInput, match="`force=True` would delete"):
        bake(folder, [(models.adapter(), 1.0)], out=mine, force=True)
    assert (mine / "unet" / "data.json").exists()
    (mine / "unet" / "data.json").unlink()
    (mine / "unet").rmdir()
    bake(folder, [(models.adapter(), 1.0)], out=mine, force=True)  # an empty folder
    assert (mine / "unet" / "config.json").exists()
