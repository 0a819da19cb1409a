"""The inverted bottleneck in place of the blocks that other people's MobileNetV2 is made of."""

from __future__ import annotations

from torch import Tensor, nn

from fusekern.backends import check_name
from fusekern.nn.inverted_bottleneck import Parts, are_known, run
from fusekern.ops._check import check_choice
from fusekern.ops.inverted_bottleneck import MEMORY

# Where a block has its modules, in the order of ``Parts``.
TIMM = Parts("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
TORCHVISION = Parts("conv.0.0", "conv.0.1", "conv.1.0", "conv.1.1", "conv.2", "conv.3")


class FusedInvertedResidual(nn.Module):
    """A block of timm or torchvision, run by the op ``inverted_bottleneck``.

    It has the block's own children under their own names: weights, optimizers and state dicts stay what they were.
    """

    def __init__(self, block: nn.Module, names: Parts, residual: bool, memory: str, backend: str) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.training = block.training
        self.names, self.residual, self.memory, self.backend = names, residual, memory, backend

    def forward(self, image: Tensor) -> Tensor:
        return run(image, Parts(*map(self.get_submodule, self.names)), self.residual, self.memory, self.backend)[0]


def fuse_inverted_residuals(model: nn.Module, *, memory: str = "default", backend: str = "auto") -> int:
    """Put the op ``inverted_bottleneck`` in place of every inverted residual of a timm or torchvision MobileNetV2.

    The weights are the same tensors and the state dict keeps its keys, so checkpoints go both ways. Blocks that are
    more than an inverted residual with ReLU6 stay as they are: with squeeze-and-excitation, dilation, stochastic depth,
    another activation, no expansion, or hooks of their own.

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
        ValueError: the model has no such block, or ``memory`` or ``backend`` is unknown.
    """
    check_choice("memory", memory, MEMORY)
    check_name(backend)
    count = _fuse(model, memory, backend)
    if count == 0:
        raise ValueError(f"model ({type(model).__name__}) has no inverted residual of timm or torchvision to replace")
    return count


def _fuse(model: nn.Module, memory: str, backend: str) -> int:
    count = 0
    for name, child in list(model.named_children()):
        fused = _fused(child, memory, backend)
        if fused is None:
            count += _fuse(child, memory, backend)
        else:
            setattr(model, name, fused)
            count += 1
    return count


def _fused(block: nn.Module, memory: str, backend: str) -> FusedInvertedResidual | None:
    """In place of a block, if it is one and nothing more."""
    hooks = (block._forward_pre_hooks, block._forward_hooks, block._backward_pre_hooks, block._backward_hooks)
    if type(block).__name__ != "InvertedResidual" or any(hooks):
        return None
    if hasattr(block, "conv_pw"):
        names, residual = TIMM, block.has_skip
        beside = [child for name, child in block.named_children() if name not in names]
        activations = [getattr(block.bn1, "act", None), getattr(block.bn2, "act", None)]
        linear = isinstance(getattr(block.bn3, "act", None), nn.Identity)
    elif isinstance(getattr(block, "conv", None), nn.Sequential) and len(block.conv) == 4:
        names, residual = TORCHVISION, block.use_res_connect
        beside, linear = [], True
        activations = [stage[2] for stage in block.conv[:2] if len(stage) == 3]
    else:
        return None
    parts = Parts(*map(block.get_submodule, names))
    plain = all(isinstance(child, nn.Identity) for child in beside) and linear and are_known(parts)
    relu6 = len(activations) == 2 and all(isinstance(activation, nn.ReLU6) for activation in activations)
    return FusedInvertedResidual(block, names, residual, memory, backend) if plain and relu6 else None
