"""The picture in an adapter's header, and the one beside its file."""

import numpy as np
import pytest
from PIL import Image
from support.adapter_making import random_adapter

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.algebra import resize, stack
from sdd_lora.adapter.metadata import THUMBNAIL_KEY
from sdd_lora.adapter.thumbnail import thumbnail_of, with_thumbnail
from sdd_lora.errors import BadInput


def noise(side: int) -> Image.Image:
    """The hardest picture to make small."""
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def pictured():
    adapter = random_adapter(name="no-bombs", concepts=["bomb"])
    return Adapter(adapter.factors, with_thumbnail(adapter.metadata, noise(300)))


def test_any_picture_becomes_a_small_text_that_gives_it_back(pictured):
    assert len(pictured.metadata.header[THUMBNAIL_KEY]) < 20_100
    assert thumbnail_of(pictured.metadata).size == (300, 300)
    plain = Image.new("RGB", (64, 64), (200, 30, 30))
    found = np.asarray(thumbnail_of(with_thumbnail(pictured.metadata, plain)))
    assert np.abs(found.astype(int) - (200, 30, 30)).max() < 4
    assert thumbnail_of(random_adapter().metadata) is None


def test_it_stays_with_the_delta_and_goes_with_another_one(pictured, tmp_path):
    loaded = Adapter.load(pictured.save(tmp_path / "a.safetensors"))
    again = Adapter.load(loaded.save(tmp_path / "b.safetensors", format="peft"))
    assert again.metadata.header[THUMBNAIL_KEY] == pictured.metadata.header[THUMBNAIL_KEY]
    for other in (resize(loaded, rank=1).adapter, loaded.scaled(0.5), stack([loaded])):
        assert thumbnail_of(other.metadata) is None


@pytest.mark.parametrize("uri", ["data:image/png;base64,???", "data:image/png;base64,AAAA"])
def test_a_damaged_picture_is_told_and_stops_no_conversion(uri, tmp_path, call):
    damaged = random_adapter(header={THUMBNAIL_KEY: uri})
    with pytest.raises(BadInput, match=r"modelspec\.thumbnail"):
        thumbnail_of(damaged.metadata)
    file = damaged.save(tmp_path / "a.safetensors")
    assert "no preview beside it" in call("convert", file, "-o", tmp_path / "b.safetensors").err
    assert (tmp_path / "b.safetensors").exists()


def test_a_programs_folder_gets_file_label_and_preview_by_the_adapters_name(
    pictured, tmp_path, ask
):
    (tmp_path / "run").mkdir()
    pictured.save(tmp_path / "run" / "adapter.safetensors")
    loras = tmp_path / "Lora"
    loras.mkdir()
    written = ask("convert", tmp_path / "run", "-o", loras)
    assert written["preview"] == str(loras / "no-bombs.preview.png")
    assert {path.name for path in loras.iterdir()} == {
        "no-bombs.safetensors",
        "no-bombs.json",
        "no-bombs.preview.png",
    }
    with Image.open(loras / "no-bombs.preview.png") as picture:
        assert picture.size == (300, 300)
    inspected = ask("inspect", loras / "no-bombs.safetensors")["files"][0]
    assert inspected["thumbnail"] and THUMBNAIL_KEY not in str(inspected["metadata"])


def test_a_preview_beside_the_file_is_taken_along(call, ask, tmp_path):
    file = random_adapter().save(tmp_path / "a.safetensors")
    Image.new("RGB", (64, 32), (200, 30, 30)).save(tmp_path / "a.preview.png")
    ask("convert", file, "-o", tmp_path / "b.safetensors")
    assert thumbnail_of(Adapter.load(tmp_path / "b.safetensors").metadata).size == (64, 32)
    with Image.open(tmp_path / "b.preview.png") as picture:
        assert picture.size == (64, 32)
    (tmp_path / "a.preview.png").write_bytes(b"no picture")
    told = call("convert", file, "-o", tmp_path / "c.safetensors").err
    assert "without the preview beside it" in told and (tmp_path / "c.safetensors").exists()
