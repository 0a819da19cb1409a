"""What a run starts from: nothing, a checkpoint, or the weights of another run."""

import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from run_training import metrics, micro_recipe, same, write_data
from safetensors.torch import load_file

from fusekern.engine import checkpoint as checkpoints
from fusekern.engine.train import train
from fusekern.errors import FusekernError


def test_a_folder_with_something_in_it_is_refused(copy, data, tmp_path):
    with pytest.raises(FusekernError, match=r"is not empty \(it holds checkpoints, .*\): go on with --resume auto"):
        train(micro_recipe(data), out=copy)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    for resume, message in ((None, r"is not empty \(it holds a\.jpg\)"), ("auto", r"is not a run folder \(no config")):
        with pytest.raises(FusekernError, match=message):
            train(micro_recipe(data), out=tmp_path / "photos", resume=resume)
    with pytest.raises(FusekernError, match="is a file; the run folder cannot be made"):
        train(micro_recipe(data), out=tmp_path / "photos" / "a.jpg")


def test_a_failed_start_leaves_no_folder(data, tmp_path):
    with pytest.raises(FusekernError, match="neither a built-in data set"):
        train(micro_recipe(data, data__dataset="nowhere.yaml"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resume_refuses_what_alters_training_and_lists_it(copy, data):
    other = micro_recipe(data, optim__lr=0.02, train__steps=9, train__ema=0.9, data__crop=(64, 96), train__log_every=1)
    with pytest.raises(FusekernError) as caught:
        train(other, out=copy, resume="auto")
    message = str(caught.value)
    for part in (
        "optim.lr: 0.001 in the checkpoint, 0.02 now",
        "train.steps: 6 in the checkpoint, 9 now",
        "train.ema: None in the checkpoint, 0.9 now",
        "data.crop: [64, 64] in the checkpoint, [64, 96] now",
        "is from another recipe",
    ):
        assert part in message
    assert "log_every" not in message


def test_resume_of_a_run_without_checkpoint_begins_if_the_recipe_is_the_same(run, copy, data):
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(
        FusekernError, match=r"config\.yaml is from another recipe.*optim\.lr: 0\.001 in the checkpoint, 1"
    ):
        train(micro_recipe(data, optim__lr=1.0), out=copy, resume="auto")
    assert same(train(micro_recipe(data), out=copy, resume="auto"), checkpoints.find(run))
    assert [line["step"] for line in metrics(copy)] == [2, 4, 6, 6], "lines of the lost steps are gone"


def test_resume_in_an_empty_folder_begins(run, data, tmp_path):
    assert same(train(micro_recipe(data), out=tmp_path / "new", resume="auto"), checkpoints.find(run))


def test_resume_of_a_finished_run_does_nothing(run, data):
    before = metrics(run)
    assert train(micro_recipe(data), out=run, resume="auto") == checkpoints.find(run)
    assert metrics(run) == before


def test_resume_of_another_checkpoint_than_the_last_is_refused(run, data, tmp_path):
    first = run / "checkpoints" / "step-00000004"
    with pytest.raises(
        FusekernError, match="is not the last checkpoint of .*remove step-00000006 or name another --out"
    ):
        train(micro_recipe(data), out=run, resume=str(first))
    assert same(train(micro_recipe(data), out=tmp_path / "branch", resume=str(first)), checkpoints.find(run))
    with pytest.raises(FusekernError, match="holds another run than"):
        train(micro_recipe(data), out=tmp_path / "branch", resume=str(first))


def test_resume_refuses_other_data(tmp_path):
    root, out = write_data(tmp_path / "data"), tmp_path / "run"
    recipe = micro_recipe(root, train__steps=4, train__save_every=2)
    train(recipe, out=out)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    yaml_file, spec = root / "dataset.yaml", yaml.safe_load((root / "dataset.yaml").read_text())
    changes = (
        ({"names": ["left", "right", "below", "above"]}, "is made for 3 classes and the data set has 4"),
        ({"names": ["links", "right", "below"]}, "the data set areas has changed since, in names"),
        ({"ignore_index": 254}, "the data set areas has changed since, in ignore_index"),
    )
    for change, message in changes:
        yaml_file.write_text(yaml.safe_dump({**spec, **change}))
        with pytest.raises(FusekernError, match=message):
            train(recipe, out=out, resume="auto")
    yaml_file.write_text(yaml.safe_dump(spec))
    (root / "images" / "train" / "5.png").unlink()
    with pytest.raises(FusekernError, match="training images are not those of .*: 6 then, 5 now"):
        train(recipe, out=out, resume="auto")


def test_two_processes_cannot_train_in_one_folder(copy, data):
    """A lock of this process would not hinder itself, so another one holds it."""
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(copy / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FusekernError, match="another process is training in"):
            train(micro_recipe(data), out=copy, resume="auto")
        holder.kill()


# Initial weights.


@pytest.mark.parametrize("kind", ["run folder", "checkpoint", "file"])
def test_init_takes_the_weights_and_nothing_else(run, data, tmp_path, kind):
    last = checkpoints.find(run)
    source = {"run folder": run, "checkpoint": last, "file": last / "model.safetensors"}[kind]
    recipe = micro_recipe(data, train__steps=1, optim__lr=1e-30, text__prompt="{}")
    start, found = (
        load_file(last / "model.safetensors"),
        load_file(train(recipe, out=tmp_path / "run", init=str(source)) / "model.safetensors"),
    )
    for name in start:
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(start[name], found[name]), name


def test_init_of_another_number_of_classes_is_said_in_words(run, tmp_path):
    root = write_data(tmp_path / "data", names=["left", "right", "below", "above", "behind"])
    with pytest.raises(
        FusekernError, match="it is made for 3 classes and the data set has 5; .*head.classifier.weight"
    ):
        train(micro_recipe(root), out=tmp_path / "run", init=str(run))


def test_init_of_another_model_lists_what_does_not_fit(run, data, tmp_path):
    with pytest.raises(FusekernError, match=r"model\.safetensors does not fit the model: .* and \d+ more"):
        train(micro_recipe(data, model__head__channels=24), out=tmp_path / "run", init=str(run))
    torch.save({}, tmp_path / "weights.pth")
    with pytest.raises(FusekernError, match=r"weights\.pth is a pickle .*refused"):
        train(micro_recipe(data), out=tmp_path / "run", init=str(tmp_path / "weights.pth"))
    with pytest.raises(FusekernError, match="no such file; a safetensors file, a checkpoint folder or a run folder"):
        train(micro_recipe(data), out=tmp_path / "run", init=str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(FusekernError, match="--resume and --init exclude each other"):
        train(micro_recipe(data), out=tmp_path / "run", init=str(run), resume="auto")
    assert not (tmp_path / "run").exists()


def test_a_small_backbone_rate_is_kept_by_a_resumed_run_though_init_is_gone(run, data, tmp_path):
    recipe, out = micro_recipe(data, train__steps=2, train__save_every=1), tmp_path / "run"
    whole = train(recipe, out=out, init=str(run))
    assert checkpoints.load(whole).state["backbone_mult"] == 0.1
    half = shutil.copytree(out, tmp_path / "half")
    shutil.rmtree(half / "checkpoints" / whole.name)
    assert same(train(recipe, out=half, resume="auto"), whole)
