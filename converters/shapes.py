"""Reading a configuration off the shapes of a checkpoint's tensors."""

import re


class ArchitectureError(Exception):
    """The tensors are not those of a model that is known. The message names them."""


def count(names, prefix):
    """How many of `prefix`0, `prefix`1, ... there are."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({int(m.group(1)) for m in map(pattern.match, names) if m})


def some(names, most=4):
    """A few of many names, for a message."""
    shown = ", ".join(map(repr, list(names)[:most]))
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "no tensors"


class Shapes:
    """{name: shape}, in which what is missing or has other dimensions is an error that names it."""

    def __init__(self, shapes):
        self._shapes = shapes

    def of(self, name, rank):
        found = self._shapes.get(name)
        if found is None:
            raise ArchitectureError(
                f"not a checkpoint of a promptable model: {name!r} is missing; found {some(self._shapes)}"
            )
        if len(found) != rank or 0 in found:
            raise ArchitectureError(f"{name!r} has shape {tuple(found)}, expected {rank} dimensions")
        return found
