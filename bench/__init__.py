"""Benchmarks and kernel checks, run from a checkout: `python -m bench --help`."""
