"""Do adapters get in each other's way? Told from the factors' Gram matrices, never dense."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np
from threadpoolctl import threadpool_limits

from sdd_lora.adapter.algebra import Weighted, require_one_model
from sdd_lora.adapter.factors import Factors

#: A sum this much stronger than the strongest part, in some direction, is called overdriven.
OVERDRIVE = 1.1
LABEL_LENGTH = 40


@dataclass(frozen=True)
class ModuleReport:
    """One module of the stack.

    `norms` are Frobenius norms of each wᵢΔWᵢ (0 where a part lacks the module) and `norm` of their
    sum. `gain` is the sum's spectral norm: the most it does to any direction. `tested_gain` is the
    highest spectral norm of a part at weight 1, the strength that its own numbers speak of.
    """

    module: str
    norms: list[float]
    norm: float
    gain: float
    tested_gain: float

    @property
    def drive(self) -> float:
        return self.gain / self.tested_gain if self.tested_gain else 0.0


@dataclass(frozen=True, eq=False)
class Interference:
    """How the parts of a stack stand to each other.

    `cosine` is (n, n): the angle between the parts' deltas over all modules, weights aside.
    `norms` are of the parts at their weights, `norm` of the sum.
    """

    names: list[str]
    weights: list[float]
    cosine: np.ndarray
    norms: list[float]
    norm: float
    modules: list[ModuleReport]

    @property
    def labels(self) -> list[str]:
        """The names for tables and pictures: foreign files may be called anything."""
        return [_label(name) for name in self.names]

    @property
    def overdriven(self) -> list[ModuleReport]:
        """Modules where the sum is stronger than any part was tested at, the worst first."""
        found = [module for module in self.modules if module.drive > OVERDRIVE]
        return sorted(found, key=lambda module: -module.drive)

    def as_json(self) -> dict[str, Any]:
        return {
            "adapters": self.names,
            "weights": self.weights,
            "cosine": [[round(float(value), 6) for value in row] for row in self.cosine],
            "norms": self.norms,
            "norm": self.norm,
            "overdriven": [module.module for module in self.overdriven],
            "modules": [asdict(module) | {"drive": module.drive} for module in self.modules],
        }


def interference(parts: Weighted) -> Interference:
    """Pairwise cosines, norms and overdriven modules of a stack.

    Raises BadInput where the parts are for models of different widths.
    """
    weights = np.array([weight for _, weight in parts])
    total = np.zeros((len(parts), len(parts)))
    modules = []
    with threadpool_limits(1, user_api="blas"):  # these matrices are small: threads only wait
        for name in dict.fromkeys(name for adapter, _ in parts for name in adapter.factors):
            found = [adapter.factors.get(name) for adapter, _ in parts]
            gram, report = _module_report(name, found, weights)
            total += gram
            modules.append(report)
    return Interference(
        names=[adapter.name for adapter, _ in parts],
        weights=weights.tolist(),
        cosine=_cosines(total),
        norms=(np.abs(weights) * np.sqrt(np.diag(total))).tolist(),
        norm=_root(weights @ total @ weights),
        modules=modules,
    )


def draw_heat_map(report: Interference, file: BinaryIO) -> None:
    """Write the table of cosines as a PNG: red where adapters push the same way, blue where
    against each other."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(16)
    cell, gap = 56, 8
    margin = max(int(font.getlength(label)) for label in report.labels) + 2 * gap
    size = margin + cell * len(report.labels) + gap
    picture = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(picture)
    for row, label in enumerate(report.labels):
        middle = margin + cell * row + cell // 2
        pen.text((margin - gap, middle), label, "black", font, anchor="rm")
        upright = Image.new("RGB", (margin - 2 * gap, cell), "white")
        ImageDraw.Draw(upright).text((0, cell // 2), label, "black", font, anchor="lm")
        picture.paste(upright.rotate(90, expand=True), (middle - cell // 2, gap))
    for (row, column), cosine in np.ndenumerate(report.cosine):
        left, top = margin + cell * column, margin + cell * row
        pen.rectangle((left, top, left + cell - 1, top + cell - 1), _color(cosine))
        center, ink = (left + cell // 2, top + cell // 2), "white" if abs(cosine) > 0.6 else "black"
        pen.text(center, f"{cosine:.2f}", ink, font, anchor="mm")
    picture.save(file, "PNG")


def _color(cosine: float) -> tuple[int, int, int]:
    """White at 0, towards dark red at 1 and dark blue at −1."""
    end = np.array((178, 24, 43) if cosine > 0 else (33, 102, 172))
    red, green, blue = (255 + min(abs(cosine), 1.0) * (end - 255)).astype(int)
    return int(red), int(green), int(blue)


def _module_report(
    name: str, found: Sequence[Factors | None], weights: np.ndarray
) -> tuple[np.ndarray, ModuleReport]:
    """The parts' inner products ⟨ΔWᵢ, ΔWⱼ⟩ (n, n), and the report."""
    owners = [i for i, factors in enumerate(found) if factors is not None]
    present = [factors for factors in found if factors is not None]
    require_one_model(name, present)
    ups = np.concatenate([f.up.astype(np.float64) * f.scale for f in present], axis=1)
    downs = np.concatenate([f.down.astype(np.float64) for f in present])
    gram_up, gram_down = ups.T @ ups, downs @ downs.T  # (R, R), R the sum of the ranks
    starts = np.cumsum([0, *(f.rank for f in present[:-1])])
    blocks = np.add.reduceat(np.add.reduceat(gram_up * gram_down, starts, 0), starts, 1)
    gram = np.zeros((len(found), len(found)))
    gram[np.ix_(owners, owners)] = blocks

    per_rank = np.repeat(weights[owners], [f.rank for f in present])
    ends = [*starts[1:], len(per_rank)]
    tested = max(
        _spectral_norm(gram_up[a:b, a:b], gram_down[a:b, a:b])
        for a, b in zip(starts, ends, strict=True)
    )
    report = ModuleReport(
        module=name,
        norms=(np.abs(weights) * np.sqrt(np.diag(gram))).tolist(),
        norm=_root(weights @ gram @ weights),
        gain=_spectral_norm(gram_up * np.outer(per_rank, per_rank), gram_down),
        tested_gain=tested,
    )
    return gram, report


def _spectral_norm(gram_up: np.ndarray, gram_down: np.ndarray) -> float:
    """‖up @ down‖₂ from upᵀup and down downᵀ: its square is the top eigenvalue of √G_d G_u √G_d."""
    values, vectors = np.linalg.eigh(gram_down)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    return _root(np.linalg.eigvalsh(root.T @ gram_up @ root)[-1])


def _cosines(gram: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.diag(gram))
    scale = np.outer(norms, norms)
    return np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)


def _label(name: str) -> str:
    """A name on one line of bearable length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return line if len(line) <= LABEL_LENGTH else line[: LABEL_LENGTH - 1] + "…"


def _root(square: float) -> float:
    return float(np.sqrt(max(square, 0.0)))
