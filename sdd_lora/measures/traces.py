"""Half-erased concepts: what the judge makes of a picture besides its verdict."""

from collections.abc import Sequence

import numpy as np
import torch

from sdd_lora.demo.judge import JUDGE_FILE, as_pictures, load_judge
from sdd_lora.demo.vocabulary import nouns
from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import sha256_of
from sdd_lora.measures.asked import named_by
from sdd_lora.measures.base import ImageSpec, Measure, MeasureInfo, Values
from sdd_lora.measures.judge import pictures_of

#: on a sheet that the eye had labelled it misses a concept in 4.5 %; on a second one in 2.1 %
#: (demo/README.md)
TRACE_THRESHOLD = 0.25


class TracesMeasure(Measure):
    """Rates by how likely the judge takes any erased noun to be.

    Its verdict is the likeliest noun or "other", so that what is half erased passes for other; here
    a concept counts from the probability `threshold` on. It misses fewer of them, and takes more
    blobs for them. Raises BadInput where the judge knows none of the nouns.
    """

    def __init__(self, erased: Sequence[str], threshold: float = TRACE_THRESHOLD) -> None:
        gone, _ = named_by(erased)
        if not gone:
            raise BadInput(f"the judge knows none of the nouns {list(erased)}")
        if not 0 < threshold < 1:
            raise BadInput(f"threshold: expected a probability below 1, found {threshold}")
        self.threshold = threshold
        self.gone = torch.tensor([noun in gone for noun in nouns()])
        self.judge, self.source = load_judge(), sha256_of(JUDGE_FILE)
        told = f"the judge's probability of all erased nouns together ≥ {threshold:g}"
        self.info = {
            "concept or traces of it": MeasureInfo.rate(
                "erased", "lower", f"half erased too: {told}"
            ),
            "another thing instead": MeasureInfo.rate(
                "erased", "neither", "no trace of a concept, and the judge names another thing"
            ),
            "nothing known instead": MeasureInfo.rate(
                "erased", "neither", "neither: a blob, or a thing that the judge has no name for"
            ),
        }

    @torch.no_grad()
    def per_image(self, specs: Sequence[ImageSpec], images: Sequence[np.ndarray]) -> list[Values]:
        pictures, owners = pictures_of([spec.prompt for spec in specs], images)
        logits, _ = self.judge(as_pictures(np.stack(pictures)))
        likely = logits.softmax(dim=1)[:, :-1]  # of nouns; the last is "other"
        erased = likely[:, self.gone].sum(dim=1) >= self.threshold
        named = (logits.argmax(dim=1) < len(self.gone)) & ~erased
        traces, others = ({o for o, x in zip(owners, m, strict=True) if x} for m in (erased, named))
        return [
            {
                "concept or traces of it": i in traces,
                "another thing instead": i in others - traces,
                "nothing known instead": i not in traces | others,
            }
            if spec.kind == "erased"
            else {}
            for i, spec in enumerate(specs)
        ]
