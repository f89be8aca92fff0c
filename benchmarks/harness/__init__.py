"""What the benchmarks share: contenders, problems, measurements, trainers."""
