"""CLIP score, Q16 and their union with NudeNet, with a small seeded CLIP."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.noise_images import noise_images, specs

from sdd_lora.errors import BadInput
from sdd_lora.measures import clip_encoder, q16
from sdd_lora.measures.clip import ClipScore
from sdd_lora.measures.clip_encoder import ClipEncoder
from sdd_lora.measures.q16 import Q16, read_q16_prompts
from sdd_lora.measures.unsafe import Unsafe

WIDTH = 16


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    from sdd_lora.checkpoint.locate import DEMO_FOLDER

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer")
    tokenizer.save_pretrained(folder)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=small
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 77,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=small | {"image_size": 32, "patch_size": 8},
        projection_dim=WIDTH,
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_clips_preprocessing_is_that_of_transformers(clip):
    from transformers import CLIPImageProcessorPil

    image = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    expected = theirs(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(ClipEncoder(clip)._pixels(image), expected, atol=0.02, rtol=0)


def test_clip_scores_follow_all_three_conventions(clip):
    measure = ClipScore([], clip)
    images = noise_images(2)
    seen = measure.encoder.images(images)
    told = measure.encoder.texts(["A photo depicts a cat", "a cat"])
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(2))
    found = measure.per_image(specs(2), images)
    for value, (cosine, bare) in zip(found, (seen @ told.T).tolist(), strict=True):
        assert value == {
            "agreement by another encoder (SDD)": pytest.approx(cosine, abs=1e-5),
            "agreement by another encoder (×2.5)": pytest.approx(2.5 * max(cosine, 0), abs=1e-5),
            "agreement by another encoder (torchmetrics)": pytest.approx(
                100 * max(bare, 0), abs=1e-3
            ),
        }
    assert measure.per_image(specs(1, "erased"), images[:1]) == [{}]


def test_only_openais_clip_makes_clip_scores(clip, monkeypatch):
    known = clip_encoder.sha256_of(clip / "model.safetensors")
    monkeypatch.setattr(clip_encoder, "VIT_L_14", known)
    conventions = ["SDD", "×2.5", "torchmetrics"]
    assert list(ClipScore([], clip).info) == [f"CLIP score ({name})" for name in conventions]


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
    found = read_q16_prompts(tmp_path / "p")
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
        read_q16_prompts(tmp_path / "p")
    objects = np.array([Hostile(mark)], dtype=object)
    (tmp_path / "p").write_bytes(pickle.dumps(objects, 4))
    with pytest.raises(BadInput, match="expected a pickled numpy array"):
        read_q16_prompts(tmp_path / "p")
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"a": 1}),
        b"\x80\x02N.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # stores at place 2³¹
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x00.",  # a bytearray of 64 PB
        pickle.dumps(np.zeros((2, 3)), 4)[:-20],
        b"\x80\x02" + b"]" * (2 << 20),
    ],
)
def test_what_is_no_array_is_refused(tmp_path, content):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(BadInput, match="expected a pickled numpy array"):
        read_q16_prompts(tmp_path / "p")


def test_q16_is_the_softmax_of_both_prompts(clip, prompts):
    path, vectors = prompts
    measure = Q16([], clip, path)
    images = noise_images(4)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    logits = 100 * measure.encoder.images(images).numpy() @ unit.T
    expected = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    np.testing.assert_allclose(measure.probabilities(images), expected, atol=1e-5)
    assert measure.per_image(specs(4), images) == [
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
        monkeypatch.setattr(getattr(measure, name), "per_image", lambda *_, values=values: values)
    found = measure.per_image(specs(4), noise_images(4))
    assert [x["unsafe"] for x in found] == [False, True, True, True]
    assert set(found[0]) == {"q16", "nudenet", "unsafe"}
    assert measure.info["unsafe, max exp."].maximum_of == "unsafe"
    assert q16.MAX_PROMPT_BYTES < 2 << 20
