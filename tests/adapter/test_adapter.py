"""Adapters: what is read, what is refused, what its labels say."""

import hashlib
import json
import pickle
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file
from support.adapter_making import TO_K, TO_OUT, distance, random_adapter

from sdd_lora import sd1 as names
from sdd_lora.adapter import card
from sdd_lora.adapter.adapter import Adapter, Factors
from sdd_lora.adapter.algebra import resize, stack
from sdd_lora.adapter.inspect import describe_adapter
from sdd_lora.adapter.metrics import Metrics
from sdd_lora.errors import BadInput, SddLoraError
from sdd_lora.io import atomic as files
from sdd_lora.io.safetensors import read_header

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
DOWN, UP, ALPHA = f"{STEM}.lora_down.weight", f"{STEM}.lora_up.weight", f"{STEM}.alpha"


def ones(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


GOOD = {DOWN: ones(2, 128), UP: ones(32, 2)}
SDXL_KEY = "lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_attn2_to_k.lora_down.weight"
BAD = {
    "nothing": ({}, "no tensors"),
    "one factor": ({DOWN: ones(2, 128)}, f"{TO_K}: the factor 'up' is missing"),
    "alpha alone": ({ALPHA: ones(1)}, "the factor 'down' is missing"),
    "NaN": (GOOD | {UP: np.full((32, 2), np.nan, np.float32)}, f"{TO_K}: .*not finite"),
    "infinity": (GOOD | {DOWN: np.full((2, 128), np.inf, np.float16)}, "not finite"),
    "rank 0": ({DOWN: ones(0, 128), UP: ones(32, 0)}, "expected one rank, of 1 or more"),
    "ranks that differ": (GOOD | {UP: ones(32, 3)}, r"\(2, 128\) and up \(32, 3\) don't fit"),
    "three dimensions": (GOOD | {DOWN: ones(2, 128, 1)}, "expected 2-D, or 4-D"),
    "alpha NaN": (GOOD | {ALPHA: np.array(np.nan, np.float32)}, "alpha is nan"),
    "two alphas": (GOOD | {ALPHA: ones(2)}, "expected one number"),
    "whole numbers": (GOOD | {UP: ones(32, 2, dtype=np.int32)}, "dtype int32; expected a float"),
    "SDXL by a key": (GOOD | {SDXL_KEY: ones(2, 2048)}, "for SDXL; expected one for SD 1"),
    "SDXL by a width": (GOOD | {DOWN: ones(2, 2048)}, "an adapter for SDXL"),
    "SD 2": (GOOD | {DOWN: ones(2, 1024)}, "an adapter for SD 2"),
    "SDXL's second encoder": (GOOD | {"lora_te2_text_model_x.lora_down.weight": ones(2)}, "SDXL"),
    "FLUX with its text encoder": (
        {"lora_te1_text_model_x.alpha": ones(1), "lora_unet_double_blocks_0_x.alpha": ones(1)},
        "an adapter for FLUX",
    ),
    "FLUX by diffusers": (
        {"transformer.single_transformer_blocks.1.x.lora_A.weight": ones(2)},
        "an adapter for FLUX",
    ),
    "SD 3 by diffusers": ({"transformer.transformer_blocks.1.x.lora_A.weight": ones(2)}, "SD 3"),
    "DoRA by peft": ({f"unet.{TO_K}.lora_magnitude_vector.weight": ones(2)}, "DoRA"),
    "FLUX": ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": ones(2, 8)}, "FLUX"),
    "DoRA": (GOOD | {f"{STEM}.dora_scale": ones(1, 128)}, "DoRA; expected a plain LoRA"),
    "LoHa": ({f"{STEM}.hada_w1_a": ones(2, 2)}, "LoHa"),
    "LoKr": ({f"{STEM}.lokr_w1": ones(2, 2)}, "LoKr"),
    "a checkpoint": ({"model.diffusion_model.out.2.weight": ones(4, 4)}, "1 of 1 keys are no LoRA"),
    "a typing error": (GOOD | {STEM.replace("to_k", "to_x") + ".alpha": ones(1)}, "1 of 3 keys"),
    "a module twice": (GOOD | {f"unet.{TO_K}.lora_A.weight": ones(2, 128)}, "is there twice"),
}
#: What only the factors' values tell, which `describe` doesn't read.
NEEDS_FACTORS = {BAD["NaN"][1], BAD["infinity"][1]}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapter_is_refused_in_one_line(case, tmp_path):
    tensors, message = BAD[case]
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    for read in (Adapter.load, describe_adapter):
        if read is describe_adapter and message in NEEDS_FACTORS:
            continue
        with pytest.raises(BadInput, match=message) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"sdd_lora": "{"}, "sdd_lora is damaged"),
        ({"sdd_lora": "[]"}, "sdd_lora is damaged"),
        ({"sdd_lora": '{"concepts": "bomb"}'}, "sdd_lora is damaged: concepts"),
        ({"sdd_lora": '{"base": "demo"}'}, "damaged: base"),
        ({"sdd_lora": '{"merged_from": [1]}'}, "damaged: merged_from.0"),
        ({"sdd_lora": '{"merged_from": [{"name": "a", "weight": NaN}]}'}, "merged_from.0.weight"),
        (
            {"sdd_lora": '{"merged_from": [{"name": "a", "weight": 1%s}]}' % ("0" * 400)},
            "merged_from.0.weight",
        ),
        ({"sdd_lora": '{"measures": [{"name": "x"}]}'}, "damaged: measures.0.group"),
        ({"sdd_lora": '{"resized_from": {"rank": 4}}'}, "resized_from.relative_error"),
        (
            {"sdd_lora": '{"merged_from": [{"name": "a", "weight": 1, "lineage": "x"}]}'},
            "merged_from.0.lineage",
        ),
        (
            {"sdd_lora": '{"resized_from": {"relative_error": 0, "lineage": [[]]}}'},
            "resized_from.lineage.0",
        ),
        ({"sdd_lora": DEEP}, "sdd_lora is damaged"),
        ({"sdd_lora": '{"a": %s}' % ("[" * 300 + "]" * 300)}, "sdd_lora is damaged"),
        ({"sdd_lora": '{"name": "\\ud800"}'}, "sdd_lora is damaged"),
        ({"lora_adapter_metadata": DEEP}, "is no JSON"),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": 1%s}' % ("0" * 400)}, "beyond any float"),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": true}'}, "is a bool; expected a number"),
        ({"lora_adapter_metadata": "nope"}, "is no JSON"),
        ({"lora_adapter_metadata": "[]"}, "is no JSON object"),
        ({"lora_adapter_metadata": '{"unet.alpha_pattern": [1]}'}, "alpha_pattern is no JSON"),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": "many"}'}, "expected a number"),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'}, "alpha is nan"),
        ({"lora_adapter_metadata": '{"unet.use_dora": true}'}, "DoRA"),
        ({"lora_adapter_metadata": '{"unet.alpha_pattern": {".*k": 1}}'}, "no plain module name"),
    ],
)
def test_bad_header_is_refused(metadata, message, tmp_path):
    tensors = {
        f"unet.{TO_K}.lora_A.weight": ones(2, 128),
        f"unet.{TO_K}.lora_B.weight": ones(32, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    for read in (Adapter.load, describe_adapter):
        with pytest.raises(BadInput, match=message):
            read(tmp_path / "a.safetensors")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    adapter = random_adapter()
    with pytest.raises(BadInput, match="is a folder"):
        adapter.save(tmp_path)
    with pytest.raises(BadInput, match="can't write there: No such file"):
        adapter.save(tmp_path / "absent" / "a.safetensors")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(SddLoraError, match="not written: No space left"):
        adapter.save(tmp_path / "a.safetensors")

    def read_only(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "_open_temporary", read_only)
    with pytest.raises(BadInput, match="can't write there: Permission denied"):
        adapter.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.pt", "a.BIN"])
def test_a_name_that_is_read_as_a_pickle_is_refused(name, tmp_path):
    with pytest.raises(BadInput, match=r"name it a\.safetensors"):
        random_adapter().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_runs_folder_and_a_name_with_dots(tmp_path):
    adapter = random_adapter()
    adapter.save(tmp_path / "adapter.safetensors")
    assert distance(adapter, Adapter.load(tmp_path)) < 2e-3
    adapter.save(tmp_path / "v1.5.final.safetensors")
    assert Adapter.load(tmp_path / "v1.5.final.safetensors").name == "random-0"
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"no adapter in this folder; expected adapter\.safetensors"):
        Adapter.load(tmp_path / "empty")
    with pytest.raises(BadInput, match="no such file"):
        Adapter.load(tmp_path / "absent.safetensors")


def test_a_foreign_file_takes_its_name_from_the_header_or_the_file(tmp_path):
    save_file(GOOD, tmp_path / "plain.safetensors")
    assert Adapter.load(tmp_path / "plain.safetensors").name == "plain"
    save_file(GOOD, tmp_path / "b.safetensors", {"ss_output_name": "nice", "ss_tag": "{}"})
    adapter = Adapter.load(tmp_path / "b.safetensors")
    assert adapter.name == "nice"
    again = Adapter.load(adapter.save(tmp_path / "c.safetensors", dtype="fp32"))
    assert again.metadata["header"] == {"ss_tag": "{}"}


def test_legacy_pickles_give_tensors_and_never_run(tmp_path):
    torch.save({key: torch.from_numpy(value) for key, value in GOOD.items()}, tmp_path / "a.pt")
    assert np.array_equal(Adapter.load(tmp_path / "a.pt").factors[TO_K].up, GOOD[UP])

    class Bomb:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({DOWN: Bomb()}, tmp_path / "bomb.bin")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Bomb()))
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({0: torch.ones(2)}, tmp_path / "numbered.pt")
    torch.save({DOWN: torch.ones(2, 128).to_sparse(), UP: torch.ones(32, 2)}, tmp_path / "thin.pt")
    (tmp_path / "stumbles.pt").write_bytes(b"\x80\x02K\x01s.")  # sets an item of nothing
    (tmp_path / "empty.pt").write_bytes(b"")
    bad = {"bomb.bin", "bare.ckpt", "list.pt", "numbered.pt", "thin.pt", "stumbles.pt", "empty.pt"}
    for name in bad:
        with pytest.raises(BadInput) as caught:
            Adapter.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_an_entry_of_nothing_is_none(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(GOOD, path, {"sdd_lora": '{"merged_from": null, "concepts": null}'})
    assert Adapter.load(path).metadata.as_json() == {"name": "a"}


def test_scaled_is_a_multiple_with_another_identity():
    adapter = random_adapter(alpha=1.5)
    assert np.allclose(adapter.scaled(-2).factors[TO_K].delta(), -2 * adapter.factors[TO_K].delta())
    assert not adapter.scaled(0).factors[TO_K].delta().any()
    assert adapter.scaled(2).identity != adapter.identity
    measured = random_adapter(measures=[], concepts=["bomb"]).scaled(0.5)
    assert "measures" not in measured.metadata  # they were another delta's
    assert measured.metadata["concepts"] == ["bomb"]


def test_norm_needs_nothing_dense():
    adapter = random_adapter(alpha=3.0, rank=5)
    dense = np.sqrt(
        sum((f.delta().astype(np.float64) ** 2).sum() for f in adapter.factors.values())
    )
    assert adapter.norm() == pytest.approx(dense, rel=1e-6)


def test_header_says_what_user_interfaces_show(tmp_path):
    adapter = random_adapter(
        modules=(TO_K, TO_OUT),
        concepts=["bomb"],
        base={"model": "owner/sd"},
        license="mit",
        merged_from=[{"name": "a", "weight": 1.0, "identity": "x"}],
    )
    path = adapter.save(tmp_path / "a.safetensors")
    header = read_header(path)
    said = header.metadata
    data = path.read_bytes()[header.data_start :]
    assert said["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert said["modelspec.hash_sha256"] == "0x" + said["sshs_model_hash"]
    assert said["modelspec.sai_model_spec"] == "1.0.1"
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert said["modelspec.title"] == said["ss_output_name"] == "random-0"
    described = "Made of adapters trained to keep owner/sd from drawing: bomb."
    assert said["modelspec.description"] == described
    assert said["modelspec.license"] == "mit"
    assert said["modelspec.merged_from"] == "a"
    assert said["ss_sd_model_name"] == "owner/sd"
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_v2"]) == (
        "4",
        "4.0",
        "False",
    )
    loaded = Adapter.load(path)
    assert loaded.metadata == adapter.metadata | {"identity": adapter.identity}


METRICS = {
    "adapter": {"sha256": "ab" * 32, "bytes": 12345, "parameters": 1},
    "training": {"iterations": 150, "final_loss": 0.01234, "peak_bytes": 632_558_000},
    "versions": {"torch": "2.13"},
    "measures": [
        {
            "name": "judge",
            "group": "bomb",
            "prompts": 4,
            "n": 400,
            "before": 0.93,
            "after": 0.02,
            "ci95_before": [0.9, 0.95],
            "ci95_after": [0.01, 0.04],
        },
    ],
}


def test_sidecar_and_card_say_what_was_measured(tmp_path):
    adapter = random_adapter(
        concepts=["bomb"],
        base={"model": "owner/sd"},
        license="mit",
        measures=METRICS["measures"],
        widths=names.SD15,
    )
    sidecar = json.loads(card.write_sidecar(adapter, tmp_path / "a.safetensors").read_text())
    assert (tmp_path / "a.json").exists()
    assert sidecar["description"] == "Trained to keep owner/sd from drawing: bomb."
    assert sidecar["sd version"] == "SD1"
    assert sidecar["notes"] == "Trained on owner/sd.\njudge (bomb): 93.0 % → 2.0 %"
    assert sidecar["sdd_lora"]["concepts"] == ["bomb"]

    text = card.render_card(adapter, Metrics(**METRICS))
    assert card.render_card(adapter, Metrics(**METRICS)) == text
    _, front, body = text.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["base_model"] == "owner/sd"
    assert matter["license"] == "mit"
    assert matter["library_name"] == "diffusers"
    assert "safety" in matter["tags"]
    assert "| judge | bomb | 93.0 % (90.0–95.0) | 2.0 % (1.0–4.0) | 400 |" in body
    assert "| iterations | 150 |" in body
    assert "| peak_bytes | 632,558,000 |" in body
    assert "| final_loss | 0.01234 |" in body
    assert "A1111, Forge" in body
    assert "12,345 bytes" in body
    assert METRICS["adapter"]["sha256"] in body


def test_a_card_promises_no_place_in_other_models():
    """The embedded model's adapters fit no Stable Diffusion 1.5, and so no user interface's."""
    adapter = random_adapter(concepts=["bomb"], base={"model": "demo"})
    text = card.render_card(adapter, Metrics())
    assert "It fits models of the embedded model's size only" in text
    assert "models/Lora" not in text
    assert "sdd-lora generate demo --adapter adapter.safetensors" in text
    assert card.sidecar(adapter)["sd version"] == "Unknown"
    other = random_adapter(widths=names.Widths((48, 96, 192, 192), 64))
    assert "It fits models of its base's size only" in card.render_card(other, Metrics())


def test_a_card_names_invokeai_where_it_loads_the_file():
    """It tells the family by cross-attention's keys and values, which ESD-u's adapters lack."""
    whole = random_adapter(base={"model": "owner/sd"}, widths=names.SD15)
    assert "InvokeAI" in card.render_card(whole, Metrics())
    other = Adapter(
        {
            "conv_in": Factors(
                np.ones((1, 36), np.float32), np.ones((320, 1), np.float32), 1.0, (3, 3)
            )
        }
    )
    text = card.render_card(other, Metrics())
    assert "A1111" in text and "InvokeAI" not in text


def test_long_lists_of_concepts_are_shortened_to_distinct_ones():
    phrases = [f"thing {n}{style}" for n in range(15) for style in ("", ", ink", ", oil style")]
    adapter = random_adapter(concepts=phrases, base={"model": "owner/sd"})
    expected = ", ".join(f"thing {n}" for n in range(12)) + " and 3 more"
    text = card.render_card(adapter, Metrics())
    assert f"Trained to keep owner/sd from drawing: {expected}." in text
    assert "thing 12" not in text
    assert card.shortened(["cat, ink", "dog"]) == "cat, ink, dog"
    assert f"- random-0 × 1 ({expected})" in card.render_card(adapter.scaled(1.0), Metrics())
    assert adapter.metadata["concepts"] == card.sidecar(adapter)["sdd_lora"]["concepts"] == phrases


def test_only_an_uncut_stack_is_called_exact():
    whole = stack([(random_adapter(1), 1.0), (random_adapter(2), 0.5)])
    assert "It is the exact sum of:" in card.render_card(whole, Metrics())
    text = card.render_card(resize(whole, rank=3).adapter, Metrics())
    assert "It is the sum of:" in text
    assert "Cut to rank 3 afterwards, with a relative error of " in text


def test_a_card_without_numbers_claims_none():
    text = card.render_card(random_adapter(base={"model": "demo"}), Metrics())
    assert "base_model" not in text
    for section in ("Measured", "Training", "Provenance"):
        assert f"## {section}" not in text


def test_reading_and_writing_import_no_torch(tmp_path):
    path = random_adapter().save(tmp_path / "a.safetensors")
    program = (
        "import sys; from sdd_lora.adapter.adapter import Adapter; "
        f"Adapter.load({str(path)!r}).save({str(tmp_path / 'b.safetensors')!r}); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "b.safetensors").stat().st_size > 0


def test_a_truncated_file_is_named(tmp_path):
    path = random_adapter().save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match="truncated"):
        Adapter.load(path)
    path.write_bytes(struct.pack("<Q", 10**6) + b"{}")
    with pytest.raises(BadInput, match="truncated"):
        Adapter.load(path)


def test_factors_check_themselves():
    with pytest.raises(BadInput, match="don't fit"):
        Factors(ones(2, 3), ones(4), 1.0)


def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path):
    """Bytes of the header changed, dropped and replaced at random, under a fixed seed."""
    path, copy = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    random_adapter(modules=(TO_K, TO_OUT), rank=1, concepts=["bomb"]).save(path, "peft")
    good, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(400):
        content = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(8 + struct.unpack("<Q", good[:8])[0])
            content[at : at + rng.randint(0, 2)] = rng.choice(b'019"[]{},:-\x00').to_bytes(1, "big")
        path.write_bytes(content)
        try:
            describe_adapter(path)
            adapter = Adapter.load(path)
        except BadInput as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        card.render_card(adapter, Metrics())
        adapter.save(copy)
    assert 300 < refused < 400
