"""Every Triton kernel, the tiles they run with, and their launchers. Imported only where a kernel is asked for."""
