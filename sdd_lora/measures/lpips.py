"""LPIPS (Zhang et al. 2018) with AlexNet: how far is an image from the one that `sd` drew?"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from sdd_lora.errors import BadInput
from sdd_lora.io.atomic import sha256_of
from sdd_lora.measures import needs
from sdd_lora.measures.base import ImageSpec, Measure, MeasureInfo, Values
from sdd_lora.sd.devices import best_device

#: SHA-256 of torchvision's alexnet-owt-7be5be79.pth starts as its name says
ALEXNET = "7be5be79"
#: where the learned heads, of the paper's authors (BSD-2), come along, module by module
_HEADS = {
    "torchmetrics": "functional/image/lpips_models/alex.pth",
    "lpips": "weights/v0.1/alex.pth",
}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPS = 1e-10
_LPIPS_BATCH = 16


class Distance(nn.Module):
    """LPIPS's network: AlexNet's five stages and a head for each, all frozen."""

    def __init__(self, trunk: dict[str, torch.Tensor], heads: dict[str, torch.Tensor]) -> None:
        super().__init__()
        convolutions = [
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.Conv2d(256, 256, 3, padding=1),
        ]
        for number, layer in zip((0, 3, 6, 8, 10), convolutions, strict=True):
            name = f"features.{number}"
            layer.load_state_dict(
                {part: trunk[f"{name}.{part}"].float() for part in ("weight", "bias")}
            )
        self.stages = nn.ModuleList(
            nn.Sequential(*([nn.MaxPool2d(3, stride=2)] if i in (1, 2) else []), layer, nn.ReLU())
            for i, layer in enumerate(convolutions)
        )
        for i in range(len(convolutions)):
            self.register_buffer(f"head{i}", heads[f"lin{i}.model.1.weight"].float())
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distances (B,) of pictures (B, 3, H, W) in [−1, 1]: Zhang et al. 2018, eq. 1."""
        shift, scale = self.get_buffer("shift"), self.get_buffer("scale")
        a, b = (a - shift) / scale, (b - shift) / scale
        total = torch.zeros(len(a), device=a.device)
        for i, stage in enumerate(self.stages):
            a, b = stage(a), stage(b)
            squared = (_unit(a) - _unit(b)) ** 2  # (B, C, h, w)
            total = total + (squared * self.get_buffer(f"head{i}")).sum(1).mean((1, 2))
        return total


def _unit(features: torch.Tensor) -> torch.Tensor:
    return features / (features.norm(dim=1, keepdim=True) + _EPS)


class Lpips(Measure):
    """`LPIPS` of each kept image to `sd`'s of the same prompt and seed.

    With another trunk than torchvision's AlexNet the number is not called LPIPS. Raises BadInput
    where the trunk, or a package that brings the heads along, is missing.
    """

    files: ClassVar = ("alexnet",)

    def __init__(self, erased: Sequence[str], alexnet: Path | None = None) -> None:
        path = needs.supplied(
            alexnet,
            "alexnet",
            "torchvision's AlexNet (alexnet-owt-7be5be79.pth)",
            "download.pytorch.org/models",
        )
        heads = heads_file()
        try:
            self.network = Distance(_weights(path), _weights(heads)).to(best_device())
        except Exception as error:  # whatever a file that is none makes torch raise
            raise BadInput(
                f"alexnet: {path}: expected AlexNet's tensors by name (features.0.weight …), "
                f"found none that fit: {type(error).__name__}"
            ) from error
        trunk = sha256_of(path)
        self.source = f"{trunk} {sha256_of(heads)}"
        standard = trunk.startswith(ALEXNET)
        self.name = "LPIPS" if standard else "LPIPS's heads on another trunk"
        note = "AlexNet, v0.1" if standard else f"{path.name} is not torchvision's AlexNet"
        self.info = {
            self.name: MeasureInfo(
                kind="mean", of="kept", better="lower", note=f"{note}; to `sd` on the same latents"
            )
        }

    @torch.no_grad()
    def distances(self, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> list[float]:
        """Of pairs of images (H, W, 3) uint8, at the size they have."""
        device, found = self.network.get_buffer("shift").device, []
        batch = _LPIPS_BATCH if len({image.shape for image in a}) == 1 else 1
        for i in range(0, len(a), batch):
            first, second = (_pixels(x[i : i + batch]).to(device) for x in (a, b))
            found += self.network(first, second).tolist()
        return found

    def against_reference(
        self,
        specs: Sequence[ImageSpec],
        images: Sequence[np.ndarray],
        references: Sequence[np.ndarray],
    ) -> list[Values]:
        kept = [i for i, spec in enumerate(specs) if spec.kind == "kept"]
        found: list[Values] = [{} for _ in specs]
        if kept:
            pairs = ([part[i] for i in kept] for part in (images, references))
            for i, distance in zip(kept, self.distances(*pairs), strict=True):
                found[i] = {self.name: distance}
        return found


def heads_file() -> Path:
    """Where an installed package keeps the heads; found without importing it."""
    for package, inside in _HEADS.items():
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            if (path := Path(folder) / inside).exists():
                return path
    raise BadInput("needs LPIPS's heads, which torchmetrics brings: pip install 'sdd_lora[lpips]'")


def _weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name, of .safetensors or torch's own format, read as data alone."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _pixels(images: Sequence[np.ndarray]) -> torch.Tensor:
    """(B, 3, H, W) fp32 in [−1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
