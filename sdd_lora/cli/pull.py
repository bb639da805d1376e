"""`sdd-lora pull`."""

from pathlib import Path
from typing import Annotated

import typer

from sdd_lora.cli.adapters import Force
from sdd_lora.cli.common import Result, verb


@verb("pull")
def pull(
    repository: Annotated[str, typer.Argument(help="owner/name on the hub.", metavar="REPO")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The folder to make [default: the repository's name]."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit [default: main].")
    ] = None,
    force: Force = False,
) -> Result:
    """Fetch a published adapter with its card and numbers, and check its hashes.

    Nothing but safetensors is taken.

    Examples:

        sdd-lora pull someone/weapons-eraser -o adapters/weapons
    """
    from sdd_lora.adapter import hub

    folder = output or Path(repository.rpartition("/")[2])
    files = sorted(path.name for path in hub.pull(repository, folder, revision, force).iterdir())
    data = {"repository": repository, "folder": str(folder), "files": files}
    return Result(data, f"{folder}: {', '.join(files)}")
