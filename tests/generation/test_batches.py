"""How many images a card draws at once, by its free memory."""

from types import SimpleNamespace

import pytest
import torch

from sdd_lora.generation.batches import bytes_of_drawing, images_at_once
from sdd_lora.generation.sampling import Sampling

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
    decoding, each = bytes_of_drawing(sd15("cuda"), Sampling())
    assert 0.35 * GB < decoding < 0.45 * GB and 0.13 * GB < each < 0.15 * GB
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
