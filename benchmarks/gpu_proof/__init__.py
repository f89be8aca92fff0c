"""Everything that must be shown on a new GPU, in one command: ``python -m benchmarks.gpu_proof``.

The command itself imports the standard library only, so that it also starts where nothing but torch is installed.
"""
