"""Pictures read from files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from sdd_lora.errors import BadInput


@contextmanager
def reading(picture: Path, advice: str) -> Iterator[None]:
    """Whatever Pillow raises for a damaged picture becomes BadInput, with `advice`."""
    try:
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"{picture}: {advice}: {error}") from error


def read_picture(path: Path, advice: str) -> np.ndarray:
    """A file's picture (H, W, 3) uint8 RGB. Raises BadInput, with `advice`, for a damaged one."""
    with reading(path, advice), Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
