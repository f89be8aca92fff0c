"""Draw the figures, and write the tables in the documents, from the CSV files.

    python -m benchmarks.plots [--results benchmarks/results]

Figures are saved beside the CSV files of their device. In the README files and in docs/, everything between
``<!-- table: NAME DEVICE -->`` and ``<!-- /table -->`` is replaced by the table of that name; DEVICE is the beginning
of the name of a results folder, such as ``cpu`` or ``nvidia-h200``. Tables have measured rows only, and every table
must have a place.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.contenders import CONTENDERS, FLOOR, OURS
from benchmarks.harness.measure import RESULTS, ROOT, main, read_csv, show_bytes, show_seconds
from grpo_fast.errors import UserError, nearest
from grpo_fast.report.curves import new_panels, save_figure

Row = dict[str, str]
Rows = list[Row]
Cell = Callable[[Row], str]
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) (?P<device>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
# The documents that may hold tables.
DOCUMENTS = ("README.md", "docs/**/*.md", "kernels/README.md", "benchmarks/README.md")
COLORS = {
    OURS: "#d1242f", FLOOR: "#1f2328", "full logits": "#0969da", "full logits, compiled": "#54aeff", "TRL": "#8250df",
    "Liger": "#1a7f37", "torch linear_cross_entropy": "#bf8700", "cut-cross-entropy": "#bf3989",
    "Liger Triton loss": "#4ac26b", "QuACK": "#6e7781", "PyTorch": "#0969da", "PyTorch, compiled": "#54aeff",
}  # fmt: skip
ORDER = [FLOOR, *(contender.name for contender in CONTENDERS)]


def color(name: str) -> str:
    return COLORS.get(name, "#953800")


def number(row: Row, name: str) -> float:
    return float(row[name]) if row.get(name) else float("nan")


def measured(rows: Rows) -> Rows:
    """The rows with a time."""
    return [row for row in rows if row.get("status", "ok") == "ok" and row.get("seconds")]


def in_order(names: Iterable[str]) -> list[str]:
    """The distinct names: contenders in the usual order, then the others as they come."""
    return sorted(dict.fromkeys(names), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def seconds(row: Row) -> str:
    return show_seconds(number(row, "seconds"))


def size(name: str) -> Cell:
    return lambda row: show_bytes(number(row, name))


def formatted(name: str, form: str) -> Cell:
    """A number in the format `form`, or ``-`` if it is missing."""
    return lambda row: form.format(number(row, name)) if row.get(name) else "-"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], rows: Rows) -> str:
    """A table, with a caption that says where, when and with which versions the rows were measured."""
    ruler = ["---"] + ["---:"] * (len(header) - 1)
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ruler, *lines))
    peers, commits = ({row[name] for row in rows if row.get(name)} for name in ("peer", "commit"))
    machine = ", ".join([rows[-1]["device"], f"torch {rows[-1]['torch']}", *sorted(peers)])
    return f"{table}\n\n{machine}; commit {', '.join(sorted(commits))}; {max(row['date'] for row in rows)}.\n"


def by_row(columns: dict[str, Cell], rows: Rows) -> str:
    """A table with a line for each row."""
    return markdown(list(columns), [[cell(row) for cell in columns.values()] for row in rows], rows)


def by_contender(title: str, line: Cell, cell: Cell, rows: Rows, column: Cell = lambda row: row["contender"]) -> str:
    """A table with a line for each case and a column for each contender."""
    cases, names = in_order(map(line, rows)), in_order(map(column, rows))
    cells = {(line(row), column(row)): cell(row) for row in rows}
    lines = [[case, *(cells.get((case, name), "-") for name in names)] for case in cases]
    return markdown([title, *names], lines, rows)


def head_case(row: Row) -> str:
    return f"{row['model']} ({row['H']} x {row['V']}), N={int(row['N']):,}, {row['dtype']}, {row['head']}"


def head_table(cell: Cell, leave_out: Sequence[str] = ()) -> Callable[[Rows], str]:
    def make(rows: Rows) -> str:
        kept = [row for row in measured(rows) if row["contender"] not in leave_out]
        return by_contender("head", head_case, cell, kept)

    return make


def time_and_ratio(row: Row) -> str:
    shown = f"{seconds(row)} ({number(row, 'to_floor'):.2f}x)"
    return f"**{shown}**" if row["contender"] == OURS else shown


MEMORY = size("beyond_gradients_bytes")
SPEEDUP = formatted("speedup", "{:.2f}x")
TOKENS_PER_SECOND = formatted("tokens_per_second", "{:,.0f}")
SUBCLASS = {
    "step": lambda row: f"{row['model']}, {row['case']}, {row['trainer']}",
    "time": seconds,
    "memory that a step adds": size("peak_bytes"),
    "speed": SPEEDUP,
}
ACCURACY = {
    "contender": lambda row: f"{row['dtype']}, {row['contender']}",
    "time": seconds,
    "log-prob, largest": formatted("error_logprob", "{:.1e}"),
    "log-prob, median": formatted("error_logprob_median", "{:.1e}"),
    "grad hidden": formatted("error_hidden", "{:.1e}"),
    "grad weight": formatted("error_weight", "{:.1e}"),
}
STEP = {
    "step": lambda row: f"{row['model']}, {100 * number(row, 'equal'):.0f}% equal rewards, {row['trainer']}",
    "time": seconds,
    "tokens/s": TOKENS_PER_SECOND,
    "peak memory": size("peak_bytes"),
    "speed": SPEEDUP,
}
ROLLOUT = {
    "sampling": lambda row: (
        f"{row['model']}, {row['sequences']} responses of up to {row['longest_tokens']} tokens, {row['contender']}"
    ),
    "tokens/s": TOKENS_PER_SECOND,
    "peak memory": size("peak_bytes"),
    "mean length": formatted("mean_tokens", "{:.0f}"),
    "speed": SPEEDUP,
}


def race_table(rows: Rows) -> str:
    """All races, also those that did not reach the target."""
    columns = {
        "trainer": lambda row: f"{row['trainer']}, seed {row['seed']}",
        f"steps to {float(rows[0]['target']):.0%}": lambda row: (
            row["steps"] if row["status"] == "ok" else f"{row['status']} in {row['steps']}"
        ),
        "wall time": formatted("seconds", "{:.0f} s"),
        "a step": formatted("seconds_per_step", "{:.1f} s"),
        "peak memory": size("peak_bytes"),
    }
    return by_row(columns, sorted(rows, key=lambda row: (row["trainer"], int(row["seed"]))))


def loss_table(rows: Rows) -> str:
    def cell(row: Row) -> str:
        return f"{seconds(row)} ({number(row, 'to_floor'):.1f}x)"

    return by_contender("operation", lambda row: f"{row['operation']}, N={int(row['N']):,}", cell, measured(rows))


def own_loss_table(rows: Rows) -> str:
    columns = {
        "formula": lambda row: row["formula"],
        "from": lambda row: f"{row['from']}, N={int(row['N']):,}",
        "loss": lambda row: row["loss"],
        "time": lambda row: f"{seconds(row)} ({number(row, 'to_built_in'):.2f}x)",
    }
    return by_row(columns, measured(rows))


def growth_table(rows: Rows) -> str:
    figures = {"seconds": "time", "beyond_gradients_bytes": "memory"}
    return by_contender(
        "exponent of", lambda row: row["contender"], formatted("exponent", "{:.2f}"), rows,
        lambda row: f"{figures[row['figure']]} in {row['sweep']}",
    )  # fmt: skip


# Contenders that a drop-in does not compete with.
OTHERS = [name for name in ORDER if name not in (OURS, "full logits", "TRL", "Liger")]
# Name of a table -> the CSV that it shows, and the function that makes it.
TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "head": ("head", head_table(time_and_ratio)),
    "head-memory": ("head", head_table(MEMORY, [FLOOR])),
    "accuracy": ("accuracy", lambda rows: by_row(ACCURACY, measured(rows))),
    "head-drop-in": ("head", head_table(lambda row: f"{seconds(row)}, {MEMORY(row)}", OTHERS)),
    "step": ("step", lambda rows: by_row(STEP, measured(rows))),
    "rollout": ("rollout", lambda rows: by_row(ROLLOUT, measured(rows))),
    "trl-subclass": ("trl_subclass", lambda rows: by_row(SUBCLASS, measured(rows))),
    "race": ("race", race_table),
    "loss": ("loss", loss_table),
    "own-loss": ("own_loss", own_loss_table),
    "growth": ("growth_fit", growth_table),
}


def panels(columns: int, height: float = 4.2, rows: int = 1) -> tuple[Any, Any]:
    return new_panels(rows, columns, (5.6 * columns, height * rows))


def _legend(figure: Any, axes: Any) -> None:
    """Add one legend below all panels."""
    entries: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    names = in_order(list(entries))
    figure.legend(
        [entries[name] for name in names], names, loc="outside lower center", ncols=min(len(names), 5), frameon=False
    )


def plot_head(rows: Rows) -> Any:
    """A line for each case with a dot for each contender: time, and memory beyond the gradients."""
    rows = measured(rows)
    cases = list(dict.fromkeys(map(head_case, rows)))[::-1]
    figure, axes = panels(2, max(0.34 * len(cases) + 1.6, 3))
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
    rows: Rows, shown: Sequence[tuple[str, dict[str, str]]], x: str, figures: Sequence[tuple[str, str, float]]
) -> Any:
    """Log-log curves by contender: a column for each panel (title, values to select) and a row for each figure (CSV
    column, label, unit). With a single figure, there are two panels in a row."""
    if len(figures) == 1:
        figure, axes = panels(2, 3.0, -(-len(shown) // 2))
    else:
        figure, axes = panels(len(shown), 3.4, len(figures))
    for column, (title, wanted) in enumerate(shown):
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
    shown = [(titles[sweep], {"sweep": sweep}) for sweep in dict.fromkeys(row["sweep"] for row in rows)]
    figures = [("seconds", "seconds", 1.0), ("beyond_gradients_bytes", "MiB beyond gradients", 2.0**20)]
    return plot_lines(rows, shown, "x", figures)


def plot_loss(rows: Rows) -> Any:
    rows = measured(rows)
    floor = {(row["operation"], row["N"]): {**row, "contender": FLOOR, "seconds": row["floor_seconds"]} for row in rows}
    shown = [(f"tokens: {name}", {"operation": name}) for name in dict.fromkeys(row["operation"] for row in rows)]
    figure = plot_lines([*rows, *floor.values()], shown, "N", [("seconds", "seconds, forward and backward", 1.0)])
    for text in figure.legends[0].get_texts():
        if text.get_text() == FLOOR:
            text.set_text("bytes / bandwidth")
    return figure


def plot_accuracy(rows: Rows) -> Any:
    rows = [row for row in measured(rows) if row.get("error_logprob")]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    found = [number(row, "error_logprob") for row in rows]
    figure, axes = panels(len(dtypes), 3.6)
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
    figure, axes = panels(2, 3.6)
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
    """Accuracy over time and over steps, with a line for each seed."""
    figure, axes = panels(2, 3.6)
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


# CSV -> the function that draws its figure.
FIGURES: dict[str, Callable[[Rows], Any]] = {
    "head": plot_head,
    "loss": plot_loss,
    "step": plot_step,
    "race_curves": plot_race,
    "accuracy": plot_accuracy,
    "growth": plot_growth,
}


def draw(folder: Path) -> list[Path]:
    """Draw the figures of all CSV files in the folder, and return their paths."""
    written = []
    for name, make in FIGURES.items():
        source = folder / f"{name}.csv"
        rows = read_csv(source) if source.exists() else []
        if name != "race_curves":
            rows = measured(rows)
        if rows:
            figure = make(rows)
            title = name.removesuffix("_curves")
            figure.suptitle(f"{title}: {rows[-1]['device']}", fontsize=12)
            save_figure(figure, folder / f"{title}.png")
            written.append(folder / f"{title}.png")
    return written


def fill_tables(page: str, results: Path) -> str:
    """`page` with every marked block replaced by its table. A block without results stays as it is."""

    def table(match: re.Match[str]) -> str:
        name, device = match["name"], match["device"]
        source, make = TABLES[name]
        folders = sorted(folder for folder in results.glob(f"{device}*") if (folder / f"{source}.csv").exists())
        if not folders:
            print(f"plots: no {source}.csv for {device}; its table {name} stays as it is")
            return match[0]
        return match[1] + make(read_csv(folders[0] / f"{source}.csv")) + match[4]

    return BLOCK.sub(table, page)


def read_documents(root: Path) -> dict[Path, str]:
    """The texts of the documents that have a place for a table.

    Raises:
        UserError: a place is for an unknown table or has no end, or a table has no place.
    """
    found = {path: path.read_text(encoding="utf-8") for form in DOCUMENTS for path in sorted(root.glob(form))}
    pages = {path: page for path, page in found.items() if "<!-- table:" in page}
    places: set[str] = set()
    for path, page in pages.items():
        names = [match["name"] for match in BLOCK.finditer(page)]
        for name in names:
            if name not in TABLES:
                known = f"{nearest(name, TABLES)}; use one of {', '.join(TABLES)}"
                raise UserError(f"{path.relative_to(root)}: table {name!r} is unknown{known}")
        if not len(names) == page.count("<!-- table:") == page.count("<!-- /table -->"):
            raise UserError(f"{path.relative_to(root)}: a place is not <!-- table: NAME DEVICE --> to <!-- /table -->")
        places.update(names)
    for name in TABLES:
        if name not in places:
            raise UserError(f"table {name!r} has no place; put <!-- table: {name} cpu --> and <!-- /table --> in docs/")
    return pages


def body() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--results", type=Path, default=RESULTS, help="folder with a folder for each device")
    results = arguments.parse_args().results
    if not results.is_dir():
        raise UserError(f"--results: there is no folder {results}; run a benchmark first")
    pages = read_documents(ROOT)
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        for path in draw(folder):
            print(f"drew {path}")
    for path, page in pages.items():
        filled = fill_tables(page, results)
        if filled != page:
            path.write_text(filled, encoding="utf-8")
            print(f"wrote the tables of {path}")


if __name__ == "__main__":
    main(body)
