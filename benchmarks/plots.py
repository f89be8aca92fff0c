"""Draw the figures and write the tables from the CSV files.

    python -m benchmarks.plots [--results benchmarks/results] [--readme README.md]

Figures go beside the CSV of their device. In the README, everything between ``<!-- table: NAME DEVICE -->`` and
``<!-- /table -->`` is replaced by the table of that name; DEVICE is the beginning of a results folder, as in ``cpu`` or
``nvidia-h200``. Only rows that were measured appear.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.contenders import CONTENDERS, FLOOR, OURS
from benchmarks.harness.measure import RESULTS, ROOT, main, read_csv, show_bytes, show_seconds
from grpo_fast.errors import UserError, nearest

Rows = list[dict[str, str]]
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) (?P<device>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
COLORS = {
    OURS: "#d1242f", FLOOR: "#1f2328", "full logits": "#0969da", "full logits, compiled": "#54aeff", "TRL": "#8250df",
    "Liger": "#1a7f37", "torch linear_cross_entropy": "#bf8700", "cut-cross-entropy": "#bf3989",
    "Liger Triton loss": "#4ac26b", "QuACK": "#6e7781", "PyTorch": "#0969da", "PyTorch, compiled": "#54aeff",
}  # fmt: skip
ORDER = [FLOOR, *(contender.name for contender in CONTENDERS)]
PAGES = ("docs/benchmarks.md", "docs/drop-in.md")


def color(name: str) -> str:
    return COLORS.get(name, "#953800")


def number(row: dict[str, str], name: str) -> float:
    return float(row[name]) if row.get(name) else float("nan")


def measured(rows: Rows) -> Rows:
    """Rows with a time."""
    return [row for row in rows if row.get("status", "ok") == "ok" and row.get("seconds")]


def in_order(names: Sequence[str]) -> list[str]:
    """Without repetition; contenders in their usual order, others behind them."""
    unique = list(dict.fromkeys(names))
    return sorted(unique, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ruler, *lines)) + "\n"


def caption(rows: Rows) -> str:
    """Where, when and with what the rows were measured."""
    parts = [rows[-1]["device"], f"torch {rows[-1]['torch']}"]
    peers = {row["peer"] for row in rows if row.get("peer")}
    commits = {row["commit"] for row in rows if row.get("commit")}
    dates = {row["date"] for row in rows}
    return f"\n{', '.join([*parts, *sorted(peers)])}; commit {', '.join(sorted(commits))}; {max(dates)}.\n"


def head_case(row: dict[str, str]) -> str:
    return f"{row['model']} ({row['H']} x {row['V']}), N={int(row['N']):,}, {row['dtype']}, {row['head']}"


def head_table(rows: Rows, cell: Callable[[dict[str, str]], str], leave_out: Sequence[str] = ()) -> str:
    rows = [row for row in measured(rows) if row["contender"] not in leave_out]
    cases, names = list(dict.fromkeys(map(head_case, rows))), in_order([row["contender"] for row in rows])
    cells = {(head_case(row), row["contender"]): cell(row) for row in rows}
    lines = [[case, *(cells.get((case, name), "-") for name in names)] for case in cases]
    return markdown(["head", *names], lines) + caption(rows)


def time_and_ratio(row: dict[str, str]) -> str:
    text = f"{show_seconds(number(row, 'seconds'))} ({number(row, 'to_floor'):.2f}x)"
    return f"**{text}**" if row["contender"] == OURS else text


def memory_cell(row: dict[str, str]) -> str:
    return show_bytes(number(row, "beyond_gradients_bytes"))


def both_cells(row: dict[str, str]) -> str:
    return f"{show_seconds(number(row, 'seconds'))}, {memory_cell(row)}"


def subclass_table(rows: Rows) -> str:
    rows = measured(rows)
    lines = [
        [
            f"{row['model']}, {row['case']}, {row['trainer']}", show_seconds(number(row, "seconds")),
            show_bytes(number(row, "peak_bytes")), f"{number(row, 'speedup'):.2f}x" if row.get("speedup") else "-",
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(["step", "time", "memory that a step adds", "speed"], lines) + caption(rows)


def accuracy_table(rows: Rows) -> str:
    rows = measured(rows)
    lines = [
        [
            f"{row['dtype']}, {row['contender']}", show_seconds(number(row, "seconds")),
            *(f"{number(row, name):.1e}" if row.get(name) else "-" for name in
              ("error_logprob", "error_logprob_median", "error_hidden", "error_weight")),
        ]
        for row in rows
    ]  # fmt: skip
    header = ["contender", "time", "log-prob, largest", "log-prob, median", "grad hidden", "grad weight"]
    return markdown(header, lines) + caption(rows)


def step_table(rows: Rows) -> str:
    rows = measured(rows)
    lines = [
        [
            f"{row['model']}, {100 * number(row, 'equal'):.0f}% equal rewards, {row['trainer']}",
            show_seconds(number(row, "seconds")), f"{number(row, 'tokens_per_second'):,.0f}",
            show_bytes(number(row, "peak_bytes")), f"{number(row, 'speedup'):.2f}x" if row.get("speedup") else "-",
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(["step", "time", "tokens/s", "peak memory", "speed"], lines) + caption(rows)


def rollout_table(rows: Rows) -> str:
    rows = measured(rows)
    lines = [
        [
            f"{row['model']}, {row['sequences']} responses of up to {row['longest_tokens']} tokens, {row['contender']}",
            f"{number(row, 'tokens_per_second'):,.0f}", show_bytes(number(row, "peak_bytes")),
            f"{number(row, 'mean_tokens'):.0f}", f"{number(row, 'speedup'):.2f}x",
        ]
        for row in rows
    ]  # fmt: skip
    return markdown(["sampling", "tokens/s", "peak memory", "mean length", "speed"], lines) + caption(rows)


def race_table(rows: Rows) -> str:
    lines = [
        [
            f"{row['trainer']}, seed {row['seed']}",
            row["steps"] if row["status"] == "ok" else f"{row['status']} in {row['steps']}",
            f"{number(row, 'seconds'):.0f} s", f"{number(row, 'seconds_per_step'):.1f} s",
            show_bytes(number(row, "peak_bytes")),
        ]
        for row in sorted(rows, key=lambda row: (row["trainer"], int(row["seed"])))
    ]  # fmt: skip
    goal = f"steps to {float(rows[0]['target']):.0%}"
    return markdown(["trainer", goal, "wall time", "a step", "peak memory"], lines) + caption(rows)


def loss_table(rows: Rows) -> str:
    rows = measured(rows)
    names = in_order([row["contender"] for row in rows])
    cases = list(dict.fromkeys((row["operation"], row["N"]) for row in rows))
    cells = {
        (row["operation"], row["N"], row["contender"]): (
            f"{show_seconds(number(row, 'seconds'))} ({number(row, 'to_floor'):.1f}x)"
        )
        for row in rows
    }
    lines = [[f"{name}, N={int(n):,}", *(cells.get((name, n, who), "-") for who in names)] for name, n in cases]
    return markdown(["operation", *names], lines) + caption(rows)


def growth_table(rows: Rows) -> str:
    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    figures = {"seconds": "time", "beyond_gradients_bytes": "memory"}
    columns = [(sweep, figure) for sweep in sweeps for figure in figures]
    found = {(row["contender"], row["sweep"], row["figure"]): number(row, "exponent") for row in rows}
    lines = [
        [name, *(f"{found[name, *column]:.2f}" if (name, *column) in found else "-" for column in columns)]
        for name in in_order([row["contender"] for row in rows])
    ]
    header = ["exponent of", *(f"{figures[figure]} in {sweep}" for sweep, figure in columns)]
    return markdown(header, lines) + caption(rows)


# What nobody has in the place that a drop-in takes.
OTHERS = [name for name in ORDER if name not in (OURS, "full logits", "TRL", "Liger")]
# Name of a table -> (its CSV, how it is made).
TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "head": ("head", lambda rows: head_table(rows, time_and_ratio)),
    "head-memory": ("head", lambda rows: head_table(rows, memory_cell, [FLOOR])),
    "accuracy": ("accuracy", accuracy_table),
    "head-drop-in": ("head", lambda rows: head_table(rows, both_cells, OTHERS)),
    "step": ("step", step_table),
    "rollout": ("rollout", rollout_table),
    "trl-subclass": ("trl_subclass", subclass_table),
    "race": ("race", race_table),
    "loss": ("loss", loss_table),
    "growth": ("growth_fit", growth_table),
}


def _figure(columns: int, height: float = 4.2, rows: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=(5.6 * columns, height * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.grid(alpha=0.25, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Any, axes: Any) -> None:
    """One legend below all panels."""
    entries: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    names = in_order(list(entries))
    figure.legend(
        [entries[name] for name in names], names, loc="outside lower center", ncols=min(len(names), 5), frameon=False
    )


def plot_head(rows: Rows) -> Any:
    """A line a case, a dot a contender: time, and memory on top of the gradients."""
    rows = measured(rows)
    cases = list(dict.fromkeys(map(head_case, rows)))[::-1]
    figure, axes = _figure(2, max(0.34 * len(cases) + 1.6, 3))
    for axis, name, title, unit in (
        (axes[0, 0], "seconds", "forward and backward (scoring: forward), s", 1.0),
        (axes[0, 1], "beyond_gradients_bytes", "peak memory beyond gradients, MiB", 2.0**20),
    ):
        for who in in_order([row["contender"] for row in rows]):
            mine = [row for row in rows if row["contender"] == who and row.get(name) and number(row, name) > 0]
            axis.scatter(
                [number(row, name) / unit for row in mine], [cases.index(head_case(row)) for row in mine], label=who,
                color=color(who), marker="|" if who == FLOOR else "o", s=160 if who == FLOOR else 42,
                zorder=4 if who == OURS else 3,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_yticks(range(len(cases)), cases if axis is axes[0, 0] else [""] * len(cases), fontsize=8)
    _legend(figure, axes)
    return figure


def plot_lines(
    rows: Rows, panels: Sequence[tuple[str, dict[str, str]]], x: str, figures: Sequence[tuple[str, str, float]]
) -> Any:
    """Log-log curves by contender; a column a panel (title, values to select), a row a figure (column, label, unit).
    Panels of a single figure stand two in a row."""
    if len(figures) == 1:
        figure, axes = _figure(2, 3.0, -(-len(panels) // 2))
    else:
        figure, axes = _figure(len(panels), 3.4, len(figures))
    for column, (title, wanted) in enumerate(panels):
        chosen = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
        for line, (name, label, unit) in enumerate(figures):
            axis = axes.flat[column] if len(figures) == 1 else axes[line, column]
            for who in in_order([row["contender"] for row in chosen]):
                mine = [row for row in chosen if row["contender"] == who and row.get(name) and number(row, name) > 0]
                points = sorted((number(row, x), number(row, name) / unit) for row in mine)
                if points:
                    style = {"linestyle": "--"} if who == FLOOR else {"linewidth": 2.4 if who == OURS else 1.4}
                    xs, ys = zip(*points, strict=True)
                    axis.plot(xs, ys, label=who, color=color(who), marker="o", markersize=4, **style)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_ylabel(label, fontsize=9)
            if line == 0:
                axis.set_title(title, loc="left", fontsize=10)
            axis.set_xlabel(title.partition(":")[0], fontsize=9)
            places = sorted({number(row, x) for row in chosen})
            axis.set_xticks(places, [f"{place:,.0f}" for place in places], fontsize=8)
            axis.minorticks_off()
    _legend(figure, axes)
    return figure


def plot_growth(rows: Rows) -> Any:
    rows = measured(rows)
    titles = {"tokens": "tokens N", "vocabulary": "vocabulary V", "microbatches": "microbatches of one step"}
    panels = [(titles[sweep], {"sweep": sweep}) for sweep in dict.fromkeys(row["sweep"] for row in rows)]
    figures = [("seconds", "seconds", 1.0), ("beyond_gradients_bytes", "MiB beyond gradients", 2.0**20)]
    return plot_lines(rows, panels, "x", figures)


def plot_loss(rows: Rows) -> Any:
    rows = measured(rows)
    floor = {(row["operation"], row["N"]): {**row, "contender": FLOOR, "seconds": row["floor_seconds"]} for row in rows}
    panels = [(f"tokens: {name}", {"operation": name}) for name in dict.fromkeys(row["operation"] for row in rows)]
    figure = plot_lines([*rows, *floor.values()], panels, "N", [("seconds", "seconds, forward and backward", 1.0)])
    for text in figure.legends[0].get_texts():
        if text.get_text() == FLOOR:
            text.set_text("bytes / bandwidth")
    return figure


def plot_accuracy(rows: Rows) -> Any:
    rows = [row for row in measured(rows) if row.get("error_logprob")]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    found = [number(row, "error_logprob") for row in rows]
    figure, axes = _figure(len(dtypes), 3.6)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for row in (row for row in rows if row["dtype"] == dtype):
            who = row["contender"]
            axis.scatter(number(row, "seconds"), number(row, "error_logprob"), label=who, color=color(who), s=60)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(f"{dtype}: largest error of a log-probability", loc="left", fontsize=10)
        axis.set_xlabel("seconds, forward and backward", fontsize=9)
        axis.set_ylim(min(found) / 3, max(found) * 3)
    axes[0, 0].set_ylabel("nats", fontsize=9)
    _legend(figure, axes)
    return figure


def plot_step(rows: Rows) -> Any:
    rows = measured(rows)
    figure, axes = _figure(2, 3.6)
    names = list(dict.fromkeys((row["model"], row["trainer"]) for row in rows))
    several = len({model for model, _ in names}) > 1
    for axis, name, label, unit in (
        (axes[0, 0], "tokens_per_second", "tokens/s", 1.0),
        (axes[0, 1], "peak_bytes", "peak memory of a step, MiB", 2.0**20),
    ):
        for model, trainer in names:
            mine = [row for row in rows if (row["model"], row["trainer"]) == (model, trainer)]
            points = sorted((100 * number(row, "equal"), number(row, name) / unit) for row in mine)
            axis.plot(*zip(*points, strict=True), label=f"{trainer}, {model}" if several else trainer,
                      color=color(trainer), marker="o")  # fmt: skip
        axis.set_yscale("log")
        axis.set_xlabel("groups of equal reward, %", fontsize=9)
        axis.set_title(label, loc="left", fontsize=10)
    _legend(figure, axes)
    return figure


def plot_race(curves: Rows) -> Any:
    """Accuracy over wall time and over steps, a thin line a seed."""
    figure, axes = _figure(2, 3.6)
    for axis, x, label in ((axes[0, 0], "seconds", "seconds of training"), (axes[0, 1], "step", "optimizer steps")):
        for trainer, seed in dict.fromkeys((row["trainer"], row["seed"]) for row in curves):
            mine = [row for row in curves if (row["trainer"], row["seed"]) == (trainer, seed)]
            points = sorted((number(row, x), 100 * number(row, "reward")) for row in mine)
            axis.plot(*zip(*points, strict=True), label=trainer, color=color(trainer), linewidth=1.4, alpha=0.85)
        axis.axhline(75, color="#1f2328", linewidth=0.8, linestyle=":")
        axis.set_xlabel(label, fontsize=9)
        axis.set_ylim(0, 100)
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_title("right answers among a step's 64 samples, %", loc="left", fontsize=10)
    _legend(figure, axes)
    return figure


# CSV -> how its figure is drawn.
FIGURES: dict[str, Callable[[Rows], Any]] = {
    "head": plot_head,
    "loss": plot_loss,
    "step": plot_step,
    "race_curves": plot_race,
    "accuracy": plot_accuracy,
    "growth": plot_growth,
}


def draw(folder: Path) -> list[Path]:
    """Draw what the folder has CSV files for; returns the figures' paths."""
    from matplotlib import pyplot as plt

    written = []
    for name, make in FIGURES.items():
        source = folder / f"{name}.csv"
        rows = read_csv(source) if source.exists() else []
        if name != "race_curves":
            rows = measured(rows)
        if not rows:
            continue
        figure = make(rows)
        figure.suptitle(f"{name.removesuffix('_curves')}: {rows[-1]['device']}", fontsize=12)
        path = folder / f"{name.removesuffix('_curves')}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        written.append(path)
    return written


def fill_tables(text: str, results: Path) -> str:
    """`text` with every marked block replaced by its table; a block without results stays as it is.

    Raises:
        UserError: a block names an unknown table.
    """

    def table(match: re.Match[str]) -> str:
        name, device = match["name"], match["device"]
        if name not in TABLES:
            raise UserError(f"table {name!r} is unknown{nearest(name, TABLES)}; there are {', '.join(TABLES)}")
        source, make = TABLES[name]
        folders = sorted(folder for folder in results.glob(f"{device}*") if (folder / f"{source}.csv").exists())
        if not folders:
            print(f"plots: no {source}.csv for {device}; its table {name} stays as it is")
            return match[0]
        return match[1] + make(read_csv(folders[0] / f"{source}.csv")) + match[4]

    return BLOCK.sub(table, text)


def body() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--results", type=Path, default=RESULTS, help="folder with a folder for each device")
    arguments.add_argument("--readme", type=Path, action="append", help=f"page (default: {', '.join(PAGES)})")
    chosen = arguments.parse_args()
    if not chosen.results.is_dir():
        raise UserError(f"--results: there is no folder {chosen.results}; run a benchmark first")
    for folder in sorted(path for path in chosen.results.iterdir() if path.is_dir()):
        for path in draw(folder):
            print(f"drew {path}")
    for readme in chosen.readme or [ROOT / name for name in PAGES]:
        if not readme.is_file():
            raise UserError(f"--readme: there is no file {readme}")
        before = readme.read_text(encoding="utf-8")
        after = fill_tables(before, chosen.results)
        if after != before:
            readme.write_text(after, encoding="utf-8")
            print(f"wrote the tables of {readme}")


if __name__ == "__main__":
    main(body)
