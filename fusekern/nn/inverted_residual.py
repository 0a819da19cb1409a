"""The inverted bottleneck in place of the blocks that other people's MobileNetV2 is made of."""

from __future__ import annotations

from torch import Tensor, nn

from fusekern.backends import check_name
from fusekern.nn._attributes import is_plain
from fusekern.nn._backend import HasBackend
from fusekern.nn.inverted_bottleneck import Parts, are_known, group_of, run
from fusekern.ops._check import check_choice
from fusekern.ops.inverted_bottleneck import MEMORY

# Where a block has its modules, in the order of ``Parts``.
TIMM = Parts("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
TORCHVISION = Parts("conv.0.0", "conv.0.1", "conv.1.0", "conv.1.1", "conv.2", "conv.3")


class FusedInvertedResidual(HasBackend):
    """A block of timm or torchvision, run by the op ``inverted_bottleneck``.

    It has the block's own children under their own names, and its attributes: weights, optimizers and state dicts stay
    what they were. Where a child is replaced later, or gets hooks, the block's own forward runs. ``torch.fx`` takes it
    for a leaf where it is told to: ``tracer_kwargs={"leaf_modules": [FusedInvertedResidual]}``.
    """

    def __init__(self, block: nn.Module, names: Parts, residual: bool, memory: str, backend: str) -> None:
        super().__init__()
        every = vars(nn.Module())
        self.__dict__.update({name: value for name, value in vars(block).items() if name not in every})
        for name, child in block.named_children():
            self.add_module(name, child)
        self.training = block.training
        self.kind, self.names, self.residual, self.memory, self.backend = type(block), names, residual, memory, backend

    def forward(self, image: Tensor) -> Tensor:
        if _besides(self, self.names):
            return self.kind.forward(self, image)
        parts = Parts(*map(self.get_submodule, self.names))
        group = group_of(parts.norms)
        if group is None:
            return self.kind.forward(self, image)
        return run(image, parts, group, self.residual, self.memory, self.backend)[0]


def fuse_inverted_residuals(model: nn.Module, *, memory: str = "default", backend: str = "auto") -> int:
    """Put the op ``inverted_bottleneck`` in place of every inverted residual of a timm or torchvision MobileNetV2.

    The weights are the same tensors and the state dict keeps its keys, so checkpoints go both ways. Blocks that are
    more than an inverted residual with ReLU6 stay as they are: with squeeze-and-excitation, dilation, stochastic depth,
    another activation, no expansion, or hooks or a forward of their own.

    >>> backbone = timm.create_model("mobilenetv2_100", features_only=True)
    >>> fuse_inverted_residuals(backbone)
    16

    Args:
        model: changed in place.
        memory: as of ``InvertedBottleneck``.
        backend: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        How many blocks were replaced.

    Raises:
        ValueError: no block was replaced, with what each is beside an inverted residual; or ``memory`` or ``backend``
            is unknown.
    """
    check_choice("memory", memory, MEMORY)
    check_name(backend)
    more: dict[str, int] = {}
    count = _fuse(model, memory, backend, more)
    if count == 0:
        left = ", ".join(f"{blocks} with {what}" for what, blocks in more.items())
        raise ValueError(
            f"model ({type(model).__name__}) has no inverted residual of timm or torchvision to replace"
            + (left and f"; left as they are: {left}")
        )
    return count


def _fuse(model: nn.Module, memory: str, backend: str, more: dict[str, int]) -> int:
    """How many were replaced; ``more`` counts those that were not, by what they have besides."""
    count = 0
    for name, child in list(model.named_children()):
        found = _layout(child)
        if found is None:
            count += _fuse(child, memory, backend, more)
        elif besides := _besides(child, found[0]) if is_plain(child, type(child)) else "hooks or a forward of its own":
            more[besides] = more.get(besides, 0) + 1
        else:
            setattr(model, name, FusedInvertedResidual(child, *found, memory, backend))
            count += 1
    return count


def _layout(block: nn.Module) -> tuple[Parts, bool] | None:
    """Where an inverted residual has its modules, and whether it adds its input."""
    if type(block).__name__ != "InvertedResidual":
        return None
    if hasattr(block, "conv_pw"):
        return TIMM, block.has_skip
    if isinstance(getattr(block, "conv", None), nn.Sequential) and len(block.conv) in (3, 4):
        return TORCHVISION, block.use_res_connect
    return None


def _besides(block: nn.Module, names: Parts) -> str:
    """What an inverted residual has that the op does not do, in words; empty for nothing."""
    if names == TIMM:
        for name, child in block.named_children():
            if name not in names and not is_plain(child, nn.Identity):
                return f"{name} ({type(child).__name__})"
        norms = block.bn1, block.bn2, block.bn3
        if not all(map(_is_timm_norm, norms)):
            return "other norms"
        *activations, last = [norm.act for norm in norms]
        if not is_plain(last, nn.Identity):
            return "an activation at its end"
    else:
        if not is_plain(block.conv, nn.Sequential):
            return "hooks or another module in the place of conv"
        if len(block.conv) == 3:
            return "no expansion"
        *stages, _, last = block.conv
        if len(stages) != 2 or not all(is_plain(stage, type(stage)) and len(stage) == 3 for stage in stages):
            return "other stages"
        if not all(is_plain(norm, nn.BatchNorm2d, nn.SyncBatchNorm) for norm in (stages[0][1], stages[1][1], last)):
            return "other norms"
        activations = [stage[2] for stage in stages]
    for activation in activations:
        if not is_plain(activation, nn.ReLU6):
            return f"the activation {type(activation).__name__}"
    return "" if are_known(Parts(*map(block.get_submodule, names))) else "other convolutions"


def _is_timm_norm(norm: nn.Module) -> bool:
    """timm's BatchNormAct2d: a batch norm with dropout, here none, and an activation."""
    known = type(norm).__name__ in ("BatchNormAct2d", "SyncBatchNormAct")
    known = known and isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
    return known and is_plain(norm, type(norm)) and is_plain(norm.drop, nn.Identity)
