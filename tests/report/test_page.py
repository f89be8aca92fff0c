"""The report page of a run, its charts and its completions."""

import json
import re

import pytest
import yaml
from transformers import LlamaConfig

from grpo_fast.cli import main
from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.memory.report import write_plan
from grpo_fast.report import Summary, plot_run, write_report
from grpo_fast.report.charts import MOST_POINTS, draw_curves, figure, path, thin, ticks
from grpo_fast.report.compare import Curve, plot_curves
from grpo_fast.report.page import split_config
from grpo_fast.report.run import SHOWN_PROMPTS, SHOWN_STEPS, read_completions
from support.run_folders import EVIL, completion, finish, page, step_metrics, write_lines


def test_page_finished_run(folder):
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
    # The objective has no reference policy.
    assert "KL to the reference policy" not in titles
    assert len(made.named("path", "band")) == 1
    # The scores before and after training, on the chart of their reward.
    assert len(made.named("circle", "dot")) == 2


def test_page_running_run(folder):
    made = page(folder)
    assert "not finished: step 12 of 20" in made.words
    assert "training time so far 0:24" in made.words
    assert made.named("circle") == []


def test_draw_curves_follows_the_values():
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
def test_draw_curves_missing_value_leaves_a_gap(folder, figures):
    write_lines(folder / "metrics.jsonl", [step_metrics(1), step_metrics(2, **figures), step_metrics(3)])
    (name,) = figures
    history = [step_metrics(1), step_metrics(2, **figures), step_metrics(3)]
    chart = next(chart for chart in draw_curves(history, {}).charts if chart.title == name)
    assert chart.values[1] is None
    assert chart.raw.count("M") == 2
    assert "nan" not in write_report(folder).read_text().lower()


def test_page_missing_files_and_metrics(folder):
    for file in (folder / "completions").iterdir():
        file.unlink()
    write_lines(folder / "metrics.jsonl", [{"step": 1, "reward": 1.0}, {"step": 2}])
    made = page(folder)
    assert "No completions were logged." in made.words
    assert len(made.named("svg")) == 1
    (folder / "metrics.jsonl").unlink()
    assert "No step has been logged yet." in page(folder).words


def test_page_line_cut_short_by_an_interruption_is_skipped(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "rew')
    assert "step 12 of 20" in page(folder).words


def test_page_unknown_metric_has_a_chart(folder):
    write_lines(folder / "metrics.jsonl", [step_metrics(1, new_thing=4.0)])
    assert any(a["aria-label"].startswith("new_thing ") for a in page(folder).named("svg"))


def test_read_completions_best_and_worst(folder):
    ((step, groups),) = read_completions(folder)
    assert step == 10
    # The widest advantages first; a group with equal ones shows one completion.
    assert [(group.prompt, group.count) for group in groups] == [("What is 2+2?", 3), ("flat", 2)]
    assert [(s.label, s.text, s.advantage) for s in groups[0].samples] == [
        ("best", "answer 2", 1.0), ("worst", "answer 0", -1.0),
    ]  # fmt: skip
    assert [s.label for s in groups[1].samples] == ["all equal"]
    assert "answer 2" in page(folder).words
    assert "answer 1" not in page(folder).words


def test_read_completions_adjacent_groups_of_one_prompt(folder):
    lines = [completion(10, "twice", f"{i}", float(i), right=0.0) | {"group": i // 2} for i in range(4)]
    write_lines(folder / "completions" / "completions_00010.jsonl", lines)
    ((_, groups),) = read_completions(folder)
    assert [(group.count, group.samples[0].text, group.samples[1].text) for group in groups] == [
        (2, "1", "0"), (2, "3", "2"),
    ]  # fmt: skip


def test_read_completions_long_run_has_few(folder):
    for step in range(100):
        lines = [completion(step, f"p{i}", "x", float(j), right=0.0) for i in range(9) for j in range(2)]
        write_lines(folder / "completions" / f"completions_{step:05d}.jsonl", lines)
    shown = read_completions(folder)
    assert [step for step, _ in shown][:: SHOWN_STEPS - 1] == [0, 99]
    assert len(shown) == SHOWN_STEPS
    assert all(len(groups) == SHOWN_PROMPTS for _, groups in shown)


def test_page_hostile_text_stays_text(folder):
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
    # The page's own script, which the policy allows by its hash, and nothing else that could run or load.
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


def test_page_policy_has_the_hash_of_its_script(folder):
    import base64
    import hashlib

    text = write_report(folder).read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert not re.search(r"(?:https?:)?//[\w.]+\.\w", text.replace(script, ""))


def test_page_memory_plan_and_measured_peak(folder):
    assert "Memory" not in page(folder).words
    plan = {"training": {"weights": 2 * 2**30, "gradients": 2**30}, "rollout": {"weights": 2 * 2**30, "cache": 2**29}}
    (folder / "memory_plan.json").write_text(json.dumps(plan))
    made = page(folder)
    assert "planned, training 3.00 GiB planned, rollout 2.50 GiB measured peak 3.50 GiB" in made.words
    widths = [a["style"] for a in made.named("span") if "style" in a]
    assert widths == ["width:57.143%", "width:28.571%", "width:57.143%", "width:14.286%", "width:100.000%"]


def test_write_plan_of_a_model(tmp_path):
    model = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = GRPOConfig("m", dataset_name="d", reward_funcs=["right"])
    write_plan(tmp_path / "memory_plan.json", config, model, 16)
    plan = json.loads((tmp_path / "memory_plan.json").read_text())
    assert set(plan) == {"training", "rollout"}
    for parts in plan.values():
        assert sum(parts.values()) > parts["weights"] > 4 * 2 * 64 * 32


def test_split_config_changed_fields_first(folder):
    changed, unchanged = split_config(yaml.safe_load((folder / "config.yaml").read_text()))
    assert dict(changed) == {
        "model_name_or_path": "m", "dataset_name": "d", "reward_funcs": '["right"]', "max_steps": "20", "seed": "7",
    }  # fmt: skip
    assert dict(unchanged)["beta"] == "0.0"


def test_page_long_text_is_folded_and_cut(folder):
    lines = [completion(10, "short", "word " * 4000, float(i), right=0.0) for i in range(2)]
    write_lines(folder / "completions" / "completions_00010.jsonl", lines)
    made = page(folder)
    assert len(made.named("details", "long")) == 2
    assert "12,000 characters left out" in made.words


def test_report_command_writes_the_page(folder, tmp_path, capsys):
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
def test_report_command_wrong_input_ends_in_one_line(folder, tmp_path, arguments, message, capsys):
    assert main(["report", *(argument.format(tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("grpo-fast: error: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_write_report_broken_file_is_named(folder, name):
    for text in ("{", '{"metric": ' + "[" * 500 + "]" * 500 + "}", "[]", "\x1b"):
        (folder / name).write_text(text)
        if name == "config.yaml" and text == "[]":
            continue
        with pytest.raises(UserError, match=f"{name} is not valid") as error:
            write_report(folder)
        assert str(error.value).isprintable()


def test_draw_curves_long_run_is_thinned():
    values = [float(i) for i in range(10 * MOST_POINTS)]
    assert thin(values, 10)[:2] == [4.5, 14.5]
    curves = draw_curves([step_metrics(step) for step in range(1, 10 * MOST_POINTS)], {})
    assert len(curves.steps) <= MOST_POINTS
    assert {len(chart.values) for chart in curves.charts} == {len(curves.steps)}
    assert curves.width == 10


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (1e-5, 1e-5), (-2.0, -2.0), (0.3, 0.31), (-1e9, 1e9)])
def test_ticks_enclose_the_range(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low <= high <= marks[-1]
    assert marks[0] < marks[-1]
    assert len({figure(mark) for mark in marks}) == len(marks) <= 7


def test_path_single_point_is_visible():
    assert path([None, (1.0, 2.0), None, (3.0, 4.0), (5.0, 6.0)]) == "M1 2h.01M3 4L5 6"


def test_plot_run_missing_values(tmp_path):
    """A resumed run reads its first steps from a file, in which NaN is null."""
    history = [step_metrics(1, reward=None), step_metrics(2, reward_std=None), step_metrics(3)]
    plot_run(history, Summary("right", 0.1, 0.9, 5.0, 3), tmp_path / "reward.png")
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_plot_labels_are_not_mathematics(tmp_path):
    plot_run([step_metrics(1), step_metrics(2)], Summary(r"$\frac{$ a\$", 0.1, 0.9, 5.0, 2), tmp_path / "reward.png")
    curve = Curve(r"$\x^$" * 100, [([1, 2], [0.1, 0.2])], [0.2], [], [])
    plot_curves({r"$\frac{$": [curve]}, r"$\bad$", tmp_path / "c.png")
