"""Tables in the documents and figures, from the results' CSV files."""

import re
import sys

import pytest
import torch

from benchmarks import head, plots
from benchmarks.harness import measure
from benchmarks.harness.contenders import FLOOR, OURS
from benchmarks.harness.measure import Run, slug
from grpo_fast.errors import UserError

CPU = torch.device("cpu")


def small_results(folder):
    """A results folder with one measured and one failed contender."""
    run = Run(CPU, output=folder, commit="abc")
    table = run.table("head", head.KEY)
    case = {"model": "m", "N": 64, "H": 8, "V": 99, "dtype": "float32", "head": "frozen", "status": "ok"}
    for who, seconds in ((FLOOR, 0.5), ("full logits", 2.0), (OURS, 1.0)):
        memory = {} if who == FLOOR else {"beyond_gradients_bytes": 3 << 20}
        table.add({**case, "contender": who, "seconds": seconds, "to_floor": 2 * seconds, **memory})
    table.add({**case, "contender": "TRL", "status": "wrong", "detail": "off"})
    return slug(measure.device_name(CPU))


def test_fill_tables_has_measured_rows_only(tmp_path):
    device = small_results(tmp_path)
    before = (
        f"a\n<!-- table: head {device} -->\nold\n<!-- /table -->\nb\n<!-- table: race cpu -->\nkept\n<!-- /table -->\n"
    )
    after = plots.fill_tables(before, tmp_path)
    assert after.startswith(f"a\n<!-- table: head {device} -->\n| head | bare GEMMs | grpo-fast | full logits |\n")
    assert "| m (8 x 99), N=64, float32, frozen | 0.50 s (1.00x) | **1.00 s (2.00x)** | 2.00 s (4.00x) |" in after
    assert "old" not in after
    assert "TRL" not in after
    assert "kept" in after
    assert plots.fill_tables(after, tmp_path) == after
    memory = plots.fill_tables("<!-- table: head-memory cpu -->\n<!-- /table -->", tmp_path)
    assert "| m (8 x 99), N=64, float32, frozen | 3 MiB | 3 MiB |" in memory


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """A folder of documents with a place for every table, most of them in a page of docs/."""
    (tmp_path / "docs").mkdir()
    places = {name: f"<!-- table: {name} cpu -->\nold\n<!-- /table -->\n" for name in plots.TABLES}
    (tmp_path / "README.md").write_text("first\n" + places.pop("head"))
    (tmp_path / "docs" / "results.md").write_text("".join(places.values()))
    (tmp_path / "docs" / "other.md").write_text("no table\n")
    monkeypatch.setattr(plots, "ROOT", tmp_path)
    return tmp_path


def test_plots_fills_the_places_in_all_documents(documents, monkeypatch, capsys):
    small_results(documents / "results")
    monkeypatch.setattr(sys, "argv", ["plots", "--results", str(documents / "results")])
    plots.body()
    assert (documents / "README.md").read_text().startswith("first\n<!-- table: head cpu -->\n| head | bare GEMMs |")
    page = (documents / "docs" / "results.md").read_text()
    assert "<!-- table: head-memory cpu -->\n| head | grpo-fast | full logits |" in page
    assert "<!-- table: race cpu -->\nold\n<!-- /table -->" in page
    assert "no race.csv for cpu; its table race stays as it is" in capsys.readouterr().out
    assert plots.read_documents(documents).keys() == {documents / "README.md", documents / "docs" / "results.md"}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("<!-- table: race cpu -->\nold\n<!-- /table -->\n", "", "table 'race' has no place; put <!-- table: race cpu"),
        ("table: race cpu", "table: rice cpu", r"docs/results.md: table 'rice' is unknown \(did you mean 'race'\?\)"),
        ("table: race cpu", "table: race", "docs/results.md: a place is not <!-- table: NAME DEVICE --> to"),
        ("old\n<!-- /table -->\n<!-- table: loss", "<!-- table: loss", "docs/results.md: a place is not"),
    ],
)
def test_read_documents_wrong_place_ends_in_one_line(documents, before, after, message):
    page = documents / "docs" / "results.md"
    assert before in page.read_text()
    page.write_text(page.read_text().replace(before, after))
    with pytest.raises(UserError, match=message):
        plots.read_documents(documents)


def test_documents_have_a_place_for_every_table():
    """And every place a table; see `read_documents`."""
    names = [
        name for page in plots.read_documents(measure.ROOT).values() for name in re.findall(r"table: ([\w-]+)", page)
    ]
    assert set(names) == set(plots.TABLES)


def test_draw_makes_a_figure_per_csv(tmp_path):
    device = small_results(tmp_path)
    assert plots.draw(tmp_path / device) == [tmp_path / device / "head.png"]
    assert (tmp_path / device / "head.png").stat().st_size > 10_000
