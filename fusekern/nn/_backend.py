"""The option that all modules with ops in them share."""

from __future__ import annotations

from torch import nn

from fusekern.backends import check_name


class HasBackend(nn.Module):
    """A module with an attribute ``backend``: set on a module, it is set on every part of it that has one too."""

    @property
    def backend(self) -> str:
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        check_name(name)
        for part in self.modules():
            if isinstance(part, HasBackend):
                part._backend = name
