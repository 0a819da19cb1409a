"""Optimizer: parameter groups, the learning rate as a pure function of the step, and the state by parameter name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from fusekern.config import OptimConfig
from fusekern.errors import FusekernError

log = logging.getLogger(__name__)


def backbone_multiplier(config: OptimConfig, *, pretrained: bool) -> float:
    """Factor on the backbone's learning rate; a small one on random weights is warned about.

    Args:
        config: the recipe's ``optim``.
        pretrained: whether the backbone starts from trained weights.
    """
    if config.backbone_lr_mult is None:
        return 0.1 if pretrained else 1.0
    if config.backbone_lr_mult < 1 and not pretrained:
        log.warning(
            "optim.backbone_lr_mult is %g on a backbone of random weights: it hardly learns; use 1, or name weights in "
            "model.backbone.weights",
            config.backbone_lr_mult,
        )
    return config.backbone_lr_mult


def parameter_groups(model: nn.Module, config: OptimConfig, *, backbone_mult: float) -> list[dict]:
    """Up to four groups, backbone or not times decayed or not, each with its ``base_lr``.

    Every parameter of a normalisation layer goes without decay; all others, biases included, have it.
    Parameters that need no gradient are left out.

    Args:
        model: its backbone is the child named ``backbone``.
        config: the recipe's ``optim``.
        backbone_mult: factor on the backbone's learning rate.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if "Norm" in type(module).__name__
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("backbone."), id(parameter) in norms), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": 0.0,
            "base_lr": config.lr * (backbone_mult if backbone else 1.0),
            "weight_decay": 0.0 if norm else config.weight_decay,
        }
        for (backbone, norm), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(model: nn.Module, config: OptimConfig, *, backbone_mult: float) -> Optimizer:
    """AdamW or SGD with momentum over ``parameter_groups``; the learning rates are 0 until ``set_learning_rate``.

    Raises:
        FusekernError: the base learning rate is not positive.
    """
    if config.lr <= 0:
        raise FusekernError(f"optim.lr is {config.lr:g}; it must be positive")
    groups = parameter_groups(model, config, backbone_mult=backbone_mult)
    return AdamW(groups) if config.name == "adamw" else SGD(groups, lr=0.0, momentum=config.momentum)


def learning_rate(step: int, base: float, config: OptimConfig, *, steps: int) -> float:
    """Polynomial decay to ``min_lr``, multiplied by a linear warm-up: the schedule of mmseg and DenseCLIP.

    ``lr(s) = ((base - min_lr) (1 - s / steps)^power + min_lr) * warm(s)``, where ``warm`` goes from ``warmup_ratio`` at
    step 0 to 1 at step ``warmup``. A base below ``min_lr`` stays as it is.

    Args:
        step: optimizer steps taken before this one, from 0.
        base: learning rate of the parameter group.
        config: the recipe's ``optim``.
        steps: length of the run.
    """
    low = min(config.min_lr, base)
    decayed = (base - low) * (1 - step / steps) ** config.power + low
    if step >= config.warmup:
        return decayed
    return decayed * (config.warmup_ratio + (1 - config.warmup_ratio) * step / config.warmup)


def set_learning_rate(optimizer: Optimizer, step: int, config: OptimConfig, *, steps: int) -> float:
    """Sets every group's learning rate for the optimizer step after ``step`` steps; returns the largest of them."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, group["base_lr"], config, steps=steps)
    return max(group["lr"] for group in optimizer.param_groups)


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``PARAMETER::KEY`` tensors, such as ``head.classifier.weight::exp_avg``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}::{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_optimizer(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], source: Path) -> None:
    """The inverse of ``optimizer_tensors``, on the parameters' devices and in their memory format.

    Raises:
        FusekernError: a tensor belongs to no parameter, or has another shape; the message names ``source``.
    """
    parameters = dict(model.named_parameters())
    for full, tensor in tensors.items():
        name, _, key = full.rpartition("::")
        parameter = parameters.get(name)
        if parameter is None:
            raise FusekernError(f"{source}: {full} belongs to no parameter of the model")
        if key == "step":  # a count, which AdamW keeps on the CPU
            optimizer.state[parameter][key] = tensor.clone()
        elif tensor.shape == parameter.shape:
            optimizer.state[parameter][key] = torch.empty_like(parameter, requires_grad=False).copy_(tensor)
        else:
            raise FusekernError(
                f"{source}: {full} is {list(tensor.shape)}, but its parameter is {list(parameter.shape)}"
            )
