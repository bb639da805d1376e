"""generate from the command line: prompt files, kills, several processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.adapter_making import random_adapter

ROOT = Path(__file__).parents[2]
PROMPTS = """case_number,prompt,evaluation_seed,evaluation_guidance
0,a cat,5,4.0
1,"a bomb,
noto style",6,9.5
2,a bus,7,4.0
3,a dog,8,4.0
4,an axe,9,9.5
"""


def command(folder, out, *arguments):
    """Arguments that draw five prompts of a file."""
    (folder / "prompts.csv").write_text(PROMPTS)
    return [
        "generate",
        "demo",
        "--prompts",
        str(folder / "prompts.csv"),
        "--steps",
        "3",
        "-o",
        str(out),
        *arguments,
    ]


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def images(folder):
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in folder.glob("*.png")}


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_after_a_kill_no_image_is_missing_and_none_twice(ask, tmp_path):
    out = tmp_path / "out"
    arguments = command(tmp_path, out, "--batch", "1", "--images", "4")
    running = subprocess.Popen(
        [sys.executable, "-m", "sdd_lora", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path = out / "manifest.jsonl"
    while running.poll() is None and not (path.exists() and path.read_text().count("\n") >= 2):
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    before = path.read_text().count("\n")
    assert 2 <= before < 20
    assert ask(*arguments)["drawn"] == 20 - before
    assert [line["file"] for line in manifest(out)] == [f"{i:05d}.png" for i in range(20)]
    assert len(images(out)) == 20
    assert sorted(p.suffix for p in out.iterdir()) == sorted([".png"] * 20 + [".json", ".jsonl"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "wrong.csv"], "wrong.csv: line 3: seed: expected a whole number"),
        (["--prompt", "x", "--weights", "gone.safetensors"], "gone.safetensors: can't be read"),
        (["--prompt", "x", "--method", "sdd", "--concept", "y"], "expected one of: sd, neg, sld-"),
        (["--prompt", "x", "--method", "sdd-gated", "--concept", "y"], "no adapter to gate"),
        (["--prompt", "x", "--column", "Wish"], "--column Wish: names a column of --prompts"),
        (["--prompt", "x", "--width", "100"], "a multiple of 8, up to 8192 pixels, found 100"),
        (["--prompt", "x", "--steps", "1000"], "999"),
    ],
)
def test_bad_input_is_one_line(refused, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "wrong.csv").write_text("prompt,seed\na cat,1\na dog,one\n")
    monkeypatch.chdir(tmp_path)
    assert message in refused("generate", "demo", "-o", "out", *arguments)


@pytest.mark.parametrize(
    ("metadata", "clip_skip", "told"),
    [
        ({"recipe": {"name": "x"}}, 2, "made for --clip-skip 1, drawn with 2"),
        ({"recipe": {"name": "x", "clip_skip": 2}}, 1, "made for --clip-skip 2, drawn with 1"),
        ({"recipe": {"name": "x", "clip_skip": 2}}, 2, ""),
        ({"words": {"keep": ["cat"]}}, 2, "made for --clip-skip 1, drawn with 2"),
        ({"header": {"ss_clip_skip": "2"}}, 1, "made for --clip-skip 2, drawn with 1"),
        ({"header": {"ss_clip_skip": "None"}}, 2, "made for --clip-skip 1, drawn with 2"),
        ({}, 2, ""),
    ],
)
def test_an_adapter_made_for_another_layer_of_the_text_encoder_is_told(
    call, tmp_path, metadata, clip_skip, told
):
    random_adapter(**metadata).save(tmp_path / "a.safetensors")
    drawn = ("generate", "demo", "--prompt", "a cat", "--steps", 1, "-o", tmp_path / "out")
    error = call(*drawn, "--adapter", tmp_path / "a.safetensors", "--clip-skip", clip_skip).err
    assert ("may miss" in error) == bool(told) and told in error


@pytest.fixture
def generate(call):
    return lambda *arguments: call("generate", "demo", *arguments)


def test_typed_options_win_over_the_files_columns(generate, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(
        "prompt,seed,guidance,steps,negative_prompt,sd_image_width\na cat,5,4,9,a dog,192\n"
    )
    own, typed = tmp_path / "own", tmp_path / "typed"
    generate("--prompts", path, "-o", own)
    assert manifest(own) == [
        {
            "file": "00000.png",
            "prompt": "a cat",
            "seed": 5,
            "guidance": 4.0,
            "width": 192,
            "steps": 9,
            "negative_prompt": "a dog",
        }
    ]
    generate(
        "--prompts",
        path,
        "-o",
        typed,
        "--steps",
        2,
        "--guidance",
        3,
        "--seed",
        8,
        "--width",
        64,
        "--negative-prompt",
        "a bus",
    )
    assert manifest(typed) == [{"file": "00000.png", "prompt": "a cat", "seed": 8}]
    settings = json.loads((typed / "settings.json").read_text())
    expected = {"steps": 2, "guidance": 3, "width": 64, "negative_prompt": "a bus"}
    assert {name: settings[name] for name in expected} == expected
    assert Image.open(typed / "00000.png").width == 64


def test_precision_clip_skip_and_negative_prompt_change_the_image_and_are_recorded(
    generate, tmp_path
):
    common = ("--prompt", "a bomb, fluent style", "--steps", 3)
    generate(*common, "-o", tmp_path / "plain")
    plain = images(tmp_path / "plain")["00000.png"]
    for name, value in (("precision", "bf16"), ("clip_skip", 2), ("negative_prompt", "a bomb")):
        generate(*common, f"--{name.replace('_', '-')}", value, "-o", tmp_path / name)
        assert not np.array_equal(images(tmp_path / name)["00000.png"], plain)
        assert json.loads((tmp_path / name / "settings.json").read_text())[name] == value


def test_an_odd_column_and_a_shard_from_the_command_line(generate, tmp_path):
    (tmp_path / "p.tsv").write_text("Wish\tn\na cat\t1\na bus\t2\n")
    common = ("--prompts", tmp_path / "p.tsv", "--column", "Wish", "--steps", 1)
    generate(*common, "-o", tmp_path / "out", "--shard", "2/2")
    assert set(images(tmp_path / "out")) == {"00001.png"}
    generate(*common, "-o", tmp_path / "out")
    assert [line["prompt"] for line in manifest(tmp_path / "out")] == ["a cat", "a bus"]


def test_a_learned_word_is_drawn_with(generate, refused, tmp_path):
    vectors = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": 3 * vectors}, tmp_path / "my-word.safetensors")

    def draw(name, *options):
        generate("--prompt", "a my-word", "--steps", 1, *options, "-o", tmp_path / name)
        return next(iter(images(tmp_path / name).values()))

    word = ("--embedding", tmp_path / "my-word.safetensors")
    assert np.abs(draw("with", *word) - draw("without")).max() > 5
    asked = ("generate", "demo", "--prompt", "x", "-o", tmp_path / "x")
    assert "no.pt: can't be read" in refused(*asked, "--embedding", "no.pt")
