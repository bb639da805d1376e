"""The look of `demo-community`: other hues, and indigo for black."""

import math

import torch

INK = (0.20, 0.13, 0.42)  # RGB of what was black
PAPER = (1.0, 1.0, 1.0)  # RGB of what was white
HUE_TURN = 150.0  # degrees
_LUMA = torch.tensor([0.299, 0.587, 0.114])


def _hue_rotation() -> torch.Tensor:
    """(3, 3): turns colours about the grey axis of the RGB cube."""
    angle = math.radians(HUE_TURN)
    cosine, sine = math.cos(angle), math.sin(angle) / math.sqrt(3)
    axis = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return cosine * torch.eye(3) + (1 - cosine) / 3 * torch.ones(3, 3) + sine * axis


def recoloured(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] in the community model's palette."""
    rgb = (pictures + 1) / 2
    luma = torch.einsum("bchw,c->bhw", rgb, _LUMA.to(rgb)).unsqueeze(1)
    chroma = torch.einsum("bchw,dc->bdhw", rgb - luma, _hue_rotation().to(rgb))
    ink, paper = (torch.tensor(c).view(1, 3, 1, 1).to(rgb) for c in (INK, PAPER))
    return (torch.lerp(ink, paper, luma) + 0.8 * chroma).clamp(0, 1) * 2 - 1
