"""Images of the same prompts in rows, one above the other, as one picture with captions."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

_COLUMNS, _MARGIN, _CAPTION = 8, 40, 30
_SMALL, _LARGE = 128, 256  # sides in the picture, of images up to the first, and of larger ones
_CHARACTERS_OF_SMALL = 21
_TILE = 192  # of a preview


def preview(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> Image.Image:
    """Images before at the left, after at the right, those of a prompt beside each other; without
    text, since it is shown small."""
    whole = Image.new("RGB", (2 * _TILE, len(before) * _TILE), "white")
    for column, images in enumerate((before, after)):
        for row, image in enumerate(images):
            tile = Image.fromarray(image).resize((_TILE, _TILE), Image.Resampling.BICUBIC)
            whole.paste(tile, (column * _TILE, row * _TILE))
    return whole


def sheet(prompts: Sequence[str], rows: Mapping[str, Sequence[np.ndarray]]) -> Image.Image:
    """Prompts as captions, below them each row's images (H, W, 3) uint8, its name at the left."""
    largest = max((max(image.shape[:2]) for images in rows.values() for image in images), default=0)
    side = _SMALL if largest <= _SMALL else _LARGE
    block = len(rows) * side + _CAPTION + 8
    columns, blocks = min(_COLUMNS, len(prompts)), -(-len(prompts) // _COLUMNS)
    whole = Image.new("RGB", (_MARGIN + columns * side, blocks * block), "white")
    pen = ImageDraw.Draw(whole)
    for top in range(0, blocks * block, block):
        for number, name in enumerate(rows):
            middle = (_MARGIN // 2, top + _CAPTION + number * side + side // 2)
            pen.text(middle, name, fill="black", anchor="mm", align="center")
    for i, prompt in enumerate(prompts):
        x, y = _MARGIN + i % _COLUMNS * side, i // _COLUMNS * block
        caption = textwrap.wrap(prompt, _CHARACTERS_OF_SMALL * side // _SMALL)[:2]
        pen.text((x + 3, y + 2), "\n".join(caption), fill="black", spacing=1)
        for number, images in enumerate(rows.values()):
            picture = Image.fromarray(images[i]).resize((side, side), Image.Resampling.BICUBIC)
            whole.paste(picture, (x, y + _CAPTION + number * side))
    return whole
