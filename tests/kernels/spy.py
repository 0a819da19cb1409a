"""What launchers launch, in order."""

from __future__ import annotations

from types import ModuleType

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

# PyTorch's operations by their names in a plan. Memory is taken, and tensors are viewed, without a launch.
OPERATIONS = {"aten::clone": "copy", "aten::copy_": "copy", "aten::sum": "sum"}
FREE = ("aten::empty", "aten::new_empty", "aten::detach")


class Launches(TorchDispatchMode):
    """While it is entered: the kernels of a module by name, and PyTorch's own operations."""

    def __init__(self, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inside = False  # of a kernel: the interpreter works with tensors too
        for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
            monkeypatch.setattr(kernels, name, Spy(getattr(kernels, name), name, self))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if not (self.inside or function.is_view or name.startswith(FREE)):
            self.names.append(OPERATIONS.get(name, name))
        return function(*args, **(kwargs or {}))

    def taken(self) -> tuple[str, ...]:
        """What there was since the last call."""
        names, self.names = tuple(self.names), []
        return names


class Spy:
    """A kernel that says when it is launched."""

    def __init__(self, kernel, name: str, launches: Launches) -> None:
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launches.names.append(self.name)
            self.launches.inside = True
            try:
                return self.kernel[grid](*arguments, **options)
            finally:
                self.launches.inside = False

        return launch


def short(op: str, plan: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Names without those of the op, in one string."""
    return {
        which: " ".join(name.removeprefix(f"{op}_").removesuffix("_kernel") for name in names)
        for which, names in plan.items()
    }
