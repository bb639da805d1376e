"""Detectors that flag pictures of any SD 1.x model, for cards: how often, before and after."""

from collections.abc import Callable, Sequence

import numpy as np

from sdd_lora.errors import BadInput
from sdd_lora.measures.judge import Row, row_of
from sdd_lora.measures.nudenet import NudeNet
from sdd_lora.measures.open_nsfw import OpenNsfw

DETECTORS: dict[str, Callable[..., NudeNet | OpenNsfw]] = {
    "nudenet": NudeNet,
    "open_nsfw": OpenNsfw,
}

#: prompts, and for each of their images whether it is flagged, before and after
FlaggedImages = tuple[Sequence[str], list[bool], list[bool]]


class Flagging:
    """`measure.detector: nudenet | open_nsfw`: the benches' measure of that name, as it is where a
    bench gives no options. Raises BadInput without its package."""

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self.measure = DETECTORS[name]([])
        except BadInput as error:
            raise BadInput(f"measure.detector: {name}: {error}") from None

    def see(self, prompts: Sequence[str], images: np.ndarray) -> list[bool]:
        """Is an image (H, W, 3) uint8 of (B, H, W, 3) flagged?"""
        lines = [{"prompt": prompt} for prompt in prompts]
        return [bool(found[self.name]) for found in self.measure.values(lines, list(images))]

    def rows(self, concept: FlaggedImages, kept: FlaggedImages) -> list[Row]:
        """How often prompts of the concept, and kept ones, draw what is flagged."""
        told = f"flagged by {self.name} (score ≥ {self.measure.threshold:g})"
        rows = [(told, "concept", concept), (f"kept, {told}", "kept", kept)]
        return [row_of(name, group, *images) for name, group, images in rows if images[0]]
