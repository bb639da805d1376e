"""LPIPS, with seeded weights in AlexNet's place."""

import math

import pytest
import torch
from safetensors.torch import save_file
from support.noise_images import noise_images, specs
from torch import nn

from sdd_lora.errors import BadInput
from sdd_lora.measures import lpips
from sdd_lora.measures.lpips import Lpips


def trunk():
    shapes = {
        0: (64, 3, 11, 11),
        3: (192, 64, 5, 5),
        6: (384, 192, 3, 3),
        8: (256, 384, 3, 3),
        10: (256, 256, 3, 3),
    }
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for number, shape in shapes.items():
        scale = math.prod(shape[1:]) ** -0.5
        weights[f"features.{number}.weight"] = scale * torch.randn(shape, generator=generator)
        weights[f"features.{number}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return weights


@pytest.fixture
def alexnet(tmp_path):
    pytest.importorskip("torchmetrics", reason="needs torchmetrics, for the heads")
    save_file(trunk(), tmp_path / "alexnet.safetensors")
    return tmp_path / "alexnet.safetensors"


def test_lpips_is_zero_for_equals_symmetric_and_positive(alexnet):
    measure = Lpips([], alexnet)
    a, b = noise_images(3), noise_images(3, seed=1)
    there, back = measure.distances(a, b), measure.distances(b, a)
    assert measure.distances(a, a) == [0, 0, 0]
    assert there == pytest.approx(back, rel=1e-5) and min(there) > 0.01
    assert measure.distances(a[:1], b[:1]) == pytest.approx(there[:1], rel=1e-5)


def test_lpips_of_a_seeded_trunk_is_what_torchmetrics_makes_of_it(alexnet, monkeypatch):
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    layers = []
    for size, (stride, padding), pool in [
        ((3, 64, 11), (4, 2), True),
        ((64, 192, 5), (1, 2), True),
        ((192, 384, 3), (1, 1), False),
        ((384, 256, 3), (1, 1), False),
        ((256, 256, 3), (1, 1), False),
    ]:
        layers += [nn.Conv2d(*size, stride=stride, padding=padding), nn.ReLU()]
        layers += [nn.MaxPool2d(3, stride=2)] if pool else []
    features = nn.Sequential(*layers)
    features.load_state_dict({k.removeprefix("features."): v for k, v in trunk().items()})
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_, **__: features)
    network = theirs._LPIPS(pretrained=True, net="alex", pnet_rand=True)
    a, b = noise_images(2), noise_images(2, seed=1)
    expected = network(lpips._pixels(a), lpips._pixels(b)).flatten().tolist()
    assert Lpips([], alexnet).distances(a, b) == pytest.approx(expected, rel=1e-4)


def test_lpips_compares_kept_images_with_sds(alexnet, monkeypatch):
    measure = Lpips([], alexnet)
    mixed = [*specs(1), *specs(1, "erased")]
    found = measure.against_reference(mixed, noise_images(2), noise_images(2, seed=1))
    assert found[1] == {} and list(found[0]) == ["LPIPS's heads on another trunk"]
    monkeypatch.setattr(lpips, "ALEXNET", lpips.sha256_of(alexnet)[:8])
    assert list(Lpips([], alexnet).info) == ["LPIPS"]


def test_lpips_says_what_is_missing(alexnet, tmp_path, monkeypatch):
    with pytest.raises(
        BadInput, match=r"option `alexnet`, found none; get it from download.pytorch"
    ):
        Lpips([])
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match=r"other.safetensors: expected AlexNet's tensors"):
        Lpips([], tmp_path / "other.safetensors")
    for name in ("broken.safetensors", "broken.pth"):
        (tmp_path / name).write_bytes(b"<html>" * 100)
        with pytest.raises(BadInput, match=f"{name}: expected AlexNet's tensors"):
            Lpips([], tmp_path / name)
    for value in (torch.zeros(2), [1], None, {"features.0.weight": 3, "features.0.bias": 3}):
        torch.save(value, tmp_path / "odd.pth")
        with pytest.raises(BadInput, match=r"odd.pth: expected AlexNet's tensors by name[^\n]*$"):
            Lpips([], tmp_path / "odd.pth")
    monkeypatch.setattr(lpips, "find_spec", lambda _: None)
    with pytest.raises(BadInput, match=r"heads, .*sdd_lora\[lpips\]"):
        Lpips([], alexnet)
