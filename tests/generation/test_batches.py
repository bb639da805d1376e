"""How many images a card draws at once, by its free memory."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from sdd_lora.generation.batches import drawing_footprint, images_at_once
from sdd_lora.generation.sampling import Sampling
from sdd_lora.sd.model import part_configs
from sdd_lora.training.plan import Account

GB = 10**9


def sd15(device: str) -> SimpleNamespace:
    """What the count looks at, of SD 1.5 in fp16."""
    unet = SimpleNamespace(block_out_channels=(320, 640, 1280, 1280), sample_size=64)
    vae = SimpleNamespace(block_out_channels=(128, 256, 512, 512))
    return SimpleNamespace(
        device=torch.device(device),
        vae_scale_factor=8,
        unet=SimpleNamespace(config=unet, dtype=torch.float16),
        vae=SimpleNamespace(config=vae, dtype=torch.float16),
    )


@pytest.fixture
def memory(monkeypatch):
    """Sets the bytes that a card has free, of which torch has 0.3 GB reserved and not used."""

    def has(free: float) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 0.3 * GB, 24 * GB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2.3 * GB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2.0 * GB)

    return has


def test_a_card_draws_as_many_as_its_free_memory_holds(memory, caplog):
    caplog.set_level("INFO")
    for free, expected in ((24 * GB, 16), (2 * GB, 9), (1 * GB, 3), (0.1 * GB, 1)):
        memory(free)
        assert images_at_once(sd15("cuda"), Sampling(batch=16)) == expected
    assert "drawing 9 images at once, not 16: the card has 2.0 GB free" in caplog.text


def test_larger_images_are_fewer_at_once(memory):
    memory(4 * GB)
    wide = Sampling(batch=64, width=1024, height=512)
    assert (
        images_at_once(sd15("cuda"), wide) <= images_at_once(sd15("cuda"), Sampling(batch=64)) / 2
    )


def test_elsewhere_as_many_are_drawn_as_asked_for():
    assert images_at_once(sd15("cpu"), Sampling(batch=64)) == 64


def test_what_drawing_takes_is_what_is_counted_of_fake_tensors():
    configs = part_configs("owner/sd", ("unet", "vae", "text_encoder"))
    found = drawing_footprint(configs)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with FakeTensorMode(), torch.no_grad():
            unet = UNet2DConditionModel.from_config(configs["unet"]).eval()
            with Account() as one_sample:
                unet(torch.empty(1, 4, 64, 64), torch.tensor(5), torch.empty(1, 77, 768))
            vae = AutoencoderKL.from_config(configs["vae"]).eval()
            with Account() as decoding:
                vae.decode(torch.empty(1, 4, 64, 64))
    finally:
        torch.set_default_dtype(before)
    assert found.each == pytest.approx(2 * one_sample.peak, rel=0.01)
    assert found.decoding == pytest.approx(decoding.peak, rel=0.01)
    assert found.total(1) == found.weights + found.decoding
    assert found.total(16) == found.weights + 16 * found.each
