"""Geometry of the report's charts: values to places in an SVG, which the template draws."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sdd_lora.adapter.metrics import Interval

WIDTH, HEIGHT = 460, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 14, 44
_LABEL_HEIGHT, _LETTER_WIDTH = 13, 6.9


@dataclass(frozen=True)
class Axis:
    """Maps [low, high] to [start, end]; values beyond stop at the ends."""

    low: float
    high: float
    start: float
    end: float
    step: float

    def at(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    @property
    def ticks(self) -> list[tuple[float, float]]:
        """(value, place) of round values."""
        count = round((self.high - self.low) / self.step)
        values = [self.low + i * self.step for i in range(count + 1)]
        return [(round(value, 10), self.at(value)) for value in values]


@dataclass(frozen=True)
class Point:
    """One value with its interval in either direction, and where its label stands."""

    label: str
    x: float
    y: float
    across: Interval
    along: Interval
    label_x: float
    label_y: float
    anchor: str


@dataclass(frozen=True)
class Curve:
    """One series: the curve and its band of intervals as SVG point lists, and its dots."""

    label: str
    points: str
    band: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Axes and what stands between them."""

    x: Axis
    y: Axis
    points: list[Point] = field(default_factory=list)
    lines: list[Curve] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT


#: label, value and interval across (x), value and interval along (y)
Spot = tuple[str, float, Interval, float, Interval]


def axis(values: Sequence[float], start: float, end: float, count: int = 6) -> Axis:
    """An axis of about `count` round steps that holds all values."""
    low, high = min(values), max(values)
    span = max(high - low, 1e-9)
    magnitude = 10 ** math.floor(math.log10(span / count))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude * count >= span)
    low = math.floor(low / step + 1e-9) * step
    high = max(math.ceil(high / step - 1e-9) * step, low + step)
    return Axis(low, high, start, end, step)


def scatter(
    spots: Sequence[Spot], paths: Mapping[str, Sequence[tuple[float, float]]] | None = None
) -> Chart:
    """Points with crosses of intervals; each label takes the first free place around its point.

    `paths` are curves through (x, value) besides, by the label of the point that they belong to.
    """
    paths = paths or {}
    across = [v for _, value, ci, _, _ in spots for v in (value, *ci)]
    along = [v for _, _, _, value, ci in spots for v in (value, *ci)]
    way = [place for path in paths.values() for place in path]
    x = axis([*across, *(a for a, _ in way)], _LEFT, WIDTH - _RIGHT)
    y = axis([*along, *(b for _, b in way)], HEIGHT - _BOTTOM, _TOP)
    taken = [(x.at(a) - 4, y.at(b) - 4, x.at(a) + 4, y.at(b) + 4) for _, a, _, b, _ in spots]
    points = []
    for label, a, x_interval, b, y_interval in spots:
        place = _free_place(label, x.at(a), y.at(b), taken)
        taken.append(_box(label, *place))
        points.append(
            Point(
                label,
                x.at(a),
                y.at(b),
                (x.at(x_interval[0]), x.at(x_interval[1])),
                (y.at(y_interval[0]), y.at(y_interval[1])),
                *place,
            )
        )
    lines = []
    for label, path in paths.items():
        dots = [(x.at(a), y.at(b)) for a, b in path]
        lines.append(Curve(label, _coordinates(dots), "", dots))
    return Chart(x, y, points=points, lines=lines)


def curves(series: dict[str, list[tuple[float, float, Interval]]]) -> Chart:
    """Lines with bands through (x, value, interval); x in rising order, y from 0."""
    rows = [row for line in series.values() for row in line]
    x = axis([a for a, _, _ in rows], _LEFT, WIDTH - _RIGHT)
    y = axis([0.0, *(v for _, value, ci in rows for v in (value, *ci))], HEIGHT - _BOTTOM, _TOP)
    lines = []
    for label, line in series.items():
        dots = [(x.at(a), y.at(value)) for a, value, _ in line]
        low = [(x.at(a), y.at(ci[0])) for a, _, ci in line]
        high = [(x.at(a), y.at(ci[1])) for a, _, ci in line]
        lines.append(Curve(label, _coordinates(dots), _coordinates([*low, *reversed(high)]), dots))
    return Chart(x, y, lines=lines)


def _coordinates(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in places)


_Place = tuple[float, float, str]
_Box = tuple[float, float, float, float]


def _free_place(label: str, x: float, y: float, taken: Sequence[_Box]) -> _Place:
    """The place nearest to (x, y), on either side, where the label covers the least."""
    places: list[_Place] = []
    for distance in (sign * 11 * step for step in range(10) for sign in (1, -1)):
        places += [(x + 8, y + 4 + distance, "start"), (x - 8, y + 4 + distance, "end")]
    inside = [p for p in places if _inside(_box(label, *p))]
    return min(inside or places, key=lambda place: _covered(_box(label, *place), taken))


def _box(label: str, x: float, y: float, anchor: str) -> _Box:
    width = _LETTER_WIDTH * len(label)
    left = x if anchor == "start" else x - width
    return left, y - _LABEL_HEIGHT + 3, left + width, y + 2


def _inside(box: _Box) -> bool:
    return box[0] >= _LEFT and box[2] <= WIDTH - 2 and box[1] >= 2 and box[3] <= HEIGHT - _BOTTOM


def _covered(box: _Box, others: Sequence[_Box]) -> float:
    """The area that a box shares with others."""
    return sum(
        max(0.0, min(box[2], o[2]) - max(box[0], o[0]))
        * max(0.0, min(box[3], o[3]) - max(box[1], o[1]))
        for o in others
    )
