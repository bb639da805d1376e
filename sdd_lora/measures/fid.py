"""Fréchet inception distance (Heusel et al. 2017) between a row's images and real ones."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import sha256_of
from sdd_lora.io.pictures import read_picture, reading
from sdd_lora.measures import needs
from sdd_lora.measures.base import Measure, MeasureInfo
from sdd_lora.sd.devices import best_device

#: inception-2015-12-05.pt, the TorchScript that clean-fid reads
INCEPTION = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
_SIZE = 299
_FID_BATCH = 32
_NO_PICTURE = "expected a picture, of `reference`, can't read it"
_REFERENCE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass
class FeatureMoments:
    """Sums of features (D,) and of their outer products (D, D), in float64."""

    count: int = 0
    sums: np.ndarray | float = 0.0
    products: np.ndarray | float = 0.0

    def add(self, features: np.ndarray) -> None:
        """Features (B, D)."""
        wide = features.astype(np.float64)
        self.count += len(wide)
        self.sums = self.sums + wide.sum(0)
        self.products = self.products + wide.T @ wide

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """(D,) and (D, D), unbiased, of two images at least."""
        mean = np.asarray(self.sums) / self.count
        covariance = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return mean, covariance


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½) (Heusel et al. 2017, eq. 6).

    tr (Σa Σb)^½ is the sum of the roots of the eigenvalues of Σa^½ Σb Σa^½, which is symmetric:
    `eigh` where others take a general matrix's root.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a.mean_and_covariance(), b.mean_and_covariance()
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    both = root @ cov_b @ root
    crossed = np.sqrt(np.clip(np.linalg.eigvalsh((both + both.T) / 2), 0, None)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * crossed)


class Fid(Measure):
    """`FID` of all kept images to the pictures in the folder `reference`, clean-fid's resizing.

    With another network than `inception-2015-12-05.pt` the number is not called FID. FID falls with
    the number of images: compare rows of one bench, not of two.
    """

    files: ClassVar = ("inception", "reference")

    def __init__(
        self, erased: Sequence[str], inception: Path | None = None, reference: Path | None = None
    ) -> None:
        path = needs.supplied(
            inception,
            "inception",
            "clean-fid's Inception (inception-2015-12-05.pt, TorchScript)",
            "NVIDIA's stylegan2-ada-pytorch metrics, where clean-fid gets it",
        )
        folder = needs.supplied(
            reference,
            "reference",
            "a folder of real pictures",
            "the captions' data set (COCO)",
            folder=True,
        )
        self.real_files = _pictures_in(folder)
        network = sha256_of(path)
        pictures = hashlib.sha256(" ".join(map(sha256_of, self.real_files)).encode())
        self.source = f"{network}, to pictures {pictures.hexdigest()}"
        standard = network == INCEPTION
        self.name = "FID" if standard else "Fréchet distance by another network"
        try:
            self.network = torch.jit.load(str(path), map_location=best_device()).eval()
        except RuntimeError as error:
            raise BadInput(
                f"inception: {path}: expected a TorchScript file, can't read it"
            ) from error
        if not hasattr(self.network, "layers"):
            raise BadInput(
                f"inception: {path}: expected a network whose `layers` give features, as "
                "inception-2015-12-05.pt has them, found none"
            )
        self._real: FeatureMoments | None = None
        note = f"to {len(self.real_files)} pictures in {folder.name}, clean-fid's resizing"
        if not standard:
            note += f"; {path.name} is not inception-2015-12-05.pt"
        self.info = {self.name: MeasureInfo(kind="mean", of="kept", better="lower", note=note)}

    def per_set(self, images: Iterable[np.ndarray]) -> dict[str, float]:
        """The distance of images (H, W, 3) uint8 to the reference; none for a single image."""
        drawn = self.moments(images)
        if drawn.count < 2:
            return {}
        if self._real is None:
            self._real = self.moments(read_picture(x, _NO_PICTURE) for x in self.real_files)
        return {self.name: frechet_distance(drawn, self._real)}

    def moments(self, images: Iterable[np.ndarray]) -> FeatureMoments:
        """Moments of the features of images."""
        found, left = FeatureMoments(), iter(images)
        while batch := [resized(image) for image in islice(left, _FID_BATCH)]:
            found.add(self._features(torch.stack(batch)))
        return found

    @torch.no_grad()
    def _features(self, pixels: torch.Tensor) -> np.ndarray:
        """(B, 3, 299, 299) in 0 … 255 → (B, D). The layers expect −1 … 1."""
        scaled = ((pixels - 128) / 128).to(best_device())
        return self.network.layers(scaled).flatten(1).cpu().numpy()


def resized(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 → (3, 299, 299) fp32 in 0 … 255: bicubic, antialiased, unrounded, channel by
    channel (Parmar et al. 2022, clean-fid)."""
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize(
            (_SIZE, _SIZE), Image.Resampling.BICUBIC
        )
        for c in range(3)
    ]
    return torch.from_numpy(np.stack([np.asarray(c) for c in channels]).clip(0, 255))


def _pictures_in(folder: Path) -> list[Path]:
    """All pictures of a folder. Raises BadInput where there are fewer than two."""
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in _REFERENCE_SUFFIXES)
    if len(found) < 2:
        raise BadInput(f"reference: {folder}: expected two pictures at least, found {len(found)}")
    for path in found:
        with reading(path, _NO_PICTURE), Image.open(path):
            pass
    return found
