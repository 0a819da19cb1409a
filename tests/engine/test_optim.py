import logging

import pytest
import torch
from torch import nn

from fusekern.config import OptimConfig
from fusekern.engine.optim import (
    backbone_multiplier,
    build_optimizer,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from fusekern.errors import FusekernError


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.guidance = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_groups_hold_every_trainable_parameter_once():
    model = Tiny()
    groups = parameter_groups(model, OptimConfig(lr=1.0, weight_decay=0.5), backbone_mult=0.1)
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == 8
    expect = {
        "backbone.0.weight": (0.1, 0.5),
        "backbone.0.bias": (0.1, 0.5),
        "backbone.1.weight": (0.1, 0.0),
        "backbone.1.bias": (0.1, 0.0),
        "guidance.0.weight": (1.0, 0.5),
        "guidance.0.bias": (1.0, 0.5),
        "guidance.1.weight": (1.0, 0.0),
        "guidance.1.bias": (1.0, 0.0),
    }
    for name, (lr, decay) in expect.items():
        group = of[id(model.get_parameter(name))]
        assert (group["base_lr"], group["weight_decay"]) == (lr, decay), name


def test_backbone_multiplier_default_and_warning(caplog):
    with caplog.at_level(logging.WARNING, "fusekern"):
        assert backbone_multiplier(OptimConfig(), pretrained=True) == 0.1
        assert backbone_multiplier(OptimConfig(), pretrained=False) == 1.0
        assert backbone_multiplier(OptimConfig(backbone_lr_mult=0.1), pretrained=True) == 0.1
        assert not caplog.records
        assert backbone_multiplier(OptimConfig(backbone_lr_mult=0.1), pretrained=False) == 0.1
    assert "random weights" in caplog.text


def test_schedule_at_hand_computed_points():
    config = OptimConfig(lr=1.0, warmup=10, warmup_ratio=0.1, power=2.0, min_lr=0.2)
    assert learning_rate(0, 1.0, config, steps=100) == pytest.approx(0.1)
    # half-way through the warm-up: (0.8 * 0.95^2 + 0.2) * 0.55
    assert learning_rate(5, 1.0, config, steps=100) == pytest.approx(0.5071)
    assert learning_rate(10, 1.0, config, steps=100) == pytest.approx(0.8 * 0.81 + 0.2)
    assert learning_rate(50, 1.0, config, steps=100) == pytest.approx(0.4)
    assert learning_rate(100, 1.0, config, steps=100) == pytest.approx(0.2)
    assert learning_rate(50, 0.1, config, steps=100) == pytest.approx(0.1), "min_lr never raises a smaller base"


def test_no_warmup_starts_at_the_base():
    assert learning_rate(0, 0.5, OptimConfig(warmup=0), steps=10) == pytest.approx(0.5)


def test_set_learning_rate_keeps_the_ratio_of_the_groups():
    config = OptimConfig(lr=1.0, warmup=0, min_lr=0.0)
    optimizer = build_optimizer(Tiny(), config, backbone_mult=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    top = set_learning_rate(optimizer, 3, config, steps=10)
    assert top == pytest.approx(0.7**0.9)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [pytest.approx(0.1 * top), top]


def test_sgd_has_the_recipes_momentum():
    optimizer = build_optimizer(Tiny(), OptimConfig(name="sgd", momentum=0.8), backbone_mult=1.0)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.8}


def test_a_learning_rate_of_zero_is_refused():
    with pytest.raises(FusekernError, match=r"optim\.lr is 0; it must be positive"):
        build_optimizer(Tiny(), OptimConfig(lr=0.0), backbone_mult=1.0)
