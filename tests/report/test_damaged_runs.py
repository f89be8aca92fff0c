"""Run folders with damaged, hostile or endless files: what can be read is shown, and the rest is named."""

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from grpo_fast.errors import UserError
from grpo_fast.report.charts import MOST_CHARTS
from grpo_fast.report.compare import read_curves
from grpo_fast.report.run import read_completions
from support.run_folders import EVIL, completion, finish, page, step_metrics, write_lines

# What a foreign file may hold in the place of a number.
NOT_NUMBERS = ["high", True, [1], {"a": 1}, 10**400, -(10**400), 1e300, EVIL]


def write_json(file, content):
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: repr(value)[:8])
def test_page_values_that_are_not_numbers_are_damaged(folder, value):
    finish(folder)
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("before", "after", "train_seconds", "best_score", "steps"):
        write_json(folder / "summary.json", {**summary, name: value})
        made = page(folder)
        assert f"summary.json: {name} is not a number: " in made.words
        assert len(made.named("script")) == 1
    finish(folder)
    figures = {name: value for name in step_metrics(1) if name != "step"}
    write_lines(folder / "metrics.jsonl", [step_metrics(1), {"step": 2, **figures}, step_metrics(3)])
    write_json(folder / "memory_plan.json", {"training": {"weights": value, "gradients": 2**30}, "rollout": value})
    write_lines(folder / "completions" / "completions_00010.jsonl", [completion(value, value, value, value, r=value)])
    made = page(folder)
    assert "metrics.jsonl: 'reward' of step 2 is not a number (" in made.words
    assert f") and is not drawn, and {len(figures) - 1} more" in made.words
    assert made.words.count(" (not a number)") == 2
    assert any(a["aria-label"].startswith("reward ") for a in made.named("svg"))
    with pytest.raises(UserError, match="has no values of 'nothing'"):
        read_curves([folder], "nothing")
    assert read_curves([folder], "reward")[1][0].last == [pytest.approx(0.3)]


def test_page_records_without_a_step_are_damaged(folder):
    steps = [None, "3", True, 1.5, 10**400, [3]]
    entries = [step_metrics(1), *({"step": step, "reward": 1.0} for step in steps), {"reward": 1.0}, step_metrics(2)]
    write_lines(folder / "metrics.jsonl", entries)
    made = page(folder)
    assert "metrics.jsonl: line 2 (its step is None) is damaged and left out, and 6 more" in made.words
    assert "step 2 of 20" in made.words


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: Expecting"), (b"[1]", "not an object"), (b'"text"', "not an object"),
        (b'{"step":' * 50_000, "not JSON: nested too deeply"), (b'{"step": ' + b"1" * 5000 + b"}", "not JSON: Exceeds"),
        (b"", "not JSON"), (b"\x1b[2J", "not JSON"), (b"\xff\x00", "not JSON"),
        (b'{"step": 3, "prompt": ' + b"[" * 500 + b"]" * 500 + b"}", "not JSON: nested too deeply"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["metrics.jsonl", "completions/completions_00010.jsonl"])
def test_page_damaged_lines_are_counted(folder, name, line, reason):
    lines = (folder / name).read_bytes().splitlines(keepends=True)
    (folder / name).write_bytes(b"".join([lines[0], line + b"\n", *lines[1:], line + b"\n"]))
    made = page(folder)
    assert f"{Path(name).name}: line 2 ({reason}" in made.words
    assert ") is damaged and left out, and 1 more" in made.words
    assert "answer 2" in made.words
    assert "step 12 of 20" in made.words
    assert "Damaged records" not in page(pristine(folder, name, lines)).words


def pristine(folder, name, lines):
    (folder / name).write_bytes(b"".join(lines))
    return folder


def test_read_completions_unicode_line_separators_stay_in_the_text(folder):
    text = "one\u2028two\u0085three\u2029"
    line = json.dumps(completion(10, "p", text, 1.0, right=1.0), ensure_ascii=False)
    (folder / "completions" / "completions_00010.jsonl").write_text(line + "\n", encoding="utf-8")
    assert read_completions(folder)[0][1][0].samples[0].text == text
    assert "Damaged records" not in page(folder).words


def test_page_control_characters_are_printed_as_escapes(folder):
    """Also those that change the direction of the text, and lone surrogates, which UTF-8 cannot encode."""
    hostile = "a\x00b\x1b[2Jc\u202ed\ud800e"
    lines = [completion(11, hostile, hostile, i - 1.0, **{hostile: 1.0}) for i in range(2)]
    write_lines(folder / "completions" / "completions_00011.jsonl", lines)
    write_lines(folder / "metrics.jsonl", [step_metrics(1, **{f"rewards/{hostile}/mean": 1.0})])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(json.dumps({**config, "run_name": hostile, hostile: hostile}))
    made = page(folder)
    assert made.words.count(r"a\x00b\x1b[2Jc\u202ed\ud800e") >= 6
    assert not re.search("[\x00\x1b\u202e]", (folder / "report.html").read_text())


@pytest.mark.parametrize(
    "fields",
    [
        {"reward_funcs": 5}, {"reward_funcs": {"a": 1}}, {"reward_funcs": [None, [1]]}, {"run_name": ["a"]},
        {"max_steps": "many"}, {"model_name_or_path": None}, {1: 2, None: 3}, {"eval_metric": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_page_odd_configuration(folder, fields):
    (folder / "config.yaml").write_text(yaml.safe_dump(fields))
    assert "Configuration" in page(folder).words
    read_curves([folder], "reward")
    with suppress(UserError):
        read_curves([folder])


def test_page_configuration_with_dates_and_bytes(folder):
    text = "a: 2026-11-25\nb: !!binary aGk=\nc: {2026-11-25: [2026-11-25T10:00:00Z]}\nd: !!set {x}\ne: .nan"
    (folder / "config.yaml").write_text(text)
    words = page(folder).words
    for shown in ("a 2026-11-25", "b b'hi'", '{"2026-11-25": ["2026-11-25 10:00:00+00:00"]}', '["x"]'):
        assert shown in words
    read_curves([folder], "reward")


def test_page_with_countless_metrics_is_bounded(folder):
    figures = {f"figure {i}": 1.0 for i in range(5000)}
    write_lines(folder / "metrics.jsonl", [step_metrics(1, **{**figures, "x" * 100_000: 1.0})])
    rewards = {f"reward {i}": 1.0 for i in range(5000)}
    lines = [completion(10, "p", "c", float(i), **rewards) for i in range(2)]
    write_lines(folder / "completions" / "completions_00010.jsonl", lines)
    made = page(folder)
    assert len(made.named("svg")) <= MOST_CHARTS
    assert re.search(r"4[,\d]+ more metrics are not drawn", made.words)
    assert (folder / "report.html").stat().st_size < 1 << 20


def test_page_endless_file_is_cut(folder, monkeypatch):
    monkeypatch.setattr("grpo_fast.report.run.LONGEST_LINE", 5000)
    monkeypatch.setattr("grpo_fast.report.run.LARGEST_FILE", 40_000)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.truncate(1 << 40)
    made = page(folder)
    assert "step 12 of 20" in made.words
    assert re.search(r"line 13 .* is damaged and left out, and \d more", made.words)
    assert "metrics.jsonl: only its first 40,000 bytes are read" in made.words
