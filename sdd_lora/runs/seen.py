"""What a measurement has seen so far, kept until its run is whole: Ctrl-C costs none of it.

It lies in the cache, by what it depends on, so that whoever measures the same again goes on there.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdd_lora.io.atomic import atomic_output
from sdd_lora.io.cache import cache_folder
from sdd_lora.io.jsonl import append_lines, read_lines
from sdd_lora.io.pictures import read_picture


class SeenImages:
    """What was seen in images (JSON-able), and some of the images (H, W, 3) uint8, by index.

    `conditions` are all that they depend on, JSON-able.
    """

    def __init__(self, folder: Path, conditions: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()
        self._folder = folder / digest[:32]
        self._file = self._folder / "seen.jsonl"
        lines = read_lines(self._file, {"index": int, "values": dict})
        self.values: dict[int, Any] = {line["index"]: line["values"] for line in lines}

    def image(self, index: int) -> np.ndarray | None:
        """An image that was kept; None where it is not there."""
        path = self._path(index)
        return read_picture(path, "delete it and measure again") if path.exists() else None

    def add(self, values: Mapping[int, Any], images: Mapping[int, np.ndarray]) -> None:
        """Keep what was seen of images, and those of `images` themselves."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for index, image in images.items():
            with atomic_output(self._path(index)) as file:
                Image.fromarray(image).save(file, "PNG")
        append_lines(self._file, [{"index": i, "values": v} for i, v in values.items()])

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.png"


def folder_of_seen(identity: str) -> Path:
    """Where what is seen of a result is kept: of an adapter by its identity, of weights by their
    SHA-256."""
    return cache_folder("measuring") / identity[:32]


def forget_seen(folder: Path) -> None:
    """Delete what was kept: the run is whole."""
    shutil.rmtree(folder, ignore_errors=True)
