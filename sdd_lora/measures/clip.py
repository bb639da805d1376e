"""CLIP score: does the image agree with its prompt, by the user's CLIP ViT-L/14?"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from sdd_lora.measures.base import ImageSpec, Measure, MeasureInfo, Values
from sdd_lora.measures.clip_encoder import ClipEncoder

SDD_PREFIX = "A photo depicts "


class ClipScore(Measure):
    """Three conventions. `CLIP score (SDD)`: the cosine, the prompt after "A photo depicts ", as in
    SDD's tables. `CLIP score (×2.5)`: 2.5 · max(cosine, 0), after the same words (Hessel et al.
    2021, eq. 1). `CLIP score (torchmetrics)`: 100 · max(cosine, 0) of the bare prompt, as
    torchmetrics' CLIPScore has it, and diffusers' evaluation guide.

    With another encoder the numbers are called agreement, not CLIP score.
    """

    files: ClassVar = ("clip",)

    def __init__(self, erased: Sequence[str], clip: Path | None = None) -> None:
        self.encoder = ClipEncoder(clip)
        self.source = self.encoder.sha256
        standard = self.encoder.is_standard
        self.name = "CLIP score" if standard else "agreement by another encoder"
        encoder = "ViT-L/14" if standard else f"{clip} is not OpenAI's CLIP ViT-L/14"
        after = f"prompts after {SDD_PREFIX!r}"
        asked = {"SDD": after, "×2.5": after, "torchmetrics": "prompts as they are"}
        self.info = {
            f"{self.name} ({convention})": MeasureInfo(
                kind="mean", of="kept", better="higher", note=f"{encoder}; {told}"
            )
            for convention, told in asked.items()
        }

    def per_image(self, specs: Sequence[ImageSpec], images: Sequence[np.ndarray]) -> list[Values]:
        kept = [i for i, spec in enumerate(specs) if spec.kind == "kept"]
        found: list[Values] = [{} for _ in specs]
        if kept:
            seen = self.encoder.images([images[i] for i in kept])
            cosines = (
                (seen * self.encoder.texts([prefix + specs[i].prompt for i in kept])).sum(1)
                for prefix in (SDD_PREFIX, "")
            )
            for i, after_prefix, bare in zip(kept, *(c.tolist() for c in cosines), strict=True):
                found[i] = {
                    f"{self.name} (SDD)": after_prefix,
                    f"{self.name} (×2.5)": 2.5 * max(after_prefix, 0.0),
                    f"{self.name} (torchmetrics)": 100 * max(bare, 0.0),
                }
        return found
