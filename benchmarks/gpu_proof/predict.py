"""Write the cost model's predictions for the head into ``predictions.csv``, which `gpu_proof` compares with its
results.

    python -m benchmarks.gpu_proof.predict

Run it whenever a change of the kernels or of the cost model changes what is predicted; a test fails until then.
"""

from __future__ import annotations

import csv
import datetime
from pathlib import Path

from benchmarks.gpu_proof.stages import PREDICTIONS, UNITS, read_rows
from grpo_kernels.cost_model import GPUS, head_cost

COLUMNS = ("device", "stage", "value", "source")
# N, H and V of the head of the headline.
HEAD = 16384, 4096, 151936


def predict_head(name: str) -> str:
    """The predicted time of each kind of head over that of its bare products on the GPU `name`, as a headline."""
    costs = {case: head_cost(case, *HEAD, GPUS[name]) for case in UNITS}
    ratios = {case: cost.seconds(GPUS[name]) / cost.floor(GPUS[name]) for case, cost in costs.items()}
    return " ".join(f"{UNITS[case]} {ratio:.2f}x" for case, ratio in ratios.items())


def device_of(name: str) -> str:
    """What the driver's name of the GPU begins with."""
    return f"NVIDIA {name.upper()}"


def write_predictions(path: Path = PREDICTIONS) -> None:
    """Replace the rows of the head; the other rows stay."""
    source = f"cost model, {datetime.date.today()}, before any run on a GPU"
    head = [
        {"device": device_of(name), "stage": "head", "value": predict_head(name), "source": source}
        for name in sorted(GPUS, reverse=True)
    ]
    rows = head + [row for row in read_rows(path) if row["stage"] != "head"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    write_predictions()
