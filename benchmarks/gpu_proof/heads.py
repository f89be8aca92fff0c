"""The head against every peer that is installed, in the order of `benchmarks.gpu`, without the check of small heads.

python -m benchmarks.gpu_proof.heads [--contenders NAMES]
"""

from __future__ import annotations

from benchmarks.gpu import head_in_order
from benchmarks.harness.contenders import choose
from benchmarks.harness.measure import main, parser, start


def body() -> None:
    arguments = parser("The head against every peer.")
    arguments.add_argument("--contenders", help="names with commas (default: all)")
    chosen = arguments.parse_args()
    head_in_order(start(chosen), choose(chosen.contenders))


if __name__ == "__main__":
    main(body)
