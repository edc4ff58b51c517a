"""Benchmarks and comparisons with other libraries; run ``python -m benchmarks NAME``."""
