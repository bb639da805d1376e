"""The way back is exact, and only taken from where the way there led."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import checkpoint_models as models
from support.checkpoint_models import contents, write_protect

from sdd_lora.checkpoint import in_place
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.copying import insert_space
from sdd_lora.checkpoint.detect import history_of_model
from sdd_lora.checkpoint.history import sidecar_of
from sdd_lora.checkpoint.journal import journal_of
from sdd_lora.checkpoint.undo import unbake
from sdd_lora.checkpoint.undo_file import UndoFile
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import read_header, read_tensors

A, B = models.adapter(name="a"), models.adapter(seed=1, leaves=("to_q",), name="b")


def padded(path: Path, room_bytes: int) -> Path:
    """The same file with spaces at the end of its header."""
    import struct

    start = read_header(path).data_start
    content = path.read_bytes()
    path.write_bytes(
        struct.pack("<Q", start - 8 + room_bytes)
        + content[8:start]
        + b" " * room_bytes
        + content[start:]
    )
    return path


def test_a_copy_is_unbaked_to_a_new_file_and_in_place(source, tmp_path):
    out, undo = tmp_path / "o.safetensors", tmp_path / "m.undo"
    bake(source, [(A, 1.0), (B, 0.5)], out=out, undo=undo)
    assert out.read_bytes() != source.read_bytes()
    unbake(out, undo, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()
    unbake(out, undo, in_place=True)
    assert out.read_bytes() == source.read_bytes()
    assert not journal_of(out).exists()


def test_the_undo_file_holds_no_more_than_the_edited_tensors(source, tmp_path):
    bake(source, [(A, 1.0)], out=tmp_path / "o.safetensors", undo=tmp_path / "m.undo")
    touched = 2 * 2 * sum(int(np.prod(f.weight_shape)) for f in A.factors.values())
    overhead = (tmp_path / "m.undo").stat().st_size - touched
    assert 0 < overhead < 3 * read_header(source).data_start


@pytest.mark.parametrize("where", ["space in the header", "space inserted", "a sidecar"])
def test_in_place(source, tmp_path, monkeypatch, where):
    if where == "space in the header":
        padded(source, 4000)
    if where == "a sidecar":
        monkeypatch.setattr(in_place, "insert_space", lambda file, size: False)
    elif where == "space inserted" and not inserts(tmp_path):
        pytest.skip("this file system can't insert space")
    original, size = source.read_bytes(), source.stat().st_size
    expected = tmp_path / "o.safetensors"
    bake(source, [(A, 1.0)], out=expected)
    report = bake(source, [(A, 1.0)], in_place=True)
    assert {k: v.tobytes() for k, v in read_tensors(source)[0].items()} == {
        k: v.tobytes() for k, v in read_tensors(expected)[0].items()
    }
    grown = source.stat().st_size - size
    assert grown == (4096 if where == "space inserted" else 0)
    assert sidecar_of(source).exists() == (where == "a sidecar")
    (entry,) = history_of_model(source)
    assert entry.adapters[0].name == "a" and not journal_of(source).exists()
    with pytest.raises(BadInput, match="already"):
        bake(source, [(A, 1.0)], in_place=True)
    unbake(source, report.undo, in_place=True)
    assert source.read_bytes() == original
    assert not sidecar_of(source).exists()
    bake(source, [(A, 1.0)], in_place=True)


def inserts(folder: Path) -> bool:
    probe = folder / "probe"
    probe.write_bytes(bytes(8192))
    with open(probe, "r+b") as file:
        return insert_space(file, 4096)


@pytest.mark.parametrize("inserting", [True, False])
def test_two_bakes_in_place_come_off_in_reverse_order(source, monkeypatch, inserting):
    if not inserting:
        monkeypatch.setattr(in_place, "insert_space", lambda file, size: False)
    original = source.read_bytes()
    first = bake(source, [(A, 1.0)], in_place=True)
    between = source.read_bytes()
    second = bake(source, [(B, 1.0)], in_place=True)
    assert first.undo != second.undo
    assert [b.adapters[0].name for b in history_of_model(source)] == ["a", "b"]
    with pytest.raises(BadInput, match="isn't"):
        unbake(source, first.undo, in_place=True)
    unbake(source, second.undo, in_place=True)
    assert source.read_bytes() == between
    assert [b.adapters[0].name for b in history_of_model(source)] == ["a"]
    unbake(source, first.undo, in_place=True)
    assert source.read_bytes() == original


def test_unbaking_where_inserted_space_can_not_be_taken_away(source, monkeypatch, tmp_path):
    """As on another file system that the model was moved to."""
    if not inserts(tmp_path):
        pytest.skip("this file system can't insert space")
    original = source.read_bytes()
    report = bake(source, [(A, 1.0)], in_place=True)
    monkeypatch.setattr("sdd_lora.checkpoint.undo_file.remove_space", lambda file, size: False)
    unbake(source, report.undo, in_place=True)
    assert source.read_bytes() == original


@pytest.mark.parametrize("in_place", [True, False])
def test_a_sharded_folder(folder, tmp_path, in_place):
    original = contents(folder)
    undo = tmp_path / "u"
    out = None if in_place else tmp_path / "o"
    bake(folder, [(A, 1.0)], out=out, in_place=in_place, undo=undo)
    baked = folder if in_place else out
    assert contents(baked) != original
    assert len(UndoFile(undo).files) > 1
    unbake(baked, undo, tmp_path / "back")
    assert contents(tmp_path / "back") == original
    unbake(baked, undo, in_place=True)
    assert contents(baked) == original


def test_a_sidecar_of_another_file_is_not_believed(source, monkeypatch, tmp_path):
    shutil.copy(source, tmp_path / "fresh")
    monkeypatch.setattr(in_place, "insert_space", lambda file, size: False)
    bake(source, [(A, 1.0)], in_place=True)
    shutil.copy(tmp_path / "fresh", source)  # downloaded again
    assert history_of_model(source) == ()


# Refusals


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("key", ["touched", "other", "other, beyond its beginning"])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_model_that_has_changed_since_is_refused(source, tmp_path, key, in_place):
    undo, out = tmp_path / "u", tmp_path / "o.safetensors"
    bake(source, [(A, 1.0)], out=None if in_place else out, in_place=in_place, undo=undo)
    baked = source if in_place else out
    name = models.checkpoint_key(models.K0)
    if key != "touched":
        name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    header = read_header(baked)
    beyond = 5000 if "beyond" in key else 0
    flip(baked, header.data_start + header.tensors[name].start + beyond)
    if in_place and beyond:
        return  # an in-place bake reads no more than the beginnings of other tensors
    before = baked.read_bytes()
    with pytest.raises(BadInput, match="changed since"):
        unbake(baked, undo, in_place=True)
    assert baked.read_bytes() == before


def test_what_is_no_undo_of_it_is_refused(source, tmp_path):
    out, undo = tmp_path / "o.safetensors", tmp_path / "u"
    bake(source, [(A, 1.0)], out=out, undo=undo)
    other = models.cast(models.ldm_tensors(ema=True), "fp16")
    other["first_stage_model.quant_conv.bias"] = other["first_stage_model.quant_conv.bias"] + 1
    models.write(tmp_path / "other.safetensors", other, {"format": "pt"})
    bake(tmp_path / "other.safetensors", [(A, 1.0)], out=tmp_path / "oo.safetensors")
    for model, file, named in [
        (source, undo, "isn't of its last bake"),  # never baked
        (tmp_path / "oo.safetensors", undo, "changed since"),
        (out, source, "expected an undo file"),
        (out, tmp_path / "nothing", "can't be read"),
        (tmp_path / "nothing", undo, "no such file"),
    ]:
        with pytest.raises(BadInput, match=named):
            unbake(model, file, in_place=True)
    with pytest.raises(BadInput, match="input itself"):
        unbake(out, undo, out, force=True)
    with pytest.raises(BadInput, match="`force=True`"):
        unbake(out, undo, source)
    with pytest.raises(BadInput, match="either"):
        unbake(out, undo)


@pytest.mark.parametrize(
    "text",
    [
        '{"files": []}',
        '{"files": [{"name": "m", "size": 1, "sidecar": 3, "tensors": [], "rest": ""}]}',
        '{"files": [{"name": "m", "size": "x", "sidecar": null, "tensors": [], "rest": ""}]}',
        '{"files": [{"name": 3, "size": 1, "sidecar": null, "tensors": [], "rest": ""}]}',
        "[",
        '{"files": 3}',
        '{"files": [{"name": "../x"}]}',
        '{"files": [{"name": "../x", "size": 1, "sidecar": null, "tensors": [], "rest": ""}]}',
        '{"files": [{"name": "m", "size": 1, "sidecar": null, "tensors": ["x"], "rest": ""}]}',
    ],
)
def test_hostile_undo_files(tmp_path, source, text):
    bad = models.write(tmp_path / "u", {"0/header": np.zeros(8, np.uint8)}, {"sdd_lora.undo": text})
    with pytest.raises(BadInput, match="undo file") as error:
        unbake(source, bad, in_place=True)
    assert "\n" not in str(error.value)


def test_linked_files_are_not_changed_in_place(source, tmp_path):
    out, undo = tmp_path / "o.safetensors", tmp_path / "u"
    bake(source, [(A, 1.0)], out=out, undo=undo)
    os.link(source, tmp_path / "second name")
    with pytest.raises(BadInput, match="linked"):
        bake(source, [(A, 1.0)], in_place=True)
    os.link(out, tmp_path / "another name")
    before = contents(tmp_path)
    with pytest.raises(BadInput, match="linked"):
        unbake(out, undo, in_place=True)
    assert contents(tmp_path) == before


def test_a_linked_component_is_not_changed_in_place(folder, tmp_path):
    (folder / "unet").rename(tmp_path / "shared")
    (folder / "unet").symlink_to(tmp_path / "shared")
    before = contents(tmp_path)
    with pytest.raises(BadInput, match="linked"):
        bake(folder, [(A, 1.0)], in_place=True)
    assert contents(tmp_path) == before


def test_an_undo_file_that_would_be_lost_is_refused(source, folder, tmp_path):
    (tmp_path / "o").mkdir()
    out = tmp_path / "o.safetensors"
    before = contents(tmp_path)
    for model, named, undo in [
        (folder, {"out": tmp_path / "o"}, tmp_path / "o" / "u"),
        (folder, {"out": tmp_path / "o"}, folder / "unet" / "u"),
        (folder, {"in_place": True}, folder / "u"),
        (folder, {"in_place": True}, journal_of(folder)),
        (source, {"in_place": True}, journal_of(source)),
        (source, {"in_place": True}, tmp_path / "o" / ".." / journal_of(source).name),
        (source, {"out": out}, journal_of(source)),
        (source, {"out": out}, journal_of(out)),
        (source, {"out": out}, out),
    ]:
        with pytest.raises(BadInput, match="undo file"):
            bake(model, [(A, 1.0)], undo=undo, force=True, **named)
    assert contents(tmp_path) == before


def test_a_folder_is_not_unbaked_into_itself(folder, tmp_path):
    bake(folder, [(A, 1.0)], out=tmp_path / "o", undo=tmp_path / "u")
    before = contents(tmp_path / "o")
    with pytest.raises(BadInput, match="inside"):
        unbake(tmp_path / "o", tmp_path / "u", tmp_path / "o" / "back")
    assert contents(tmp_path / "o") == before


def test_what_is_read_is_not_replaced_by_what_is_unbaked(source, folder, tmp_path):
    bake(source, [(A, 1.0)], out=tmp_path / "o.safetensors", undo=tmp_path / "u")
    bake(folder / "unet", [(A, 1.0)], in_place=True, undo=tmp_path / "v")
    before = contents(tmp_path)
    for model, undo, out in [
        (tmp_path / "o.safetensors", tmp_path / "u", tmp_path / "u"),
        (folder / "unet", tmp_path / "v", folder),
    ]:
        with pytest.raises(BadInput, match="would replace"):
            unbake(model, undo, out, force=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_read_only_model_is_refused_before_anything_is_written(
    source, folder, tmp_path, monkeypatch, kind
):
    model = source if kind == "file" else folder
    report = bake(model, [(A, 1.0)], in_place=True)
    undo, last = report.undo, report.changes[-1].file
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        write_protect(patch, last)
        with pytest.raises(BadInput, match="can't be changed in place: Permission"):
            bake(model, [(models.adapter(seed=2), 1.0)], in_place=True)
        with pytest.raises(BadInput, match="can't be changed in place: Permission"):
            unbake(model, undo, in_place=True)
    assert contents(tmp_path) == before
    unbake(model, undo, in_place=True)


@pytest.mark.skipif(os.name == "nt", reason="fsync of folders and flock")
def test_a_share_without_fsync_and_locks(source, folder, tmp_path, monkeypatch):
    import fcntl

    def without_fsync(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def without_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(os, "fsync", without_fsync)
    monkeypatch.setattr(fcntl, "flock", without_locks)
    for model in (source, folder):
        original = contents(model)
        report = bake(model, [(A, 1.0)], in_place=True)
        assert contents(model) != original
        unbake(model, report.undo, in_place=True)
        assert contents(model) == original
        out, undo = tmp_path / f"o{model.suffix}", tmp_path / f"undo{model.suffix}"
        bake(model, [(A, 1.0)], out=out, undo=undo)
        unbake(out, undo, tmp_path / f"back{model.suffix}")
        assert list(contents(tmp_path / f"back{model.suffix}").values()) == list(original.values())
