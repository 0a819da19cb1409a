"""The command line as a user meets it: one small run through every verb, and what bad input says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import fusekern
from fusekern import recipes
from fusekern.cli import VERBS, main
from fusekern.data.scenes import write_scenes
from fusekern.data.spec import load_spec

TINY = [
    *("--model.backbone.name", "mobilenetv2_035", "--model.backbone.output_stride", "16"),
    *("--model.guidance.channels", "32", "--model.guidance.blocks", "1", "--text.width", "32"),
    *("--model.head.neck_channels", "16", "--model.head.channels", "16"),
    *("--data.scale", "[128, 96]", "--eval.scale", "[128, 96]", "--data.crop", "[96, 96]", "--data.workers", "0"),
    *(
        "--train.steps",
        "3",
        "--train.batch",
        "2",
        "--train.log_every",
        "1",
        "--train.save_every",
        "1",
        "--optim.warmup",
        "0",
    ),
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, images=(6, 3), size=(96, 128), seed=0)
    return root


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "demo"
    assert main(["train", "demo", *TINY, "--data.root", str(scenes), "--out", str(out)]) == 0
    return out


def error_of(capsys, *argv):
    assert main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fusekern: error: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_train_leaves_a_whole_run_folder(run):
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "metrics.jsonl", "log", "checkpoints"}
    assert recipes.from_dict(yaml.safe_load((run / "config.yaml").read_text())).train.steps == 3
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3]


def test_train_refuses_a_folder_in_use_and_goes_on_with_resume(run, scenes, capsys):
    arguments = ["train", "demo", *TINY, "--data.root", str(scenes), "--out", str(run)]
    assert "--resume auto" in error_of(capsys, *arguments)
    last = run / "checkpoints" / "step-00000003"
    before = (last / "model.safetensors").read_bytes()
    shutil.rmtree(last)
    assert main([*arguments, "--resume", "auto"]) == 0
    assert (last / "model.safetensors").read_bytes() == before


def test_eval_prints_the_table_and_says_that_there_is_no_language(run, scenes, tmp_path, capsys):
    assert main(["eval", str(run), "--baseline", "--out", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "results.json").read_text())
    assert "no language prior" in printed
    assert f"{100 * report['miou']:.2f}" in printed
    assert "colour alone" in printed
    assert report["images"] == 3
    assert report["language_prior"] is False
    assert {"results.json", "per_class.csv", "confusion.png"} <= {path.name for path in (tmp_path / "report").iterdir()}


def test_eval_takes_eval_options_and_no_training_options(run, tmp_path, capsys):
    slide = ["--eval.mode", "slide", "--eval.crop", "[64, 64]", "--eval.stride", "[48, 48]"]
    assert main(["eval", str(run), *slide, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["protocol"]["mode"] == "slide"
    capsys.readouterr()
    assert "unknown option --train.steps" in error_of(capsys, "eval", run, "--train.steps", 3)


def test_what_is_missing_is_called_as_the_usage_calls_it(capsys):
    assert "required: RUN|CHECKPOINT, INPUT, --out\n" in error_of(capsys, "predict")
    assert "required: RECIPE\n" in error_of(capsys, "train")


def test_predict_writes_labels_and_overlays(run, scenes, tmp_path, capsys):
    assert main(["predict", str(run), str(scenes / "images" / "validation"), "--out", str(tmp_path)]) == 0
    labels = sorted((tmp_path / "labels").iterdir())
    assert len(labels) == len(list((tmp_path / "overlays").iterdir())) == 3
    assert np.asarray(Image.open(labels[0])).min() >= 1  # 0 is void in the scenes' own ids


def test_a_data_set_is_told_from_a_recipe(tmp_path, capsys):
    path = tmp_path / "streets.yaml"
    path.write_text("names: [road]\ntrain: {images: '*.jpg', labels: '{stem}.png'}\n")
    assert "is a data set, not a recipe: give it as --data.dataset" in error_of(capsys, "train", path)
    assert "no built-in data set; did you mean demo?" in error_of(capsys, "check-data", "demoo")
    assert "no built-in data set: " in error_of(capsys, "check-data", "zzzzzz")


def test_predictions_are_not_written_over_other_files(run, scenes, tmp_path, capsys):
    image = next((scenes / "images" / "validation").iterdir())
    mine = tmp_path / "labels" / f"{image.stem}.png"
    mine.parent.mkdir()
    mine.write_bytes(b"drawn by hand")
    assert "is there already (1 such files)" in error_of(capsys, "predict", run, image, "--out", tmp_path)
    assert mine.read_bytes() == b"drawn by hand" and not (tmp_path / "overlays").exists()
    for _ in range(2):
        assert main(["predict", str(run), str(image), "--out", str(tmp_path / "new")]) == 0
    assert json.loads((tmp_path / "new" / "predictions.json").read_text())["dataset"] == "scenes"


def test_a_report_or_prediction_that_cannot_be_written_is_said(run, scenes, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    assert "taken" in error_of(capsys, "eval", run, "--out", taken)
    image = next((scenes / "images" / "validation").iterdir())
    assert "taken" in error_of(capsys, "predict", run, image, "--out", taken / "below")
    assert taken.read_text() == "a file"


def test_a_protocol_out_of_range_is_named(run, capsys):
    assert "eval.scale is (0, 0); it must be 1 or more" in error_of(capsys, "eval", run, "--eval.scale", "[0, 0]")


def test_check_data_passes_good_data_and_fails_on_bad(scenes, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["check-data", "demo", "--data.root", str(scenes), "--out", str(sheet)]) == 0
    assert Image.open(sheet).size[0] > 100
    broken = tmp_path / "scenes"
    write_scenes(broken, images=(2, 1), size=(96, 96), seed=0)
    victim = next((broken / "images" / "training").iterdir())
    victim.write_bytes(victim.read_bytes()[:200])
    assert main(["check-data", "demo", "--data.root", str(broken), "--out", str(sheet)]) == 2
    assert victim.name in capsys.readouterr().out


def test_check_data_reads_a_recipe_of_the_user_or_a_data_set(scenes, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"data: {{dataset: scenes, root: {scenes}}}")
    assert main(["check-data", str(recipe), "--out", str(tmp_path / "sheet.png")]) == 0
    data = tmp_path / "data.yaml"
    split = "{{images: 'images/{0}/*.jpg', labels: 'annotations/{0}/{{stem}}.png'}}"
    names = ", ".join(load_spec("scenes").names)
    data.write_text(
        f"root: {scenes}\nreduce_zero_label: true\nnames: [{names}]\n"
        f"train: {split.format('training')}\nval: {split.format('validation')}\n"
    )
    assert main(["check-data", str(data), "--out", str(tmp_path / "sheet.png")]) == 0


def test_a_run_is_named_after_its_whole_recipe(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr("fusekern.engine.train.train", lambda recipe, out, resume, init: seen.append(Path(out)))
    Path("my.v2.yaml").write_text("train: {steps: 3}")
    for name in ("camvid/mobilenetv2-fpn", "my.v2.yaml"):
        assert main(["train", name]) == 0
    assert seen == [Path("runs/camvid/mobilenetv2-fpn"), Path("runs/my.v2")]


def test_flops_prints_json(capsys):
    assert main(["flops", "demo", "--size", "192", "--json"]) == 0
    small = json.loads(capsys.readouterr().out)
    assert main(["flops", "demo", "--size", "[192, 384]", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["neck"] == 2 * small["parts"]["neck"]


def test_print_config_prints_the_resolved_recipe(capsys):
    assert main(["train", "demo", "--train.steps", "5", "--print_config"]) == 0
    printed = recipes.from_dict(yaml.safe_load(capsys.readouterr().out))
    assert printed == recipes.load("demo", "--train.steps", "5")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "did you mean train?"),
        (["train", "dem"], "did you mean demo?"),
        (["train", "demo", "--train.stepz", "3"], "did you mean --train.steps?"),
        (["eval", "nowhere"], "nowhere"),
        (["predict", "nowhere", "x.png", "--out", "y"], "nowhere"),
        (["train", "camvid/mobilenetv2-fpn", "--out", "unused"], "data.root"),
    ],
)
def test_bad_arguments_are_named(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_verb_and_each_verb_explains_itself(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in printed
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert f"fusekern {verb}" in capsys.readouterr().out


def test_says_its_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fusekern {fusekern.__version__}\n"


@pytest.mark.parametrize("word", ["--help", "--version", "info"])
def test_a_reader_that_has_seen_enough_is_no_error(word):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "fusekern", word], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_python_m_fusekern_returns_the_exit_code():
    done = subprocess.run([sys.executable, "-m", "fusekern", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown verb" in done.stderr
