"""The same adapter, through the real loaders of diffusers and peft, does the same to a UNet."""

import copy
import logging

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from support.adapter_making import KINDS, random_adapter
from support.checkpoint_models import parts, pipeline

from sdd_lora import stack
from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.alphas import peft_metadata
from sdd_lora.errors import BadInput
from sdd_lora.sd1 import CROSS_ATTENTION

UNET_KINDS = tuple(k for k in KINDS if not k.startswith("text_encoder"))
TEXT_KINDS = tuple(k for k in KINDS if k.startswith("text_encoder"))


@pytest.fixture(scope="module")
def inputs() -> tuple:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(1, 4, 16, 16, generator=generator),
        500,
        torch.randn(1, 7, 128, generator=generator),
    )


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    """Two adapters of different rank and alpha: ranks differ between modules."""
    k = tuple(name for name in CROSS_ATTENTION if name.endswith("to_k"))
    return stack(
        [
            (random_adapter(1, 4, CROSS_ATTENTION, 2.0, size=0.2), 1.0),
            (random_adapter(2, 3, k, 5.0, size=0.2), -0.5),
        ]
    )


@torch.no_grad()
def noise(unet: torch.nn.Module, inputs: tuple) -> torch.Tensor:
    return unet.eval()(*inputs).sample


@torch.no_grad()
def with_deltas(adapter: Adapter) -> torch.nn.Module:
    """The UNet with ΔW added to its weights: what every loader must agree with."""
    unet = copy.deepcopy(parts()["unet"])
    for name in adapter.factors:
        weight = unet.get_submodule(name).weight
        weight += adapter.delta(name).reshape(weight.shape)
    return unet


def assert_same_effect(found: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    change = (expected - base).abs().max()
    assert change > 0.05, "the adapter must change the output, or the test can't fail"
    assert (found - expected).abs().max() < 1e-3 * change


@pytest.mark.parametrize("format", ["kohya", "peft", "attn-procs"])
def test_diffusers_loads_what_we_write(format, adapter, inputs, tmp_path, caplog):
    path = adapter.save(tmp_path / "v1.2.safetensors", format, "fp32")
    pipe = pipeline()
    base = noise(pipe.unet, inputs)
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        pipe.load_lora_weights(str(path))
    assert_same_effect(noise(pipe.unet, inputs), noise(with_deltas(adapter), inputs), base)
    assert "unexpected keys" not in caplog.text


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_diffusers_loads_modules_outside_the_attention(format, inputs, tmp_path):
    adapter = random_adapter(3, 4, UNET_KINDS, 2.0, size=0.2)
    pipe = pipeline()
    base = noise(pipe.unet, inputs)
    pipe.load_lora_weights(str(adapter.save(tmp_path / "a.safetensors", format, "fp32")))
    assert_same_effect(noise(pipe.unet, inputs), noise(with_deltas(adapter), inputs), base)


@pytest.mark.parametrize("format", ["kohya", "peft", "attn-procs"])
def test_diffusers_loads_the_text_encoders_part(format, tmp_path):
    kinds = TEXT_KINDS[:1] if format == "attn-procs" else TEXT_KINDS
    text = random_adapter(4, 4, kinds, 2.0, size=0.5)
    adapter = Adapter(random_adapter(1).factors | text.factors)
    pipe = pipeline()
    ids = torch.arange(7)[None]
    with torch.no_grad():
        base = pipe.text_encoder(ids).last_hidden_state
        pipe.load_lora_weights(str(adapter.save(tmp_path / "a.safetensors", format, "fp32")))
        found = pipe.text_encoder(ids).last_hidden_state
        reference = copy.deepcopy(parts()["text_encoder"])
        flat = not hasattr(reference, "text_model")  # transformers 5
        for name in text.factors:
            inside = name.removeprefix("text_encoder." + ("text_model." if flat else ""))
            reference.get_submodule(inside).weight += adapter.delta(name)
        expected = reference(ids).last_hidden_state
    assert_same_effect(found, expected, base)


def test_peft_loads_what_we_write(adapter, inputs):
    tensors = adapter.to_state_dict("peft")
    prefix = "unet."
    state = {key.removeprefix(prefix): torch.from_numpy(value) for key, value in tensors.items()}
    ranks = {key.removesuffix(".lora_A.weight"): len(t) for key, t in state.items() if "_A" in key}
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks
    )
    unet = copy.deepcopy(parts()["unet"])
    base = noise(unet, inputs)
    inject_adapter_in_model(config, unet, "safety")
    outcome = set_peft_model_state_dict(unet, state, "safety")
    assert not outcome.unexpected_keys
    assert_same_effect(noise(unet, inputs), noise(with_deltas(adapter), inputs), base)


def test_what_diffusers_saves_we_read(adapter, inputs, tmp_path):
    """save_lora_adapter (bare names) and save_lora_weights (peft), alpha ≠ rank in both."""
    unet = pipeline().unet
    config = LoraConfig(
        r=4, lora_alpha=2, init_lora_weights=False, target_modules=r".*attn2\.to_(q|k|v|out\.0)"
    )
    base = noise(unet, inputs)
    unet.add_adapter(config, "default")
    expected = noise(unet, inputs)
    unet.save_lora_adapter(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert loaded.factors.keys() == set(CROSS_ATTENTION)
    assert_same_effect(noise(with_deltas(loaded), inputs), expected, base)


def test_the_same_image_in_every_form(adapter, tmp_path):
    """A whole pipeline, sampling included."""
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)

    def image() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipe("!!", num_inference_steps=2, generator=generator, output_type="np").images[0]

    base = image()
    images = []
    for format in ("kohya", "peft", "attn-procs"):
        path = adapter.save(tmp_path / f"{format}.safetensors", format, "fp32")
        pipe.load_lora_weights(str(path))
        images.append(image())
        pipe.unload_lora_weights()
    assert np.abs(images[0] - base).max() > 0.02
    assert np.abs(images[1] - images[0]).max() < 1e-4
    assert np.abs(images[2] - images[0]).max() < 1e-4
    assert np.abs(image() - base).max() < 1e-6


def test_diffusers_refuses_ldm_names_as_we_say(adapter, tmp_path):
    """`verify` tells people so; a diffusers that learns it should make us say otherwise."""
    pipe = pipeline()
    path = adapter.save(tmp_path / "ldm.safetensors", "ldm")
    with pytest.raises(ValueError, match="not found in the base model"):
        pipe.load_lora_weights(str(path))


def test_peft_metadata_names_the_text_encoder_as_transformers_5_does():
    text = random_adapter(modules=TEXT_KINDS)
    assert '"encoder.layers.0.mlp.fc1"' in peft_metadata(text.factors)


def test_peft_reads_the_folder_that_we_write(adapter, inputs, tmp_path):
    folder = adapter.save(tmp_path / "folder", "peft", "fp32")
    unet = PeftModel.from_pretrained(copy.deepcopy(parts()["unet"]), str(folder))
    base = noise(parts()["unet"], inputs)
    assert_same_effect(noise(unet, inputs), noise(with_deltas(adapter), inputs), base)


def test_we_read_the_folder_that_peft_writes(inputs, tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        init_lora_weights=False,
        use_rslora=True,
        target_modules=r".*attn2\.to_(q|k|v|out\.0)",
    )
    base = noise(parts()["unet"], inputs)
    unet = get_peft_model(copy.deepcopy(parts()["unet"]), config)
    expected = noise(unet, inputs)
    unet.save_pretrained(tmp_path / "folder")
    loaded = Adapter.load(tmp_path / "folder")
    assert loaded.factors.keys() == set(CROSS_ATTENTION)
    assert_same_effect(noise(with_deltas(loaded), inputs), expected, base)


def test_a_peft_folder_holds_one_model(tmp_path):
    both = Adapter(random_adapter(1).factors | random_adapter(modules=TEXT_KINDS).factors)
    with pytest.raises(BadInput, match="peft folder"):
        both.save(tmp_path / "folder", "peft")
    assert list(tmp_path.iterdir()) == []
