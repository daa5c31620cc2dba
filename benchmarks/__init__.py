"""Benchmarks against the models that a user would otherwise run. Each module is one command; results: RESULTS.md."""
