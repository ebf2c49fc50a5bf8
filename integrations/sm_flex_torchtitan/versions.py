"""Which torchtitan, and which torch under it, is known to have what this package builds on."""

import importlib.metadata

import torch


def check_versions() -> None:
    """Raises ImportError, in one line, where torchtitan is missing or of another version than 0.3, or torch older than 2.14."""
    try:
        version = importlib.metadata.version("torchtitan")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("torchtitan is not installed: pip install 'sm-flex[torchtitan]'") from None
    if version.split(".")[:2] != ["0", "3"]:
        raise ImportError(f"sm_flex_torchtitan knows torchtitan 0.3, got {version}: pip install 'torchtitan>=0.3,<0.4'")
    if torch.__version__ < "2.14":
        raise ImportError(f"torchtitan {version} needs torch 2.14 or newer, got {torch.__version__}: pip install 'torch>=2.14'")
