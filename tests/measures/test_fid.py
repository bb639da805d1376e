"""The Fréchet distance, with a small seeded stand-in for the Inception network."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.noise_images import noise_images
from torch import nn

from sdd_lora.errors import BadInput
from sdd_lora.measures import fid
from sdd_lora.measures.fid import FeatureMoments, Fid, frechet_distance


def moments_of(features):
    moments = FeatureMoments()
    for part in np.array_split(features, 3):
        moments.add(part)
    return moments


def test_moments_are_those_of_numpy_though_they_come_in_parts_of_half_precision():
    features = np.random.default_rng(0).normal(5, 1, (50, 4)).astype(np.float16)
    mean, covariance = moments_of(features).mean_and_covariance()
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.T.astype(np.float64)), rtol=1e-9)


@pytest.mark.parametrize("count", [60, 9])  # fewer images than features: a singular covariance
def test_the_distance_is_that_of_the_matrix_root(count):
    linalg = pytest.importorskip("scipy.linalg", reason="needs scipy, which scikit-image brings")
    generator = np.random.default_rng(1)
    a = generator.normal(size=(count, 12)) @ generator.normal(size=(12, 12))
    b = generator.normal(1, 2, size=(40, 12))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(cov_a @ cov_b + 1e-12 * np.eye(12)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(moments_of(a), moments_of(b)) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(moments_of(a), moments_of(a)) == pytest.approx(0, abs=1e-6)


def test_the_distance_of_diagonal_gaussians_has_a_closed_form():
    shift = np.array([2.0, 0.0])  # of two images: the means lie 1 apart
    a = FeatureMoments(2, np.zeros(2), np.diag([1.0, 4.0]))
    b = FeatureMoments(2, shift, np.diag([9.0, 16.0]) + np.outer(shift, shift) / 2)
    assert frechet_distance(a, b) == pytest.approx(1 + (1 - 3) ** 2 + (2 - 4) ** 2)


class StandIn(nn.Module):
    """Has `layers`, as the TorchScript Inception has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 7, stride=7), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def inception(tmp_path):
    torch.jit.script(StandIn()).save(str(tmp_path / "inception.pt"))
    (tmp_path / "real").mkdir()
    for i, picture in enumerate(noise_images(12, seed=7)):
        Image.fromarray(picture).save(tmp_path / "real" / f"{i}.png")
    return tmp_path / "inception.pt", tmp_path / "real"


def test_fid_agrees_with_torchmetrics_on_the_same_features(inception):
    image = pytest.importorskip("torchmetrics.image.fid", reason="needs torchmetrics")
    measure = Fid([], *inception)
    network = StandIn().eval()

    class Features(nn.Module):
        num_features = 6

        def forward(self, x):
            return network.layers((x - 128) / 128).flatten(1)

    other = image.FrechetInceptionDistance(Features(), normalize=False).set_dtype(torch.float64)
    drawn = [picture // 3 for picture in noise_images(40, size=48)]
    for real, images in ((True, noise_images(12, seed=7)), (False, drawn)):
        other.update(torch.stack([fid.resized(x) for x in images]), real=real)
    (value,) = measure.per_set(iter(drawn)).values()
    assert value > 0.001 and value == pytest.approx(float(other.compute()), rel=1e-3)


def test_another_network_never_wears_fids_name(inception, monkeypatch):
    assert list(Fid([], *inception).info) == ["Fréchet distance by another network"]
    monkeypatch.setattr(fid, "INCEPTION", fid.sha256_of(inception[0]))
    assert list(Fid([], *inception).info) == ["FID"]


def test_fid_says_what_is_missing(inception, tmp_path):
    with pytest.raises(BadInput, match="option `inception`, found none; get it from NVIDIA"):
        Fid([])
    (tmp_path / "broken.pt").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"broken.pt: expected a TorchScript file"):
        Fid([], tmp_path / "broken.pt", inception[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty: expected two pictures at least, found 0"):
        Fid([], inception[0], tmp_path / "empty")
    with pytest.raises(BadInput, match="found something that is no file"):
        Fid([], tmp_path / "empty", inception[1])
    torch.jit.script(torch.nn.Identity()).save(str(tmp_path / "other.pt"))
    with pytest.raises(BadInput, match=r"other.pt: expected a network whose `layers` give feat"):
        Fid([], tmp_path / "other.pt", inception[1])
    for name, content in {"a.png": b"broken", "b.png": b"x"}.items():
        (tmp_path / "empty" / name).write_bytes(content)
    with pytest.raises(BadInput, match=r"a.png: expected a picture, of `reference`, can't read it"):
        Fid([], inception[0], tmp_path / "empty")


def test_fid_names_a_picture_that_is_cut_short(inception, tmp_path):
    for index, picture in enumerate(noise_images(2, size=48)):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    path = tmp_path / "1.png"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadInput, match=r"1.png: expected a picture, of `reference`, can't read it"):
        Fid([], inception[0], tmp_path).per_set(iter(noise_images(2)))
    assert Fid([], *inception).per_set(noise_images(1)) == {}
