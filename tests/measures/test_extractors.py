"""Measures by the user's networks, with small seeded stand-ins for them."""

import json
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from sdd_lora.errors import BadInput
from sdd_lora.measures import clip_encoder, fid, lpips, q16
from sdd_lora.measures.clip import ClipScore
from sdd_lora.measures.clip_encoder import ClipEncoder
from sdd_lora.measures.fid import Fid, Moments, frechet_distance
from sdd_lora.measures.lpips import Lpips
from sdd_lora.measures.q16 import Q16, read_prompts
from sdd_lora.measures.unsafe import Unsafe

WIDTH = 16


def pictures(count, size=64, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8))


def lines(count, kind="kept"):
    return [{"kind": kind, "set": "s", "prompt": "a cat", "seed": i} for i in range(count)]


# Fréchet distance


def moments_of(features):
    moments = Moments()
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
    a = Moments(2, np.zeros(2), np.diag([1.0, 4.0]))
    b = Moments(2, shift, np.diag([9.0, 16.0]) + np.outer(shift, shift) / 2)
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
    from PIL import Image

    torch.jit.script(StandIn()).save(str(tmp_path / "inception.pt"))
    (tmp_path / "real").mkdir()
    for i, picture in enumerate(pictures(12, seed=7)):
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
    drawn = [picture // 3 for picture in pictures(40, size=48)]
    for real, images in ((True, pictures(12, seed=7)), (False, drawn)):
        other.update(torch.stack([fid.resized(x) for x in images]), real=real)
    (value,) = measure.of_set(iter(drawn)).values()
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
    for index, picture in enumerate(pictures(2, size=48)):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    path = tmp_path / "1.png"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadInput, match=r"1.png: expected a picture, of `reference`, can't read it"):
        Fid([], inception[0], tmp_path).of_set(iter(pictures(2)))
    assert Fid([], *inception).of_set(pictures(1)) == {}


# LPIPS


def trunk():
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3),
              10: (256, 256, 3, 3)}  # fmt: skip
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
    a, b = pictures(3), pictures(3, seed=1)
    there, back = measure.distances(a, b), measure.distances(b, a)
    assert measure.distances(a, a) == [0, 0, 0]
    assert there == pytest.approx(back, rel=1e-5) and min(there) > 0.01
    assert measure.distances(a[:1], b[:1]) == pytest.approx(there[:1], rel=1e-5)


def test_lpips_of_a_seeded_trunk_is_what_torchmetrics_makes_of_it(alexnet, monkeypatch):
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    layers = []
    for size, (stride, padding), pool in [
        ((3, 64, 11), (4, 2), True), ((64, 192, 5), (1, 2), True), ((192, 384, 3), (1, 1), False),
        ((384, 256, 3), (1, 1), False), ((256, 256, 3), (1, 1), False),
    ]:  # fmt: skip
        layers += [nn.Conv2d(*size, stride=stride, padding=padding), nn.ReLU()]
        layers += [nn.MaxPool2d(3, stride=2)] if pool else []
    features = nn.Sequential(*layers)
    features.load_state_dict({k.removeprefix("features."): v for k, v in trunk().items()})
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_, **__: features)
    network = theirs._LPIPS(pretrained=True, net="alex", pnet_rand=True)
    a, b = pictures(2), pictures(2, seed=1)
    expected = network(lpips._pixels(a), lpips._pixels(b)).flatten().tolist()
    assert Lpips([], alexnet).distances(a, b) == pytest.approx(expected, rel=1e-4)


def test_lpips_compares_kept_images_with_sds(alexnet, monkeypatch):
    measure = Lpips([], alexnet)
    mixed = [*lines(1), *lines(1, "erased")]
    found = measure.beside(mixed, pictures(2), pictures(2, seed=1))
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


# CLIP and Q16


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    from sdd_lora.checkpoint.locate import DEMO_FOLDER

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer")
    tokenizer.save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=small | {"vocab_size": len(tokenizer), "max_position_embeddings": 77,
                             "eos_token_id": tokenizer.eos_token_id},
        vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=WIDTH,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_clips_preprocessing_is_that_of_transformers(clip):
    from transformers import CLIPImageProcessorPil

    image = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    expected = theirs(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(ClipEncoder(clip)._pixels(image), expected, atol=0.02, rtol=0)


def test_clip_scores_follow_both_conventions(clip):
    measure = ClipScore([], clip)
    images = pictures(2)
    seen = measure.encoder.images(images)
    told = measure.encoder.texts(["A photo depicts a cat"])
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(2))
    cosines = (seen @ told.T).flatten().tolist()
    found = measure.values(lines(2), images)
    for value, cosine in zip(found, cosines, strict=True):
        assert value == {
            "agreement by another encoder (SDD)": pytest.approx(cosine, abs=1e-5),
            "agreement by another encoder (×2.5)": pytest.approx(2.5 * max(cosine, 0), abs=1e-5),
        }
    assert measure.values(lines(1, "erased"), images[:1]) == [{}]


def test_only_openais_clip_makes_clip_scores(clip, monkeypatch):
    known = clip_encoder.sha256_of(clip / "model.safetensors")
    monkeypatch.setattr(clip_encoder, "VIT_L_14", known)
    assert list(ClipScore([], clip).info) == ["CLIP score (SDD)", "CLIP score (×2.5)"]


def test_clip_says_what_is_missing(tmp_path):
    with pytest.raises(BadInput, match="option `clip`, found none; get it from the hub's openai/"):
        ClipScore([])
    with pytest.raises(BadInput, match="expected CLIP's weights in one file, found no such file"):
        ClipScore([], tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weights: dict(list(weights.items())[1:]), "found 1 missing"),
        (lambda weights: weights | {"logit_scale": torch.zeros(2)}, "expected a CLIP of transfo"),
        (None, "expected a CLIP of transformers"),
    ],
    ids=["incomplete", "another shape", "cut short"],
)
def test_a_damaged_clip_measures_nothing(clip, tmp_path, damage, message):
    shutil.copytree(clip, tmp_path / "clip")
    path = tmp_path / "clip" / "model.safetensors"
    if damage:
        save_file(damage(load_file(path)), path, metadata={"format": "pt"})
    else:
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInput, match=message):
        ClipScore([], tmp_path / "clip")


@pytest.mark.parametrize(
    "config", [[], {"projection_dim": "x"}, {"vision_config": {"hidden_size": -1}}]
)
def test_an_odd_config_of_clip_is_one_line(clip, tmp_path, config):
    shutil.copytree(clip, tmp_path / "clip")
    path = tmp_path / "clip" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config if config else config))
    with pytest.raises(BadInput, match=r"expected a CLIP of transformers: [^\n]+$"):
        ClipScore([], tmp_path / "clip")


@pytest.fixture
def prompts(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float16)
    (tmp_path / "prompts.p").write_bytes(pickle.dumps(vectors, 4))
    return tmp_path / "prompts.p", vectors.astype(np.float32)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("order", [np.ascontiguousarray, np.asfortranarray])
def test_q16s_prompts_are_read_as_they_were_pickled(tmp_path, protocol, dtype, order):
    values = order(np.arange(6).reshape(2, 3).astype(dtype))
    (tmp_path / "p").write_bytes(pickle.dumps(values, protocol))
    found = read_prompts(tmp_path / "p")
    assert found.dtype == np.float32 and found.tolist() == values.tolist()


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def test_a_hostile_pickle_runs_nothing(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "p").write_bytes(pickle.dumps(Hostile(mark)))
    pickle.loads((tmp_path / "p").read_bytes())  # it does run where nothing stops it
    assert mark.exists()
    mark.unlink()
    with pytest.raises(BadInput, match=r"expected a pickled numpy array: asks for builtins.exec"):
        read_prompts(tmp_path / "p")
    objects = np.array([Hostile(mark)], dtype=object)
    (tmp_path / "p").write_bytes(pickle.dumps(objects, 4))
    with pytest.raises(BadInput, match="expected a pickled numpy array"):
        read_prompts(tmp_path / "p")
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({"a": 1}), b"\x80\x02N.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # stores at place 2³¹
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x00.",  # a bytearray of 64 PB
        pickle.dumps(np.zeros((2, 3)), 4)[:-20], b"\x80\x02" + b"]" * (2 << 20),
    ],
)  # fmt: skip
def test_what_is_no_array_is_refused(tmp_path, content):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(BadInput, match="expected a pickled numpy array"):
        read_prompts(tmp_path / "p")


def test_q16_is_the_softmax_of_both_prompts(clip, prompts):
    path, vectors = prompts
    measure = Q16([], clip, path)
    images = pictures(4)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    logits = 100 * measure.encoder.images(images).numpy() @ unit.T
    expected = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    np.testing.assert_allclose(measure.probabilities(images), expected, atol=1e-5)
    assert measure.values(lines(4), images) == [
        {"q16's prompts by another encoder": bool(p > 0.5)} for p in expected
    ]


def test_q16_refuses_prompts_of_another_width(clip, tmp_path):
    (tmp_path / "p").write_bytes(pickle.dumps(np.zeros((2, 3), np.float32), 4))
    with pytest.raises(BadInput, match=r"expected \(2, 16\), found \(2, 3\)"):
        Q16([], clip, tmp_path / "p")
    with pytest.raises(BadInput, match=r"option `prompts`, found none; get it from github.com/ml-"):
        Q16([], clip)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_q16_refuses_prompts_that_point_nowhere(clip, tmp_path, value):
    vectors = np.ones((2, WIDTH), np.float32)
    vectors[1] = value
    (tmp_path / "p").write_bytes(pickle.dumps(vectors, 4))
    with pytest.raises(BadInput, match="expected two directions, found NaN, infinity or zeros"):
        Q16([], clip, tmp_path / "p")


def test_unsafe_is_the_union(clip, prompts, monkeypatch):
    pytest.importorskip("nudenet", reason="needs nudenet (AGPL-3.0): pip install nudenet")
    monkeypatch.setattr(
        clip_encoder, "VIT_L_14", clip_encoder.sha256_of(clip / "model.safetensors")
    )
    measure = Unsafe([], clip, prompts[0])
    flags = {"q16": [0, 0, 1, 1], "nudenet": [0, 1, 0, 1]}
    for name, told in flags.items():
        values = [{name: bool(flag)} for flag in told]
        monkeypatch.setattr(getattr(measure, name), "values", lambda *_, values=values: values)
    found = measure.values(lines(4), pictures(4))
    assert [x["unsafe"] for x in found] == [False, True, True, True]
    assert set(found[0]) == {"q16", "nudenet", "unsafe"}
    assert measure.info["unsafe, max exp."].maximum_of == "unsafe"
    assert q16.MAX_PROMPT_BYTES < 2 << 20
