"""The page of a run: what it holds, what it stands, and that nothing of the model's gets out of its text."""

import json
import re
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from grpo_fast.cli import main
from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.memory.report import write_plan
from grpo_fast.report import Summary, plot_run, write_config, write_report
from grpo_fast.report.charts import MOST_CHARTS, MOST_POINTS, draw_curves, figure, path, thin, ticks
from grpo_fast.report.compare import Curve, plot_curves, read_curves
from grpo_fast.report.page import split_config
from grpo_fast.report.run import SHOWN_PROMPTS, SHOWN_STEPS, read_completions

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x' {{ 7 * 7 }}"
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; a tag left open, or closed before its children, is an error."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def named(self, tag, css_class=""):
        return [a for name, a in self.elements if name == tag and css_class in (a.get("class") or "")]

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def step_metrics(step, **figures):
    return {
        "step": step, "reward": 0.1 * step, "reward_std": 0.5, "rewards/right/mean": 0.05 * step,
        "rewards/right/std": 0.1, "completions/mean_length": 20.0 + step, "completions/min_length": 3.0,
        "completions/max_length": 90.0, "loss": 0.01, "entropy": 1.5, "grad_norm": 0.3, "learning_rate": 1e-5,
        "step_time": 2.0, "tokens_per_second": 1000.0, "memory/peak_allocated_gib": 3.5, "num_tokens": 64 * step,
        **figures,
    }  # fmt: skip


def completion(step, prompt, text, advantage, **rewards):
    return {"step": step, "prompt": prompt, "completion": text, "rewards": rewards, "advantage": advantage}


def write_lines(file, entries):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture
def folder(tmp_path):
    """A run that goes on: a configuration, metrics and completions, but no summary."""
    run = tmp_path / "run"
    run.mkdir()
    write_config(run / "config.yaml", GRPOConfig("m", dataset_name="d", reward_funcs=["right"], max_steps=20, seed=7))
    write_lines(run / "metrics.jsonl", [step_metrics(step) for step in range(1, 13)])
    lines = [completion(10, "flat", "same", 0.0, right=1.0) for _ in range(2)]
    lines += [completion(10, "What is 2+2?", f"answer {i}", i - 1.0, right=float(i)) for i in range(3)]
    write_lines(run / "completions" / "completions_00010.jsonl", lines)
    return run


def page(folder, **fields):
    return Page(write_report(folder, **fields).read_text())


def finish(folder):
    (folder / "summary.json").write_text(
        json.dumps({"metric": "right", "before": 0.125, "after": 0.875, "train_seconds": 3725.0, "steps": 12})
    )


def test_a_finished_run(folder):
    finish(folder)
    made = page(folder)
    assert "12.5% → 87.5%" in made.words
    assert "1:02:05" in made.words
    assert "finished after 12 steps" in made.words
    assert "3.5 GiB" in made.words
    labels = [attributes["aria-label"] for attributes in made.named("svg")]
    titles = [label.split(" by optimizer step")[0] for label in labels]
    assert titles[:3] == ["reward", "right", "reward spread (std)"]
    assert {"loss", "entropy (nats per token)", "gradient norm", "tokens per second", "peak memory (GiB)"} <= set(
        titles
    )
    # No objective with a reference, no chart of its divergence.
    assert "KL to the reference policy" not in titles
    assert len(made.named("path", "band")) == 1
    # The score before and after, on the curve of its reward.
    assert len(made.named("circle", "dot")) == 2


def test_a_running_run(folder):
    made = page(folder)
    assert "not finished: step 12 of 20" in made.words
    assert "training time so far 0:24" in made.words
    assert made.named("circle") == []


def test_curves_follow_the_figures():
    drawn = {chart.title: chart for chart in draw_curves([step_metrics(s) for s in (1, 2, 3)], {}).charts}
    assert drawn["reward"].values == [0.1, 0.2, 0.3]
    heights = [float(y) for y in re.findall(r"[ML]\S+ (\S+?)(?=L|$)", drawn["reward"].raw)]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert drawn["reward"].last == "0.3"


@pytest.mark.parametrize(
    "figures",
    [{"reward": None}, {"reward": float("nan")}, {"loss": float("inf")}, {"reward": "high"}],
    ids=lambda figures: str(*figures.values()),
)
def test_figures_without_a_number_leave_a_gap(folder, figures):
    write_lines(folder / "metrics.jsonl", [step_metrics(1), step_metrics(2, **figures), step_metrics(3)])
    (name,) = figures
    history = [step_metrics(1), step_metrics(2, **figures), step_metrics(3)]
    chart = next(chart for chart in draw_curves(history, {}).charts if chart.title == name)
    assert chart.values[1] is None
    assert chart.raw.count("M") == 2
    assert "nan" not in write_report(folder).read_text().lower()


def test_missing_files_and_figures(folder):
    for file in (folder / "completions").iterdir():
        file.unlink()
    write_lines(folder / "metrics.jsonl", [{"step": 1, "reward": 1.0}, {"step": 2}])
    made = page(folder)
    assert "No completions were logged." in made.words
    assert len(made.named("svg")) == 1
    (folder / "metrics.jsonl").unlink()
    assert "No step has been logged yet." in page(folder).words


def test_a_line_cut_off_by_an_interruption_is_left_out(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "rew')
    assert "step 12 of 20" in page(folder).words


def test_an_unknown_figure_is_drawn_too(folder):
    write_lines(folder / "metrics.jsonl", [step_metrics(1, new_thing=4.0)])
    assert any(a["aria-label"].startswith("new_thing ") for a in page(folder).named("svg"))


def test_completions_best_and_worst(folder):
    ((step, groups),) = read_completions(folder)
    assert step == 10
    # The widest advantages first; equal ones show one completion.
    assert [(group.prompt, group.count) for group in groups] == [("What is 2+2?", 3), ("flat", 2)]
    assert [(s.label, s.text, s.advantage) for s in groups[0].samples] == [
        ("best", "answer 2", 1.0), ("worst", "answer 0", -1.0),
    ]  # fmt: skip
    assert [s.label for s in groups[1].samples] == ["all equal"]
    assert "answer 2" in page(folder).words
    assert "answer 1" not in page(folder).words


def test_neighbouring_groups_of_one_prompt_are_kept_apart(folder):
    lines = [completion(10, "twice", f"{i}", float(i), right=0.0) | {"group": i // 2} for i in range(4)]
    write_lines(folder / "completions" / "completions_00010.jsonl", lines)
    ((_, groups),) = read_completions(folder)
    assert [(group.count, group.samples[0].text, group.samples[1].text) for group in groups] == [
        (2, "1", "0"), (2, "3", "2"),
    ]  # fmt: skip


def test_completions_of_long_runs_are_few(folder):
    for step in range(100):
        lines = [completion(step, f"p{i}", "x", float(j), right=0.0) for i in range(9) for j in range(2)]
        write_lines(folder / "completions" / f"completions_{step:05d}.jsonl", lines)
    shown = read_completions(folder)
    assert [step for step, _ in shown][:: SHOWN_STEPS - 1] == [0, 99]
    assert len(shown) == SHOWN_STEPS
    assert all(len(groups) == SHOWN_PROMPTS for _, groups in shown)


def test_what_the_model_writes_stays_text(folder):
    chat = [{"role": "user", "content": EVIL}]
    lines = [completion(11, chat, EVIL * 40, i - 1.0, **{EVIL: None}) for i in range(3)]
    write_lines(folder / "completions" / "completions_00011.jsonl", lines)
    name = f"rewards/{EVIL}/mean"
    write_lines(folder / "metrics.jsonl", [step_metrics(1, **{name: 0.5, EVIL: 1.0})])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"dataset_name": EVIL, "prompt_template": EVIL, "run_name": EVIL}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps({"metric": EVIL, "before": 0.0, "after": 1.0, "steps": 1}))
    (folder / "memory_plan.json").write_text(json.dumps({EVIL: {EVIL: 2**30}}))
    write_lines(folder / "warnings.jsonl", [{"step": 1, "name": EVIL, "text": EVIL}, {"step": "x"}])
    made = page(folder)
    # One script, the page's own, which the policy names by its hash; nothing else that could run or load.
    assert len(made.named("script")) == 1
    assert made.named("img") == []
    assert not [
        name for _, attributes in made.elements for name in attributes if name.startswith("on") or name == "src"
    ]
    assert made.words.count("{{ 7 * 7 }}") >= 40
    assert "<script>alert(1)</script>" in made.words
    policy = next(a["content"] for a in made.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    assert "script-src 'sha256-" in policy


def test_the_policy_names_the_script_that_is_there(folder):
    import base64
    import hashlib

    text = write_report(folder).read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert not re.search(r"(?:https?:)?//[\w.]+\.\w", text.replace(script, ""))


def test_memory_beside_the_plan(folder):
    assert "Memory" not in page(folder).words
    plan = {"training": {"weights": 2 * 2**30, "gradients": 2**30}, "rollout": {"weights": 2 * 2**30, "cache": 2**29}}
    (folder / "memory_plan.json").write_text(json.dumps(plan))
    made = page(folder)
    assert "planned, training 3.00 GiB planned, rollout 2.50 GiB measured peak 3.50 GiB" in made.words
    widths = [a["style"] for a in made.named("span") if "style" in a]
    assert widths == ["width:57.143%", "width:28.571%", "width:57.143%", "width:14.286%", "width:100.000%"]


def test_the_plan_of_a_model(tmp_path):
    model = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = GRPOConfig("m", dataset_name="d", reward_funcs=["right"])
    write_plan(tmp_path / "memory_plan.json", config, model, 16)
    plan = json.loads((tmp_path / "memory_plan.json").read_text())
    assert set(plan) == {"training", "rollout"}
    for parts in plan.values():
        assert sum(parts.values()) > parts["weights"] > 4 * 2 * 64 * 32


def test_configuration_changed_fields_first(folder):
    changed, unchanged = split_config(yaml.safe_load((folder / "config.yaml").read_text()))
    assert dict(changed) == {
        "model_name_or_path": "m", "dataset_name": "d", "reward_funcs": '["right"]', "max_steps": "20", "seed": "7",
    }  # fmt: skip
    assert dict(unchanged)["beta"] == "0.0"


def test_long_texts_are_folded_and_cut(folder):
    lines = [completion(10, "short", "word " * 4000, float(i), right=0.0) for i in range(2)]
    write_lines(folder / "completions" / "completions_00010.jsonl", lines)
    made = page(folder)
    assert len(made.named("details", "long")) == 2
    assert "12,000 characters left out" in made.words


def test_report_command(folder, tmp_path, capsys):
    output = tmp_path / "page.html"
    assert main(["report", str(folder), "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert output.read_text().startswith("<!doctype html>")
    assert not (folder / "report.html").exists()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}"], "is not a run folder: it has no config.yaml"),
        (["{}/missing"], "is not a run folder"),
        ([], "grpo-fast report RUN"),
        (["{}", "--outptu", "x"], "grpo-fast report RUN"),
        (["{}/run", "--output", "/dev/null/x.html"], "/dev/null/x.html could not be written"),
    ],
)
def test_wrong_input_ends_in_one_line(folder, tmp_path, arguments, message, capsys):
    assert main(["report", *(argument.format(tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("grpo-fast: error: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_broken_files_are_named(folder, name):
    for text in ("{", '{"metric": ' + "[" * 500 + "]" * 500 + "}", "[]", "\x1b"):
        (folder / name).write_text(text)
        if name == "config.yaml" and text == "[]":
            continue
        with pytest.raises(UserError, match=f"{name} is not valid") as error:
            write_report(folder)
        assert str(error.value).isprintable()


def test_long_runs_are_thinned():
    values = [float(i) for i in range(10 * MOST_POINTS)]
    assert thin(values, 10)[:2] == [4.5, 14.5]
    curves = draw_curves([step_metrics(step) for step in range(1, 10 * MOST_POINTS)], {})
    assert len(curves.steps) <= MOST_POINTS
    assert {len(chart.values) for chart in curves.charts} == {len(curves.steps)}
    assert curves.width == 10


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (1e-5, 1e-5), (-2.0, -2.0), (0.3, 0.31), (-1e9, 1e9)])
def test_ticks_hold_the_range(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low <= high <= marks[-1]
    assert marks[0] < marks[-1]
    assert len({figure(mark) for mark in marks}) == len(marks) <= 7


def test_a_point_alone_is_visible():
    assert path([None, (1.0, 2.0), None, (3.0, 4.0), (5.0, 6.0)]) == "M1 2h.01M3 4L5 6"


def test_reward_png_of_figures_that_were_read_back(tmp_path):
    """A resumed run has the figures of its first part from a file, where NaN is null."""
    history = [step_metrics(1, reward=None), step_metrics(2, reward_std=None), step_metrics(3)]
    plot_run(history, Summary("right", 0.1, 0.9, 5.0, 3), tmp_path / "reward.png")
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


# What a file from elsewhere may hold where a run writes a number.
NOT_NUMBERS = ["high", True, [1], {"a": 1}, 10**400, -(10**400), 1e300, EVIL]


def write_json(file, content):
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: repr(value)[:8])
def test_figures_that_are_no_numbers_are_shown_as_damaged(folder, value):
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


def test_records_without_a_step_are_shown_as_damaged(folder):
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
def test_damaged_lines_are_counted(folder, name, line, reason):
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


def test_line_separators_inside_a_text_do_not_end_its_line(folder):
    text = "one\u2028two\u0085three\u2029"
    line = json.dumps(completion(10, "p", text, 1.0, right=1.0), ensure_ascii=False)
    (folder / "completions" / "completions_00010.jsonl").write_text(line + "\n", encoding="utf-8")
    assert read_completions(folder)[0][1][0].samples[0].text == text
    assert "Damaged records" not in page(folder).words


def test_control_characters_are_shown(folder):
    """Also those that change the order of what is seen, and halves of pairs, which no file can hold."""
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
def test_odd_configurations_are_shown(folder, fields):
    (folder / "config.yaml").write_text(yaml.safe_dump(fields))
    assert "Configuration" in page(folder).words
    read_curves([folder], "reward")
    with suppress(UserError):
        read_curves([folder])


def test_dates_and_bytes_in_a_configuration_are_shown(folder):
    text = "a: 2026-11-25\nb: !!binary aGk=\nc: {2026-11-25: [2026-11-25T10:00:00Z]}\nd: !!set {x}\ne: .nan"
    (folder / "config.yaml").write_text(text)
    words = page(folder).words
    for shown in ("a 2026-11-25", "b b'hi'", '{"2026-11-25": ["2026-11-25 10:00:00+00:00"]}', '["x"]'):
        assert shown in words
    read_curves([folder], "reward")


def test_a_page_of_countless_figures_is_bounded(folder):
    figures = {f"figure {i}": 1.0 for i in range(5000)}
    write_lines(folder / "metrics.jsonl", [step_metrics(1, **{**figures, "x" * 100_000: 1.0})])
    rewards = {f"reward {i}": 1.0 for i in range(5000)}
    lines = [completion(10, "p", "c", float(i), **rewards) for i in range(2)]
    write_lines(folder / "completions" / "completions_00010.jsonl", lines)
    made = page(folder)
    assert len(made.named("svg")) <= MOST_CHARTS
    assert re.search(r"4[,\d]+ more metrics are not drawn", made.words)
    assert (folder / "report.html").stat().st_size < 1 << 20


def test_files_that_never_end_are_cut(folder, monkeypatch):
    monkeypatch.setattr("grpo_fast.report.run.LONGEST_LINE", 5000)
    monkeypatch.setattr("grpo_fast.report.run.LARGEST_FILE", 40_000)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.truncate(1 << 40)
    made = page(folder)
    assert "step 12 of 20" in made.words
    assert re.search(r"line 13 .* is damaged and left out, and \d more", made.words)
    assert "metrics.jsonl: only its first 40,000 bytes are read" in made.words


def test_labels_are_not_mathematics(tmp_path):
    plot_run([step_metrics(1), step_metrics(2)], Summary(r"$\frac{$ a\$", 0.1, 0.9, 5.0, 2), tmp_path / "reward.png")
    curve = Curve(r"$\x^$" * 100, [([1, 2], [0.1, 0.2])], [0.2], [], [])
    plot_curves({r"$\frac{$": [curve]}, r"$\bad$", tmp_path / "c.png")
