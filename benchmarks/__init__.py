"""Benchmarks of rootstockd against what else there is. `python -m benchmarks.run_local --help`."""
