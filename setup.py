"""Where the packages lie, and the compiled modules; everything else about the project stands in pyproject.toml.

No install fails for want of a compiled module: every op also runs without. Why a module is absent is said once here and
kept in ``fusekern/_build.json``, from which ``fusekern info`` tells it.

FUSEKERN_BUILD=auto|cpu|cuda|none  which modules to build: all that can be, ``_C`` alone, ``_C_cuda`` alone, neither
CXX, CXXFLAGS                      compiler, GCC or one like it, and flags for it that come last
CUDA_HOME                          where CUDA lies, if not where the ``nvcc`` of the PATH does
TORCH_CUDA_ARCH_LIST               which GPUs to compile for, as for PyTorch's own extensions: "8.0;9.0;10.0"
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
# -fvisibility and the like are for the host's compiler. No fast maths: a NaN must stay one.
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-MD"]
# Compute capabilities that the kernels are compiled for by default, and the oldest that they can be.
ARCHS, OLDEST_ARCH = ["8.0", "9.0", "10.0"], 80


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
        needs = listing.read_text().replace("\\\n", " ").partition(":")[2].split()
        fresh = all((ROOT / need).stat().st_mtime < built.stat().st_mtime for need in needs)
        if fresh and json.loads(record.read_text()) == command:
            return
    except (OSError, ValueError):
        pass  # never compiled, or a file that it needed has gone
    run(command)
    record.write_text(json.dumps(command))


def compile_all(commands: list[list[str]], objects: list[Path]) -> None:
    objects[0].parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
        list(pool.map(compile_file, commands, objects))


def compile_cpp(sources: list[str], temporary: Path, *more: str) -> list[Path]:
    """Object files of C++ sources, in ``temporary``."""
    cxx, torch, python = compiler(), torch_folder(), sysconfig.get_path("include")
    if not Path(python, "Python.h").is_file():
        raise NotBuilt(f"Python.h is missing in {python} (on Debian and Ubuntu: apt install python3-dev)")
    includes = ["-Icsrc", "-isystem", str(torch / "include"), "-isystem", python]
    flags = [*FLAGS, *more, *includes, *shlex.split(os.environ.get("CXXFLAGS", "")), "-MD"]
    objects = [(temporary / Path(source).name).with_suffix(".o") for source in sources]
    compile_all([[*cxx, *flags, "-c", a, "-o", str(b)] for a, b in zip(sources, objects, strict=True)], objects)
    return objects


def link(objects: list[Path], libraries: list[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # No run path: torch is imported first, and the loader knows its libraries by name.
    run([*compiler(), "-shared", *map(str, objects), f"-L{torch_folder() / 'lib'}", *libraries, "-o", str(target)])


def build_cpp(target: Path, temporary: Path) -> None:
    """``csrc/*.cpp``, but for those of ``_C_cuda``, become ``_C``."""
    sources = sorted(f"csrc/{path.name}" for path in ROOT.glob("csrc/*.cpp") if not path.stem.endswith("_cuda"))
    link(compile_cpp(sources, temporary), ["-ltorch_cpu"], target)


def nvcc() -> tuple[str, str, list[str]]:
    """The command, its version, and the folders of CUDA's libraries, of which it is asked: it may be a script."""
    home = os.environ.get("CUDA_HOME")
    command = shutil.which(str(Path(home, "bin", "nvcc")) if home else "nvcc")
    if not command:
        raise NotBuilt(f"no nvcc found: looked {f'in {home}/bin' if home else 'on the PATH, and CUDA_HOME is not set'}")
    try:
        said = [
            subprocess.run([command, *options], capture_output=True, text=True, check=True)
            for options in (["--version"], ["--dryrun", "-c", "none.cu"])
        ]
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotBuilt(f"{command} does not work: {error}") from None
    version = re.search(r"release ([\d.]+)", said[0].stdout)
    folders = re.findall(r'"-L([^"]+)"', said[1].stderr)
    if not version or not folders:
        raise NotBuilt(f"{command} says neither its version nor where CUDA's libraries are")
    return command, version[1], [f"-L{folder}" for folder in folders if not folder.endswith("stubs")]


def archs(command: str) -> list[str]:
    """What to compile for, such as ``["80", "90"]``, oldest first."""
    wanted = re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,"))
    found = []
    for name in wanted if wanted[0] else ARCHS:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not match:
            raise NotBuilt(f"TORCH_CUDA_ARCH_LIST must be numbers such as 9.0, got {name!r}")
        found.append("".join(match.groups()[:3]))
    number = {arch: int(arch.rstrip("af")) for arch in found}
    known = subprocess.run([command, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    can = sorted(
        {arch for arch in found if number[arch] >= OLDEST_ARCH and (f"sm_{arch}" in known or not known)}, key=number.get
    )
    if not can:
        raise NotBuilt(f"{command} cannot compile for {', '.join(found)}, of which 8.0 is the oldest that will do")
    return can


def build_cuda(target: Path, temporary: Path) -> None:
    """``csrc/*.cu`` and ``csrc/*_cuda.cpp`` become ``_C_cuda``."""
    torch = torch_folder()
    if not (torch / "lib" / "libtorch_cuda.so").is_file():
        raise NotBuilt("this torch is one without CUDA")
    command, version, folders = nvcc()
    targets = archs(command)
    # The first half of the compilation, which takes the longest, is done once, for the oldest; kernels that need an
    # instruction of a newer one would want theirs. Its result is kept too: the driver compiles it for newer GPUs.
    kinds = ",".join([*(f"sm_{arch}" for arch in targets), f"compute_{targets[0]}"])
    flags = [*NVCC_FLAGS, "-ccbin", compiler()[0], "-gencode", f"arch=compute_{targets[0]},code=[{kinds}]"]
    sources = sorted(f"csrc/{path.name}" for path in ROOT.glob("csrc/*_cuda.cpp"))
    build = [f'-DFUSEKERN_NVCC="{version}"', f'-DFUSEKERN_ARCHS="{kinds.replace(",", " ")}"']
    objects = compile_cpp(sources, temporary, "-DUSE_CUDA", *build)
    kernels = sorted(f"csrc/{path.name}" for path in ROOT.glob("csrc/*.cu"))
    built = [temporary / f"{Path(source).name}.o" for source in kernels]
    compile_all([[command, *flags, "-c", a, "-o", str(b)] for a, b in zip(kernels, built, strict=True)], built)
    # CUDA's runtime goes into the module, unseen from outside, so that it matters not which one torch brings.
    runtime = ["-lcudart_static", "-lrt", "-lpthread", "-ldl", "-Wl,--exclude-libs,ALL"]
    link([*objects, *built], ["-ltorch_cpu", "-ltorch_cuda", *folders, *runtime], target)


MODULES = {"_C": ("cpu", "C++", build_cpp), "_C_cuda": ("cuda", "CUDA", build_cuda)}


class Build(build):
    # Also where no module is to be built: the reasons are written in any case.
    sub_commands = [(name, None if name == "build_ext" else needed) for name, needed in build.sub_commands]


class BuildModules(build_ext):
    def run(self) -> None:
        wanted, reasons = choice(), {}
        for name, (kind, label, build_module) in MODULES.items():
            target = self.in_place(self.get_ext_filename(f"fusekern.{name}"))
            reasons[name] = "" if wanted in ("auto", kind) else f"FUSEKERN_BUILD was {wanted}"
            if not reasons[name]:
                try:
                    build_module(target, Path(self.build_temp).absolute())
                except NotBuilt as reason:
                    reasons[name] = str(reason)
            if reasons[name]:
                target.unlink(missing_ok=True)
                print(f"fusekern is installed without its {label} kernels: {reasons[name]}", flush=True)
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
