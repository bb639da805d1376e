"""The Python API as its users call it: what it exports, takes, shows and says."""

import subprocess
import sys

import pytest
import torch
from support.adapter_making import random_adapter
from support.adapters import random_adapter as fitting_adapter
from support.short_run import SHORT, short

import sdd_lora
from sdd_lora import Adapter, BadInput, Recipe, bake, load_pipeline, measure, resize, stack, train
from sdd_lora.adapter.weighted import with_weights
from sdd_lora.training.erase import Erased


def test_all_that_is_public_is_there_and_importing_it_is_light():
    assert {getattr(sdd_lora, name) is not None for name in sdd_lora.__all__} == {True}
    assert set(sdd_lora.__all__) >= {"BadInput", "SddLoraError", "train", "Adapter"}
    code = (
        "import sys, sdd_lora; sdd_lora.BadInput; "
        "print(sorted({'torch', 'numpy', 'pydantic', 'diffusers', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture
def saved(tmp_path):
    """Two adapters: one in memory and as a run's folder, one as a file."""
    a, b = random_adapter(seed=1), random_adapter(seed=2)
    (tmp_path / "run").mkdir()
    a.save(tmp_path / "run" / "adapter.safetensors", dtype="fp32")
    file = b.save(tmp_path / "b.safetensors", dtype="fp32")
    return a, tmp_path / "run", file


def test_adapters_are_given_in_any_way(saved):
    a, run, file = saved
    for given in (a, str(run), run):
        assert [(x.identity, w) for x, w in with_weights(given)] == [(a.identity, 1.0)]
        assert [(x.identity, w) for x, w in with_weights((given, 2))] == [(a.identity, 2.0)]
    for given in ([f"{run}:0.5", file], [(run, 0.5), file], ((a, 0.5), (str(file), 1))):
        assert [weight for _, weight in with_weights(given)] == [0.5, 1]
    both = stack([f"{run}:0.5", file])
    expected = stack([(a, 0.5), (Adapter.load(file), 1.0)])
    assert all((both.delta(n) - expected.delta(n)).norm() == 0 for n in expected.factors)
    assert resize(file, rank=1).adapter.rank == 1
    for wrong in (3, [None], {"a": 1.0}):
        with pytest.raises(BadInput, match="expected an Adapter, a path or a hub id"):
            stack(wrong if isinstance(wrong, list) else [wrong])


def test_pipelines_and_bakes_take_paths(tmp_path, caplog):
    file = fitting_adapter(0.3).save(tmp_path / "a.safetensors")
    pipe = load_pipeline("demo", adapters=[f"{file}:0.8"], torch_dtype=torch.bfloat16, device="cpu")
    assert pipe.unet.dtype == torch.bfloat16 and pipe.get_active_adapters() == ["adapter_0"]
    assert load_pipeline("demo", file, dtype="fp32", device="cpu").unet.dtype == torch.float32
    with pytest.raises(BadInput, match=r"'half': expected a torch\.dtype, or one of fp32"):
        load_pipeline("demo", dtype="half")
    with pytest.raises(BadInput, match="expected one of them"):
        load_pipeline("demo", dtype="fp32", torch_dtype=torch.float32)
    assert "LoRA" not in caplog.text
    report = bake("demo", str(file), out=tmp_path / "baked", rounding="stochastic")
    assert [a.weight for a in report.adapters] == [1.0]
    assert repr(report) == (
        f"BakeReport('{tmp_path / 'baked'}': random × 1, 32 tensors of unet: weights)"
    )


def test_a_recipes_file_trains_into_its_default_folder_and_calls_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(SHORT)
    seen = []
    adapter = train("r.yaml", callback=lambda *told: seen.append(told))
    assert [iteration for iteration, _ in seen] == [1, 2, 3]
    assert all(losses.keys() == {"loss"} and losses["loss"] > 0 for _, losses in seen)
    assert Adapter.load("runs/short").identity == adapter.identity
    with pytest.raises(BadInput, match="expected a recipe that names prompts"):
        measure("runs/short", "r.yaml", "measured")

    def stops(iteration, losses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="iteration 1 of 3; `resume=True` continues"):
        train("r.yaml", "other", callback=stops)
    assert train("r.yaml", "other", resume=True).identity == adapter.identity


def test_notebooks_show_a_line_each():
    adapter = random_adapter(rank=2, concepts=["bomb", "axe", "gun", "dagger"])
    assert repr(adapter) == (
        "Adapter('random-0', rank 2, 32 modules, 13,184 parameters, "
        "erases bomb, axe, gun and 1 more)"
    )
    assert repr(short()) == "Recipe('short' on 'demo': sdd, rank 4, 2 concepts, 3 iterations)"
    shown = [
        repr(Recipe(name="x", model="demo", concepts=["bomb"], parameters="full")),
        repr(next(iter(adapter.factors.values()))),
        repr(resize(adapter, rank=1)),
        repr(Erased(adapter, ("knife",), ())),
    ]
    assert all(len(text) < 200 and "\n" not in text for text in shown)
    assert shown[1] == "Factors(32 × 128, rank 2, alpha 2)"
