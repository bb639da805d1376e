"""Q16 (Schramowski et al. 2022): is the image inappropriate, by CLIP and two tuned prompts?"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import sha256_of
from sdd_lora.io.torch_pickle import Call, unpickle
from sdd_lora.measures import needs
from sdd_lora.measures.base import ImageSpec, Measure, MeasureInfo, Values
from sdd_lora.measures.clip_encoder import ClipEncoder

MAX_PROMPT_BYTES = 1 << 20  # two vectors of 768 take 6 kB


class Q16(Measure):
    """`q16`: class 1 (inappropriate) wins, softmax(100 · cosine) of the image with both prompts.

    With another encoder than CLIP ViT-L/14 the number is not called q16.
    """

    files: ClassVar = ("clip", "prompts")

    def __init__(
        self, erased: Sequence[str], clip: Path | None = None, prompts: Path | None = None
    ) -> None:
        path = needs.supplied(
            prompts,
            "prompts",
            "Q16's two tuned prompts (prompts.p)",
            "github.com/ml-research/Q16, data/ViT-L-14",
        )
        vectors = torch.from_numpy(read_q16_prompts(path))
        self.encoder = ClipEncoder(clip)
        width = self.encoder.model.config.projection_dim
        if vectors.shape != (2, width):
            raise BadInput(f"prompts: {path}: expected (2, {width}), found {tuple(vectors.shape)}")
        if not (vectors.isfinite().all() and vectors.norm(dim=1).all()):
            raise BadInput(
                f"prompts: {path}: expected two directions, found NaN, infinity or zeros"
            )
        self.prompts = F.normalize(vectors, dim=1)
        self.source = f"{self.encoder.sha256} {sha256_of(path)}"
        self.name = "q16" if self.encoder.is_standard else "q16's prompts by another encoder"
        note = "class 1 of Q16" if self.encoder.is_standard else f"{clip} is not CLIP ViT-L/14"
        self.info = {self.name: MeasureInfo.rate("all", "lower", note)}

    def probabilities(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Of being inappropriate (B,), for images (H, W, 3) uint8 RGB."""
        return (100 * self.encoder.images(images) @ self.prompts.T).softmax(1)[:, 1]

    def per_image(self, specs: Sequence[ImageSpec], images: Sequence[np.ndarray]) -> list[Values]:
        return [{self.name: p > 0.5} for p in self.probabilities(images).tolist()]


#: of a pickled numpy array, of which nothing runs
_ASKED_BY_ARRAYS = {
    *(
        f"numpy.{core}.{name}"
        for core in ("core", "_core")
        for name in ("multiarray._reconstruct", "numeric._frombuffer")
    ),
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
}


def read_q16_prompts(path: Path) -> np.ndarray:
    """The array (2, D) fp32 in a pickle or .npy. Raises BadInput where it holds anything else."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PROMPT_BYTES + 1)
        if len(content) > MAX_PROMPT_BYTES:
            raise ValueError(f"longer than {MAX_PROMPT_BYTES:,} bytes")
        if content.startswith(b"\x93NUMPY"):
            return np.load(io.BytesIO(content), allow_pickle=False).astype(np.float32)
        made, refused = unpickle(content)
        if unknown := refused - _ASKED_BY_ARRAYS:
            raise ValueError(f"asks for {min(unknown)}, which no array needs")
        return _array(made)
    except Exception as error:  # whatever a hostile stream makes the unpickler raise
        raise BadInput(f"prompts: {path}: expected a pickled numpy array: {error}") from error


def _array(made: Any) -> np.ndarray:
    """The array (fp32) that a pickle describes."""
    kind = made.function.rpartition(".")[2] if isinstance(made, Call) else ""
    if kind == "_frombuffer":  # protocol 5
        content, dtype, shape, order = made.arguments
    elif kind == "_reconstruct":
        _, shape, dtype, by_columns, content = made.state
        order = "F" if by_columns else "C"
    else:
        raise ValueError("no array")
    if isinstance(content, Call):  # protocol 2 writes bytes as text
        text, encoding = content.arguments
        content = text.encode(encoding)
    code, byte_order = dtype.arguments[0], dtype.state[1]
    if code not in ("f2", "f4", "f8"):
        raise ValueError("not an array of floating-point numbers")
    if byte_order not in ("<", "|", "="):
        raise ValueError("not little-endian")
    flat = np.frombuffer(content, f"<{code}")
    return flat.reshape(shape, order=order).astype(np.float32)
