import shutil
from pathlib import Path

import pytest
from run_training import micro_recipe, write_data

from fusekern.engine.train import train


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("areas"))


@pytest.fixture(scope="session")
def run(data, tmp_path_factory) -> Path:
    """A finished run of six steps; not to be changed."""
    out = tmp_path_factory.mktemp("train") / "run"
    assert train(micro_recipe(data, train__eval_every=4), out=out) == out / "checkpoints" / "step-00000006"
    return out


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """The run as it was after four steps, to go on from."""
    out = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    return out
