"""Run folders, and what their report pages hold."""

import json
from html.parser import HTMLParser

from grpo_fast.report import write_report

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\" onload='x' {{ 7 * 7 }}"
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """The elements, attributes and text of a page; fails if a tag is not closed, or closed before its children."""

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


def page(folder, **fields):
    return Page(write_report(folder, **fields).read_text())


def finish(folder):
    (folder / "summary.json").write_text(
        json.dumps({"metric": "right", "before": 0.125, "after": 0.875, "train_seconds": 3725.0, "steps": 12})
    )
