"""Results are judged over several draws."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from bench import layer
from bench.case import Shape, draws, judge


class Drawn:
    """A truth in bf16 with two peers, whose relative errors are given; of the parameters one is zero but for noise."""

    def __init__(self, errors, zero=1e-17):
        self.case, self.shape = SimpleNamespace(parts=lambda shape, out: {"out": out}, judged_with=self.group), None
        self.sizes = {"out": (64, 64), "dweight": (64, 64), "dbias": (64,)}
        draws = {name: torch.randn(size, dtype=torch.float64) for name, size in self.sizes.items()}
        self.exact = [draws["out"], draws["dweight"], zero * draws["dbias"]]
        self.peers = [self.with_errors(dict.fromkeys(self.sizes, error)) for error in errors]

    @staticmethod
    def group(name):
        return name if name == "out" else "parameters"

    def named(self, found):
        return dict(zip(self.sizes, found, strict=True))

    def with_errors(self, errors):
        found = []
        for name, exact in self.named(self.exact).items():
            noise = errors[name] * torch.randn_like(exact)
            found.append((noise if name == "dbias" else exact * (1 + noise)).bfloat16())
        return found


def test_draws_are_judged_together():
    torch.manual_seed(0)
    truths = [Drawn((0.1, 0.1)) for _ in range(4)]
    found = [
        truth.with_errors({"out": error, "dweight": 0.09, "dbias": 0.09})
        for truth, error in zip(truths, (0.13, 0.07, 0.08, 0.08), strict=True)
    ]
    assert judge(truths, found) == []
    assert len(judge(truths[:1], found[:1])) == 1  # 1.1 times as much is allowed
    found = [truth.with_errors(dict.fromkeys(truth.sizes, 0.13)) for truth in truths]
    assert [fault.split(":")[0] for fault in judge(truths, found)] == ["out", "parameters"]


def test_further_draws_keep_what_is_judged_of_them_and_find_errors_in_it():
    case, shape = layer.CASES[0], Shape(1, 64, 5, 3)
    first, *others = truths = draws(case, shape, torch.bfloat16, "cpu")
    assert len(others) == 3 and first.kept == list(first.tensors)
    assert all(truth.kept == ["image", "text"] for truth in others)
    assert all(len(run) == 3 for truth in others for run in (truth.exact, *truth.peers))
    found = [truth.peers[0] for truth in truths]
    assert judge(truths, found) == []
    out, dimage, dtext = found[-1]
    assert {fault.split(":")[0] for fault in judge(truths, [*found[:-1], (out, dimage, 3 * dtext)])} == {"dtext"}


def test_a_gradient_of_nothing_but_noise_hides_no_error():
    """As that of a bias which a softmax takes away: multiplied until it were 1 it would be all that is judged."""
    torch.manual_seed(0)
    truth = Drawn((0.1, 0.1))
    errors = dict.fromkeys(truth.sizes, 0.1)
    assert judge([truth], [truth.with_errors(errors)]) == []
    assert judge([truth], [truth.with_errors({**errors, "dweight": 0.15})])[0].startswith("parameters: relative L2")
    assert judge([truth], [truth.with_errors({**errors, "dbias": 10})])[0].startswith("parameters: ")
