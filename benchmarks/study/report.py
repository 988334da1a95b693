"""Writes what the study found: the tables of docs/evaluation.md, and one picture, docs/study.svg."""

from collections.abc import Sequence
from pathlib import Path

from plan import METHODS, PLANS

DOCS = Path(__file__).parent.parent.parent / "docs"
START, END = "<!-- study: make study writes what follows -->", "<!-- end of study -->"
ROWS = (  # protocol, figure, title
    ("lds 0.95", "spearman", "LDS, 95 % kept"),
    ("lds 0.5", "spearman", "LDS, 50 % kept"),
    ("deletion", "proponents-auc", "Without top proponents: −loss"),
    ("tsloo", "spearman", "TSLOO, Spearman"),
    ("mislabel", "found-20%", "Wrong labels in the first 20 %"),
    ("score", "seconds", "Seconds to score 20 queries"),
)
COLOURS = {"random": "#888888", "kronfluence": "#d55e00", "traker": "#d55e00"}
OURS = "#0072b2"

Row = dict[str, str]
Cells = dict[tuple[str, str, str, str], Row]  # run, method, protocol, figure


def write_report(rows: Sequence[Row]) -> None:
    cells = {(row["run"], row["method"], row["protocol"], row["figure"]): row for row in rows}
    runs = [plan.run for plan in PLANS if any(row["run"] == plan.run for row in rows)]
    draw(cells, runs, DOCS / "study.svg")
    page = DOCS / "evaluation.md"
    before, _, rest = page.read_text().partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n\n{tables(cells, runs)}\n{END}{after}")


def methods_of(cells: Cells, protocol: str, figure: str) -> list[str]:
    """Ours in the order of the plan, then those of other libraries."""
    names = {key[1] for key in cells if key[2:] == (protocol, figure)} - {"retraining"}
    order = [*METHODS, *sorted(names - METHODS.keys())]
    return [name for name in order if name in names]


# ---------------------------------------------------------------- tables
def tables(cells: Cells, runs: Sequence[str]) -> str:
    texts = []
    for protocol, figure, title in ROWS:
        if methods := methods_of(cells, protocol, figure):
            texts.append(table(cells, runs, methods, protocol, figure, title))
    return "\n".join(texts)


def table(
    cells: Cells,
    runs: Sequence[str],
    methods: Sequence[str],
    protocol: str,
    figure: str,
    title: str,
) -> str:
    used = [
        run for run in runs if any((run, method, protocol, figure) in cells for method in methods)
    ]
    lines = [f"**{title}**", "", f"| | {' | '.join(used)} |", "|---" * (1 + len(used)) + "|"]
    for method in methods:
        texts = [cell_text(cells.get((run, method, protocol, figure))) for run in used]
        lines.append(f"| {method} | {' | '.join(texts)} |")
    for name in ("effect", "noise"):
        sizes = [cells.get((run, "retraining", protocol, name)) for run in used]
        if any(sizes):
            texts = [f"{float(row['value']):.1g}" if row else "" for row in sizes]
            lines.append(f"| *{name}* | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def cell_text(row: Row | None) -> str:
    """`0.71 ± 0.05`: half the width of the 95 % interval. A method that refused has `error`."""
    if row is None:
        return ""
    if not row["value"]:
        return "error" if row["figure"] == "seconds" else ""
    if row["figure"] == "seconds":
        return f"{float(row['value']):.0f}"
    half = (float(row["high"]) - float(row["low"])) / 2
    return f"{float(row['value']):.2f} ± {half:.2f}"


# ---------------------------------------------------------------- the picture
def draw(cells: Cells, runs: Sequence[str], path: Path) -> None:
    """A panel per figure and run; methods from top to bottom, values with their intervals."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "sans-serif"],
        "svg.fonttype": "none",
        "svg.hashsalt": "study",
        "font.size": 8,
    }
    from matplotlib import pyplot

    lines = [row for row in ROWS if methods_of(cells, *row[:2])]
    heights = [len(methods_of(cells, *row[:2])) for row in lines]
    figure, axes = pyplot.subplots(
        len(lines), len(runs), figsize=(1.7 * len(runs) + 1.5, 0.17 * sum(heights) + 4), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for number, (line, (protocol, name, title)) in enumerate(zip(axes, lines, strict=True)):
        methods = methods_of(cells, protocol, name)
        for run, axis in zip(runs, line, strict=True):
            draw_panel(axis, [cells.get((run, method, protocol, name)) for method in methods])
            axis.set_yticks(range(len(methods)), methods if axis is line[0] else [])
            axis.set_ylim(len(methods) - 0.5, -0.5)
            if number == 0:
                axis.set_title(run, fontsize=9)
        line[0].annotate(
            title, (0, 1), (-6, 4), xycoords="axes fraction", textcoords="offset points",
            ha="right", fontsize=8, weight="bold", annotation_clip=False,
        )  # fmt: skip
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw_panel(axis, rows: Sequence[Row | None]) -> None:
    axis.grid(axis="x", color="#dddddd", linewidth=0.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    if not any(rows):
        axis.xaxis.set_visible(False)
        axis.spines["bottom"].set_visible(False)
        return
    for place, row in enumerate(rows):
        if row is None or not row["value"]:
            continue
        value = float(row["value"])
        low, high = (float(row[side] or value) for side in ("low", "high"))
        colour = COLOURS.get(row["method"].split()[0], OURS)
        axis.plot([low, high], [place, place], color=colour, linewidth=1.5)
        axis.plot([value], [place], "o", color=colour, markersize=3.5)
    first = next(row for row in rows if row is not None)
    if first["figure"] == "seconds":
        axis.set_xscale("log")
        axis.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
        axis.set_xlim(1, 1000)
        axis.minorticks_off()
    elif first["protocol"] != "deletion":
        axis.set_xlim(min(-0.05, axis.get_xlim()[0]), 1.03)
