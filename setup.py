"""Where the packages lie, and the compiled modules; everything else about the project stands in pyproject.toml.

No install fails for want of a compiled module: every op also runs without. Why a module is absent is said once here and
kept in ``fusekern/_build.json``, from which ``fusekern info`` tells it.

FUSEKERN_BUILD=auto|cpu|cuda|none  which modules to build: all that can be, ``_C`` alone, ``_C_cuda`` alone, neither
CXX, CXXFLAGS                      compiler, GCC or one like it, and flags for it that come last
MAX_JOBS                           how many files to compile at a time
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# The oldest torch that the modules load under. They use its stable ABI alone, so that every newer one will do.
TORCH = (2, 11)
FLAGS = [
    *("-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"),
    f"-DTORCH_TARGET_VERSION=0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000",
]


class NotBuilt(Exception):
    """Why a module is absent, in one line."""


def choice() -> str:
    found = os.environ.get("FUSEKERN_BUILD") or "auto"
    if found not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"FUSEKERN_BUILD must be one of auto, cpu, cuda, none, got {found!r}")
    return found


def torch_folder() -> Path:
    """The folder of the torch beside which fusekern will run; pip's build isolation hides it from ``import``."""
    spec = find_spec("torch")
    found = Path(spec.origin).parent if spec and spec.origin else Path(sysconfig.get_path("platlib"), "torch")
    header = found / "include" / "torch" / "headeronly" / "version.h"
    if not header.is_file():
        raise NotBuilt("torch was not installed when fusekern was: pip install torch, then fusekern once more")
    version = tuple(
        int(re.search(rf"TORCH_VERSION_{part} (\d+)", header.read_text())[1]) for part in ("MAJOR", "MINOR")
    )
    if version < TORCH:
        raise NotBuilt(f"it needs torch {TORCH[0]}.{TORCH[1]} or newer, found {version[0]}.{version[1]}")
    return found


def compiler() -> list[str]:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for command in map(shlex.split, names):
        if shutil.which(command[0]):
            return command
    raise NotBuilt(f"no C++ compiler found: looked for {', '.join(names)}")


def run(command: list[str]) -> None:
    """Raises a ``NotBuilt`` with the first error among the command's output, all of which is printed."""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "LC_ALL": "C"}, **pipe)
    if done.stdout:
        print(shlex.join(command), done.stdout, sep="\n", flush=True)
    if done.returncode:
        errors = [line.strip() for line in done.stdout.splitlines() if re.search("error|cannot|undefined", line, re.I)]
        raise NotBuilt(f"{command[0]} failed: {errors[0] if errors else f'exit code {done.returncode}'}")


def compile_file(command: list[str], built: Path) -> None:
    """Run the command, unless it was the same last time and ``built`` is newer than all that went into it."""
    record, listing = built.with_suffix(".json"), built.with_suffix(".d")
    try:
        needs = listing.read_text().replace("\\\n", " ").split()[1:]
        fresh = all((ROOT / need).stat().st_mtime < built.stat().st_mtime for need in needs)
        if fresh and json.loads(record.read_text()) == command:
            return
    except (OSError, ValueError):
        pass  # never compiled, or a file that it needed has gone
    run(command)
    record.write_text(json.dumps(command))


def compile_cpp(target: Path, temporary: Path) -> None:
    """``csrc/*.cpp`` become one module, with object files in ``temporary``."""
    cxx, torch = compiler(), torch_folder()
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").is_file():
        raise NotBuilt(f"Python.h is missing in {python} (on Debian and Ubuntu: apt install python3-dev)")
    includes = ["-Icsrc", "-isystem", str(torch / "include"), "-isystem", python]
    flags = [*FLAGS, *includes, *shlex.split(os.environ.get("CXXFLAGS", "")), "-MD"]
    sources = [f"csrc/{path.name}" for path in sorted(ROOT.glob("csrc/*.cpp"))]
    objects = [(temporary / Path(source).name).with_suffix(".o") for source in sources]
    commands = [[*cxx, *flags, "-c", source, "-o", str(built)] for source, built in zip(sources, objects, strict=True)]
    temporary.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
        list(pool.map(compile_file, commands, objects))
    target.parent.mkdir(parents=True, exist_ok=True)
    # No run path: torch is imported first, and the loader knows its library by name.
    run([*cxx, "-shared", *map(str, objects), f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(target)])


class Build(build):
    # Also where no module is to be built: the reasons are written in any case.
    sub_commands = [(name, None if name == "build_ext" else needed) for name, needed in build.sub_commands]


class BuildModules(build_ext):
    def run(self) -> None:
        wanted = choice()
        skipped = "" if wanted == "auto" else f"FUSEKERN_BUILD was {wanted}"
        reasons = {"_C": "" if wanted in ("auto", "cpu") else skipped, "_C_cuda": "this version has no CUDA sources"}
        target = self.in_place(self.get_ext_filename("fusekern._C"))
        if not reasons["_C"]:
            try:
                compile_cpp(target, Path(self.build_temp).absolute())
            except NotBuilt as reason:
                reasons["_C"] = str(reason)
        if reasons["_C"]:
            target.unlink(missing_ok=True)
            print(f"fusekern is installed without its C++ kernels: {reasons['_C']}", flush=True)
        record = self.in_place("fusekern/_build.json")
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(reasons, indent=2) + "\n")

    def in_place(self, name: str) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).absolute()) / name


setup(
    packages=[*find_packages(include=["fusekern", "fusekern.*"]), "fusekern.kernels"],
    package_dir={"fusekern.kernels": "kernels"},
    package_data={"fusekern.recipes": ["*.yaml", "*/*.yaml"]},
    ext_modules=[] if choice() == "none" else [Extension("fusekern._C", [], language="c++")],
    cmdclass={"build": Build, "build_ext": BuildModules},
)
