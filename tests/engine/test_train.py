import errno
import io
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import write_data
from run_training import micro_recipe
from safetensors.torch import load_file

from fusekern import recipes
from fusekern.data.folder import SegmentationFolder
from fusekern.data.sampler import draws
from fusekern.data.spec import load_spec
from fusekern.engine import assemble, reports, run_folder, signals
from fusekern.engine import checkpoint as checkpoints
from fusekern.engine import train as training
from fusekern.engine.signals import Interrupted, StopSignals
from fusekern.engine.train import train
from fusekern.errors import FusekernError
from fusekern.models.segmenter import Segmenter


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, byte for byte."""
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(names) >= 3 and names == sorted(path.name for path in other.glob("*.safetensors"))
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run of six steps."""
    out = tmp_path_factory.mktemp("train") / "run"
    recipe = micro_recipe(data, train__eval_every=4)
    assert train(recipe, out=out) == out / "checkpoints" / "step-00000006"
    return out


@pytest.fixture
def copy(run, tmp_path):
    """The run as it was after four steps: another one may go on from there."""
    out = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    return out


def test_a_run_folder_holds_all_of_it(run, data):
    assert sorted(path.name for path in run.iterdir() if not path.name.startswith(".")) == [
        "checkpoints",
        "config.yaml",
        "log",
        "metrics.jsonl",
        "tensorboard",
    ]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    config = recipes.from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    assert config == micro_recipe(data, train__eval_every=4)
    assert any((run / "tensorboard").iterdir())


def test_metrics_hold_losses_rates_and_scores(run):
    lines = metrics(run)
    assert [line["step"] for line in lines] == [2, 4, 4, 6, 6]
    for line in (line for line in lines if "loss" in line):
        assert line["loss"] == pytest.approx(line["decode"] + line["aux"])
        assert line["images_per_second"] > 0 and line["grad_norm"] > 0 and -1 <= line["token_cosine"] <= 1
    assert [line["lr"] for line in lines if "lr" in line] == [
        # steps 1, 3 and 5 were taken at base 1e-3, min_lr 1e-6, warm-up over 2 steps from a factor of 1e-6
        pytest.approx((999e-6 * (5 / 6) ** 0.9 + 1e-6) * (1e-6 + (1 - 1e-6) / 2)),
        pytest.approx(999e-6 * (3 / 6) ** 0.9 + 1e-6),
        pytest.approx(999e-6 * (1 / 6) ** 0.9 + 1e-6),
    ]
    for line in (line for line in lines if "miou" in line):
        assert 0 <= line["miou"] <= 1 and line["weights"] == "model" and line["language_prior"] is False
    score = checkpoints.load(run).state["score"]
    assert score["last"] == lines[-1]["miou"]
    assert score["best"] == max(line["miou"] for line in lines if "miou" in line)


def test_every_line_with_a_score_says_that_hashed_text_has_no_language_prior(run):
    scored = [line for line in (run / "log").read_text().splitlines() if "mIoU" in line]
    assert len(scored) == 3, "two evaluations, and the losses after the first"
    assert all("(no language prior)" in line for line in scored)


def test_a_model_without_text_has_no_such_note_and_no_cosine(data, tmp_path):
    train(micro_recipe(data, model__guidance__kind="none", train__steps=2), out=tmp_path / "run")
    assert "no language prior" not in (tmp_path / "run" / "log").read_text()
    assert "token_cosine" not in metrics(tmp_path / "run")[0]
    assert metrics(tmp_path / "run")[-1]["language_prior"] is None


def test_training_learns(data, tmp_path):
    recipe = micro_recipe(data, train__steps=40, optim__lr=1e-2, data__ratio=(1.0, 1.0), data__photometric=False)
    train(recipe, out=tmp_path / "run")
    # measured 0.88 and, without clipping, 0.83; a model that has learnt nothing has 0.28
    assert metrics(tmp_path / "run")[-1]["miou"] > 0.6


def test_how_often_it_reports_and_loads_does_not_change_the_weights(run, data, tmp_path):
    other = micro_recipe(data, train__eval_every=1, train__log_every=1, train__save_every=0, data__workers=2)
    assert same(train(other, out=tmp_path / "run"), checkpoints.find(run))


def test_another_seed_changes_the_weights(run, data, tmp_path):
    assert not same(train(micro_recipe(data, train__seed=1), out=tmp_path / "run"), checkpoints.find(run))


def test_accumulation_averages_the_rounds(data, tmp_path, monkeypatch):
    """Without batch statistics and dropout, two rounds of two images have nearly the gradient of one of four."""
    place = assemble.place
    monkeypatch.setattr(assemble, "place", lambda model, accelerator: place(model, accelerator).eval())
    settings = {"optim__name": "sgd", "optim__clip": None, "optim__momentum": 0.0, "optim__warmup": 0}
    settings |= {"train__steps": 1, "data__ratio": (1.0, 1.0)}

    def weights(name: str, **more) -> dict:
        path = train(micro_recipe(data, **settings, **more), out=tmp_path / name)
        return load_file(path / "model.safetensors")

    start = weights("start", optim__lr=1e-30)
    one, two = weights("one", optim__lr=0.1), weights("two", optim__lr=0.1, train__accumulate=2)
    moved = max((one[name] - start[name]).abs().max() for name in one)
    apart = max((one[name] - two[name]).abs().max() for name in one)
    # a sum in place of the mean would put them `moved` apart; void pixels, 1 in 16 rows, weigh a little differently
    assert moved > 1e-3 and apart < 0.1 * moved


def test_a_data_set_without_validation_split_is_not_evaluated(tmp_path):
    root = write_data(tmp_path / "data")
    spec = yaml.safe_load((root / "dataset.yaml").read_text())
    del spec["val"]
    (root / "dataset.yaml").write_text(yaml.safe_dump(spec))
    train(micro_recipe(root, train__steps=1), out=tmp_path / "run")
    assert "no val split, so no evaluation" in (tmp_path / "run" / "log").read_text()
    assert not any("miou" in line for line in metrics(tmp_path / "run"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_one_bar_with_everything(data, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    train(micro_recipe(data, train__steps=3, train__log_every=1, train__eval_every=1), out=tmp_path / "run")
    last = terminal.getvalue().split("\r")[-1]
    for part in ("3/3", "loss ", "mIoU ", "(no language prior)", "lr ", "img/s"):
        assert part in last, last


# What a run starts from.


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


# Bad settings and bad luck.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__steps": 0}, "train.steps is 0; it must be 1 or more"),
        ({"train__keep": 0}, "train.keep is 0; it must be 1 or more"),
        ({"train__save_every": -1}, "train.save_every is -1; it must be 0 or more"),
        ({"eval__weights": "ema"}, "eval.weights is ema, but train.ema is off"),
        ({"train__accumulate": 3}, "train.batch 4 is the global batch: it must be a multiple of 3"),
    ],
)
def test_bad_settings_are_named(data, tmp_path, settings, message):
    with pytest.raises(FusekernError, match=message):
        train(micro_recipe(data, **settings), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fp16_needs_cuda(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        FusekernError, match="train.precision fp16 needs CUDA, and there is none here: use bf16 or fp32"
    ):
        train(micro_recipe(data, train__precision="fp16"), out=tmp_path / "run")


def test_a_warm_up_longer_than_the_run_is_warned_about(data, tmp_path, caplog):
    train(micro_recipe(data, train__steps=1, optim__warmup=1500), out=tmp_path / "run")
    assert "optim.warmup 1500 is not below train.steps 1" in caplog.text


def test_a_warning_from_before_the_log_file_is_in_it(data, tmp_path):
    train(micro_recipe(data, train__steps=1, optim__backbone_lr_mult=0.1), out=tmp_path / "run")
    first = (tmp_path / "run" / "log").read_text().splitlines()[0]
    assert "WARNING optim.backbone_lr_mult is 0.1 on a backbone of random weights" in first


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change(data, tmp_path, monkeypatch):
    calls, loss = [], Segmenter.loss

    def broken(self, output, label):
        calls.append(1)
        losses = loss(self, output, label)
        return {**losses, "decode": losses["decode"] * float("nan")} if len(calls) == 6 else losses

    monkeypatch.setattr(Segmenter, "loss", broken)
    recipe = micro_recipe(data, train__accumulate=2, train__save_every=1)
    with pytest.raises(FusekernError) as caught:
        train(recipe, out=tmp_path / "run")
    message = str(caught.value)
    folder = SegmentationFolder(load_spec(recipe.data.dataset), "train")
    names = [folder.names[index] for index in draws(len(folder), batch=4, seed=0, step=2)[2:]]
    assert message.startswith("step 3: the loss is not finite: decode nan, aux ")
    assert f"on the images {', '.join(names)}. The step changed no weight" in message
    last = checkpoints.load(tmp_path / "run")
    assert last.state["step"] == 2
    assert all(tensor.isfinite().all() for tensor in last.model.values() if tensor.is_floating_point())


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, monkeypatch):
    update = training._Run._update

    def poison(self):
        norm = update(self)
        if self.step == 2:
            self.model.head.classifier.bias.data[0] = float("inf")
        return norm

    monkeypatch.setattr(training._Run, "_update", poison)
    with pytest.raises(FusekernError, match="after step 2 weights are not finite, so they are not saved"):
        train(micro_recipe(data, train__save_every=1), out=tmp_path / "run")
    assert checkpoints.load(tmp_path / "run").state["step"] == 1


def test_metrics_stay_json_when_a_number_is_not_finite(tmp_path):
    run_folder.append_metrics(tmp_path, {"step": 1, "grad_norm": float("inf"), "loss": 0.5})
    assert metrics(tmp_path) == [{"step": 1, "grad_norm": None, "loss": 0.5}]
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()


def test_no_space_left_stops_the_run_and_it_goes_on_later(run, copy, data):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = checkpoints.find(copy)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # the model has 1.3 MB
    try:
        with pytest.raises(FusekernError, match="step 6 could not be saved .*no space left .*step-00000004 before it"):
            train(micro_recipe(data), out=copy, resume="auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (copy / "checkpoints").iterdir()] == [before.name]
    assert same(train(micro_recipe(data), out=copy, resume="auto"), checkpoints.find(run))


def test_no_space_left_for_the_metrics_is_said_too(data, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(reports, "append_metrics", full)
    with pytest.raises(
        FusekernError, match=r"no space left \(.*metrics\.jsonl.*make room and go on with --resume auto"
    ):
        train(micro_recipe(data), out=tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_from_there(run, data, tmp_path, monkeypatch, number):
    update = training._Run._update

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), number)
        return update(self)

    monkeypatch.setattr(training._Run, "_update", interrupted)
    before, out = signal.getsignal(number), tmp_path / "run"
    with pytest.raises(
        Interrupted, match="interrupted at step 4; saved .*step-00000004; continue with --resume auto"
    ) as e:
        train(micro_recipe(data, train__save_every=0), out=out)
    assert (e.value.step, e.value.checkpoint) == (4, checkpoints.find(out)), "seen by the step after it"
    assert signal.getsignal(number) == before
    assert same(train(micro_recipe(data), out=out, resume="auto"), checkpoints.find(run))


def test_a_second_ctrl_c_quits_at_once_but_not_the_echo_of_the_first(monkeypatch):
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)  # within the second
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(signals, "_ECHO", 0.0)
        os.kill(os.getpid(), signal.SIGINT)


def test_the_callers_logging_is_as_before(data, tmp_path):
    logger = logging.getLogger("fusekern")
    before = (logger.level, list(logger.handlers), logger.propagate)
    train(micro_recipe(data, train__steps=1), out=tmp_path / "run")
    assert (logger.level, list(logger.handlers), logger.propagate) == before
