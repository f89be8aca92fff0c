"""Speed, memory and accuracy compared with other libraries; the README in this folder lists the benchmarks."""

import os

# Without progress bars between the results; tqdm reads this when it is imported.
os.environ.setdefault("TQDM_DISABLE", "1")
