"""Which size of SD 1.x's structure an adapter is for, told from the shapes of its modules."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from sdd_lora import sd1 as names
from sdd_lora.errors import BadInput

Shapes = Mapping[str, tuple[int, ...]]

#: Modules that have the width of their place on the side of their inputs.
_WIDE_OUTPUTS = (".ff.net.0.proj", "conv_out", "time_embedding.linear_1", ".mlp.fc1")
_CONTEXT = 4  # beside the four levels


def fits(shapes: Shapes, widths: names.Widths) -> bool:
    """Whether all these modules have the shapes that a model of these widths gives them."""
    known = _known_shapes(widths)
    return all(known.get(name) == shape for name, shape in shapes.items())


def require_one_model(shapes: Shapes) -> None:
    """Raises BadInput, naming the odd one out, where no model has modules of all these shapes.

    The widths are those that most modules speak for; a width that none tells is not checked.
    """
    votes: dict[int, Counter[int]] = {}
    for name, shape in shapes.items():
        for place, width in _widths_told(name, shape):
            votes.setdefault(place, Counter())[width] += 1
    untold: Any = math.nan  # and so is every sum with it
    told = [
        votes[place].most_common(1)[0][0] if place in votes else untold
        for place in range(_CONTEXT + 1)
    ]
    widths = names.Widths((told[0], told[1], told[2], told[3]), told[_CONTEXT])
    known = _known_shapes(widths, in_channels=untold)  # 4, or 9 of an inpainting model
    for name, shape in shapes.items():
        expected = known.get(name, ())
        found, wanted = without_ones(shape), without_ones(expected)
        if len(found) != len(wanted) or any(
            n != m and not math.isnan(m) for n, m in zip(found, wanted, strict=True)
        ):
            raise BadInput(
                f"{name}: its factors are for a weight of {shape}, but in a model that the other "
                f"modules fit it is {expected or 'missing'}: there is no model for this adapter"
            )


def _widths_told(name: str, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Places (a level, or the context) and the widths that a module's shape gives them."""
    if name == "time_embedding.linear_2":
        return
    yield _place(name), shape[1 if name.endswith(_WIDE_OUTPUTS) else 0]
    if name.endswith((".attn2.to_k", ".attn2.to_v")):
        yield _CONTEXT, shape[1]


def _place(name: str) -> int:
    """The level of a module, or the context's place of the text encoder's."""
    if names.is_text(name):
        return _CONTEXT
    block, _, rest = name.partition(".")
    if block == "down_blocks":
        return int(rest[0])
    if block == "up_blocks":
        return 3 - int(rest[0])
    return 3 if block == "mid_block" else 0


def _known_shapes(widths: names.Widths, in_channels: int = 4) -> dict[str, tuple[int, ...]]:
    return names.unet_shapes(widths, in_channels) | names.text_encoder_shapes(widths.context)


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """1×1 convolutions are matrices and back."""
    return shape[:2] if shape[2:] == (1, 1) else shape
