"""The adapters under adapters/demo: sound, as labelled, and as good as their cards say.

`python -m tests.test_published` prints the tables of adapters/README.md.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sdd_lora.adapter.adapter import Adapter
from sdd_lora.adapter.algebra import stack
from sdd_lora.adapter.inspect import describe_adapter
from sdd_lora.adapter.loaders import verdicts
from sdd_lora.checkpoint.bake import bake
from sdd_lora.checkpoint.describe import open_sd1
from sdd_lora.checkpoint.locate import DEMO_FOLDER, locate
from sdd_lora.checkpoint.plan import misfits_of
from sdd_lora.checkpoint.portable import adapter_on
from sdd_lora.checkpoint.undo import unbake
from sdd_lora.io.atomic import sha256_of
from sdd_lora.recipe import Recipe
from sdd_lora.runs import before_after
from sdd_lora.sd.pipeline import load_pipeline

ADAPTERS = Path(__file__).parent.parent / "adapters"
FOLDERS = sorted(path.parent for path in ADAPTERS.glob("demo/*/metrics.json"))
PARTS = ("weapons", "substances", "gore")
pytestmark = pytest.mark.skipif(not FOLDERS, reason="adapters/demo is empty: none published yet")


def table() -> list[str]:
    """One line an adapter: what it erases, and what it keeps, from its metrics.json."""
    lines = [
        "| adapter | erases | drawn | worst kept group | style kept | kB |",
        "|---|---|---|---|---|---|",
    ]
    for folder in FOLDERS:
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        rows = metrics["measures"]
        erased = [row for row in rows if row["name"] == "concept drawn"]
        kept = [row for row in rows if row["name"] == "noun kept"]
        styles = [row for row in rows if row["name"] == "style kept"]
        worst = min(kept, key=lambda row: row["after"] - row["before"])
        lines.append(
            f"| [`{folder.name}`](demo/{folder.name}/) | "
            f"{', '.join(row['group'] for row in erased)} | "
            f"{', '.join(_change(row) for row in erased)} | {worst['group']}: {_change(worst)} | "
            f"{_change(styles[0])} | {metrics['adapter']['bytes'] / 1000:.0f} |"
        )
    return lines


def side_by_side(names: tuple[str, ...]) -> list[str]:
    """A line a measure: what adapters make of it that were measured on the same pictures."""
    measures = [_measures(ADAPTERS / "demo" / name) for name in names]
    lines = [f"| % of pictures | base | {' | '.join(f'`{name}`' for name in names)} |"]
    lines.append("|---" * (2 + len(names)) + "|")
    for rows in zip(*measures, strict=True):
        first = rows[0]
        assert len({(row["name"], row["group"], row["before"], row["n"]) for row in rows}) == 1
        cells = (f"{100 * row['after']:.1f} ({_interval(row['ci95_after'])})" for row in rows)
        lines.append(
            f"| {first['group']}: {first['name']} | {100 * first['before']:.1f} | "
            f"{' | '.join(cells)} |"
        )
    return lines


def _measures(folder: Path) -> list[dict]:
    return json.loads((folder / "metrics.json").read_text("utf-8"))["measures"]


def _interval(limits: list[float]) -> str:
    return " … ".join(f"{100 * limit:.1f}" for limit in limits)


def _change(row: dict) -> str:
    return f"{100 * row['before']:.1f} → {100 * row['after']:.1f} %"


def test_the_index_lists_them_with_their_numbers():
    index = (ADAPTERS / "README.md").read_text("utf-8").splitlines()
    assert {folder.name for folder in FOLDERS} >= {*PARTS, "unsafe", "style-sketch", "stack"}
    for line in table() + side_by_side(("stack", "unsafe")):
        assert line in index


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_is_sound_complete_and_as_its_metrics_say(folder):
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    path = folder / "adapter.safetensors"
    assert sha256_of(path) == metrics["adapter"]["sha256"]
    adapter = Adapter.load(path)
    assert adapter.metadata["measures"] == metrics["measures"]
    assert misfits_of(open_sd1(locate("demo")), [(adapter, 1.0)]) == []
    loads = {v.loader: v.loads for v in verdicts(describe_adapter(path))}
    assert loads["diffusers"] != adapter.is_portable  # an eraser of embeddings is baked, or ours
    assert not loads["A1111"], "of the embedded model's size, it fits no Stable Diffusion 1.5"
    if not adapter.is_portable:
        twin = Adapter.load(folder / "adapter.peft.safetensors")
        for module in adapter.factors:
            difference = adapter.delta(module) - twin.delta(module)
            assert difference.norm() <= 1e-3 * adapter.delta(module).norm()
    for name in ("README.md", "adapter.json", "adapter.preview.png", "before-after.png"):
        assert (folder / name).stat().st_size > 0
    if metrics["training"]:
        assert Recipe.load(folder / "recipe.yaml").sha256 == metrics["recipe_sha256"]


def test_the_stack_is_the_sum_of_its_parts():
    stack = Adapter.load(ADAPTERS / "demo" / "stack")
    parts = [Adapter.load(ADAPTERS / "demo" / name) for name in PARTS]
    for module in stack.factors:
        expected = np.sum([part.factors[module].delta() for part in parts], axis=0)
        error = np.linalg.norm(stack.factors[module].delta() - expected)
        assert error <= 1e-3 * np.linalg.norm(expected)


@torch.no_grad()
def test_the_one_that_holds_loads_in_diffusers_stacks_bakes_and_unbakes(tmp_path):
    folder = ADAPTERS / "demo" / "weapons-robust"
    inputs = (torch.ones(1, 4, 16, 16), torch.tensor([500]), torch.ones(1, 77, 128))
    base, theirs = load_pipeline("demo"), load_pipeline("demo")
    theirs.load_lora_weights(str(folder), weight_name="adapter.safetensors")
    found = theirs.unet(*inputs).sample
    robust = Adapter.load(folder)
    ours = load_pipeline("demo", [(robust, 1.0)]).unet(*inputs).sample
    assert (found - base.unet(*inputs).sample).abs().max() > 0.1
    torch.testing.assert_close(found, ours, atol=1e-3, rtol=0)
    eraser = Adapter.load(folder.parent / "from-words" / "no-weapons.safetensors")
    words = adapter_on(eraser, "demo")
    both = stack([robust, words])
    bake(DEMO_FOLDER, [both], out=tmp_path / "baked", undo=tmp_path / "demo.undo")
    baked = load_pipeline(str(tmp_path / "baked")).unet(*inputs).sample
    expected = load_pipeline("demo", [(robust, 1.0), (words, 1.0)]).unet(*inputs).sample
    torch.testing.assert_close(baked, expected, atol=2e-2, rtol=0)  # baked in fp16
    assert (baked - found).abs().max() > 0.1
    unbake(tmp_path / "baked", tmp_path / "demo.undo", tmp_path / "back")
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    assert (tmp_path / "back" / weights).read_bytes() == (DEMO_FOLDER / weights).read_bytes()


def test_weapons_measured_again():
    """A small sample on other seeds: far apart, as the card says."""
    overrides = {"measure.images": 8, "measure.seed": 7_000_000, "measure.prompts.kept": []}
    recipe = Recipe.load(ADAPTERS / "demo" / "weapons" / "recipe.yaml", overrides)
    adapter = Adapter.load(ADAPTERS / "demo" / "weapons")
    row = before_after.measure_before_after(recipe, adapter, "demo").rows[0]
    assert (row.name, row.group, row.n) == ("concept drawn", "weapons", 8)
    assert row.before >= 0.7 and row.after <= 0.2


if __name__ == "__main__":
    print("\n".join([*table(), "", *side_by_side(("stack", "unsafe"))]))
