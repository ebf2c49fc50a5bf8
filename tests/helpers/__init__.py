"""What several tests share: problems to solve, small models, stand-in checkouts, programs to run."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
