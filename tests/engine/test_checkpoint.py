import dataclasses
import json
import pickle
import resource
import shutil

import pytest
import torch
from run_training import micro_recipe
from torch import nn

from fusekern import recipes
from fusekern.backends import BACKENDS
from fusekern.data.spec import DatasetSpec, load_spec
from fusekern.engine import checkpoint as checkpoints
from fusekern.engine.optim import load_optimizer, optimizer_tensors
from fusekern.engine.predict import load_for_test
from fusekern.engine.train import train
from fusekern.errors import FusekernError

STATE = {
    "world": 1,
    "device": "cpu",
    "threads": 1,
    "versions": {},
    "recipe": {},
    "backbone_mult": 1.0,
    "dataset": {},
    "images": {},
    "text": None,
    "score": {},
    "scaler": None,
}


def save(run, step, *, keep=3, scale=1.0):
    tensors = {
        "model": {"weight": torch.full((8, 3, 2, 2), scale).to(memory_format=torch.channels_last)},
        "optimizer": {"weight::exp_avg": torch.arange(3.0), "weight::step": torch.tensor(float(step))},
        "rng": {"rank0.cpu": torch.arange(5, dtype=torch.uint8)},
    }
    return checkpoints.save(run, step, state=STATE, tensors=tensors, keep=keep)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run with a moving average."""
    out = tmp_path_factory.mktemp("run") / "run"
    train(micro_recipe(data, train__steps=2, train__ema=0.5), out=out)
    return out


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path, 7, scale=2.0)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    found = checkpoints.load(tmp_path)
    assert found.state["step"] == 7 and found.ema is None
    assert torch.equal(found.model["weight"], torch.full((8, 3, 2, 2), 2.0))
    assert torch.equal(found.optimizer["weight::exp_avg"], torch.arange(3.0))
    assert torch.equal(found.rng["rank0.cpu"], torch.arange(5, dtype=torch.uint8))


def test_only_the_last_are_kept_and_leftovers_are_swept(tmp_path):
    for step in (1, 2, 10, 11):
        save(tmp_path, step, keep=2)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000010", "step-00000011"]
    (folder / ".tmp-step-00000012").mkdir()
    (folder / ".old-step-00000009").mkdir()
    assert checkpoints.find(tmp_path).name == "step-00000011"
    checkpoints.sweep(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000010", "step-00000011"]


def test_no_space_left_keeps_the_checkpoint_before(tmp_path):
    before = save(tmp_path, 1)
    files = {path.name: path.read_bytes() for path in before.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(FusekernError, match=r"step 2 could not be saved .* no space left .*step-00000001 before"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert {path.name: path.read_bytes() for path in before.iterdir()} == files


@pytest.mark.parametrize("name", [*checkpoints.REQUIRED, "ema.safetensors"])
def test_a_file_cut_short_is_named(run, tmp_path, name):
    broken = shutil.copytree(checkpoints.find(run), tmp_path / "step-00000002")
    data = (broken / name).read_bytes()
    for length in (0, 5, len(data) // 2, len(data) - 1):
        (broken / name).write_bytes(data[:length])
        with pytest.raises(FusekernError, match=rf"{name} is cut short or damaged"):
            checkpoints.load(broken)


@pytest.mark.parametrize("name", checkpoints.REQUIRED)
def test_a_missing_file_is_named(run, tmp_path, name):
    broken = shutil.copytree(checkpoints.find(run), tmp_path / "step-00000002")
    (broken / name).unlink()
    with pytest.raises(FusekernError, match=f"no whole checkpoint: it lacks {name}"):
        checkpoints.load(broken)


def test_another_format_and_missing_keys_are_refused(tmp_path):
    path = save(tmp_path, 1) / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(FusekernError, match="found checkpoint format 99, this version reads format 1"):
        checkpoints.load(tmp_path)
    path.write_text(json.dumps([1]))
    with pytest.raises(FusekernError, match="found checkpoint format list"):
        checkpoints.load(tmp_path)
    path.write_text(json.dumps({key: value for key, value in state.items() if key not in ("recipe", "text")}))
    with pytest.raises(FusekernError, match=r"state\.json lacks recipe, text"):
        checkpoints.load(tmp_path)


def test_resolve_says_what_it_found(run, tmp_path):
    last = checkpoints.find(run)
    assert checkpoints.resolve(run) == checkpoints.resolve(last) == last
    with pytest.raises(FusekernError, match="no such folder; a run folder or a checkpoint folder is needed"):
        checkpoints.resolve(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FusekernError, match=r"holds no checkpoint: found notes\.txt; looked for checkpoints/step-\*"):
        checkpoints.resolve(tmp_path)
    with pytest.raises(FusekernError, match=r"is a file, not a run folder or a checkpoint folder; .*02 is one"):
        checkpoints.resolve(last / "model.safetensors")


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_whatever_its_name(tmp_path, name, zipped):
    path = tmp_path / name
    if zipped:
        torch.save({"weight": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Evil()}))
    for reader in (checkpoints.read_weights, checkpoints.resolve, checkpoints.load_segmenter):
        with pytest.raises(FusekernError, match=rf"{name} is a pickle .*refused.* taken from \.safetensors files"):
            reader(path)
    assert not Evil.ran


def test_weights_must_fit_by_name_and_shape(tmp_path):
    model, source = nn.Linear(3, 2), tmp_path / "x.safetensors"
    with pytest.raises(FusekernError, match=r"bias is missing in the file; scale is not in the model; weight"):
        checkpoints.load_weights(model, {"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}, source)
    given = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    checkpoints.load_weights(model, given, source)
    assert torch.equal(model.weight, given["weight"]) and torch.equal(model.bias, given["bias"])


def test_load_segmenter_takes_the_average_unless_told(run, data):
    loaded = checkpoints.load_segmenter(run)
    assert (loaded.weights_used, loaded.step, loaded.text_source) == ("ema", 2, "hash vectors")
    assert loaded.language_prior is False and not loaded.model.training
    assert loaded.recipe == micro_recipe(data, train__steps=2, train__ema=0.5)
    assert dataclasses.asdict(loaded.spec) == dataclasses.asdict(load_spec(data / "dataset.yaml"))
    raw = checkpoints.load_segmenter(checkpoints.find(run), weights="model")
    assert raw.weights_used == "model"
    files = checkpoints.load(run)
    for segmenter, tensors in ((loaded.model, files.ema), (raw.model, files.model)):
        assert all(torch.equal(value, tensors[name]) for name, value in segmenter.state_dict().items())
    assert not torch.equal(loaded.model.head.classifier.weight, raw.model.head.classifier.weight)


def test_load_segmenter_needs_neither_data_nor_text_nor_pretrained_weights(run, tmp_path):
    path = shutil.copytree(checkpoints.find(run), tmp_path / "step-00000002")
    state = json.loads((path / "state.json").read_text())
    state["recipe"]["model"]["backbone"]["weights"] = str(tmp_path / "gone.safetensors")
    state["recipe"]["text"] |= {"source": "file", "file": str(tmp_path / "gone.npy")}
    state["recipe"]["data"]["dataset"] = state["dataset"]["root"] = str(tmp_path / "gone")
    (path / "state.json").write_text(json.dumps(state))
    image = torch.rand(1, 3, 70, 50)
    with torch.no_grad():
        here, there = (checkpoints.load_segmenter(p).model(image).logits for p in (run, path))
    assert torch.equal(here, there)


def test_load_segmenter_with_another_backend(run, tmp_path, monkeypatch):
    """A checkpoint trained by a backend asked for by name, where there is none of this name."""
    path = shutil.copytree(checkpoints.find(run), tmp_path / "step-00000002")
    state = json.loads((path / "state.json").read_text())
    state["recipe"]["model"]["guidance"]["backend"] = "cpp"
    (path / "state.json").write_text(json.dumps(state))
    monkeypatch.setitem(BACKENDS, "cpp", dataclasses.replace(BACKENDS["cpp"], missing="it was not built"))
    image = torch.rand(1, 3, 70, 50)
    with pytest.raises(FusekernError, match="backend 'cpp' cannot run .*: it was not built"):
        checkpoints.load_segmenter(path).model(image)
    with torch.no_grad():
        trained, other = (checkpoints.load_segmenter(p, backend="auto") for p in (run, path))
        assert torch.equal(trained.model(image).logits, other.model(image).logits)
    assert other.recipe.model.guidance.backend == "cpp"
    config = dataclasses.replace(other.recipe.eval, backend="reference")
    found, _ = load_for_test(path, config, torch.device("cpu"))
    assert {m.backend for m in found.model.modules() if hasattr(m, "backend")} == {"reference"}
    (path / "state.json").write_text(json.dumps({**state, "recipe": _without(state["recipe"], "backend")}))
    assert checkpoints.load_segmenter(path).recipe.eval.backend == "trained"  # one of before there was the key


def _without(recipe, key):
    return {**recipe, "eval": {name: value for name, value in recipe["eval"].items() if name != key}}


def test_load_segmenter_without_an_average(data, tmp_path):
    recipe = micro_recipe(data, train__steps=1, model__guidance__kind="none")
    train(recipe, out=tmp_path / "run")
    loaded = checkpoints.load_segmenter(tmp_path / "run")
    assert (loaded.weights_used, loaded.text_source, loaded.language_prior) == ("model", None, False)
    with pytest.raises(FusekernError, match=r"has no moving average \(train\.ema was off\)"):
        checkpoints.load_segmenter(tmp_path / "run", weights="ema")


def test_a_recipe_of_another_version_is_refused(run, tmp_path):
    path = shutil.copytree(checkpoints.find(run), tmp_path / "step-00000002")
    state = json.loads((path / "state.json").read_text())
    state["recipe"]["train"]["colour"] = "red"
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(FusekernError, match="not a recipe of this version"):
        checkpoints.load_segmenter(path)


def test_the_data_set_survives_json(data):
    for spec in (load_spec("camvid"), load_spec(data / "dataset.yaml")):
        found = checkpoints.spec_from_dict(json.loads(json.dumps(checkpoints.spec_to_dict(spec))))
        assert isinstance(found, DatasetSpec) and found == spec
    with pytest.raises(FusekernError, match="not of this version"):
        checkpoints.spec_from_dict({"name": "x"})


def test_optimizer_tensors_are_named_and_come_back(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    assert "0.weight::exp_avg_sq" in tensors and len(tensors) == 4 * 3
    fresh = torch.optim.AdamW(model.parameters())
    load_optimizer(model, fresh, tensors, tmp_path)
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(fresh.state[parameter][key], value)
            assert fresh.state[parameter][key].stride() == value.stride()
    with pytest.raises(FusekernError, match="2.weight::exp_avg belongs to no parameter"):
        load_optimizer(model, fresh, {"2.weight::exp_avg": torch.zeros(1)}, tmp_path)
    with pytest.raises(FusekernError, match=r"0.bias::exp_avg is \[9\], but its parameter is \[4\]"):
        load_optimizer(model, fresh, {"0.bias::exp_avg": torch.zeros(9)}, tmp_path)


def test_recipes_survive_the_checkpoint(data):
    recipe = micro_recipe(data, optim__clip=None, train__ema=0.9)
    assert recipes.from_dict(json.loads(json.dumps(recipes.to_dict(recipe)))) == recipe
