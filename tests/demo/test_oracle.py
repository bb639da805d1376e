"""The oracle never sees what is left out: no picture that shows it, no caption that names it."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("resvg_py", reason="needs the extra `build`")

from sdd_lora.demo.build import oracle
from sdd_lora.demo.build.checkpoints import save_state
from sdd_lora.demo.build.diffusion import Batches, make_model
from sdd_lora.demo.build.schedule import WeightAverage
from sdd_lora.demo.vocabulary import groups, nouns, styles
from sdd_lora.measures.judge import asked_for
from sdd_lora.sd.pipeline import load_pipeline


def every_label() -> dict[str, torch.Tensor]:
    """One row for each noun and style, alone and beside the noun three places on."""
    count = len(nouns())
    rows = [
        (noun, second, style)
        for noun in range(count)
        for style in range(len(styles()))
        for second in (-1, (noun + 3) % count)
    ]
    first, second, style = torch.tensor(rows).T
    latents = torch.zeros(len(rows), 4, 1, 1)
    return {"latents": latents, "first": first, "second": second, "style": style}


def captions_of(encoded: dict[str, torch.Tensor], steps: int = 100) -> list[str]:
    """The captions of a training's first steps."""
    seen: list[str] = []

    def tokenizer(texts, **_):
        seen.extend(texts)
        return SimpleNamespace(input_ids=torch.zeros(len(texts), 77, dtype=torch.long))

    batches = Batches(encoded, tokenizer, misses={})
    for step in range(steps):
        batches(step)
    return seen


def groups_named(texts: list[str]) -> set[str]:
    """Groups that captions name, by one of their nouns or by their word."""
    words = {name for name, group in groups().items() for t in texts if group.word in t.split()}
    return words | {noun.group for text in texts for noun in asked_for(text).nouns}


def test_no_caption_names_a_weapon_and_every_other_group_is_named():
    every = every_label()
    assert groups_named(captions_of(every)) == set(groups())
    seen = captions_of(oracle.without(every, "weapons"))
    assert groups_named(seen) == set(groups()) - {"weapons"}


def test_no_picture_shows_a_weapon_alone_or_beside_something():
    every = every_label()
    left = oracle.without(every, "weapons")
    group = [noun.group for noun in nouns()]
    for column in ("first", "second"):
        assert {group[i] for i in left[column] if i >= 0} == set(groups()) - {"weapons"}
    weapons = [i for i, name in enumerate(group) if name == "weapons"]
    pairs = zip(every["first"].tolist(), every["second"].tolist(), strict=True)
    shown = sum(first in weapons or second in weapons for first, second in pairs)
    assert len(left["latents"]) == len(every["latents"]) - shown


def test_a_style_is_left_out_of_pictures_and_captions():
    every = every_label()
    left = oracle.without(every, "sketch")
    assert len(left["first"]) == len(every["first"]) * 3 // 4
    assert any("pencil" in text for text in captions_of(every))
    assert not any("pencil" in text for text in captions_of(left))


def test_the_export_is_a_model_of_the_runs_average_with_the_shipped_autoencoder(tmp_path):
    demo = load_pipeline("demo", device="cpu")
    model = make_model(demo.tokenizer)
    save_state(oracle.state_of(tmp_path, "weapons"), 0, ema=WeightAverage(model, decay=0.999))
    oracle.export(tmp_path, "weapons", tmp_path / "model")
    exported = load_pipeline(str(tmp_path / "model"), device="cpu")
    for name, expected in model["unet"].state_dict().items():
        assert torch.equal(exported.unet.state_dict()[name], expected.half().float()), name
    ours, shipped = exported.vae.state_dict(), demo.vae.state_dict()
    assert all(torch.equal(ours[name], shipped[name]) for name in shipped)
    assert exported.vae.config.scaling_factor == demo.vae.config.scaling_factor


def test_without_a_run_nothing_is_exported(tmp_path):
    with pytest.raises(FileNotFoundError, match="oracle-weapons"):
        oracle.export(tmp_path, "weapons", tmp_path / "model")
    assert not (tmp_path / "model").exists()
