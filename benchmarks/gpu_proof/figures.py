"""Draw the figures of one folder of results: ``python -m benchmarks.gpu_proof.figures FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.harness.measure import main
from benchmarks.plots import draw


def body() -> None:
    for path in draw(Path(sys.argv[1])):
        print(f"drew {path}")


if __name__ == "__main__":
    main(body)
