"""setup.py builds the compiled modules where it can, and never fails an install where it cannot."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools
import torch

from fusekern import extensions

ROOT = Path(__file__).parents[1]
NOT_BUILT = extensions.load("_C")
needs_module = pytest.mark.skipif(bool(NOT_BUILT), reason=NOT_BUILT)
NO_CUDA = extensions.load("_C_cuda")
needs_cuda_module = pytest.mark.skipif(bool(NO_CUDA), reason=NO_CUDA)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

PIP = ["-m", "pip", "install", "--verbose", "--no-build-isolation", "--no-deps", "--no-index"]
PROBE = """
import torch, fusekern
from fusekern import extensions, info, ops
print(extensions.load("_C"))
print(list(ops.score_map(torch.ones(1, 4, 2, 2), torch.ones(1, 3, 4)).shape))
print(info.render(info.collect()))
"""


@pytest.fixture
def source(tmp_path):
    """A copy of what is needed to build, without what has been built."""
    leave = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("fusekern", "kernels", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def script(monkeypatch):
    """The names that setup.py defines."""
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def call(command, **options):
    environment = {**os.environ, **options.pop("environment", {})}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([sys.executable, *command], env=environment, **pipe, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_compiler
def test_where_there_is_a_compiler_there_is_a_module():
    """Without this a broken build would only skip the tests of what it builds."""
    if NOT_BUILT.startswith("FUSEKERN_BUILD was"):
        pytest.skip(NOT_BUILT)
    assert not NOT_BUILT


@needs_module
def test_the_module_says_what_it_is():
    import fusekern._C as module

    info = module.build_info()
    assert set(info) == {"torch", "torch_at_least", "python", "compiler", "isas"}
    assert info["torch_at_least"] == "2.11"
    numbers = [[int(part) for part in version.split(".")[:2]] for version in (info["torch"], torch.__version__)]
    assert min(numbers) >= [2, 11]
    assert info["python"] == platform.python_version()
    assert info["isas"][0] == "baseline" and module.cpu_capability() in info["isas"]
    assert torch.ops.fusekern_cpp.score_map_fwd


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None or not torch.version.cuda, reason="needs nvcc and a torch with CUDA")
def test_where_there_is_nvcc_there_is_a_cuda_module():
    if NO_CUDA.startswith("FUSEKERN_BUILD was"):
        pytest.skip(NO_CUDA)
    assert not NO_CUDA


CUDA_PROBE = """
import torch
import fusekern._C_cuda as module
assert not torch.cuda.is_initialized()
print(module.build_info())
print(torch.ops.fusekern_cuda.bn_relu6_dw_fwd, torch.ops.fusekern_cuda.bn_relu6_dw_bwd)
if torch.cuda.is_available():
    kernels = module.kernel_attributes()
    assert len(kernels) == 52 and not any(kernel["local_bytes"] for kernel in kernels), kernels
    assert all(0 < kernel["registers"] <= 255 and kernel["shared_bytes"] <= 48 * 1024 for kernel in kernels), kernels
else:
    try:
        module.kernel_attributes()
    except RuntimeError as error:
        assert str(error).startswith("kernel_attributes: "), error
"""


@needs_cuda_module
def test_the_cuda_module_says_what_it_is():
    """In a process of its own, whose CUDA nobody has touched."""
    info, ops = call(["-c", CUDA_PROBE], cwd=ROOT).splitlines()
    info = ast.literal_eval(info)
    assert set(info) == {"torch", "torch_at_least", "python", "nvcc", "archs"}
    assert info["torch_at_least"] == "2.11" and info["python"] == platform.python_version()
    assert info["archs"][-1].startswith("compute_") and len(info["archs"]) > 1
    assert ops == "fusekern_cuda.bn_relu6_dw_fwd fusekern_cuda.bn_relu6_dw_bwd"


@needs_cuda_module
def test_no_cuda_kernel_spills():
    """Registers, stack and shared memory of every kernel for every architecture, from the module itself."""
    import fusekern._C_cuda as module

    tool = shutil.which("cuobjdump")
    if tool is None:
        tool = pytest.importorskip("triton").knobs.nvidia.cuobjdump.path
    done = subprocess.run([tool, "--dump-resource-usage", module.__file__], capture_output=True, text=True, check=True)
    used = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout)
    binaries = [arch for arch in module.build_info()["archs"] if arch.startswith("sm_")]
    assert len(used) == 52 * len(binaries)
    for registers, stack, shared, local in used:
        assert int(registers) <= 255 and int(stack) == int(local) == 0 and int(shared) <= 48 * 1024


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"FUSEKERN_BUILD": "none"}, "FUSEKERN_BUILD was none"),
        ({"CXX": "/nonexistent/g++"}, "no C++ compiler found: looked for /nonexistent/g++"),
    ],
)
def test_an_install_without_a_module_works_and_says_why(source, tmp_path, environment, reason):
    site = tmp_path / "site"
    said = call([*PIP, "--target", str(site), str(source)], environment=environment)
    assert said.count(f"fusekern is installed without its C++ kernels: {reason}") == 1
    first, shape, *rest = call(["-c", PROBE], environment={"PYTHONPATH": str(site)}, cwd=tmp_path).splitlines()
    assert first == reason
    assert shape == "[1, 3, 2, 2]"
    assert reason in "\n".join(rest)
    (wheel,) = site.glob("fusekern-*.dist-info/WHEEL")
    assert ("Root-Is-Purelib: true" in wheel.read_text()) == ("FUSEKERN_BUILD" in environment)


@needs_compiler
@pytest.mark.skipif(not torch.version.cuda, reason="needs a torch with CUDA")
def test_without_nvcc_there_is_one_module_less(source, tmp_path):
    environment = {"FUSEKERN_BUILD": "cuda", "CUDA_HOME": str(tmp_path)}
    said = call(["setup.py", "build_ext", "--inplace"], cwd=source, environment=environment)
    reason = f"no nvcc found: looked in {tmp_path}/bin"
    assert said.count(f"fusekern is installed without its CUDA kernels: {reason}") == 1
    written = json.loads((source / "fusekern" / "_build.json").read_text())
    assert written == {"_C": "FUSEKERN_BUILD was cuda", "_C_cuda": reason}


def test_which_gpus_to_compile_for(script, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_75 sm_80 sm_90 sm_90a sm_100\n")
    nvcc.chmod(0o755)
    for wanted, found in (
        (None, ["80", "90", "100"]),
        ("9.0;8.0", ["80", "90"]),
        ("7.5 8.0+PTX, 9.0a 12.0", ["80", "90a"]),
    ):
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        if wanted:
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        assert script["archs"](str(nvcc)) == found
    for wanted, reason in (("Hopper", "must be numbers such as 9.0, got 'Hopper'"), ("7.5", "cannot compile for 75")):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        with pytest.raises(script["NotBuilt"], match=reason):
            script["archs"](str(nvcc))


@needs_compiler
def test_a_failing_compiler_leaves_its_first_error_and_no_module(source):
    environment = {"CXXFLAGS": "-no-such-flag", "FUSEKERN_BUILD": "auto"}
    stale = source / "fusekern" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.touch()
    said = call(["setup.py", "build_ext", "--inplace"], cwd=source, environment=environment)
    assert "without its C++ kernels: g++ failed: " in said and "no-such-flag" in said
    assert "no-such-flag" in (source / "fusekern" / "_build.json").read_text()
    assert not stale.exists()


def test_choices_are_checked(script, monkeypatch):
    assert script["choice"]() in ("auto", "cpu", "cuda", "none")
    monkeypatch.setenv("FUSEKERN_BUILD", "gpu")
    with pytest.raises(SystemExit, match="FUSEKERN_BUILD must be one of auto, cpu, cuda, none, got 'gpu'"):
        script["choice"]()


def test_torch_is_found_where_build_isolation_hides_it(script, monkeypatch, tmp_path):
    beside = Path(torch.__file__).parent
    assert script["torch_folder"]() == beside
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(beside.parent))
    assert script["torch_folder"]() == beside
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(script["NotBuilt"], match="torch was not installed when fusekern was"):
        script["torch_folder"]()
    header = tmp_path / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 10\n")
    with pytest.raises(script["NotBuilt"], match=r"it needs torch 2\.11 or newer, found 2\.10"):
        script["torch_folder"]()


@needs_compiler
def test_a_file_is_compiled_when_something_has_changed(script, tmp_path):
    code, header, built = tmp_path / "a.cpp", tmp_path / "a.h", tmp_path / "a.o"
    code.write_text('#include "a.h"\n')
    header.write_text("")
    command = ["g++", "-MD", "-c", str(code), "-o", str(built)]

    def compiled(command):
        before = built.stat().st_mtime_ns if built.exists() else None
        script["compile_file"](command, built)
        return built.stat().st_mtime_ns != before

    assert compiled(command)
    assert not compiled(command)
    assert compiled([*command, "-O1"])
    now = built.stat().st_mtime_ns
    os.utime(header, ns=(now + 10**7, now + 10**7))
    assert compiled([*command, "-O1"])
    header.write_text("this is not C++")
    os.utime(header, ns=(now + 10**10, now + 10**10))
    with pytest.raises(script["NotBuilt"], match=r"g\+\+ failed: .*a.h:1"):
        compiled([*command, "-O1"])


def shared_functions(source: Path, namespace: str, built: Path) -> list[str]:
    """What a file defines outside of the namespace and would share with other files, nothing being inlined."""
    includes = ["-I", str(ROOT / "csrc"), "-isystem", str(Path(torch.__file__).parent / "include")]
    subprocess.run(["g++", "-std=c++20", "-O0", *includes, "-c", str(source), "-o", str(built)], check=True)
    done = subprocess.run(["nm", "-C", "--defined-only", str(built)], capture_output=True, text=True, check=True)
    named = [line.split(maxsplit=2)[1:] for line in done.stdout.splitlines()]
    assert any(kind == "T" and name.startswith(namespace) for kind, name in named)
    return [name for kind, name in named if kind.isupper() and namespace not in name and "personality" not in name]


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_bodies_share_no_function(isa, tmp_path):
    """The linker keeps one copy of those that several files define: it could be one that the CPU cannot run."""
    if isa != "baseline" and platform.machine() != "x86_64":
        pytest.skip("a file for x86-64")
    source = ROOT / "csrc" / f"isa_{isa}.cpp"
    assert shared_functions(source, f"fusekern::{isa}::", tmp_path / "a.o") == []
    bad = tmp_path / "bad.cpp"
    bad.write_text(f"#include <algorithm>\nnamespace fusekern::{isa} {{ int f(int a) {{ return std::max(a, 1); }} }}\n")
    assert shared_functions(bad, f"fusekern::{isa}::", tmp_path / "b.o") == [
        "int const& std::max<int>(int const&, int const&)"
    ]


def test_why_a_module_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(extensions, "_FOLDER", tmp_path)
    assert extensions.load("_C") == "this copy of fusekern was never installed"
    (tmp_path / "_build.json").write_text('{"_C": "for a reason", "_C_other": ""}')
    assert extensions.load("_C") == "for a reason"
    (tmp_path / "_C_other.cpython-39.so").touch()
    reason = extensions.load("_C_other")
    assert (
        reason.startswith("it does not load: No module named 'fusekern._C_other'")
        and "_C_other.cpython-39.so" in reason
    )
