"""Pictures read from files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from sdd_lora.errors import BadInput


@contextmanager
def reading(picture: Path, advice: str) -> Iterator[None]:
    """Whatever Pillow raises for a damaged picture becomes BadInput, with `advice`."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"{picture}: {advice}: {error}") from error
