"""Speed, memory and accuracy, side by side with the peers: one file a question, see the README in this folder."""

import os

# Bars of the libraries would stand between the figures; tqdm reads this when it is imported.
os.environ.setdefault("TQDM_DISABLE", "1")
