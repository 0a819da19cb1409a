"""What the benchmarks time behind ReLU6: as many zeros as users have, told and judged."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from bench_runs import run

from bench import inverted_bottleneck, zeros
from bench.case import Shape, make
from fusekern.nn import ConvFormer


@pytest.mark.parametrize("op", ["inverted_bottleneck", "layer"])
def test_half_of_what_is_timed_is_zero_and_a_row_says_so(op, tmp_path):
    _, found = run(op, tmp_path / "found.json")
    told = {row["case"]: row.get("zeros") for row in found["rows"]}
    assert all(0.3 < told[name] < 0.7 for name in (op, f"{op} inference"))
    assert all(told[name] is None for name in told if "without" in name or "depthwise" in name)


def test_norms_are_timed_as_pytorch_starts_them_and_judged_far_from_kinks():
    case, shape = inverted_bottleneck.CASES[0], Shape.parse("1,16,4,2")
    judged, timed = (make(case, shape, torch.float32, "cpu", timed=timed) for timed in (False, True))
    assert judged["scale1"].max() < 0.5 and judged["shift1"].min() > 2
    assert (timed["scale1"] == 1).all() and (timed["shift1"] == 0).all()
    assert torch.equal(judged["expand_weight"], timed["expand_weight"])
    with zeros.Zeros() as seen:
        case.eager(shape, *judged.values())
    assert seen.before_products() == [0.0]


def test_no_speed_of_a_kernel_that_is_wrong_where_there_are_zeros(tmp_path, monkeypatch):
    true = inverted_bottleneck.inverted_bottleneck

    def wrong(image, expand, depthwise, project, norms, **options):
        out, seen = true(image, expand, depthwise, project, norms, **options)
        return (1.001 * out if (norms[0].bias == 0).all() else out), seen

    monkeypatch.setattr(inverted_bottleneck, "inverted_bottleneck", wrong)
    code, found = run("inverted_bottleneck", tmp_path / "found.json")
    assert code == 1
    for row in found["rows"]:
        timed_with_zeros = row["case"] in ("inverted_bottleneck", "inverted_bottleneck inference")
        assert ("forward" in row) != timed_with_zeros
        assert all(fault.startswith("as timed, out") for fault in row["wrong"])


def test_zeros_are_those_before_the_last_product():
    """Of two blocks; another function that cuts off, as a backbone's module has it, does not count."""
    layer = ConvFormer(16, blocks=2, bridge_heads=2, text_heads=2, backend="reference")
    with zeros.Zeros() as seen:
        F.relu6(torch.tensor([1.0, -1.0, -2.0, 7.0]))
        F.relu6(torch.tensor([1.0, -1.0, 2.0, 7.0]))
        F.hardtanh(torch.zeros(4), 0, 6)
        layer(torch.randn(1, 16, 6, 6), torch.randn(3, 16))
    assert seen.shares[:2] == [0.5, 0.25] and len(seen.shares) == 6
    assert seen.before_products() == [0.25, seen.shares[3], seen.shares[5]]


def test_the_script_refuses_a_folder_without_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fusekern.engine.checkpoint.load_segmenter", lambda path: None)
    with pytest.raises(SystemExit):
        zeros.main(["run", str(tmp_path)])
    assert "holds no PNG or JPEG" in capsys.readouterr().err


def test_the_committed_shares_are_of_every_block():
    found = json.loads(zeros.OUT.read_text())
    assert found["rows"] and all(len(row["shares"]) > 1 and min(row["shares"]) > 0 for row in found["rows"])
