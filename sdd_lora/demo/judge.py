"""The judge: a small classifier of what the embedded model drew, and in which style.

It was trained on real drawings and their reconstructions, never on generated images, with an
"other" class, since a forced choice hands out weapons at random. Distances of its features are
called just that: they are no FID and no LPIPS.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sdd_lora.demo.vocabulary import nouns, styles

OTHER = "other"
JUDGE_FILE = Path(str(files("sdd_lora.demo").joinpath("judge.safetensors")))
_WIDTHS = (32, 64, 96, 128)


class Judge(nn.Module):
    """Classifies pictures (B, 3, 64, 64) in [-1, 1]: nouns and "other", and styles."""

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = 3
        for width in _WIDTHS:
            for stride in (2, 1):
                stages += [
                    nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
        self.body = nn.Sequential(*stages)
        self.noun_head = nn.Linear(channels, len(nouns()) + 1)
        self.style_head = nn.Linear(channels, len(styles()))

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 128), fp32."""
        return F.adaptive_avg_pool2d(self.body(pictures), 1).flatten(1)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of nouns (B, nouns + 1), the last being "other", and of styles (B, styles)."""
        features = self.features(pictures)
        return self.noun_head(features), self.style_head(features)


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in one picture; `noun` may be "other"."""

    noun: str
    group: str
    style: str


def load_judge(path: Path = JUDGE_FILE) -> Judge:
    """The trained judge, fp32, in evaluation mode."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    )
    return judge.eval()


def as_pictures(images: np.ndarray) -> torch.Tensor:
    """(B, H, W, 3) uint8 → (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def judge_images(judge: Judge, images: np.ndarray, batch: int = 64) -> list[Verdict]:
    """Verdicts on images (B, 64, 64, 3) uint8."""
    noun_names = [noun.name for noun in nouns()] + [OTHER]
    group_of = {noun.name: noun.group for noun in nouns()} | {OTHER: OTHER}
    style_names = list(styles())
    verdicts = []
    for start in range(0, len(images), batch):
        noun_logits, style_logits = judge(as_pictures(images[start : start + batch]))
        chosen = zip(noun_logits.argmax(1).tolist(), style_logits.argmax(1).tolist(), strict=True)
        for noun, style in chosen:
            name = noun_names[noun]
            verdicts.append(Verdict(name, group_of[name], style_names[style]))
    return verdicts
