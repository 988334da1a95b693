"""Plots influence over training time as bars in a terminal."""

from collections.abc import Sequence
from typing import IO

from rich.console import Console
from rich.text import Text

from influence_cli.output.visible import escape_controls

UP, DOWN = " ▁▂▃▄▅▆▇█", " ▔🮂🮃▀🮄🮅🮆█"
HEIGHT = 4  # lines above and below the axis


def print_trace(
    title: str, series: Sequence[tuple[int, float]], steps: range, file: IO[str]
) -> None:
    """Plot a series of (step, score). A bar is the sum of the scores of some consecutive steps;
    bars of proponents point up.
    """
    console = Console(file=file, highlight=False)
    width = max(10, min(console.width - 14, len(steps)))
    bins = [0.0] * width
    for step, score in series:
        bins[(step - steps.start) * width // len(steps)] += score
    high, low = max(0.0, *bins), max(0.0, *(-value for value in bins))
    top = max(high, low)
    console.print(Text(escape_controls(title), style="bold"))
    for sign, style in ((1, "green"), (-1, "red")):
        extent = high if sign > 0 else low
        lines = [
            draw_line([sign * value / top for value in bins], line, sign)
            for line in range(HEIGHT)
            if top and extent > line * top / HEIGHT
        ]
        for number, text in enumerate(reversed(lines) if sign > 0 else lines):
            edge = number == (0 if sign > 0 else len(lines) - 1)
            console.print(
                Text(f"{sign * extent:>12.4g} " if edge else " " * 13),
                Text(text.rstrip(), style=style),
                sep="",
                soft_wrap=True,
            )
        if sign > 0:
            console.print(Text(f"{'0':>12} "), Text("─" * width, style="dim"), sep="")
    last = f"step {steps.stop - 1:,}"
    console.print(Text(" " * 13 + f"step {steps.start:,}".ljust(max(0, width - len(last))) + last))
    console.print()


def draw_line(values: Sequence[float], line: int, sign: int) -> str:
    """The cells of one line; line 0 touches the axis. `values`: shares of the height."""
    cells = UP if sign > 0 else DOWN
    return "".join(cells[round(8 * min(1.0, max(0.0, value * HEIGHT - line)))] for value in values)
