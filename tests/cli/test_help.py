"""What the command line says before it does anything."""

import subprocess
import sys
from pathlib import Path

import pytest

from sdd_lora.adapter.weighted import weighted
from sdd_lora.cli.common import in_options
from sdd_lora.version import __version__

VERBS = [
    "demo",
    "erase",
    "train",
    "measure",
    "plan",
    "inspect",
    "verify",
    "convert",
    "resize",
    "stack",
    "extract",
    "bake",
    "unbake",
    "generate",
    "evaluate",
    "report",
    "push",
    "pull",
]


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "sys.argv = ['sdd-lora', '--help']\n"
        "from sdd_lora.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'diffusers', 'transformers', 'peft'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stderr
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches(call, verb):
    text = call(verb, "--help").out
    assert "Examples" in text and f"sdd-lora {verb}" in text and "--json" in text


def test_the_version_is_told(call):
    assert call("--version").out == f"sdd-lora {__version__}\n"


def test_an_unknown_verb_is_bad_input(refused):
    assert "No such command" in refused("forget")


def test_a_name_drives_no_terminal(refused):
    said = refused("inspect", "\x1b[31mred\x07.safetensors")
    assert "\\x1b[31mred\\x07.safetensors" in said


def test_a_weight_follows_the_last_colon():
    assert [weighted(a) for a in ("a", "a:0.5", "a:b/c", "dir/a.safetensors:-1")] == [
        ("a", 1),
        ("a", 0.5),
        ("a:b/c", 1),
        ("dir/a.safetensors", -1),
    ]


def test_messages_name_parameters_and_the_command_line_shows_them_as_options():
    said = in_options(
        'r.yaml: add `force=True`, `out=PATH`, `how="sum"`, `overrides["a.b"]`, '
        "`overrides[\"a.b\"]='c'` or `in_place=True`; `demo` is one, `x == y` none"
    )
    assert said == (
        "r.yaml: add --force, -o PATH, --how sum, --set a.b, --set a.b=c or --in-place; "
        "`demo` is one, `x == y` none"
    )


def test_a_verb_that_loads_a_model_says_so_at_once(refused, tmp_path):
    arguments = ("generate", "demo", "-o", tmp_path / "out")  # and no prompt
    assert refused(*arguments).startswith("loading PyTorch and the model\n")
    assert refused(*arguments, "-q").startswith("sdd-lora: no prompt")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--rank", "lora.rank"),
        ("--lr", "optimizer.learning_rate"),
        ("--learning-rate", "optimizer.learning_rate"),
        ("--iteratons", "training.iterations"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_an_option_that_is_a_recipes_field_is_told(call, verb, typed, meant):
    told = call(verb, "r.yaml", typed, "8", code=2).err
    assert f"--set {meant}=" in " ".join(told.replace("│", " ").split())


def test_a_recipe_is_no_bench_and_a_bench_no_recipe(refused):
    recipes = Path(__file__).parents[2] / "recipes"
    recipe, bench = recipes / "demo" / "weapons.yaml", recipes / "bench" / "demo-single.yaml"
    for verb in ("train", "plan"):
        assert f"{bench}: a bench, which `sdd-lora evaluate` takes" in refused(verb, bench)
    for quick in ([], ["--quick"]):
        told = refused("evaluate", recipe, *quick)
        assert f"{recipe}: a recipe, which `sdd-lora train` takes" in told
