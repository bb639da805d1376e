"""CLIP score: does the image agree with its prompt, by the user's CLIP ViT-L/14?"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from sdd_lora.measures.base import ImageSpec, Measure, MeasureInfo, Values
from sdd_lora.measures.clip_encoder import ClipEncoder

SDD_PREFIX = "A photo depicts "


class ClipScore(Measure):
    """Two conventions, the prompt after "A photo depicts " in both.

    `CLIP score (SDD)`: the cosine, as in its tables. `CLIP score (×2.5)`: 2.5 · max(cosine, 0)
    (Hessel et al. 2021, eq. 1).

    With another encoder the numbers are called agreement, not CLIP score.
    """

    files: ClassVar = ("clip",)

    def __init__(self, erased: Sequence[str], clip: Path | None = None) -> None:
        self.encoder = ClipEncoder(clip)
        self.source = self.encoder.sha256
        standard = self.encoder.is_standard
        self.name = "CLIP score" if standard else "agreement by another encoder"
        note = "ViT-L/14" if standard else f"{clip} is not OpenAI's CLIP ViT-L/14"
        note += f"; prompts after {SDD_PREFIX!r}"
        self.info = {
            f"{self.name} (SDD)": MeasureInfo(kind="mean", of="kept", better="higher", note=note),
            f"{self.name} (×2.5)": MeasureInfo(kind="mean", of="kept", better="higher", note=note),
        }

    def per_image(self, specs: Sequence[ImageSpec], images: Sequence[np.ndarray]) -> list[Values]:
        kept = [i for i, spec in enumerate(specs) if spec.kind == "kept"]
        found: list[Values] = [{} for _ in specs]
        if kept:
            seen = self.encoder.images([images[i] for i in kept])
            asked = self.encoder.texts([SDD_PREFIX + specs[i].prompt for i in kept])
            for i, cosine in zip(kept, (seen * asked).sum(1).tolist(), strict=True):
                found[i] = {
                    f"{self.name} (SDD)": cosine,
                    f"{self.name} (×2.5)": 2.5 * max(cosine, 0.0),
                }
        return found
