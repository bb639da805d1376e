"""Run a notebook's cells from top to bottom and keep what they show in it, without Jupyter:

python tests/support/run_notebook.py recipes/quickstart.ipynb
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image


def sources(notebook: Path) -> list[str]:
    """The code of each cell of code."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run_cell(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Run a cell; its outputs as a notebook has them: what it prints, and its last value."""
    tree = ast.parse(source)
    ends_in_value = bool(tree.body) and isinstance(tree.body[-1], ast.Expr)
    last = tree.body.pop() if ends_in_value else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"<cell {number}>", "exec"), names)
        value = last and eval(
            compile(ast.Expression(last.value), f"<cell {number}>", "eval"), names
        )
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    if value is not None:
        shown = {"output_type": "execute_result", "execution_count": number, "metadata": {}}
        outputs.append(shown | {"data": _shown(value)})
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    if not isinstance(value, Image.Image):
        return {"text/plain": [repr(value)]}
    file = io.BytesIO()
    value.quantize(128).save(file, "PNG", optimize=True)  # a palette: the notebook stays small
    picture = base64.b64encode(file.getvalue()).decode()
    return {"image/png": picture, "text/plain": ["<PIL.Image.Image>"]}


def run_notebook(notebook: Path) -> None:
    content = json.loads(notebook.read_text("utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for number, cell in enumerate(code, 1):
            outputs = run_cell("".join(cell["source"]), names, number)
            cell |= {"outputs": outputs, "execution_count": number}
    notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    run_notebook(Path(sys.argv[1]).resolve())
