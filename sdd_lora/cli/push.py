"""`sdd-lora push`."""

from pathlib import Path
from typing import Annotated

import typer

from sdd_lora.cli.common import Result, verb


@verb("push")
def push(
    folder: Annotated[Path, typer.Argument(help="A run's folder.", metavar="DIR")],
    repository: Annotated[
        str, typer.Argument(help="Where to, owner/name; made if it is not there.", metavar="REPO")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="For you alone, where the repository is new.")
    ] = False,
) -> Result:
    """Publish an adapter with its card and numbers on the hub.

    Log in once with `hf auth login`. The state of an unfinished run is never sent.

    Examples:

        sdd-lora push runs/weapons me/weapons-eraser
    """
    from sdd_lora.adapter import hub

    url = hub.push(folder, repository, private)
    return Result({"repository": repository, "commit": url}, f"{repository}: {url}")
