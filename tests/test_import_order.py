"""Imports run one way: a file format doesn't know a model, a model doesn't know training, …"""

import ast
from pathlib import Path

import sdd_lora

PACKAGE = Path(sdd_lora.__file__).parent
#: each may import what stands in an earlier row
ORDER = [
    {"version", "errors", "progress"},
    {"sd1"},
    {"io"},
    {"recipe"},
    {"adapter"},
    {"checkpoint"},
    {"demo"},  # the embedded models and judge: data, a leaf
    {"sd"},
    {"training"},
    {"generation"},
    {"measures"},
    {"attacks"},
    {"runs"},
    {"bench"},
    {"cli"},
    {"__main__", "__init__"},
]
ROW = {name: row for row, names in enumerate(ORDER) for name in names}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Top-level parts of sdd_lora that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "sdd_lora":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sdd_lora."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("sdd_lora.")}
    return found & ROW.keys()


def test_every_part_has_its_place():
    parts = {part_of(path) for path in PACKAGE.rglob("*.py")}
    assert parts <= ROW.keys()


def test_imports_never_run_back():
    files = [p for p in PACKAGE.rglob("*.py")
             if p.name != "__init__.py" or p.parent != PACKAGE]  # fmt: skip
    files = [p for p in files if "build" not in p.relative_to(PACKAGE).parts]
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in files
        for other in imported_parts(path)
        if other != part_of(path) and ROW[other] >= ROW[part_of(path)]
    ]
    assert wrong == []


def test_the_test_sees_a_wrong_import(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from sdd_lora.runs.train import train\n")
    assert imported_parts(file) == {"runs"}
