"""python -m benchmarks.inductor_report: what torch.compile makes of a training step on CUDA, without a GPU (cli.py)."""
