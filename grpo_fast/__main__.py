"""``grpo-fast`` and ``python -m grpo_fast``."""

import sys

from grpo_fast.startup import leaving_at_once, use_utf8


def main() -> int:
    use_utf8()
    with leaving_at_once():
        from grpo_fast.cli import main as run
    return run()


if __name__ == "__main__":
    sys.exit(main())
