"""recipes/quickstart.ipynb: cells of Python that names what there is, and shows what it made.

`python tests/support/run_notebook.py recipes/quickstart.ipynb` runs it anew, in minutes.
"""

import ast
import importlib
import json
from pathlib import Path

from support.run_notebook import run_cell, sources

import sdd_lora

NOTEBOOK = Path(__file__).parent.parent / "recipes" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def test_its_cells_are_python_and_take_public_names():
    taken = []
    for source in sources(NOTEBOOK):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sdd_lora"):
                module = importlib.import_module(node.module)
                names = [alias.name for alias in node.names]
                assert all(hasattr(module, name) for name in names)
                taken += names if node.module == "sdd_lora" else []
    assert set(taken) >= {"Recipe", "bake", "erase", "stack", "train", "unbake"}
    assert set(taken) <= set(sdd_lora.__all__)


def test_its_calls_take_the_arguments_that_they_are_given():
    """Each call of a public function, with arguments of whatever kind, fits its signature."""
    import inspect

    for source in sources(NOTEBOOK):
        for node in ast.walk(ast.parse(source)):
            name = node.func.id if isinstance(node, ast.Call) and hasattr(node.func, "id") else ""
            if name in sdd_lora.__all__:
                options = {keyword.arg: None for keyword in node.keywords}
                inspect.signature(getattr(sdd_lora, name)).bind(*node.args, **options)


def test_its_first_cell_installs_nothing_where_the_package_is(capsys):
    assert run_cell(sources(NOTEBOOK)[0], {"__name__": "__main__"}, 1) == []


def test_it_shows_what_it_made_and_stays_small():
    assert NOTEBOOK.stat().st_size < 400_000
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    shown = [output["data"] for cell in code for output in cell["outputs"] if "data" in output]
    assert sum("image/png" in data for data in shown) == 3
    assert not [o for cell in code for o in cell["outputs"] if o["output_type"] == "error"]
    ends_in_value = [isinstance(ast.parse(s).body[-1], ast.Expr) for s in sources(NOTEBOOK)]
    assert [bool(cell["outputs"]) for cell in code] == ends_in_value
