"""The adapter verbs from the command line: exit codes, JSON, and nothing written on refusal."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support import checkpoint_models as models
from support.adapter_making import KINDS, TO_K, distance, random_adapter
from support.hub_stand_in import hub  # noqa: F401

from sdd_lora import sd1 as names
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.io.safetensors import read_header


@pytest.fixture
def a(tmp_path):
    return random_adapter(1, alpha=2.0, concepts=["bomb"]).save(tmp_path / "a.safetensors")


@pytest.fixture
def b(tmp_path):
    return random_adapter(2, 6, KINDS).save(tmp_path / "b.safetensors", dtype="fp32")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tensors = models.cast(models.ldm_tensors(ema=True), "fp16")
    return models.write(tmp_path_factory.mktemp("model") / "model.safetensors", tensors)


def test_inspect_tells_adapters_from_checkpoints(ask, call, a, model):
    adapter, checkpoint = ask("inspect", a, model)["files"]
    assert adapter["kind"] == "adapter"
    assert adapter["form"] == "kohya"
    assert adapter["modules"] == {"attn2.to_k": 16, "attn2.to_v": 16}
    assert adapter["metadata"]["concepts"] == ["bomb"]
    assert adapter["autov2"] == adapter["sha256"][:10]
    assert checkpoint["kind"] == "checkpoint"
    assert checkpoint["layout"] == "ldm"
    assert checkpoint["ema"] is True
    assert checkpoint["missing"] == []
    text = call("inspect", a, model).out
    assert "concepts: bomb" in text
    assert "copies: weights, EMA copy" in text


def test_inspect_names_the_code_in_a_pickle(ask, call, tmp_path):
    class Code:
        def __reduce__(self):
            return os.system, ("true",)

    weight = torch.zeros(320, 4, 3, 3)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    torch.save({"state_dict": {key: weight}, "callback": Code()}, tmp_path / "m.ckpt")
    (found,) = ask("inspect", tmp_path / "m.ckpt")["files"]
    assert found["code_in_pickle"] == [f"{os.system.__module__}.system"]
    assert "system" in call("inspect", tmp_path / "m.ckpt").out


def test_inspect_reads_tensors_on_request(ask, a, b, model):
    adapter, checkpoint = ask("inspect", b, model, "--norms")["files"]
    expected = Adapter.load(b).factors[TO_K].norm()
    assert adapter["norms"][TO_K] == pytest.approx(expected)
    assert len(checkpoint["norms"]) == 2 * 64
    weight = models.states()["unet"][f"{TO_K}.weight"].astype(np.float16).astype(np.float64)
    assert checkpoint["norms"][f"weights: {TO_K}"] == pytest.approx(np.linalg.norm(weight))
    assert "norms" not in ask("inspect", a)["files"][0]


def test_inspect_imports_no_torch(a, model):
    for arguments in (["inspect", str(a), str(model)], ["verify", str(a), "--model", str(model)]):
        program = (
            "import sys; from sdd_lora.cli import app\n"
            f"try: app({arguments!r})\n"
            "except SystemExit as end: assert end.code == 0\n"
            "assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_convert_keeps_the_delta_and_the_dtype(ask, call, b, tmp_path):
    for form in ("peft", "ldm", "kohya"):
        out = tmp_path / f"{form}.safetensors"
        written = ask("convert", b, "-o", out, "--to", form)
        assert (written["form"], written["dtype"]) == (form, "fp32")
        assert distance(Adapter.load(b), Adapter.load(out)) < 1e-6
    half = tmp_path / "half.safetensors"
    assert ask("convert", b, "-o", half, "--dtype", "bf16")["dtype"] == "bf16"
    assert {info.dtype for info in read_header(half).tensors.values()} == {"BF16", "F32"}
    printed = call("convert", b, "-o", tmp_path / "no", "--to", "attn-procs", code=2)
    assert "attn-procs holds attention modules alone" in printed.err
    assert not (tmp_path / "no").exists()


def test_legacy_pickles_are_converted_and_not_inspected(ask, call, b, tmp_path):
    adapter, old = Adapter.load(b), tmp_path / "old.pt"
    tensors = {k: torch.from_numpy(v) for k, v in adapter.to_state_dict("kohya").items()}
    torch.save(tensors, old)
    for verb in ("inspect", "verify"):
        assert "convert it first" in call(verb, old, code=2).err
    assert ask("convert", old, "-o", tmp_path / "new.safetensors")["dtype"] == "fp32"
    assert distance(adapter, Adapter.load(tmp_path / "new.safetensors")) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pickle_from_before_torch_1_6_is_converted_in_its_dtype(ask, a, tmp_path, dtype):
    adapter, old = Adapter.load(a), tmp_path / "old.pt"
    tensors = {k: torch.from_numpy(v).to(dtype) for k, v in adapter.to_state_dict("kohya").items()}
    torch.save(tensors, old, _use_new_zipfile_serialization=False)
    out = tmp_path / "new.safetensors"
    expected = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    assert ask("convert", old, "-o", out)["dtype"] == expected
    assert distance(Adapter.load(old), Adapter.load(out)) == 0
    assert ask("resize", old, "-o", tmp_path / "r.safetensors", "--rank", 1)["dtype"] == expected


def test_an_output_that_exists_is_refused(call, a, tmp_path):
    before = a.read_bytes()
    for arguments in (["convert", a], ["resize", a, "--rank", 1], ["stack", a]):
        assert "exists already" in call(*arguments, "-o", a, code=2).err
    assert a.read_bytes() == before
    call("resize", a, "--rank", 2, "-o", a, "--force")
    assert Adapter.load(a).rank == 2


def test_an_output_named_like_a_pickle_is_refused(call, a, model, tmp_path):
    for arguments in (
        ["convert", a],
        ["resize", a, "--rank", 1],
        ["stack", a],
        ["extract", model, "--base", model, "--rank", 1],
    ):
        printed = call(*arguments, "-o", tmp_path / "x.pt", "--force", code=2)
        assert "name it x.safetensors" in printed.err
    assert list(tmp_path.iterdir()) == [a]


def test_a_disk_without_room_for_the_sidecar_takes_no_adapter(call, a, tmp_path, monkeypatch):
    text = "x" * 100_000  # more than is buffered

    class Full(io.FileIO):
        def write(self, data):
            if bytes(data).startswith(b"xxx"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr("sdd_lora.adapter.card.sidecar_text", lambda adapter: text)
    monkeypatch.setattr(os, "fdopen", Full)
    printed = call("convert", a, "-o", tmp_path / "o.safetensors", code=1)
    assert "o.json: not written: No space left" in printed.err
    assert list(tmp_path.iterdir()) == [a]


def test_every_verb_writes_the_sidecar(ask, call, a, model, tmp_path):
    """`<name>.json` beside the file, where A1111 and InvokeAI look; it is an output like others."""
    tuned = tmp_path / "tuned.safetensors"
    call("bake", model, a, "-o", tuned)
    said = {
        "convert": (["convert", a], "Trained to keep Stable Diffusion 1.x from drawing: bomb."),
        "resize": (["resize", a, "--rank", 2], "Trained to keep"),
        "stack": (["stack", a, f"{a}:0.5"], "Contains random-1 at weight 0.5."),
        "extract": (
            ["extract", tuned, "--base", model, "--rank", 1],
            "What tuned.safetensors changed",
        ),
    }
    for name, (arguments, text) in said.items():
        sidecar = tmp_path / f"{name}.json"
        written = ask(*arguments, "-o", tmp_path / f"{name}.safetensors")
        assert written["sidecar"] == str(sidecar)
        content = json.loads(sidecar.read_text("utf-8"))
        assert text in content["description"] + content["notes"]
        (tmp_path / f"{name}.safetensors").unlink()
        printed = call(*arguments, "-o", tmp_path / f"{name}.safetensors", code=2)
        assert f"{name}.json: exists already" in printed.err
        assert not (tmp_path / f"{name}.safetensors").exists()
        call(*arguments, "-o", tmp_path / f"{name}.safetensors", "--force")
    printed = call("convert", a, "-o", tmp_path / "name.json", code=2)
    assert "two outputs are one file" in printed.err
    assert not (tmp_path / "name.json").exists()


def test_a_foreign_file_of_which_nothing_is_known_gets_no_sidecar(ask, tmp_path):
    foreign = tmp_path / "f.safetensors"
    save_file(random_adapter(modules=(TO_K,)).to_state_dict("kohya"), foreign)
    mine = tmp_path / "o.json"
    mine.write_text('{"activation text": "by somebody"}')
    out = tmp_path / "o.safetensors"
    assert ask("convert", foreign, "-o", out, "--force")["sidecar"] is None
    assert mine.read_text() == '{"activation text": "by somebody"}'


def test_resize_says_what_it_costs(ask, call, a, tmp_path):
    out = tmp_path / "r.safetensors"
    written = ask("resize", a, "-o", out, "--rank", 2)
    assert written["rank"] == Adapter.load(out).rank == 2
    assert 0.5 < written["relative_error"] < 0.9
    assert written["modules"].keys() == Adapter.load(a).factors.keys()
    text = call("resize", a, "-o", tmp_path / "e.safetensors", "--energy", 0.5).out
    assert "relative error in all" in text
    for wrong in ([], ["--rank", 1, "--energy", 0.5], ["--energy", 2]):
        assert call("resize", a, "-o", tmp_path / "no", *wrong, code=2).err
    assert not (tmp_path / "no").exists()


def test_rank_1_of_sd15_takes_about_200_kB(ask, tmp_path):  # noqa: N802
    big = random_adapter(widths=names.SD15).save(tmp_path / "big.safetensors")
    written = ask("resize", big, "-o", tmp_path / "small.safetensors", "--rank", 1)
    assert 190_000 < written["bytes"] < 220_000  # kohya's format has no rank of 1


def test_convert_writes_the_folder_that_peft_reads(ask, call, a, tmp_path):
    folder = tmp_path / "for-peft"
    written = ask("convert", a, "-o", folder, "--to", "peft")
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert written["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert ask("inspect", folder)["files"][0]["form"] == "peft-folder"
    assert Adapter.load(folder).identity == Adapter.load(a).identity
    call("convert", folder, "-o", tmp_path / "b.safetensors")
    (folder / "thesis.txt").write_text("mine")
    assert "thesis" in call("convert", a, "-o", folder, "--to", "peft", "--force", code=2).err


def test_stack_sums_and_reports(ask, call, a, b, tmp_path):
    out, picture = tmp_path / "s.safetensors", tmp_path / "s.png"
    found = ask("stack", a, f"{b}:-0.5", "-o", out, "--dtype", "fp32", "--heat-map", picture)
    delta = Adapter.load(a).factors[TO_K].delta() - 0.5 * Adapter.load(b).factors[TO_K].delta()
    np.testing.assert_allclose(Adapter.load(out).factors[TO_K].delta(), delta, atol=1e-6)
    assert found["rank"] == 10
    report = found["interference"]
    assert report["weights"] == [1.0, -0.5]
    assert report["cosine"][0][0] == 1.0
    assert len(report["modules"]) == 46
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert Adapter.load(out).metadata["merged_from"][1]["weight"] == -0.5

    twice = call("stack", a, a, "-o", tmp_path / "t.safetensors", "--rank", 4)
    assert "overdrive: 32 of 32 modules" in twice.err
    assert "2.0 times" in twice.err
    assert "cut to rank 4: relative error 0.0" in twice.out
    assert "random-1 and random-1     +1.000" in twice.out


def test_a_stack_and_its_heat_map_are_written_both_or_neither(call, a, tmp_path):
    out = tmp_path / "s.safetensors"
    for same in (out, tmp_path / "." / "s.safetensors"):
        assert (
            "two outputs are one file"
            in call("stack", a, "-o", out, "--heat-map", same, code=2).err
        )
    for picture in (tmp_path / "absent" / "x.png", tmp_path, tmp_path / "s.json"):
        assert call("stack", a, "-o", out, "--heat-map", picture, "--force", code=2).err
    absent = tmp_path / "absent" / "s.safetensors"
    assert call("stack", a, "-o", absent, "--heat-map", tmp_path / "x.png", code=2).err
    assert list(tmp_path.iterdir()) == [a]


@pytest.fixture
def read_only(tmp_path):
    """A folder in which nothing can be made: by its mode, or for root, whom no mode stops, the
    kernel's own.
    """
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        folder = Path("/sys")
        if not folder.is_dir():
            pytest.skip("runs as root, and there is no /sys")
    yield folder


def test_a_read_only_folder_takes_nothing(call, hub, a, read_only, tmp_path):  # noqa: F811
    out = read_only / "sdd-lora-x.safetensors"
    before = sorted(tmp_path.iterdir())
    here = tmp_path / "s.safetensors"
    for arguments in (
        ["convert", a, "-o", out],
        ["resize", a, "--rank", 1, "-o", out],
        ["stack", a, "-o", out],
        ["stack", a, "-o", out, "--heat-map", tmp_path / "s.png"],
        ["stack", a, "-o", here, "--heat-map", read_only / "sdd-lora-x.png"],
    ):
        assert "can't write there: " in call(*arguments, code=2).err
        assert not out.exists()
        assert sorted(tmp_path.iterdir()) == before
    hub.repositories["me/x"] = {"adapter.safetensors": a.read_bytes()}
    pulled = read_only / "sdd-lora-x"
    assert "can't write there: " in call("pull", "me/x", "-o", pulled, code=2).err
    assert not pulled.exists()


def test_verify_says_who_loads_it_and_whether_it_fits(ask, call, a, b, model, tmp_path):
    found = ask("verify", a, "--model", model)
    assert found["sound"]
    assert found["fits"]
    assert not found["presence"]["present"]
    assert [name for name, v in found["loaders"].items() if v["loads"]] == ["diffusers"]
    assert ask("verify", b, "--model", model)["fits"]

    big = random_adapter(widths=names.SD15).save(tmp_path / "big.safetensors")
    wrong = ask("verify", big, "--model", model, code=1)
    assert len(wrong["misfits"]) == 32
    assert wrong["misfits"][0].endswith("the weight is (32, 128), the delta (320, 768)")
    assert "does NOT fit" in call("verify", big, "--model", model, code=1).out

    save_file({f"{TO_K}.lora_A.weight": np.ones((1, 128), np.float32)}, tmp_path / "half")
    assert "the factor 'up' is missing" in call("verify", tmp_path / "half", code=2).err


def test_verify_finds_an_adapter_in_a_model(ask, call, a, b, model, tmp_path):
    baked = tmp_path / "baked.safetensors"
    call("bake", model, f"{a}:0.5", "-o", baked)
    assert "random-1 at weight 0.5" in call("verify", baked).out
    assert "nothing is recorded" in call("verify", model).out
    assert ask("verify", a, "--model", baked, "--base", model)["presence"]["present"]
    found = ask("verify", baked, "--adapter", a, "--base", model)["presence"]
    assert found["strength"] == pytest.approx(0.5, abs=0.01)
    assert found["recorded"]["weight"] == 0.5
    assert not ask("verify", baked, "--adapter", b, code=1)["presence"]["present"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["{a}", "--adapter", "{a}"],
        ["{a}", "--base", "{m}"],
        ["{m}", "--model", "{m}"],
        ["{m}", "--base", "{m}"],
    ],
)
def test_options_that_would_be_ignored_are_refused(call, a, model, arguments):
    printed = call("verify", *(part.format(a=a, m=model) for part in arguments), code=2)
    assert "goes with" in printed.err


def test_extract(ask, call, a, model, tmp_path):
    tuned, out = tmp_path / "tuned.safetensors", tmp_path / "x.safetensors"
    call("bake", model, a, "-o", tuned)
    found = ask("extract", tuned, "--base", model, "-o", out, "--rank", 4, "--dtype", "fp32")
    assert found["inside_share"] == 1
    assert found["kept_share"] > 0.999
    assert found["outside"] == {}
    assert distance(Adapter.load(a), Adapter.load(out)) < 0.02  # the model is fp16
    text = call("extract", tuned, "--base", model, "-o", tmp_path / "y", "--energy", 0.9).out
    assert "kept of the squared change: 9" in text
    assert (
        "no weight that an adapter may hold differs"
        in call("extract", model, "--base", model, "-o", tmp_path / "no", "--rank", 1, code=2).err
    )
    assert not (tmp_path / "no").exists()


def test_push_and_pull(hub, ask, a, tmp_path, call):  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    a.rename(run / "adapter.safetensors")
    assert ask("push", run, "me/eraser")["commit"].startswith(hub.address)
    found = ask("pull", "me/eraser", "-o", tmp_path / "got")
    assert found["files"] == ["README.md", "adapter.json", "adapter.safetensors"]
    assert "exists already" in call("pull", "me/eraser", "-o", tmp_path / "got", code=2).err
    call("pull", "me/eraser", "-o", tmp_path / "got", "--force")
    assert ask("inspect", tmp_path / "got")["files"][0]["kind"] == "adapter"


def test_an_adapter_that_changes_nothing_is_not_sound(ask, call, tmp_path):
    path = random_adapter(size=0.0).save(tmp_path / "a.safetensors")
    assert not ask("verify", path)["sound"]
    assert "changes nothing" in call("verify", path).err


def test_a_tag_of_a_user_interface_is_answered_with_a_files_name(call, tmp_path):
    printed = call("stack", "<lora:x:0.8>", "-o", tmp_path / "s.safetensors", code=2)
    assert "x.safetensors:0.8" in printed.err
