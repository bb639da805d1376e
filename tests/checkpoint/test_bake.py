"""Baked files: exactly the edit, in every copy, and every other byte as it was."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import checkpoint_models as models

from sdd_lora import sd1 as names
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.factors import Factors
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.detect import find_adapter, history_of_model
from sdd_lora.checkpoint.history import HISTORY_KEY, UNKNOWN_DIGEST
from sdd_lora.checkpoint.layout import open_checkpoint
from sdd_lora.checkpoint.rounding import Rounding
from sdd_lora.checkpoint.undo import unbake
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import read_header, read_tensors

LDM_K0 = models.checkpoint_key(models.K0)


def tensors_of(path):
    return read_tensors(path)[0]


def expected(before, adapters, keys_of):
    """Key → W + Σ wᵢ·ΔWᵢ in fp64, rounded to the stored dtype."""
    sums = {}
    for adapter, weight in adapters:
        for module, part in adapter.factors.items():
            delta = weight * part.scale * (part.up.astype(np.float64) @ part.down)
            for key in keys_of(module):
                sums[key] = sums.get(key, 0) + delta
    return {
        key: (before[key].astype(np.float64) + delta).astype(before[key].dtype)
        for key, delta in sums.items()
    }


def require_exact(source, output, adapters, keys_of):
    before, after = tensors_of(source), tensors_of(output)
    edited = expected(before, adapters, keys_of)
    assert list(before) == list(after)
    for key, tensor in before.items():
        if key in edited:
            assert not np.array_equal(tensor, after[key]), key
            a, b = (x.astype(np.float64) for x in (after[key], edited[key]))
            step = np.abs(np.spacing(edited[key].astype(np.float32)))
            assert (np.abs(a - b) <= (step if tensor.dtype == np.float32 else 0)).all(), key
        else:
            assert tensor.tobytes() == after[key].tobytes(), key
    assert edited


def ldm_keys(ema=None):
    def keys_of(module):
        key = models.checkpoint_key(module)
        return [key] if ema is None or names.is_text(module) else [key, names.ema_keys(key)[ema]]

    return keys_of


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp8"])
@pytest.mark.parametrize("ema", [None, 0, 1])
def test_a_single_file_in_every_dtype_with_and_without_ema(tmp_path, dtype, ema):
    tensors = models.cast(models.ldm_tensors(ema is not None, ema or 0), dtype)
    source = models.write(tmp_path / "m.safetensors", tensors, {"format": "pt", "title": "a → b"})
    original = source.read_bytes()
    adapters = [
        (models.adapter(size=0.05, text=True, name="a"), 1.0),
        (models.adapter(rank=2, seed=1, size=0.05, leaves=("to_q", "to_k", "to_out.0")), -0.5),
    ]
    report = bake(source, adapters, out=tmp_path / "out.safetensors")
    require_exact(source, tmp_path / "out.safetensors", adapters, ldm_keys(ema))
    assert source.read_bytes() == original
    assert any("EMA" in copy for copy in report.copies) == (ema is not None)
    metadata = read_header(tmp_path / "out.safetensors").metadata
    assert metadata.pop(HISTORY_KEY)
    assert metadata == {"format": "pt", "title": "a → b"}
    with torch.no_grad():  # the library itself reads it
        from safetensors.torch import load_file

        assert load_file(tmp_path / "out.safetensors").keys() == tensors.keys()


def test_mixed_dtypes_inpainting_missing_parts_and_integers_stay(tmp_path):
    tensors = models.cast(models.ldm_tensors(), "fp16")
    tensors = {k: v for k, v in tensors.items() if not k.startswith("first_stage_model.")}
    conv = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[conv] = np.zeros((32, 9, 3, 3), np.float32)
    tensors[LDM_K0] = tensors[LDM_K0].astype(np.float32)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(77)[None]
    source = models.write(tmp_path / "m.safetensors", tensors)
    adapters = [(models.adapter(size=0.05), 1.0)]
    bake(source, adapters, out=tmp_path / "o.safetensors")
    require_exact(source, tmp_path / "o.safetensors", adapters, ldm_keys())
    assert read_header(tmp_path / "o.safetensors").metadata["format"] == "pt"


def test_the_data_keep_their_place_within_a_page(tmp_path):
    source = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    bake(source, [(models.adapter(), 1.0)], out=tmp_path / "o.safetensors")
    moved = read_header(tmp_path / "o.safetensors").data_start - read_header(source).data_start
    assert moved % 4096 == 0


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "diffusers"])
def test_unet_only_files(tmp_path, prefix):
    def name(key):
        return key if prefix == "diffusers" else prefix + names.to_ldm(key)

    tensors = {name(key): value for key, value in models.states()["unet"].items()}
    source = models.write(tmp_path / "m.safetensors", tensors)
    adapters = [(models.adapter(size=0.05), 1.0)]
    bake(source, adapters, out=tmp_path / "o.safetensors")
    require_exact(source, tmp_path / "o.safetensors", adapters, lambda m: [f"{name(m)}.weight"])
    with pytest.raises(BadInput, match="text encoder"):
        bake(source, [(models.adapter(text=True), 1.0)], out=tmp_path / "p.safetensors")


def test_adapters_of_every_form_give_the_same_bytes(tmp_path):
    source = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    adapter = models.adapter()
    outputs = set()
    for form in ("kohya", "peft", "ldm", "attn-procs"):
        adapter.save(tmp_path / f"{form}.safetensors", format=form, dtype="fp32")
        loaded = Adapter.load(tmp_path / f"{form}.safetensors")
        bake(source, [(loaded, 1.0)], out=tmp_path / "o.safetensors", force=True)
        outputs.add((tmp_path / "o.safetensors").read_bytes())
    assert len(outputs) == 1


def test_ema_drop(tmp_path):
    source = models.write(tmp_path / "m.safetensors", models.ldm_tensors(ema=True))
    report = bake(source, [(models.adapter(), 1.0)], out=tmp_path / "o.safetensors", ema="drop")
    after, before = tensors_of(tmp_path / "o.safetensors"), tensors_of(source)
    assert list(after) == [key for key in before if not key.startswith("model_ema.")]
    edited = expected(before, [(models.adapter(), 1.0)], ldm_keys())
    assert all(after[k].tobytes() == edited.get(k, before[k]).tobytes() for k in after)
    assert report.dropped == 688 and not any("EMA" in copy for copy in report.copies)
    for arguments in ({"undo": tmp_path / "u"}, {"in_place": True, "out": None}):
        with pytest.raises(BadInput, match="has no undo"):
            bake(
                source,
                [(models.adapter(), 1.0)],
                ema="drop",
                **{"out": tmp_path / "p.safetensors"} | arguments,
            )


def test_two_ema_copies_in_one_file_are_both_edited(tmp_path):
    tensors = models.ldm_tensors(ema=True) | models.ldm_tensors(ema=True, ema_prefix=1)
    source = models.write(tmp_path / "m.safetensors", tensors)
    adapters = [(models.adapter(size=0.05), 1.0)]
    report = bake(source, adapters, out=tmp_path / "o.safetensors")
    require_exact(
        source,
        tmp_path / "o.safetensors",
        adapters,
        lambda module: [(key := models.checkpoint_key(module)), *names.ema_keys(key)],
    )
    assert len(set(report.copies)) == 3
    report = bake(source, adapters, out=tmp_path / "d.safetensors", ema="drop")
    assert report.copies == ("unet: weights",) and report.dropped == 2 * 686 + 2


def test_an_incomplete_ema_copy_is_no_way_around_the_edit(tmp_path):
    tensors = models.ldm_tensors(ema=True)
    del tensors[names.ema_keys(LDM_K0)[0]]
    source = models.write(tmp_path / "m.safetensors", tensors)
    with pytest.raises(BadInput, match="EMA copy"):
        bake(source, [(models.adapter(), 1.0)], out=tmp_path / "o.safetensors")


def test_what_rounding_left_is_reported_and_warned_of(tmp_path):
    adapter = models.adapter(size=1e-5)
    for dtype, poor in (("fp32", False), ("bf16", True), ("fp8", True)):
        source = models.write(tmp_path / dtype, models.cast(models.ldm_tensors(), dtype))
        report = bake(source, [(adapter, 1.0)], out=tmp_path / f"{dtype}.safetensors")
        assert bool(report.warnings) == poor, dtype
        assert len(report.changes) == 32
        if poor:
            assert report.total.realised < 0.5 and "stochastic" in report.warnings[0]
    first = next(change for change in report.changes if change.module == models.K0)
    assert first.intended == pytest.approx(adapter.factors[models.K0].norm(), rel=1e-5)
    report = bake(
        tmp_path / "bf16",
        [(adapter, 1.0)],
        out=tmp_path / "s.safetensors",
        rounding=Rounding("stochastic", 3),
    )
    assert report.total.realised == pytest.approx(1, abs=0.2)


# Provenance


def test_the_history_names_adapters_and_survives_a_second_bake(tmp_path):
    source = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    a = Adapter(models.adapter().factors, {"name": "a", "concepts": ["bomb"], "recipe": {"x": 1}})
    b = models.adapter(seed=1, name="b")
    bake(source, [(a, 0.75)], out=tmp_path / "a.safetensors")
    report = bake(tmp_path / "a.safetensors", [(b, 1.0)], out=tmp_path / "ab.safetensors")
    assert "second time" in report.warnings[0]
    first, second = history_of_model(tmp_path / "ab.safetensors")
    assert (first.adapters[0].name, first.adapters[0].weight) == ("a", 0.75)
    assert first.adapters[0].concepts == ("bomb",) and first.adapters[0].recipe_sha256
    assert second.adapters[0].identity == b.identity
    assert find_adapter(tmp_path / "ab.safetensors", a).recorded == first.adapters[0]
    assert find_adapter(tmp_path / "a.safetensors", b).recorded is None


def test_baking_twice_is_refused_by_identity_stack_and_weights(tmp_path):
    from sdd_lora.adapter.algebra import resize, stack

    source = models.write(tmp_path / "m.safetensors", models.cast(models.ldm_tensors(), "fp16"))
    a, b = models.adapter(size=0.05, name="a"), models.adapter(seed=1, size=0.05, name="b")
    bake(source, [(a, 0.5)], out=tmp_path / "a.safetensors")
    a.save(tmp_path / "x.safetensors", format="peft", dtype="fp16")
    for again in (a, Adapter.load(tmp_path / "x.safetensors"), stack([(a, 1.0), (b, 1.0)])):
        with pytest.raises(BadInput, match=r"already, as a at weight 0\.5"):
            bake(tmp_path / "a.safetensors", [(again, 1.0)], out=tmp_path / "aa.safetensors")
    with pytest.raises(BadInput, match="given twice"):
        bake(source, [(a, 0.5), (a, 0.5)], out=tmp_path / "aa.safetensors")
    pair = stack([(a, 1.0), (b, 1.0)])
    c, d = models.adapter(seed=2, name="c"), models.adapter(seed=3, name="d")
    for more in (pair, stack([(pair, 0.5), (c, 1.0)]), resize(pair, rank=2).adapter):
        for given in ((a, more), (more, a), (more, stack([(a, 2.0), (d, 1.0)]))):
            with pytest.raises(BadInput, match="twice"):
                bake(source, [(x, 1.0) for x in given], out=tmp_path / "aa.safetensors")
        with pytest.raises(BadInput, match="already"):
            bake(tmp_path / "a.safetensors", [(more, 1.0)], out=tmp_path / "aa.safetensors")

    tensors, metadata = read_tensors(tmp_path / "a.safetensors")
    metadata.pop(HISTORY_KEY)
    bare = models.write(tmp_path / "bare.safetensors", tensors, metadata)
    with pytest.raises(BadInput, match=r"hold it at 0\.50"):
        bake(bare, [(a, 1.0)], out=tmp_path / "aa.safetensors", base=source)
    bake(bare, [(b, 1.0)], out=tmp_path / "ab.safetensors", base=source)
    bake(bare, [(a, 1.0)], out=tmp_path / "aa.safetensors")  # nothing to know it by


# Legacy files


@pytest.mark.parametrize("nesting", [0, 1, 2])
def test_legacy_checkpoints_become_safetensors(tmp_path, nesting):
    content = {k: torch.from_numpy(v.copy()) for k, v in models.ldm_tensors(ema=True).items()}
    strided = "model.diffusion_model.input_blocks.0.0.weight"
    content[strided] = content[strided].to(memory_format=torch.channels_last)
    assert not content[strided].is_contiguous()
    expected_tensors = {k: v.numpy().copy() for k, v in content.items()}
    for _ in range(nesting):
        content = {"state_dict": content, "epoch": 3}
    torch.save(content, tmp_path / "m.ckpt")
    adapters = [(models.adapter(), 1.0)]
    report = bake(tmp_path / "m.ckpt", adapters, out=tmp_path / "o.safetensors")
    after = tensors_of(tmp_path / "o.safetensors")
    edited = expected(expected_tensors, adapters, ldm_keys(0))
    assert after.keys() == expected_tensors.keys() and len(edited) == 64
    for key, tensor in expected_tensors.items():
        np.testing.assert_allclose(after[key], edited.get(key, tensor), rtol=1e-6, atol=1e-9)
        assert key in edited or after[key].tobytes() == tensor.tobytes()
    assert report.left_out == ("epoch",) * nesting
    for arguments in ({"in_place": True}, {"out": tmp_path / "p.safetensors", "undo": "u"}):
        with pytest.raises(BadInput, match="legacy"):
            bake(tmp_path / "m.ckpt", adapters, **arguments)


# Folders


def test_a_folder_keeps_everything_but_the_unets_tensors(tmp_path):
    source = models.write_folder(tmp_path / "m")
    adapters = [(models.adapter(size=0.05), 1.0)]
    report = bake(source, adapters, out=tmp_path / "o")
    unet = "unet/diffusion_pytorch_model.safetensors"
    require_exact(source / unet, tmp_path / "o" / unet, adapters, lambda m: [f"{m}.weight"])
    files = [p.relative_to(source) for p in source.rglob("*") if p.is_file()]
    assert len(files) > 8
    for file in files:
        same = (source / file).read_bytes() == (tmp_path / "o" / file).read_bytes()
        assert same == (file.as_posix() != unet)
    assert {p.relative_to(tmp_path / "o") for p in (tmp_path / "o").rglob("*") if p.is_file()} == {
        *files
    }
    assert report.output == tmp_path / "o"
    with pytest.raises(BadInput, match="inside"):
        bake(source, adapters, out=source / "o")
    with pytest.raises(BadInput, match="expected a folder's name"):
        bake(source, adapters, out=tmp_path / "o.safetensors")


@pytest.mark.parametrize("here", [".", "../unet", ".."])
def test_the_folder_that_one_is_in(tmp_path, monkeypatch, here):
    root = models.write_folder(tmp_path / "m")
    monkeypatch.chdir(root / "unet")
    model = root if here == ".." else root / "unet"
    original = (root / "unet/diffusion_pytorch_model.safetensors").read_bytes()
    report = bake(here, [(models.adapter(), 1.0)], in_place=True)
    assert report.undo.resolve() == model.with_name(f"{model.name}.undo1")
    unbake(Path(here), report.undo, in_place=True)
    assert (root / "unet/diffusion_pytorch_model.safetensors").read_bytes() == original


def test_text_encoder_parts_land_in_a_folders_text_encoder(tmp_path):
    source = models.write_folder(tmp_path / "m")
    bake(source, [(models.adapter(text=True), 1.0)], out=tmp_path / "o")
    file = "text_encoder/model.safetensors"
    assert (source / file).read_bytes() != (tmp_path / "o" / file).read_bytes()
    assert len(history_of_model(tmp_path / "o")) == 1


def test_every_variant_and_only_touched_shards_are_written(tmp_path):
    source = models.write_folder(tmp_path / "m", shard="2MB")
    models.write_folder(source, variant="fp16")
    adapters = [(models.adapter(leaves=("to_k",)), 1.0)]
    bake(source, adapters, out=tmp_path / "o")
    edited = 0
    for file in sorted((source / "unet").glob("*.safetensors")):
        before, after = tensors_of(file), tensors_of(tmp_path / "o" / "unet" / file.name)
        touched = [key for key in before if "attn2.to_k" in key]
        linked = (tmp_path / "o" / "unet" / file.name).samefile(file)
        assert linked == (not touched)
        assert [k for k in before if before[k].tobytes() != after[k].tobytes()] == touched
        edited += len(touched)
    assert edited == 32  # 16 in the shards, 16 in the variant


def test_pickled_weights_of_a_folder(tmp_path):
    source = models.write_folder(tmp_path / "m")
    safe = source / "unet" / "diffusion_pytorch_model.safetensors"
    state = {k: torch.from_numpy(v.copy()) for k, v in tensors_of(safe).items()}
    torch.save(state, safe.with_suffix(".bin"))
    adapters = [(models.adapter(), 1.0)]
    (source / "unet" / "diffusion_flax_model.msgpack").write_bytes(b"x")
    (source / "text_encoder" / "pytorch_model.bin").write_bytes(b"PK")
    report = bake(source, adapters, out=tmp_path / "both")
    assert set(report.left_out) == {
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_flax_model.msgpack",
    }
    assert (tmp_path / "both/text_encoder/pytorch_model.bin").exists()  # not edited: it stays
    assert not (tmp_path / "both/unet/diffusion_pytorch_model.bin").exists()
    with pytest.raises(BadInput, match="another copy"):
        bake(source, adapters, in_place=True)
    safe.unlink()
    bake(source, adapters, out=tmp_path / "pickled")
    one, other = (tmp_path / d / "unet" / safe.name for d in ("both", "pickled"))
    assert {k: v.tobytes() for k, v in tensors_of(one).items()} == {
        k: v.tobytes() for k, v in tensors_of(other).items()
    }


def test_second_copies_in_a_folder_are_left_out_and_listed(tmp_path):
    source = models.write_folder(tmp_path / "m")
    single = models.write(source / "m-pruned.safetensors", models.ldm_tensors())
    (source / "m.ckpt").write_bytes(b"PK and no more")
    for name in ("unet/model.onnx", "unet/model.onnx_data", "text_encoder/model.onnx"):
        (source / name).write_bytes(b"x")
    models.adapter().save(source / "pytorch_lora_weights.safetensors")
    vae = {"first_stage_model.x.weight": np.ones(2, np.float32)}
    models.write(source / "vae.safetensors", vae)
    adapters = [(models.adapter(), 1.0)]
    report = bake(source, adapters, out=tmp_path / "o")
    stale = {single.name, "m.ckpt", "unet/model.onnx", "unet/model.onnx_data"}
    assert set(report.left_out) == stale
    for name in stale:
        assert not (tmp_path / "o" / name).exists()
    for kept in ("pytorch_lora_weights.safetensors", "vae.safetensors", "text_encoder/model.onnx"):
        assert (tmp_path / "o" / kept).exists()
    with pytest.raises(BadInput, match="another copy"):
        bake(source, adapters, in_place=True)


def test_a_hub_caches_links_are_followed(tmp_path):
    real = models.write_folder(tmp_path / "blobs")
    source = tmp_path / "snapshot"
    for file in [p for p in real.rglob("*") if p.is_file()]:
        link = source / file.relative_to(real)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    bake(source, [(models.adapter(), 1.0)], out=tmp_path / "o")
    assert not any(p.is_symlink() for p in (tmp_path / "o").rglob("*"))
    with pytest.raises(BadInput, match="linked"):
        bake(source, [(models.adapter(), 1.0)], in_place=True)


def test_no_torch_is_imported(tmp_path):
    source = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    models.adapter().save(tmp_path / "a.safetensors")
    code = (
        "import sys; from sdd_lora import Adapter, bake; "
        f"bake({str(source)!r}, [(Adapter.load({str(tmp_path / 'a.safetensors')!r}), 1.0)], "
        f"out={str(tmp_path / 'o.safetensors')!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_same_call_gives_the_same_bytes(tmp_path):
    source = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    for name in "ab":
        bake(source, [(models.adapter(), 1.0)], out=tmp_path / f"{name}.safetensors")
    a, b = (tmp_path / f"{name}.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()
    entry = json.loads(read_header(a).metadata[HISTORY_KEY])[0]
    assert UNKNOWN_DIGEST not in (entry["before"], entry["after"])
    assert open_checkpoint(a).weight_sets[0].label == "weights"


def test_an_adapter_that_changes_nothing_is_warned_of_and_not_recorded(tmp_path):
    source = models.write(tmp_path / "m.safetensors", models.ldm_tensors())
    idle = Adapter(
        {models.K0: Factors(np.ones((1, 128), np.float32), np.zeros((32, 1), np.float32), 1.0)}
    )
    out, undo = tmp_path / "o.safetensors", tmp_path / "undo"
    report = bake(source, [(idle, 1.0)], out, undo=undo)
    assert not report.changed and not report.adapters and history_of_model(out) == ()
    assert any("changes nothing" in warning for warning in report.warnings)
    unbake(out, undo, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()
    both = bake(source, [(idle, 1.0), (models.adapter(name="b"), 1.0)], out, force=True)
    assert both.changed and [adapter.name for adapter in both.adapters] == ["b"]


def test_an_edit_that_rounding_swallows_is_warned_of(tmp_path):
    tensors = models.cast(models.ldm_tensors(), "bf16")
    source = models.write(tmp_path / "m.safetensors", tensors)
    report = bake(source, [(models.adapter(size=1e-25), 1.0)], tmp_path / "o.safetensors")
    assert not report.changed and any("changes nothing" in w for w in report.warnings)
