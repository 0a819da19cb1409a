"""What is built and installed is what lies in the tree: the wheel, made of the sdist, works outside of it."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROBE = """
import fusekern, fusekern.kernels
from fusekern import recipes
from fusekern.data.spec import built_in_datasets, load_spec
from fusekern.extensions import load
print(fusekern.__file__, fusekern.kernels.__file__, sep="\\n")
assert not (reason := load("_C")), reason
print(*recipes.names(), *built_in_datasets(), len(load_spec("ade20k").names))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The package as pip installs it from a wheel that was built from the sdist."""
    work = tmp_path_factory.mktemp("packaging")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout: cannot tell the project's files from others")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (work / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, work / "tree" / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run([sys.executable, "-c", build, str(work)], cwd=work / "tree")
    (archive,) = work.glob("fusekern-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(work / "sdist", filter="data")
    (source,) = (work / "sdist").iterdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    one = {**os.environ, "TORCH_CUDA_ARCH_LIST": "9.0"}  # a third of the time, where there is nvcc
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(work), str(source)], cwd=work, env=one)
    (wheel,) = work.glob("fusekern-*.whl")
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(work / "site"), str(wheel)], cwd=work)
    return work / "site"


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_installed_package_has_its_recipes_data_sets_and_kernels(site, tmp_path):
    printed = run([sys.executable, "-c", PROBE], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)})
    package, kernels, rest = printed.splitlines()
    assert Path(package).parent == site / "fusekern"
    assert Path(kernels).parent == site / "fusekern" / "kernels"
    recipes = ["ade20k/mobilenetv2-convformer", "ade20k/mobilenetv2-fpn", "camvid/mobilenetv2-convformer"]
    assert rest.split() == [*recipes, "camvid/mobilenetv2-fpn", "demo", "ade20k", "camvid", "scenes", "150"]


def test_nothing_but_the_package_is_installed(site):
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"fusekern", "bin"}
