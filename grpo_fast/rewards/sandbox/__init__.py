"""Generated code and its tests, run in processes that can do no harm (Linux)."""
