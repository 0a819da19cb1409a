"""ConfusionMatrix against hand counts and against torchmetrics."""

import csv
import json
import math

import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from fusekern.engine.metrics import ConfusionMatrix


def counted(pred, label, classes):
    matrix = ConfusionMatrix(classes)
    matrix.update(torch.tensor(pred), torch.tensor(label))
    return matrix


def test_counts_by_hand():
    matrix = counted([[0, 1, 1], [2, 2, 0]], [[0, 0, 1], [2, 255, 255]], 3)
    assert matrix.counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert matrix.iou.tolist() == [1 / 2, 1 / 2, 1]
    assert matrix.miou == pytest.approx(2 / 3)
    assert matrix.accuracy == 3 / 4
    assert matrix.class_accuracy.tolist() == [1 / 2, 1, 1]


def test_absent_class_is_left_out_and_false_class_counts_zero():
    # Class 2 is predicted but never true, class 3 is neither.
    matrix = counted([0, 0, 1, 2], [0, 0, 1, 1], 4)
    assert matrix.iou[:3].tolist() == [1, 1 / 2, 0]
    assert matrix.iou[3].isnan()
    assert matrix.miou == pytest.approx(1.5 / 3)  # mmseg: class 2 counts as 0
    assert matrix.miou_present == pytest.approx(1.5 / 2)  # detectron2: class 2 is skipped


def test_predictions_on_ignored_pixels_count_nowhere():
    matrix = counted([1, 1, 0], [255, 255, 0], 2)
    assert matrix.counts.tolist() == [[1, 0], [0, 0]]
    assert matrix.miou == 1


def test_empty_matrix_has_undefined_scores():
    matrix = counted([0, 1], [255, 255], 2)
    scores = matrix.to_dict(["a", "b"])
    assert math.isnan(matrix.miou) and math.isnan(matrix.accuracy)
    assert scores["miou"] is scores["miou_present"] is scores["accuracy"] is None
    assert scores["pixels"] == 0


@pytest.mark.parametrize(("classes", "drawn"), [(2, 2), (11, 11), (150, 98), (255, 200)])
def test_against_torchmetrics(classes, drawn):
    generator = torch.Generator().manual_seed(classes)
    matrix = ConfusionMatrix(classes)
    oracle = MulticlassJaccardIndex(classes, ignore_index=255, average="macro")
    for height, width in [(37, 53), (64, 64), (1, 7)]:  # images of several sizes: one matrix, not a mean of means
        label = torch.randint(0, drawn, (height, width), generator=generator)
        noise = torch.randint(0, drawn, (height, width), generator=generator)
        pred = torch.where(torch.rand(height, width, generator=generator) < 0.7, label, noise)
        label[torch.rand(height, width, generator=generator) < 0.1] = 255
        matrix.update(pred[None], label.to(torch.uint8)[None])
        oracle.update(pred, label)
    # The oracle computes in float32: K terms of relative rounding 2^-24 each.
    assert matrix.miou == pytest.approx(oracle.compute().item(), rel=1e-5)


def test_counts_stay_exact_beyond_float32():
    matrix = ConfusionMatrix(2)
    matrix.counts[0, 0] = 2**40
    matrix.counts[0, 1] = 2**24
    matrix.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0]))
    assert matrix.counts.tolist() == [[2**40 + 1, 2**24 + 2], [0, 0]]
    expected = (2**40 + 1) / (2**40 + 1 + 2**24 + 2)
    assert matrix.iou.dtype == torch.float64
    assert matrix.iou[0].item() == expected  # in float32 the added pixels vanish
    assert torch.tensor(expected, dtype=torch.float32).item() != expected


@pytest.mark.parametrize(
    ("pred", "label", "message"),
    [
        ([0, 3], [0, 1], r"pred has values 3; classes are 0\.\.2"),
        ([0, -1], [0, 1], "pred has values -1"),
        ([0, 255], [0, 255], "pred has values 255"),
        ([0, 0], [3, 254], r"label has values 3, 254; classes are 0\.\.2 or 255"),
        ([0, 0], [-1, 0], "label has values -1"),
        ([0.0, 1.0], [0, 1], "pred must hold integers"),
        ([[0, 1]], [0, 1], "one shape"),
    ],
)
def test_refuses_what_it_cannot_count(pred, label, message):
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message):
        matrix.update(torch.tensor(pred), torch.tensor(label))
    assert matrix.counts.sum() == 0


@pytest.mark.parametrize("classes", [0, 256])
def test_refuses_a_number_of_classes_that_collides_with_the_ignored_label(classes):
    with pytest.raises(ValueError, match="classes"):
        ConfusionMatrix(classes)


def test_all_reduce_without_process_group_changes_nothing():
    matrix = counted([0, 1], [0, 0], 2)
    matrix.all_reduce()
    assert matrix.counts.tolist() == [[1, 1], [0, 0]]


def test_reports_agree(tmp_path):
    names = ["sky", "a long name, with a comma", "never"]
    matrix = counted([0, 0, 1, 1, 1], [0, 0, 1, 0, 255], 3)
    scores = json.loads(json.dumps(matrix.to_dict(names), allow_nan=False))
    assert [row["name"] for row in scores["classes"]] == names
    assert [row["iou"] for row in scores["classes"]] == [pytest.approx(2 / 3), pytest.approx(1 / 2), None]
    assert [row["pixels"] for row in scores["classes"]] == [3, 1, 0]
    assert [row["predicted"] for row in scores["classes"]] == [2, 2, 0]

    matrix.write_csv(tmp_path / "per_class.csv", names)
    with open(tmp_path / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == names
    assert float(rows[0]["iou"]) == pytest.approx(2 / 3) and rows[2]["iou"] == ""

    table = matrix.table(names).splitlines()
    assert len({len(line) for line in table[:6]}) == 1  # aligned
    assert "66.67" in table[2] and "50.00" in table[3] and table[4].split()[1:3] == ["-", "-"]
    assert "58.33" in table[6] and "75.00" in table[8]


def test_names_must_fit():
    with pytest.raises(ValueError, match="names"):
        ConfusionMatrix(3).table(["a", "b"])
