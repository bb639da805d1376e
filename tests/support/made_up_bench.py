"""A bench's folder made of made-up numbers and drawings, to look at reports with.

`python tests/made_up_bench.py DIR` writes one, to be read by `sdd-lora report DIR`.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sdd_lora.bench.results import (
    AdapterCosines,
    AttackRow,
    ChoiceRow,
    ConceptShift,
    Cost,
    Results,
    Row,
    SettingRow,
)
from sdd_lora.bench.results import Variation as VariationResults
from sdd_lora.measures.base import MeasureInfo
from sdd_lora.measures.intervals import wilson

#: method → made-up rates of what is erased and of what is kept
RATES = {
    "sd": (0.93, 0.82),
    "neg": (0.31, 0.74),
    "sld-weak": (0.9, 0.82),
    "sld-medium": (0.77, 0.81),
    "sld-strong": (0.52, 0.78),
    "sld-max": (0.33, 0.72),
    "sega": (0.83, 0.8),
    "esd-x-1": (0.41, 0.77),
    "esd-x-3": (0.22, 0.7),
    "esd-u-1": (0.52, 0.68),
    "esd-u-3": (0.35, 0.6),
    "sdd-full": (0.12, 0.69),
    "sdd": (0.05, 0.66),
    "sdd-preserve": (0.09, 0.81),
    "sdd-gated": (0.1, 0.82),
    "stack": (0.1, 0.79),
    "baked": (0.09, 0.81),
}
SETS = {
    "weapons": ("erased", ["a bomb", "an axe", "a dagger, noto style"]),
    "animals": ("kept", ["a cat", "a frog"]),
    "food": ("kept", ["a pizza"]),
}
DRAWN, KEPT, DISTANCE = "concept drawn", "noun kept", "judge features: distance"
#: attack → the rate that it brings a method to, at least; seconds and UNet passes a prompt
ATTACKED = {"paraphrase": (0.2, 0.01, 0), "ring_a_bell": (0.1, 21, 0), "inversion": (0.6, 40, 912)}
WEIGHTS = [0.0, 0.5, 1.0, 1.5, 2.0]


def row(method, measure, group, rate, n, base=None):
    difference = None if base is None else rate - base
    interval = None if base is None else (rate - base - 0.04, rate - base + 0.04)
    return Row(
        method=method,
        measure=measure,
        group=group,
        value=rate,
        ci95=wilson(round(rate * n), n),
        n=n,
        difference=difference,
        ci95_difference=interval,
    )


def results(methods=tuple(RATES)):
    """Results as `evaluate` writes them."""
    rows, moved = [], []
    gone, kept = RATES["sd"]
    for method in methods:
        drawn, there = RATES[method]
        rows += [row(method, DRAWN, g, drawn, 210, gone) for g in ("all", "weapons")]
        rows += [row(method, KEPT, g, there, 400, kept) for g in ("all", "animals", "food")]
        rows.append(
            Row(
                method=method,
                measure=DISTANCE,
                group="all",
                value=4 - 3 * there,
                ci95=(3.9 - 3 * there, 4.2 - 3 * there),
                n=400,
            )
        )
        for k, noun in enumerate(["cat", "frog", "pizza"]):
            change = (there - kept) * (2 - k)
            interval = (change - 0.1, change + 0.1)
            moved.append(
                ConceptShift(
                    method=method,
                    concept=noun,
                    group="animals",
                    before=kept,
                    after=kept + change,
                    change=change,
                    ci95_change=interval,
                    n=24,
                )
            )
    strength = [
        SettingRow(**row(m, name, "all", value, 96).model_dump(), setting=w)
        for m in methods[-4:-2]
        for w in WEIGHTS
        for name, value in [(DRAWN, gone * float(np.exp(-2 * w))), (KEPT, kept - 0.05 * w**2)]
    ]
    samplers = [
        SettingRow(**row(m, name, "all", value, 96).model_dump(), setting=s)
        for m in methods[-4:-2]
        for k, s in enumerate(["dpm++", "euler-a"])
        for name, value in [(DRAWN, 0.08 + k / 50), (KEPT, kept - k / 40)]
    ]
    attacks = []
    for attack, (raised, seconds, passes) in ATTACKED.items():
        for method in [m for m in methods if m in ("sd", "neg", "esd-x-1", "sdd", "sdd-preserve")]:
            before = RATES[method][0]
            after = max(raised, before)
            if (method, attack) != ("neg", "inversion"):
                attacks.append(
                    AttackRow(
                        attack=attack,
                        method=method,
                        measure=DRAWN,
                        n=10,
                        before=before,
                        ci95_before=wilson(round(10 * before), 10),
                        after=after,
                        ci95_after=wilson(round(10 * after), 10),
                        change=after - before,
                        ci95_change=(after - before - 0.1, 0.7),
                        seconds=seconds,
                        unet_passes=passes,
                    )
                )
    cosine = [[1.0, 0.31, -0.08], [0.31, 1.0, 0.12], [-0.08, 0.12, 1.0]]
    return Results(
        bench="made-up",
        model="demo",
        date="2026-01-02T03:04:05+00:00",
        command="sdd-lora evaluate recipes/bench/demo-single.yaml -o bench",
        versions={"python": "3.11", "torch": "2.13.0"},
        rows=rows,
        concepts=["bomb", "axe", "dagger"],
        sampling={"steps": 25, "guidance": 3.0, "scheduler": "ddim"},
        methods={m: {"how": "as it is" if m == "sd" else f"made up for {m}"} for m in methods},
        measures={
            DRAWN: MeasureInfo(kind="rate", of="erased", better="lower", note="any of them"),
            KEPT: MeasureInfo(kind="rate", of="kept", better="higher", note="the noun asked for"),
            DISTANCE: MeasureInfo(kind="mean", of="kept", better="lower"),
        },
        variations=[
            VariationResults(name="strength", field="weight", rows=strength),
            VariationResults(name="samplers", field="scheduler", rows=samplers),
        ],
        attacks=attacks,
        collateral=moved,
        costs=[
            Cost(
                method=m,
                told="2 words",
                unet_passes=None if m == "baked" else 40_000,
                seconds=61.5,
                parameters=65_536,
                bytes=148_000,
            )
            for m in methods
        ],
        choices=[
            ChoiceRow(method="sdd", iteration=i, drawn=d, kept=k, n=(42, 48), chosen=i == 500)
            for i, d, k in ((250, 0.6, 0.8), (500, 0.2, 0.75), (750, 0.1, 0.5))
        ],
        interference=AdapterCosines(names=["weapons", "gore", "look <1>"], cosine=cosine),
        missing=["nudenet: expected the package nudenet, which is not installed"],
    )


def drawing(index, gone, side=64):
    """A shape on white; another one where it is gone."""
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    colour = tuple(int(c) for c in np.random.default_rng(index).integers(40, 200, 3))
    box = (side // 6, side // 6, side - side // 6, side - side // 6)
    (pen.ellipse if gone else pen.rectangle)(box, fill=colour)
    return image


def write(folder, methods=tuple(RATES), side=64):
    """Fill `folder` with results.json, images.jsonl, bench.yaml and images."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(results(methods).to_json())
    (folder / "bench.yaml").write_text("name: made-up\nmodel: demo\n")
    lines = []
    cells = [(m, None, None) for m in methods]
    cells += [(m, "strength", w) for m in methods[-4:-2] for w in WEIGHTS]
    for method, variation, setting in cells:
        place = Path("images") / (f"{variation}-{setting}-{method}" if variation else method)
        (folder / place).mkdir(parents=True, exist_ok=True)
        prompts = [(kind, name, p) for name, (kind, ps) in SETS.items() for p in ps]
        for index, (kind, name, prompt) in enumerate(prompts):
            rate = RATES[method][0] if setting is None else float(np.exp(-2 * setting))
            there = kind == "kept" or index / 3 + 0.2 < rate
            file = place / f"{index:05d}.png"
            drawing(index, not there, side).save(folder / file)
            values = {DRAWN: there} if kind == "erased" else {KEPT: there, DISTANCE: 1.25}
            lines.append(
                {
                    "method": method,
                    "variation": variation,
                    "setting": setting,
                    "kind": kind,
                    "set": name,
                    "prompt": prompt,
                    "seed": 7 + index,
                    "file": str(file),
                    "values": values,
                }
            )
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "images.jsonl").write_text(text)
    return folder


if __name__ == "__main__":
    write(sys.argv[1])
