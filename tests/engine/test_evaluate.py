"""The test protocol against a direct computation, the loop, and the report on a checkpoint."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from toys import CLASSES, Fake, samples, save_checkpoint

from fusekern.config import EvalConfig
from fusekern.data.folder import Sample, SegmentationFolder
from fusekern.data.scenes import write_scenes
from fusekern.data.spec import load_spec
from fusekern.data.transforms import resize_for_test
from fusekern.engine.evaluate import evaluate, evaluate_checkpoint
from fusekern.engine.histogram import histogram_baseline
from fusekern.engine.metrics import ConfusionMatrix
from fusekern.errors import FusekernError

CONFIG = EvalConfig(scale=(64, 32))


def test_matrix_is_that_of_the_resized_logits():
    model, data = Fake(), samples(4)
    expected = ConfusionMatrix(CLASSES)
    with torch.no_grad():
        for image, label, _ in data:
            size = label.shape
            factor = min(64 / max(size), 32 / min(size))
            fitted = [int(side * factor + 0.5) for side in size]
            resized = resize_for_test(image, (64, 32))
            assert list(resized.shape[1:]) == fitted
            logits = F.interpolate(model.eval()(resized[None]).logits, size, mode="bilinear", align_corners=False)
            expected.update(logits.argmax(1)[0], label)
    found = evaluate(model, data, CONFIG, device="cpu").counts
    assert found.sum() == sum((sample.label != 255).sum() for sample in data)
    # Logits within float32 rounding of each other may swap: a pixel or two of 3647.
    assert (found - expected.counts).abs().sum() <= 4


def test_leaves_the_model_and_the_random_state_alone():
    model = nn.Sequential(Fake())
    model.train()
    model[0].conv.eval()  # frozen by its owner
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = evaluate(model, samples(2), CONFIG, device="cpu")
    assert model.training and model[0].training and model[0].noise.training and not model[0].conv.training
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    assert torch.equal(first.counts, evaluate(model, samples(2), CONFIG, device="cpu").counts)  # dropout was off


def test_training_flags_return_after_an_error():
    model = Fake(classes=CLASSES + 3).train()
    model.conv.bias.data[-1] = 100
    with pytest.raises(ValueError, match="pred has values 7"):
        evaluate(model, samples(1), CONFIG, device="cpu")
    assert model.training and model.noise.training


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_cover_every_image_once(world):
    model, data = Fake(), samples(5)
    shares = [evaluate(model, data, CONFIG, device="cpu", rank=rank, world=world).counts for rank in range(world)]
    assert torch.equal(sum(shares), evaluate(model, data, CONFIG, device="cpu").counts)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, images=(3, 5), size=(96, 128), seed=0)
    return root


def test_report(scenes, tmp_path, capsys):
    model = save_checkpoint(tmp_path, scenes)["ema"]
    report = evaluate_checkpoint(tmp_path, baseline=True)
    stored = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert stored == json.loads(json.dumps(report))
    names = load_spec("scenes").names
    folder = SegmentationFolder(load_spec("scenes"), "val", scenes)
    matrix = evaluate(model, folder, EvalConfig(scale=(256, 192)), device="cpu")
    assert stored["miou"] == matrix.miou and stored["accuracy"] == matrix.accuracy
    assert stored["images"] == 5 and stored["step"] == 300 and stored["weights"] == "ema" and stored["split"] == "val"
    assert stored["protocol"]["scale"] == [256, 192] and stored["language_prior"] is False
    assert stored["checkpoint"] == str(tmp_path / "checkpoints" / "step-00000300")
    train = SegmentationFolder(load_spec("scenes"), "train", scenes)
    assert stored["baseline"]["miou"] == histogram_baseline(train, folder, len(names)).miou
    with open(tmp_path / "eval" / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(names) and {row["note"] for row in rows} == {"no language prior"}
    with open(tmp_path / "eval" / "confusion.csv", newline="") as file:
        (_, *predicted), *rows = csv.reader(file)
    assert predicted == list(names) == [row[0] for row in rows]
    assert [[int(cell) for cell in row[1:]] for row in rows] == matrix.counts.tolist()
    assert min(Image.open(tmp_path / "eval" / "confusion.png").size) > 300
    printed = capsys.readouterr().out
    assert "EMA weights" in printed and "whole image, fitted into 256x192, times 1.0, no flip, fp32" in printed
    scores = [line for line in printed.splitlines() if line.startswith(("text", "class", "mIoU", "pixel"))]
    assert len(scores) == 5 and all("no language prior" in line for line in scores)
    assert "colour alone" in printed and f"{100 * matrix.miou:.2f}" in printed


@pytest.mark.parametrize(("source", "kind"), [("file text.npy", "convformer"), (None, "none")])
def test_only_hashed_text_is_said_to_lack_a_prior(source, kind, scenes, tmp_path, capsys):
    save_checkpoint(tmp_path, scenes, source=source, kind=kind)
    report = evaluate_checkpoint(tmp_path, out=tmp_path / "elsewhere")
    assert report["language_prior"] is (source is not None) and report["text"] == source
    assert "no language prior" not in capsys.readouterr().out
    assert "note" not in (tmp_path / "elsewhere" / "per_class.csv").read_text()


def test_says_which_weights_were_used(scenes, tmp_path, capsys):
    models = save_checkpoint(tmp_path, scenes, kind="none", weights="model")
    folder = SegmentationFolder(load_spec("scenes"), "val", scenes)
    config = EvalConfig(scale=(256, 192))
    expected = {name: evaluate(model, folder, config, device="cpu").miou for name, model in models.items()}
    assert expected["model"] != expected["ema"]
    for override, used in [(None, "model"), (config, "ema"), (EvalConfig(scale=(256, 192), weights="model"), "model")]:
        report = evaluate_checkpoint(tmp_path, config=override)
        assert report["weights"] == used and report["miou"] == expected[used]
        assert ("not EMA" in capsys.readouterr().out) is (used == "model")


def test_protocol_and_root_can_be_overridden(scenes, tmp_path, capsys):
    save_checkpoint(tmp_path, tmp_path / "gone", kind="none")
    config = EvalConfig(
        mode="slide", scale=(256, 192), crop=(128, 128), stride=(64, 96), ratios=(0.5, 1.0), flip=True, precision="bf16"
    )
    report = evaluate_checkpoint(tmp_path, config=config, root=str(scenes), split="train")
    assert report["images"] == 3 and report["protocol"]["mode"] == "slide"
    protocol = "windows of 128x128 every 64x96 pixels, fitted into 256x192, times 0.5, 1.0, flip, bf16"
    assert protocol in capsys.readouterr().out
    with pytest.raises(FusekernError, match="gone"):
        evaluate_checkpoint(tmp_path)


def test_refuses_another_number_of_classes(scenes, tmp_path):
    save_checkpoint(tmp_path, scenes, kind="none")
    other = tmp_path / "other.yaml"
    other.write_text("names: [a, b]\nval: {images: images/*.jpg, labels: 'labels/{stem}.png'}\n")
    with pytest.raises(FusekernError, match=r"made for 11 classes, but the data set 'other' has 2"):
        evaluate_checkpoint(tmp_path, dataset=str(other))


def test_refuses_classes_in_another_order(scenes, tmp_path):
    save_checkpoint(tmp_path, scenes, kind="none")
    names = ", ".join(reversed(load_spec("scenes").names))
    other = tmp_path / "other.yaml"
    other.write_text(f"names: [{names}]\nval: {{images: images/*.jpg, labels: 'labels/{{stem}}.png'}}\n")
    with pytest.raises(FusekernError, match=r"'ball' is class 10 of the checkpoint and 0 of the data set"):
        evaluate_checkpoint(tmp_path, dataset=str(other))


def test_another_data_set_brings_its_own_root(scenes, tmp_path, capsys):
    save_checkpoint(tmp_path, tmp_path / "gone", kind="none")
    other = tmp_path / "other.yaml"
    parts = "images: 'images/validation/*.jpg', labels: 'annotations/validation/{stem}.png'"
    names = ", ".join(f"class {k}" for k in range(11))
    other.write_text(f"names: [{names}]\nroot: {scenes}\nreduce_zero_label: true\nval: {{{parts}}}\n")
    report = evaluate_checkpoint(tmp_path, dataset=str(other))
    assert report["dataset"] == "other" and report["images"] == 5 and report["classes"][10]["name"] == "class 10"
    assert "11 classes had other names in training: 'class 0' was 'sky', " in capsys.readouterr().out
    assert (tmp_path / "eval-other" / "results.json").is_file() and not (tmp_path / "eval").exists()
    with pytest.raises(FusekernError, match="'other' has no split 'train'"):
        evaluate_checkpoint(tmp_path, dataset=str(other), baseline=True)
    assert capsys.readouterr().out == ""  # told before the evaluation, not after it


TORCHRUN = """
import json, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import torch.distributed as dist
from fusekern.engine.evaluate import evaluate, evaluate_checkpoint
from test_evaluate import CONFIG
from toys import Fake, samples

run = Path({run!r})
evaluate_checkpoint(run)
reductions, reduce = [], dist.all_reduce
dist.all_reduce = lambda *args, **options: (reductions.append(1), reduce(*args, **options))
matrix = evaluate(Fake(), samples(5), CONFIG, device="cpu", rank=dist.get_rank(), world=dist.get_world_size())
(run / f"rank{{dist.get_rank()}}.json").write_text(json.dumps([matrix.counts.tolist(), len(reductions)]))
dist.destroy_process_group()
"""


def test_two_processes_equal_one(scenes, tmp_path):
    model = save_checkpoint(tmp_path, scenes, kind="none")["ema"]
    (tmp_path / "both.py").write_text(TORCHRUN.format(folder=os.path.dirname(__file__), run=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(tmp_path / "both.py")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # Five images: a sampler that pads would count one twice.
    expected = evaluate(Fake(), samples(5), CONFIG, device="cpu").counts.tolist()
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == [expected, 1]
    report = json.loads((tmp_path / "eval" / "results.json").read_text())
    folder = SegmentationFolder(load_spec("scenes"), "val", scenes)
    matrix = evaluate(model, folder, EvalConfig(scale=(256, 192)), device="cpu")
    assert report["processes"] == 2 and done.stdout.count("pixel accuracy") == 1
    assert report["pixels"] == matrix.counts.sum() and report["miou"] == matrix.miou


def test_histogram_baseline_by_hand():
    def sample(colours, labels):
        image = torch.tensor(colours, dtype=torch.uint8).T[:, None]
        return Sample(image, torch.tensor([labels], dtype=torch.uint8), "x")

    red, dark_red, blue, unseen, tie = (250, 0, 0), (240, 15, 15), (0, 0, 250), (0, 250, 0), (99, 99, 99)
    train = [
        sample([red, red, red, blue, blue, blue], [0, 0, 1, 2, 2, 255]),
        sample([blue, tie, tie], [2, 0, 2]),
    ]
    val = [sample([dark_red, blue, unseen, tie, red], [0, 2, 2, 2, 255])]
    matrix = histogram_baseline(train, val, 4)
    # Class 2 has most pixels (4 of 8 counted): it takes the unseen colour and the tie.
    assert matrix.counts.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]]
