"""A small bench of the embedded model, and what tests ask of a run."""

import json

import numpy as np
from PIL import Image

from sdd_lora.bench.bench_file import Bench
from sdd_lora.bench.run import run

SMALL = """
name: small
model: demo
concepts: [bomb, axe]
prompts:
  erased: {weapons: [a bomb, an axe]}
  kept: {animals: [a cat, a dog], beside: [a cat and a bomb]}
seeds: {first: 5, erased: 3, kept: 4}
sampling: {steps: 2, guidance: 3.0, batch: 2}
methods: [sd, neg]
measures: [judge]
"""

RECIPE = """
name: short
model: demo
concepts: [bomb, axe]
training: {iterations: 2}
"""


def parsed(text=SMALL, **changes):
    return Bench.parse(text, overrides=changes)


def never_train(recipe, folder, resume):
    raise AssertionError("nothing here is to be trained")


def ran(bench, folder, train=never_train):
    return run(bench, folder, train, "sdd-lora evaluate", {"python": "3"})


def varied(field, *values, methods=("sd",), **more):
    fields = {"field": field, "values": list(values), "methods": list(methods)} | more
    return {"variations": {"v": fields}}


def lines_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def images_of(folder):
    """The main table's images, by method, set and seed."""
    found = lines_of(folder / "images.jsonl")
    return {
        (x["method"], x["set"], x["seed"]): np.asarray(Image.open(folder / x["file"])).astype(int)
        for x in found
        if x["variation"] is None
    }


def same(one, other):
    """Equal to rounding: another batch size may move a value by 1/255."""
    difference = np.abs(one - other)
    return difference.max() <= 1 and (difference > 0).mean() <= 1e-3
