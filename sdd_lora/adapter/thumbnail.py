"""A picture of what an adapter does, small, in its file's header: `modelspec.thumbnail`.

ModelSpec has it as a data URI. A1111 shows a file beside the adapter's, NAME.preview.png.
"""

import base64
import io
from pathlib import Path

from PIL import Image

from sdd_lora.adapter.metadata import THUMBNAIL_KEY, Metadata
from sdd_lora.errors import BadInput
from sdd_lora.io.pictures import reading

_START = "data:image/jpeg;base64,"
_MOST_BYTES = 15_000  # a third more as base64
_QUALITIES = (85, 70, 55, 40, 25, 10)


def with_thumbnail(metadata: Metadata, picture: Image.Image) -> Metadata:
    """The metadata with a picture, as a JPEG of 15 kB at most; the best quality that fits."""
    for quality in _QUALITIES:
        file = io.BytesIO()
        picture.convert("RGB").save(file, "JPEG", quality=quality)
        if len(file.getvalue()) <= _MOST_BYTES:
            break
    uri = _START + base64.b64encode(file.getvalue()).decode()
    return metadata | {"header": metadata.header | {THUMBNAIL_KEY: uri}}


def thumbnail_of(metadata: Metadata) -> Image.Image | None:
    """The picture in the metadata, whoever put it there; None where there is none. Raises BadInput
    for a damaged one."""
    uri = metadata.header.get(THUMBNAIL_KEY, "")
    kind, comma, data = uri.partition(",")
    if not comma or not kind.startswith("data:image/") or not kind.endswith(";base64"):
        return None
    try:
        content = base64.b64decode(data, validate=True)
    except ValueError as error:
        raise BadInput(f"{THUMBNAIL_KEY}: expected base64, found other text") from error
    with reading(Path(THUMBNAIL_KEY), "expected a picture"):
        return Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")).convert("RGB")


def preview_path(path: Path) -> Path:
    """Where A1111 looks for the picture of an adapter's file."""
    return path.with_suffix(".preview.png")
