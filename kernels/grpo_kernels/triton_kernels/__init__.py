"""Every Triton kernel, the tiles they run with, and their launchers. Imported when a kernel is first needed."""
