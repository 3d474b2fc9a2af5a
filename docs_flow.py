"""Pictures of the data flow of the methods: SVG of a small description, for the pages ``docs/methods/NAME.md``.

A line of a description is a step, from top to bottom, and ``|`` separates its lanes: what runs side by side, at most
three. A cell is empty (the lane passes), ``stop`` (no gradient), or a box: one name or several, separated by commas,
and after a colon the symbol of its output in the equation. Equal neighbors are one wide box, and so is the only cell
of a line. ``> box`` also gets what its left neighbor gives, ``box <`` what the right one does. A line that begins
with ``#`` is part of the caption. A network next to its momentum network is joined to it by a dashed arrow.
"""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

INPUTS = (
    *("view", "view 1", "view 2", "views", "other views", "global views", "local views", "masked view", "masked views"),
    *("target view", "image", "images", "visible patches", "hidden patches", "text", "depth", "item a", "item b"),
    *("clip", "visible tubelets", "global clips", "local clips", "labels", "indices"),
)
"""Inputs of a step."""
STEPS = ("attack", "cross-entropy", "miner", "mean of last layers", "nearest neighbor", "overlapping patches")
"""What a step computes without a network or a loss of its own."""

_WIDTH, _GAP, _LINE, _ARROW, _LETTER = 336, 26, 14, 22, 6.6
_LANES = 3


@dataclass
class Box:
    """A box of the picture.

    Attributes:
        names: What it shows: names of modules, losses, inputs or steps.
        symbol: Symbol of its output, or "".
        row: Step, from 0.
        first: First lane.
        last: Last lane.
        source: -1 or 1 if it also gets what the neighbor on the left or on the right gives, else 0.
    """

    names: tuple[str, ...]
    symbol: str
    row: int
    first: int
    last: int
    source: int = 0

    @property
    def text(self) -> str:
        """The names, separated by commas."""
        return ", ".join(self.names)


@dataclass
class Flow:
    """A parsed description.

    Attributes:
        boxes: All boxes, from top to bottom.
        stops: Row and lane of each place that no gradient passes.
        lanes: Number of lanes.
        rows: Number of steps.
        caption: Text below the picture, or "".
    """

    boxes: list[Box]
    stops: set[tuple[int, int]]
    lanes: int
    rows: int
    caption: str

    @property
    def averages(self) -> list[tuple[Box, Box]]:
        """Networks and the momentum networks beside them."""
        found = []
        for box in self.boxes:
            for other in self.boxes:
                beside = other.row == box.row and (other.first == box.last + 1 or other.last == box.first - 1)
                if beside and other.names == tuple(f"momentum_{name}" for name in box.names):
                    found.append((box, other))
        return found


def parse_flow(text: str) -> Flow:
    """Parse a description.

    Args:
        text: The description, see the module.

    Raises:
        ValueError: If there is no box, there are too many lanes, or the lines have different numbers of lanes.
    """
    lines = [line for line in text.splitlines() if line.strip() and line[0] != "#"]
    caption = " ".join(line[1:].strip() for line in text.splitlines() if line[:1] == "#")
    steps = [[cell.strip() for cell in line.split("|")] for line in lines]
    lanes = max(map(len, steps), default=0)
    if not 1 <= lanes <= _LANES or any(len(cells) not in (1, lanes) for cells in steps):
        raise ValueError(f"a flow has 1 to {_LANES} lanes, and each line one cell or all, got {lines}")
    boxes: list[Box] = []
    stops = set()
    for row, cells in enumerate(steps):
        for lane, cell in enumerate(cells * lanes if len(cells) == 1 else cells):
            before = boxes[-1] if boxes and boxes[-1].row == row and boxes[-1].last == lane - 1 else None
            found = re.fullmatch(r"(> )?([^:<>]+?)(?:: ([^<]+?))?( <)?", cell)
            if cell == "stop":
                stops.add((row, lane))
            elif found:
                names = tuple(found[2].split(", "))
                if before and before.names == names:
                    before.last, before.symbol = lane, before.symbol or found[3] or ""
                else:
                    boxes.append(Box(names, found[3] or "", row, lane, lane, bool(found[4]) - bool(found[1])))
            elif cell:
                raise ValueError(f"a cell is `name`, `> name`, `name <` or `name: symbol`, got `{cell}`")
    return Flow(boxes, stops, lanes, len(steps), caption)


def flow_figure(text: str, is_loss: Callable[[str], bool]) -> str:
    """Return a description as an HTML figure with an SVG in it, whose colors are those of the page.

    Args:
        text: The description.
        is_loss: Whether a name is that of a loss function.

    Raises:
        ValueError: If the description is not one, or a name is too long for its box.
    """
    flow = parse_flow(text)
    wide = _WIDTH / flow.lanes
    lines = {id(box): _wrapped(box, wide * (box.last - box.first + 1) - _GAP) for box in flow.boxes}
    tops, y = [], 4.0
    for row in range(flow.rows):
        heights = [len(lines[id(box)]) * _LINE + 12 for box in flow.boxes if box.row == row]
        tops.append((y, max(heights, default=0)))
        y += max(heights, default=0) + _ARROW
    bottom = y - _ARROW + 4

    def edges(box: Box) -> tuple[float, float]:
        left, right = box.first * wide + _GAP / 2, (box.last + 1) * wide - _GAP / 2
        middle = (left + right) / 2
        return (left, right) if flow.lanes > 1 else (middle - 90, middle + 90)

    parts = [*_arrows(flow, tops, wide), *_sideways(flow, tops, wide, edges)]
    for box in flow.boxes:
        (left, right), (top, height) = edges(box), tops[box.row]
        kind = _kind(box, flow, is_loss)
        radius = 13 if kind == "input" else 4
        parts.append(
            f'<rect class="{kind}" x="{left:g}" y="{top:g}" width="{right - left:g}" height="{height}" rx="{radius}"/>'
        )
        start = top + height / 2 - (len(lines[id(box)]) - 1) * _LINE / 2 + 4
        for number, line in enumerate(lines[id(box)]):
            place = f'x="{(left + right) / 2:g}" y="{start + number * _LINE:g}"'
            parts.append(f'<text class="{kind}" {place}>{html.escape(line)}</text>')
        if box.symbol:
            x = (box.last + 0.5) * wide + 12
            symbol = html.escape(box.symbol)
            parts.append(f'<text class="symbol" x="{x:g}" y="{top + height + 14:g}">{symbol}</text>')
    label = html.escape("; then ".join(_spoken(flow, row) for row in range(flow.rows)), quote=True)
    size = f'viewBox="0 0 {_WIDTH} {bottom:g}" role="img" aria-label="{label}"'
    svg = f"<svg {size}>{_MARKER}{''.join(parts)}</svg>"
    return f'<figure class="flow">{svg}<figcaption>{html.escape(_caption(flow))}</figcaption></figure>'


_MARKER = (
    '<defs><marker id="flow-head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0L10 5L0 10z"/></marker></defs>'
)


def _kind(box: Box, flow: Flow, is_loss: Callable[[str], bool]) -> str:
    """Return the class of a box in the style sheet."""
    if box.row == flow.rows - 1:
        return "loss"
    if box.names[0] in INPUTS:
        return "input"
    if box.names[0] in STEPS or is_loss(box.names[0]):
        return "step"
    return "average" if box.names[0].startswith("momentum_") else "module"


def _wrapped(box: Box, width: float) -> list[str]:
    """Return the lines of a box's text, broken after a space or an underscore."""
    limit = int((width - 6) / _LETTER)
    lines = [""]
    for piece in re.findall(r"[^_ ]+[_ ]?", box.text):
        if len(piece.rstrip()) > limit:
            raise ValueError(f"`{piece}` of `{box.text}` is longer than the {limit} letters of its box")
        if len((lines[-1] + piece).rstrip()) > limit:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _arrows(flow: Flow, tops: Sequence[tuple[float, float]], wide: float) -> list[str]:
    """Return the arrows from box to box of each lane, with the bars that stop gradients."""
    parts = []
    for lane in range(flow.lanes):
        own = [box for box in flow.boxes if box.first <= lane <= box.last]
        x = (lane + 0.5) * wide
        for box, after in pairwise(own):
            start, end = sum(tops[box.row]), tops[after.row][0]
            parts.append(_arrow("arrow", f"M{x:g} {start:g}V{end:g}"))
            if any((row, lane) in flow.stops for row in range(box.row, after.row)):
                y = start + 7
                parts.append(f'<path class="stop" d="M{x - 9:g} {y:g}h18m-18 5h18"/>')
    return parts


def _sideways(
    flow: Flow, tops: Sequence[tuple[float, float]], wide: float, edges: Callable[[Box], tuple[float, float]]
) -> list[str]:
    """Return the arrows between neighbors: what a box also gets, and the moving averages."""
    parts = []
    for box in (box for box in flow.boxes if box.source):
        lane = box.first - 1 if box.source < 0 else box.last + 1
        beside = [other for other in flow.boxes if other.row == box.row and other.first <= lane <= other.last]
        start = edges(beside[0])[box.source < 0] if beside else (lane + 0.5) * wide
        y = tops[box.row][0] + tops[box.row][1] / 2
        parts.append(
            f'<path class="arrow" marker-end="url(#flow-head)" d="M{start:g} {y:g}H{edges(box)[box.source > 0]:g}"/>'
        )
    for box, average in flow.averages:
        right = average.first > box.last
        y = tops[box.row][0] + tops[box.row][1] / 2
        parts.append(_arrow("ema", f"M{edges(box)[right]:g} {y:g}H{edges(average)[not right]:g}"))
    return parts


def _arrow(kind: str, path: str) -> str:
    return f'<path class="{kind}" marker-end="url(#flow-head)" d="{path}"/>'


def _spoken(flow: Flow, row: int) -> str:
    return " and ".join(box.text for box in flow.boxes if box.row == row) or "stop-gradient"


def _caption(flow: Flow) -> str:
    """Return the caption, and what the signs in the picture mean."""
    signs = ["Dashed arrow: moving average of the weights."] if flow.averages else []
    signs += ["Double bar: no gradient."] if flow.stops else []
    return " ".join(([flow.caption] if flow.caption else []) + signs)
