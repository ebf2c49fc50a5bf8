"""python -m benchmarks.kernel_report: what the compiler makes of the remask kernel, without a GPU (cli.py)."""
