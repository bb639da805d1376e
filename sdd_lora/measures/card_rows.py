"""The rows of a card: rates before and after, from a measure's numbers of single images."""

from collections.abc import Sequence

from sdd_lora.adapter.metrics import CardRow
from sdd_lora.measures.base import ImageSpec, Measure, Values
from sdd_lora.measures.intervals import paired_difference, wilson


def card_rows(
    measure: Measure,
    specs: Sequence[ImageSpec],
    before: Sequence[Values],
    after: Sequence[Values],
) -> list[CardRow]:
    """A row for each name and group that the measure puts its numbers into, in the order of its
    `info`; images that lack the number before or after count in neither."""
    rows = []
    for name in measure.info:
        found: dict[tuple[str, str], list[tuple[str, bool, bool]]] = {}
        for spec, old, new in zip(specs, before, after, strict=True):
            place = measure.card_row(spec, name) if name in old and name in new else None
            if place is not None:
                images = found.setdefault(place, [])
                images.append((spec.prompt, bool(old[name]), bool(new[name])))
        rows += [_card_row(*place, images) for place, images in found.items()]
    return rows


def _card_row(name: str, group: str, images: Sequence[tuple[str, bool, bool]]) -> CardRow:
    prompts, before, after = zip(*images, strict=True)
    n = len(images)
    _, low, high = paired_difference(before, after)
    return CardRow(
        name=name,
        group=group,
        prompts=len(set(prompts)),
        before=sum(before) / n,
        after=sum(after) / n,
        n=n,
        ci95_before=wilson(sum(before), n),
        ci95_after=wilson(sum(after), n),
        ci95_change=(low, high),
    )
