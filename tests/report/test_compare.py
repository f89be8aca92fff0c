"""Comparing several runs in one figure."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure

from grpo_fast.cli import main, parse_config
from grpo_fast.errors import UserError
from grpo_fast.report.compare import Curve, plot_curves, read_curves, spread

EXAMPLES = Path(__file__).parents[2] / "examples"
RAW = {"reward_baseline": "none", "scale_rewards": "none"}
CENTRED = {"scale_rewards": "none"}


def write_run(folder, scores, after=None, **config):
    """A run folder with one step per score."""
    folder.mkdir(parents=True)
    config = {"run_name": folder.name, "reward_funcs": ["digits_included", "mine.py:mine"], "seed": 1, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [{"step": step, "rewards/mine/mean": score, "reward": 2 * score} for step, score in enumerate(scores, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if after is not None:
        summary = {"metric": "mine", "before": 0.1, "after": after, "steps": len(scores), "train_seconds": 1.0}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_read_curves_runs_that_differ_only_in_the_seed_share_a_curve(tmp_path):
    folders = [
        write_run(tmp_path / f"a{seed}", [0.1 * seed, 0.5], 0.2 * seed, run_name="a", seed=seed) for seed in (1, 2)
    ]
    folders.insert(1, write_run(tmp_path / "b", [0.3], beta=0.1))
    metric, (a, b) = read_curves(folders)
    assert metric == "mine"
    assert (a.label, b.label) == ("a", "b")
    assert a.lines == [([1, 2], [0.1, 0.5]), ([1, 2], [0.2, 0.5])]
    assert (a.before, a.after) == ([0.1, 0.1], [0.2, 0.4])
    assert (b.lines, b.after) == ([([1], [0.3])], [])
    assert a.last == [0.5, 0.5]
    assert spread(a.after, share=True) == "30.0% (20.0% to 40.0%)"
    assert spread([1.5], share=False) == "1.500"
    _, (whole,) = read_curves(folders[:1], "reward")
    assert (whole.lines, whole.last, whole.after) == ([([1, 2], [0.2, 1.0])], [1.0], [])


def test_read_curves_settings_of_one_name_are_labelled_by_fields(tmp_path):
    folders = [write_run(tmp_path / str(b), [0.5], run_name="sort", beta=b, output_dir=str(b)) for b in (0.0, 0.1)]
    _, curves = read_curves(folders)
    assert [curve.label for curve in curves] == ["beta=0.0", "beta=0.1"]


def test_read_curves_refuses_different_scores_and_missing_metrics(tmp_path):
    one = write_run(tmp_path / "one", [0.5], 0.5)
    other = write_run(tmp_path / "other", [0.5], eval_metric="digits_included")
    with pytest.raises(UserError, match=r"is scored by 'mine', .*other by 'digits_included'; choose one with --metric"):
        read_curves([one, other])
    with pytest.raises(UserError, match="one has no values of 'no_such'"):
        read_curves([one], "no_such")
    with pytest.raises(UserError, match="is not a run folder"):
        read_curves([tmp_path / "none"])


def test_plot_curves_draws_every_seed_and_the_mean(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: figures.append(self) or save(self, *args, **options)
    )
    curve = Curve("a", [([1, 2, 3], [0.0, 0.2, 0.4]), ([2, 3], [0.4, 0.8])], [0.5], [], [0.25])
    plot_curves({"left": [curve], "right": [curve, curve]}, "mine", tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
    left, right = figures[0].axes
    drawn = [(list(line.get_xdata()), [round(float(y), 6) for y in line.get_ydata()]) for line in left.lines]
    assert drawn == [([1, 2, 3], [0.0, 0.2, 0.4]), ([2, 3], [0.4, 0.8]), ([2, 3], [0.3, 0.6])]
    assert len(right.lines) == 6
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["a: 25.0%"]


def test_compare_command(tmp_path, capsys):
    folders = [str(write_run(tmp_path / name, [0.1, 0.6], after)) for name, after in (("a", 0.5), ("b", 0.7))]
    output = str(tmp_path / "figure.svg")
    assert main(["compare", *folders, "--output", output]) == 0
    printed = capsys.readouterr().out
    assert ["60.0%", "10.0%", "70.0%"] in [re.findall(r"[\d.]+%", line) for line in printed.splitlines()]
    assert "</svg>" in (tmp_path / "figure.svg").read_text()
    for arguments, message in (
        ([*folders, "--output", "x.txt"], "--output='x.txt' is not allowed: it must end in .png, .svg or .pdf"),
        ([str(tmp_path / "c")], "c is not a run folder"),
        ([], "grpo-fast compare RUN RUN ..."),
    ):
        assert main(["compare", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_sort_comparison_continues_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    import sort_comparison

    panels = {"a": {"raw, small": RAW, "centred": CENTRED}, "b": {"centred": CENTRED}}
    monkeypatch.setattr(sort_comparison, "PANELS", panels)
    small = ["--max_steps", "2", "--generation_batch_size", "16", "--max_eval_samples", "5"]
    made = []
    trainer = sort_comparison.GRPOTrainer
    monkeypatch.setattr(sort_comparison, "GRPOTrainer", lambda config: made.append(config) or trainer(config))
    monkeypatch.setattr(sys, "argv", ["main", "--seeds", "1", "--output_dir", str(tmp_path), *small])
    for _ in range(2):
        sort_comparison.main()
        assert [(config.reward_baseline, config.seed) for config in made] == [("none", 1), ("mean", 1)]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "raw, small" in capsys.readouterr().out


def test_sort_comparison_configurations_are_valid(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import sort_comparison

    for changes in (changes for panel in sort_comparison.PANELS.values() for changes in panel.values()):
        options = [f"--{name}={json.dumps(value).strip(chr(34))}" for name, value in changes.items()]
        config = parse_config([sort_comparison.RECIPE, *options])
        assert {name: getattr(config, name) for name in changes} == changes


def test_objectives_comparison_continues_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    import objectives_comparison as comparison

    made = []
    trainer = comparison.GRPOTrainer
    monkeypatch.setattr(comparison, "GRPOTrainer", lambda config: made.append(config) or trainer(config))
    small = ["--max_steps", "4", "--generation_batch_size", "16", "--max_eval_samples", "5"]
    for seeds in ("1", "2"):
        arguments = ["--seeds", seeds, "--objectives", "dapo, remax;", "--output_dir", str(tmp_path), *small]
        comparison.main(arguments)
    runs = [(config.loss_type, config.advantage_estimator, config.seed) for config in made]
    assert runs == [("dapo", "remax", 1), ("dapo", "remax", 2)]
    rows = (tmp_path / "runs.csv").read_text().splitlines()
    assert len(rows) == 3
    assert rows[0].startswith("task,objective,seed,score")
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 1 + 2 * 4
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"dapo, remax +[\d.]+ ± [\d.]+ \([\d.]+, [\d.]+\)", capsys.readouterr().out)
    with pytest.raises(UserError, match="--objectives: 'ppo' is unknown; there is: reinforce; unclipped"):
        comparison.chosen_objectives("dapo,ppo")


def test_objectives_comparison_configurations_are_valid(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import objectives_comparison as comparison

    for task, (recipe, changes, _) in comparison.TASKS.items():
        for fields in list(comparison.OBJECTIVES.values())[: None if task == "sort" else 1]:
            given = {**comparison.SHARED, **changes, **fields}
            config = parse_config([recipe, *(f"--{k}={json.dumps(v).strip(chr(34))}" for k, v in given.items())])
            assert {name: getattr(config, name) for name in given} == given


def test_interval_is_students():
    sys.path.insert(0, str(EXAMPLES))
    try:
        from objectives_comparison import interval
    finally:
        sys.path.remove(str(EXAMPLES))
    mean, half = interval([1.0, 2.0, 4.0])
    # scipy.stats.t.interval(0.95, 2, loc=7 / 3, scale=scipy.stats.sem([1, 2, 4]))
    assert mean - half == pytest.approx(-1.4612, abs=1e-3)
    assert mean + half == pytest.approx(6.1279, abs=1e-3)


def test_read_curves_warns_of_damaged_records(tmp_path, capsys):
    run = write_run(tmp_path / "run", [0.5, 0.6])
    with (run / "metrics.jsonl").open("a") as file:
        file.write("{}\n")
    read_curves([run])
    assert (
        f"warning: {run}: metrics.jsonl: line 3 (its step is None) is damaged and left out" in capsys.readouterr().err
    )
