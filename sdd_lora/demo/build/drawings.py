"""The drawings that the embedded model learns from: fetched as SVG, rendered, sketched, shaken.

The icon sets are npm packages whose licences allow it (see NOTICE); nothing of them is stored here.
"""

import io
import json
import random
import shutil
import subprocess
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image, ImageChops, ImageFilter, ImageOps

from sdd_lora.demo.vocabulary import nouns, styles

#: package → the version that the shipped weights were trained on
ICON_SETS = {"noto": "1.2.9", "twemoji": "1.2.5", "fluent-emoji-flat": "1.2.6"}
#: a set that nothing was trained on: the judge is tried on it (`check-judge`)
HELD_OUT_SET = ("emojione", "1.2.3")
IMAGE_SIZE = 64
_MASTER = 192  # px of a drawing before it is shaken and reduced
WHITE = (255, 255, 255)


def fetch(work: Path) -> None:
    """Download the icon sets' npm packages into `work/icons`, once."""
    folder = work / "icons"
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in [*ICON_SETS.items(), HELD_OUT_SET]:
        target = folder / f"{name}.json"
        if target.exists():
            continue
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError(f"npm is needed to download @iconify-json/{name}")
        packed = subprocess.run(
            [npm, "pack", "--silent", f"@iconify-json/{name}@{version}"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()[-1]
        with tarfile.open(folder / packed) as archive:
            member = archive.extractfile("package/icons.json")
            assert member is not None
            target.write_bytes(member.read())
        (folder / packed).unlink()


@lru_cache(maxsize=8)
def icon_set(work: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((work / "icons" / f"{name}.json").read_text("utf-8")))


def _svg(icons: dict[str, Any], icon: str) -> str:
    body = icons["icons"].get(icon) or icons["icons"][icons["aliases"][icon]["parent"]]
    width = body.get("width", icons.get("width", 16))
    height = body.get("height", icons.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{body["body"]}</svg>'
    )


@lru_cache(maxsize=4096)
def drawing(work: Path, style: str, icon: str) -> Image.Image:
    """One drawing in one style, RGBA, 192×192 px."""
    image = _rendered(icon_set(work, styles()[style].source), icon)
    return _pencil(image) if style == "sketch" else image


def _rendered(icons: dict[str, Any], icon: str) -> Image.Image:
    svg = _svg(icons, icon)
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=_MASTER, height=_MASTER))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _pencil(image: Image.Image) -> Image.Image:
    """Grey contours on paper: colour dodge of the picture over its blurred negative."""
    paper = Image.new("RGBA", image.size, "white")
    grey = ImageOps.autocontrast(Image.alpha_composite(paper, image).convert("L"))
    blurred = ImageOps.invert(grey).filter(ImageFilter.GaussianBlur(5))
    base = np.asarray(grey, np.float32)
    dodge = np.clip(base * 255 / np.maximum(255 - np.asarray(blurred, np.float32), 1), 0, 255)
    lines = Image.fromarray((255 - np.clip((255 - dodge) * 2.2, 0, 215)).astype(np.uint8))
    lines = ImageChops.darker(lines, Image.fromarray((200 + base * 0.2157).astype(np.uint8)))
    opaque = Image.merge("RGBA", (lines, lines, lines, Image.new("L", image.size, 255)))
    return opaque


def _shaken(image: Image.Image, rng: random.Random, side: int) -> Image.Image:
    """Mirrored half the time, turned up to 8°, scaled .82–1, on white, `side` px."""
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image = image.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=WHITE)
    inner = round(side * rng.uniform(0.82, 1.0))
    image = image.resize((inner, inner), Image.Resampling.LANCZOS)
    out = Image.new("RGB", (side, side), WHITE)
    out.paste(image, (rng.randint(0, side - inner), rng.randint(0, side - inner)))
    return out


def one(work: Path, style: str, icon: str, rng: random.Random) -> Image.Image:
    """A training picture of one drawing, RGB, 64×64 px."""
    return _shaken(drawing(work, style, icon), rng, IMAGE_SIZE)


def held_out(work: Path, icon: str, rng: random.Random) -> Image.Image | None:
    """A picture from the set that nothing was trained on; None where it lacks the icon."""
    icons = icon_set(work, HELD_OUT_SET[0])
    if icon not in icons["icons"] and icon not in icons.get("aliases", {}):
        return None
    return _shaken(_rendered(icons, icon), rng, IMAGE_SIZE)


def two(work: Path, style: str, icons: tuple[str, str], rng: random.Random) -> Image.Image:
    """A training picture of two drawings side by side, RGB, 64×64 px."""
    half = IMAGE_SIZE // 2
    out = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), WHITE)
    for column, icon in enumerate(icons):
        part = _shaken(drawing(work, style, icon), rng, half)
        out.paste(part, (column * half, rng.randint(4, half - 4)))
    return out


@lru_cache(maxsize=1)
def other_icons(work: Path) -> list[str]:
    """Names that all three sets draw and that are no noun of ours, sorted."""
    ours = {noun.icon for noun in nouns()}
    sets = [icon_set(work, style.source) for style in styles().values()]
    shared = set.intersection(*({*s["icons"], *s.get("aliases", {})} for s in sets))
    return sorted(shared - ours)
