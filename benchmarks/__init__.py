"""Benchmarks of the linear layer: ``python -m benchmarks --help``."""
