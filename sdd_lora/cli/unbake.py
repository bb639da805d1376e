"""`sdd-lora unbake`."""

from pathlib import Path
from typing import Annotated

import typer

from sdd_lora.cli.common import Result, verb


@verb("unbake")
def unbake(
    model: Annotated[Path, typer.Argument(help="What was baked: a file or a folder.")],
    undo: Annotated[Path, typer.Argument(help="The undo file of that bake, or a journal.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the original goes.")
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Change MODEL itself.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an output that is there.")
    ] = False,
) -> Result:
    """Take a bake back, byte for byte. Refused where the model has changed since.

    Examples:

        sdd-lora unbake safe.safetensors safe.undo -o model.safetensors

        sdd-lora unbake model.safetensors model.safetensors.undo1 --in-place
    """
    from sdd_lora.checkpoint import undo as undoing

    done = undoing.unbake(model, undo, output, in_place=in_place, force=force)
    what = "an interrupted change rolled back" if done.rolled_back else "as before the bake"
    data = {
        "output": str(done.output),
        "files": [str(file) for file in done.files],
        "in_place": done.in_place,
        "rolled_back": done.rolled_back,
    }
    return Result(data, f"{done.output}: {what}")
