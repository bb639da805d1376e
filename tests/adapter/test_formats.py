"""Every format is read and written with the same delta; golden files say what each format is."""

import importlib.util
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.adapter_making import (
    ATTENTION_KINDS,
    KINDS,
    TO_K,
    distance,
    random_adapter,
    random_factors,
    shapes,
)

from sdd_lora import sd1 as names
from sdd_lora.adapter import formats
from sdd_lora.adapter.adapter import Adapter, Factors
from sdd_lora.adapter.inspect import describe_adapter
from sdd_lora.errors import BadInput
from sdd_lora.io.safetensors import read_header

GOLDEN = Path(__file__).parent / "golden"
#: Relative to the largest entry: two factors of a product, each rounded once.
ROUNDING = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1.6e-2}


def golden_makers():
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("format", ["kohya", "ldm", "peft", "peft-plain", "bare", "attn-procs"])
def test_golden_file_is_read(format):
    make = golden_makers()
    path = GOLDEN / f"{format}.safetensors"
    tensors, header = make.MAKERS[format]()
    stored = load_file(path)
    assert stored.keys() == tensors.keys(), "run golden/make.py"
    assert all(np.array_equal(stored[key], tensors[key]) for key in tensors)
    assert read_header(path).metadata == header

    adapter = Adapter.load(path)
    assert adapter.factors.keys() == {make.TO_K, make.TO_OUT}
    for name, factors in adapter.factors.items():
        np.testing.assert_array_equal(factors.delta(), make.delta(name))
    assert formats.format_of(stored) == format.removesuffix("-plain")


@pytest.mark.parametrize("format", ["kohya", "ldm", "peft", "attn-procs"])
def test_written_keys_are_the_golden_ones(format):
    adapter = Adapter.load(GOLDEN / "bare.safetensors")
    golden = load_file(GOLDEN / f"{format}.safetensors")
    assert adapter.to_state_dict(format).keys() == golden.keys()


@st.composite
def adapters(draw, kinds=KINDS):
    """Any modules, each with its own rank and alpha."""
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    factors = {
        name: random_factors(
            shapes()[name],
            draw(st.integers(1, 6)),
            draw(st.floats(0.125, 16) | st.floats(-2, -0.125)),
            rng,
        )
        for name in chosen
    }
    return Adapter(factors, {"name": "drawn"})


no_fixture_resets = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("format", ["kohya", "peft", "ldm"])
@no_fixture_resets
@given(adapter=adapters())
def test_a_file_holds_the_same_delta(format, dtype, adapter, tmp_path):
    loaded = Adapter.load(adapter.save(tmp_path / "a.safetensors", format, dtype))
    assert distance(adapter, loaded) < ROUNDING[dtype]
    assert loaded.identity == adapter.identity
    for name, factors in adapter.factors.items():
        assert loaded.factors[name].weight_shape == factors.weight_shape


@no_fixture_resets
@given(adapter=adapters(ATTENTION_KINDS))
def test_attn_procs_holds_the_same_delta(adapter, tmp_path):
    loaded = Adapter.load(adapter.save(tmp_path / "a.safetensors", "attn-procs", "fp32"))
    assert distance(adapter, loaded) < ROUNDING["fp32"]


@no_fixture_resets
@given(adapter=adapters(), formats_in_turn=st.permutations(["kohya", "peft", "ldm"]))
def test_converting_again_changes_no_byte(adapter, formats_in_turn, tmp_path):
    """After the first file the scale is folded, so that any chain of conversions is exact."""
    first = adapter.save(tmp_path / "first.safetensors", "kohya", "fp32")
    path = first
    for n, format in enumerate(formats_in_turn):
        path = Adapter.load(path).save(tmp_path / f"{n}.safetensors", format, "fp32")
    last = Adapter.load(path).save(tmp_path / "last.safetensors", "kohya", "fp32")
    assert distance(Adapter.load(first), Adapter.load(last)) == 0
    assert first.read_bytes() == last.read_bytes()


def test_the_file_that_everybody_loads(tmp_path):
    """One alpha for all modules, 2-D tensors, and nothing that upsets a loader."""
    mixed = random_adapter(modules=(TO_K,), rank=3, alpha=1.5).factors
    mixed |= random_adapter(modules=KINDS[1:3], rank=5, alpha=7.0).factors
    path = Adapter(mixed).save(tmp_path / "a.safetensors")
    tensors = load_file(path)
    assert {key.rpartition("lora_")[2] for key in tensors if "alpha" not in key} == {
        "down.weight",
        "up.weight",
    }
    assert len({float(tensor) for key, tensor in tensors.items() if "alpha" in key}) == 1
    for key, tensor in tensors.items():
        assert key.startswith("lora_unet_down_blocks_0_")
        if not key.endswith(".alpha"):
            assert tensor.ndim == 2
            assert tensor.dtype == np.float16
    assert "lora_adapter_metadata" not in read_header(path).metadata


def test_modules_of_lower_rank_are_not_padded_to_the_highest(tmp_path):
    """63 modules of rank 1 and one of 32: 13 times as large where all are padded to 32."""
    first, *others = names.CROSS_ATTENTION
    mixed = random_adapter(modules=tuple(others), rank=1).factors
    mixed |= random_adapter(modules=(first,), rank=32).factors
    loaded = Adapter.load(Adapter(mixed).save(tmp_path / "a.safetensors", dtype="fp32"))
    assert distance(Adapter(mixed), loaded) == 0
    assert {part.alpha for part in loaded.factors.values()} == {32.0}
    assert loaded.factors[first].rank == 32
    assert {loaded.factors[name].rank for name in others} == {2}


@pytest.mark.parametrize("ranks", [(3, 5), (1, 33), (6, 12), (1, 2), (7, 7)])
def test_ranks_of_their_own_never_take_more_than_one_rank_for_all(ranks):
    mixed = {
        name: random_adapter(modules=(name,), rank=rank).factors[name]
        for name, rank in zip(KINDS, ranks, strict=False)
    }
    tensors = Adapter(mixed).to_state_dict("kohya")
    size = sum(t.size for key, t in tensors.items() if "alpha" not in key)
    assert size <= sum(max(*ranks, 2) * sum(part.weight_shape) for part in mixed.values())
    assert distance(Adapter(mixed), Adapter.from_state_dict(tensors)) == 0


def test_a_kohya_file_has_no_rank_of_1(tmp_path):
    """stable-diffusion.cpp would take the width of a rank-1 factor for its rank."""
    adapter = random_adapter(rank=1)
    tensors = adapter.to_state_dict("kohya")
    assert all(t.shape[0] == 2 for key, t in tensors.items() if key.endswith("down.weight"))
    assert distance(adapter, Adapter.from_state_dict(tensors)) == 0
    assert Adapter.from_state_dict(adapter.to_state_dict("peft")).rank == 1


#: Keys of one module, as other tools spell them; of the text encoder's where it is `TEXT`.
TEXT = "text_encoder.text_model.encoder.layers.1.mlp.fc1"
KOHYA = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
LDM = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
DIALECTS = {
    "ComfyUI's extraction": (TO_K, f"diffusion_model.{LDM}.lora_{{}}.weight", "down", "up"),
    "peft's folder": (TO_K, f"base_model.model.{TO_K}.lora_{{}}.weight", "A", "B"),
    "peft, with the adapter's name": (TO_K, f"unet.{TO_K}.lora_{{}}.default.weight", "A", "B"),
    "LyCORIS": (TO_K, f"lycoris_{KOHYA}.lora_{{}}.weight", "down", "up"),
    "first text encoder": (
        TEXT,
        "lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_{}.weight",
        "down",
        "up",
    ),
    "text encoder of transformers 5": (
        TEXT,
        "lora_te_encoder_layers_1_mlp_fc1.lora_{}.weight",
        "down",
        "up",
    ),
    "peft's folder of a text encoder": (
        TEXT,
        "base_model.model.text_model.encoder.layers.1.mlp.fc1.lora_{}.weight",
        "A",
        "B",
    ),
    "ComfyUI's text encoder": (
        TEXT,
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.lora_{}.weight",
        "down",
        "up",
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_of_keys_are_read(dialect, tmp_path):
    module, pattern, down, up = DIALECTS[dialect]
    adapter = random_adapter(modules=(module,))
    factors = adapter.factors[module]
    path = tmp_path / "a.safetensors"
    save_file({pattern.format(down): factors.down, pattern.format(up): factors.up}, path)
    assert distance(adapter, Adapter.load(path)) == 0
    assert describe_adapter(path).format != "unknown"
    assert formats.looks_like_adapter(load_file(path))


STEM = f"lora_unet_{KOHYA}"
PLAIN = {
    f"{STEM}.lora_down.weight": np.ones((2, 128), np.float32),
    f"{STEM}.lora_up.weight": np.ones((32, 2), np.float32),
}


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_whole_alphas_are_read(dtype, tmp_path):
    """As diffusers' converter and sd-scripts' svd_merge write them."""
    save_file(PLAIN | {f"{STEM}.alpha": np.array(1, dtype)}, tmp_path / "a.safetensors")
    assert Adapter.load(tmp_path / "a.safetensors").factors[TO_K].scale == 0.5
    assert describe_adapter(tmp_path / "a.safetensors").scales == {TO_K: 0.5}


@pytest.mark.parametrize("format", ["kohya", "peft", "ldm", "attn-procs"])
def test_a_module_of_alpha_0_adds_nothing(format, tmp_path):
    other = random_adapter(modules=(KINDS[1],))
    path = tmp_path / "a.safetensors"
    save_file(PLAIN | {f"{STEM}.alpha": np.zeros((), np.float32)} | other.to_state_dict(), path)
    adapter = Adapter.load(path)
    assert not adapter.factors[TO_K].delta().any()
    again = Adapter.load(adapter.save(tmp_path / "b.safetensors", format, "fp32"))
    assert distance(adapter, again) == 0


def test_bundled_embeddings_are_named_and_left_out(tmp_path, caplog):
    embedding = {"bundle_emb.badhands.string_to_param.*": np.ones((2, 768), np.float32)}
    save_file(PLAIN | embedding, tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING):
        adapter = Adapter.load(tmp_path / "a.safetensors")
    assert list(adapter.factors) == [TO_K]
    assert "badhands" in caplog.text
    assert describe_adapter(tmp_path / "a.safetensors").embeddings == ["badhands"]


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (".dora_scale", "DoRA"),
        (".hada_w1_a", "LoHa"),
        (".lokr_w1", "LoKr"),
        (".w_norm", "a trained norm"),
    ],
)
def test_other_kinds_of_adapters_are_named_with_the_way_out(ending, kind, tmp_path):
    save_file(PLAIN | {STEM + ending: np.ones((2, 2), np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=rf"{kind}.*sdd-lora extract"):
        Adapter.load(tmp_path / "a.safetensors")


def test_tiny_factors_survive_fp16(tmp_path):
    """up of 1e-7 would be subnormal in fp16; balancing the pair keeps the delta."""
    adapter = random_adapter(size=1e-7)
    naive = {k: v.astype(np.float16) for k, v in adapter.to_state_dict("kohya").items()}
    assert distance(adapter, Adapter.from_state_dict(naive)) > 10 * ROUNDING["fp16"]
    loaded = Adapter.load(adapter.save(tmp_path / "a.safetensors", "kohya", "fp16"))
    assert distance(adapter, loaded) < ROUNDING["fp16"]


def test_a_delta_too_large_for_fp16_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"don't fit fp16"):
        random_adapter(size=1e12).save(tmp_path / "a.safetensors", "kohya", "fp16")
    assert not list(tmp_path.iterdir())


def test_attn_procs_names_what_it_cannot_hold(tmp_path):
    with pytest.raises(BadInput, match=r"attention modules alone; 1 others .*proj_in"):
        random_adapter(modules=(TO_K, KINDS[5])).save(tmp_path / "a.safetensors", "attn-procs")
    assert not list(tmp_path.iterdir())


def test_torch_tensors_and_alphas_are_read():
    down, up = torch.ones(2, 128, dtype=torch.bfloat16), torch.ones(32, 2, requires_grad=True)
    adapter = Adapter.from_state_dict(
        {
            f"{TO_K}.lora_A.weight": down,
            f"{TO_K}.lora_B.weight": up,
            f"{TO_K}.alpha": torch.tensor(1.0),
        }
    )
    assert torch.equal(adapter.delta(TO_K), torch.full((32, 128), 1.0))
    assert adapter.parameters == 2 * (128 + 32)


def test_two_dimensional_factors_of_a_convolution_are_written_back_as_one():
    down, up = np.ones((2, 32), np.float32), np.ones((32, 2), np.float32)
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    adapter = Adapter.from_state_dict(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    )
    written = adapter.to_state_dict("peft")
    assert [t.shape for t in written.values()] == [(2, 32, 1, 1), (32, 2, 1, 1)]


def test_four_dimensional_factors_of_a_linear_module_are_written_back_as_matrices():
    """As some trainers write them; diffusers and peft refuse those."""
    adapter = random_adapter(modules=KINDS)
    tensors = adapter.to_state_dict("kohya")
    four = {k: t[..., None, None] if t.ndim == 2 else t for k, t in tensors.items()}
    found = Adapter.from_state_dict(four)
    assert distance(adapter, found) == 0
    assert {k: t.shape for k, t in found.to_state_dict("kohya").items()} == {
        k: t.shape for k, t in tensors.items()
    }
    assert {n: part.weight_shape for n, part in found.factors.items()} == {
        n: part.weight_shape for n, part in adapter.factors.items()
    }


def test_rslora_scales_by_the_root_of_the_rank():
    config = '{"lora_alpha": 3, "use_rslora": true}'
    tensors = random_adapter(modules=(TO_K,), rank=4).to_state_dict("peft")
    factors = formats.decode_factors(tensors, {"lora_adapter_metadata": config})
    assert factors[TO_K].scale == pytest.approx(3 / 2)


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    adapter = random_adapter(concepts=["bomb"], zeta=1, alpha=2.0)
    reordered = Adapter(
        dict(reversed(adapter.factors.items())), dict(reversed(adapter.metadata.as_json().items()))
    )
    first = adapter.save(tmp_path / "a.safetensors").read_bytes()
    assert reordered.save(tmp_path / "b.safetensors").read_bytes() == first


def test_text_encoder_names_of_transformers_5_are_read():
    tensors = {
        "text_encoder.encoder.layers.1.mlp.fc1.lora_A.weight": np.ones((1, 128), np.float32),
        "text_encoder.encoder.layers.1.mlp.fc1.lora_B.weight": np.ones((512, 1), np.float32),
    }
    adapter = Adapter.from_state_dict(tensors)
    assert list(adapter.factors) == ["text_encoder.text_model.encoder.layers.1.mlp.fc1"]


def test_balancing_changes_nothing_but_the_split():
    factors = random_factors((32, 128), 4, 4.0, np.random.default_rng(0), size=1e-5)
    balanced = factors.balanced()
    np.testing.assert_array_equal(balanced.delta(), factors.delta())
    ratio = np.abs(balanced.up).max(axis=0) / np.abs(balanced.down).max(axis=1)
    assert ((ratio > 0.4) & (ratio < 2.5)).all()
    zero = Factors(np.zeros((1, 3), np.float32), np.ones((2, 1), np.float32), 1.0)
    assert not zero.balanced().delta().any()
