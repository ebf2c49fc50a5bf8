"""Griffe extension: our docstrings and public names, as griffe reads them."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Our "Example:" is griffe's "Examples:", a doctest and no paragraph; a :func: role is code."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r":\w+:`([^`]+)`", r"`\1`", text)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Where a public function has the name of the module that it is in (sm_flex.testing.oracle), the function is meant."""
        for name in map(str, pkg.exports or ()):
            module = pkg.members.get(name)
            if isinstance(module, griffe.Module) and isinstance(module.members.get(name), griffe.Function):
                function = module.members[name]
                self.on_object(obj=function)  # its module is no longer walked
                pkg.set_member(name, griffe.Alias(name, function, parent=pkg))
        for member in list(pkg.members.values()):
            if isinstance(member, griffe.Module):
                self.on_package(pkg=member)
