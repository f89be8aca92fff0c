"""The fused loss inside other people's loops: `trl`, `liger` and `verl`, each imported by its own name."""
