"""Training pictures, rendered once: singles, pairs, and drawings of other things."""

import random
from pathlib import Path

import numpy as np
from PIL import Image

from sdd_lora.demo.build import drawings
from sdd_lora.demo.vocabulary import nouns, styles

VIEWS = 48  # shaken views of each of the nouns × styles drawings
PAIRS = 6000  # pictures of two nouns side by side
OTHERS = 6000  # pictures of icons that are no noun of ours


def others_split(work: Path) -> tuple[list[str], list[str]]:
    """Icons that are no noun of ours: (for training, never seen), nine to one."""
    names = drawings.other_icons(work)
    unseen = names[::10]
    return sorted(set(names) - set(unseen)), unseen


def render(work: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Render, or read from `work/pictures.npz`.

    Returns `pixels` (N, 64, 64, 3) uint8; `first`, `second` (N,) noun indices, −1 for none;
    `style` (N,) style index. Pictures of other icons have `first` = −1 and come last.
    """
    path = work / "pictures.npz"
    if path.exists():
        return dict(np.load(path))
    rng = random.Random(seed)
    all_nouns, all_styles = nouns(), list(styles())
    labels: list[tuple[int, int, int]] = []
    pixels: list[np.ndarray] = []

    def add(image: Image.Image, first: int, second: int, style: int) -> None:
        pixels.append(np.asarray(image))
        labels.append((first, second, style))

    for noun_index, noun in enumerate(all_nouns):
        for style_index, style in enumerate(all_styles):
            for _ in range(VIEWS):
                add(drawings.one(work, style, noun.icon, rng), noun_index, -1, style_index)
    for _ in range(PAIRS):
        left, right = rng.sample(range(len(all_nouns)), 2)
        style_index = rng.randrange(len(all_styles))
        icons = (all_nouns[left].icon, all_nouns[right].icon)
        add(drawings.two(work, all_styles[style_index], icons, rng), left, right, style_index)
    known, _ = others_split(work)
    for _ in range(OTHERS):
        style_index = rng.randrange(len(all_styles))
        icon = rng.choice(known)
        add(drawings.one(work, all_styles[style_index], icon, rng), -1, -1, style_index)
    first, second, style_column = np.array(labels, np.int64).T
    data = {"pixels": np.stack(pixels), "first": first, "second": second, "style": style_column}
    np.savez(path, **data)
    return data
