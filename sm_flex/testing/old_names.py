"""Names that have changed, kept for one release: each gives what the new one does, with a DeprecationWarning."""

import warnings
from typing import Any


def find(name: str, old_names: dict[str, Any], module: str) -> Any:
    """For a module's __getattr__: old_names holds what each old name stands for."""
    if name not in old_names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(name, old_names[name].__name__)
    return old_names[name]


def renamed(old: str, new: str) -> Any:
    """The old name of an attribute, for the body of a class."""

    def get(self: Any) -> Any:
        _warn(old, new)
        return getattr(self, new)

    return property(get, doc=f"The old name of {new}.")


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is now {new}; the old name will go with the next release", DeprecationWarning, stacklevel=4)
