"""The gate that needs no GPU: all kernels in all settings that a launcher can choose, compiled ahead of time.

    python -m fusekern.kernels.aot --out bench/results/aot.json --table docs/aot.md
    python -m fusekern.kernels.aot --op former2conv --case '*bwd*bf16*' --arch 90
    python -m fusekern.kernels.aot --op former2conv --merge --out bench/results/aot.json --table docs/aot.md

The exit code is 1 where a kernel does not compile, uses the stack (spilled registers lie there), needs more shared or
tensor memory than there is, or rounds the operands of an fp32 product to tf32 unasked. The table also tells what makes
a kernel fast: the unit that computes each product, and how many bits its accesses of global memory have.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

OPS = ("downsample", "conv2former", "inverted_bottleneck", "batch_norm", "former", "former2conv", "score_map")
# Files besides an op's own that its kernels lie in, and those of other ops that they call.
PARTS = {
    "inverted_bottleneck": tuple(f"inverted_bottleneck_{part}" for part in ("fwd", "bwd", "places", "plan", "cases")),
    "former": ("former_fwd", "former_bwd"),
    "former2conv": ("former2conv_fwd", "former2conv_bwd"),
    "conv2former": ("conv2former_fwd", "conv2former_bwd"),
    "score_map": ("score_map_fwd", "score_map_bwd"),
}
USES = {"inverted_bottleneck": ("batch_norm",)}
NO_KERNELS = ("text_path", "aot", "__init__")  # launches former's
ARCHS = (80, 90, 100)
# Shared memory that a program can have, bytes: 1 KiB less than the multiprocessor's own.
LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Columns of tensor memory, which sm_100 has.
TENSOR_MEMORY = 512
COMMAND = "python -m fusekern.kernels.aot --out bench/results/aot.json --table docs/aot.md"


@dataclass(frozen=True)
class Case:
    """A kernel as a launcher launches it.

    Args:
        kernel: the ``@triton.jit`` function.
        name: unique within the op.
        signature: types of all arguments that are no constexpr: ``"*bf16"``, ``"i32"``, ``"i64"``, ``"fp32"``.
        constexprs: the others' values.
        divisible: arguments that Triton finds to be multiples of 16.
        maxnreg: registers of a thread at most. Where it is not stated, ptxas may spill a few of them although there are
            more, so that another program fits on a multiprocessor.
        archs: those on which a launcher can choose it, 10 times the compute capability.
    """

    kernel: JITFunction
    name: str
    signature: dict[str, str]
    constexprs: dict[str, object]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None
    archs: tuple[int, ...] = ARCHS

    @classmethod
    def of(
        cls,
        kernel: JITFunction,
        name: str,
        constexprs: Mapping[str, object],
        types: Mapping[str, str],
        *setting: int | None,
        usual: str = "i32",
        odd: tuple[str, ...] = (),
    ) -> Case:
        """A case from tables that an op's kernels share, and may have what this one does not take.

        Args:
            types: ``usual`` is the type of an argument that is not among them.
            setting: warps, stages and registers.
            odd: how names of arguments begin that are no multiples of 16.
        """
        given = [param for param in kernel.params if param.name not in constexprs]
        return cls(
            kernel,
            name,
            {param.name: types.get(param.name, usual) for param in given},
            {key: value for key, value in constexprs.items() if key in kernel.arg_names},
            tuple(param.name for param in given if not (param.do_not_specialize or param.name.startswith(odd))),
            *setting,
        )


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case.

    Args:
        registers: a thread's.
        spill_bytes: stack of a thread.
        shared: bytes of shared memory of a program.
        tensor_memory: columns of it.
        dots: products by the unit that computes them: ``wgmma`` and ``tcgen05`` are the fast ones of sm_90 and sm_100,
            ``mma`` is the one of sm_80, ``fma`` has no tensor core in it.
        loads: instructions that load from global memory, by their bits; 128 is what all but odd shapes should have.
        stores: the same for stores.
        tf32: an fp32 product has its operands rounded to tf32.
    """

    registers: int
    spill_bytes: int
    shared: int
    tensor_memory: int
    dots: dict[str, int] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    tf32: bool = False


def build(case: Case, arch: int) -> CompiledKernel:
    """Compiles a case for an architecture.

    Raises:
        ValueError: the case does not fit its kernel.
    """
    if not isinstance(case.kernel, JITFunction):
        raise ValueError(f"{case.name}: the kernel is not compiled but interpreted; unset TRITON_INTERPRET")
    names = case.kernel.arg_names
    given = [*case.signature, *case.constexprs]
    if sorted(given) != sorted(names):
        raise ValueError(
            f"{case.name}: arguments {sorted(set(given) ^ set(names))} are missing, unknown or named twice"
        )
    wrong = [p.name for p in case.kernel.params if p.name in case.divisible and p.do_not_specialize]
    wrong += [name for name in case.divisible if name not in case.signature]
    if wrong:
        raise ValueError(f"{case.name}: Triton does not look whether {', '.join(wrong)} can be divided by 16")
    source = ASTSource(
        case.kernel,
        {name: case.signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in case.constexprs.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={**options, "enable_fp_fusion": True})


def compile(case: Case, arch: int) -> Report:
    """What ``build`` makes of a case."""
    built = build(case, arch)
    ptx = built.asm["ptx"]
    return Report(
        **_resources(built.asm["cubin"]),
        shared=built.metadata.shared,
        tensor_memory=built.metadata.tmem_size or 0,
        dots=_dots(built.asm["ttgir"]),
        loads=_accesses(ptx, "ld"),
        stores=_accesses(ptx, "st"),
        tf32=bool(re.search(r"tt\.dot .*inputPrecision = tf32 : tensor<[\dx]+xf32", built.asm["ttir"])),
    )


def _resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {name: max(map(int, re.findall(rf"\b{name}:(\d+)", said))) for name in ("REG", "STACK", "LOCAL")}
    return {"registers": used["REG"], "spill_bytes": used["STACK"] + used["LOCAL"]}


def _dots(ttgir: str) -> dict[str, int]:
    found = Counter()
    for line in ttgir.splitlines():
        if "ttng.warp_group_dot " in line:
            found["wgmma"] += 1
        elif "ttng.tc_gen5_mma " in line:
            found["tcgen05"] += 1
        elif "tt.dot " in line:
            found["mma" if "parent = #mma" in line else "fma"] += 1
    return dict(sorted(found.items()))


def _accesses(ptx: str, kind: str) -> dict[str, int]:
    found = Counter()
    for count, bits in re.findall(rf"\b{kind}\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx):
        found[int(count or 1) * int(bits)] += 1
    if kind == "ld":
        for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[[^]]*\], (0x[\da-f]+|\d+)", ptx):
            found[8 * int(size, 0)] += 1
    return {str(bits): found[bits] for bits in sorted(found, reverse=True)}


def faults(case: Case, arch: int, report: Report) -> list[str]:
    """What must not be, in words."""
    found = []
    if report.spill_bytes:
        found.append(f"{report.spill_bytes} bytes of stack")
    if report.shared > LIMITS[arch]:
        found.append(f"{report.shared} bytes of shared memory, {LIMITS[arch]} is the limit")
    if report.tensor_memory > TENSOR_MEMORY:
        found.append(f"{report.tensor_memory} columns of tensor memory, {TENSOR_MEMORY} is the limit")
    if report.tf32 and "tf32" not in case.constexprs.values():
        found.append("an fp32 product in tf32, for which no constexpr of the case asks")
    return found


def cases_of(op: str) -> dict[str, Case]:
    """The cases that the op's file yields, by name."""
    found = {}
    for case in import_module(f"fusekern.kernels.{op}").compile_cases():
        if case.name in found:
            raise ValueError(f"{op} has two cases with the name {case.name}")
        found[case.name] = case
    return found


def source_hash(op: str) -> str:
    """Of all that a case of the op can depend on, comments and layout left out: its file, those that its kernels lie in
    or call, and those that are no op's."""
    folder = Path(__file__).parent
    of_ops = {*OPS, *chain.from_iterable(PARTS.values())}
    shared = [path for path in sorted(folder.glob("*.py")) if path.stem not in (*of_ops, *NO_KERNELS)]
    digest = hashlib.sha256()
    for path in [*(folder / f"{name}.py" for name in (op, *PARTS.get(op, ()), *USES.get(op, ()))), *shared]:
        digest.update("".join(_tokens(path)).encode())
    return digest.hexdigest()[:16]


def _tokens(path: Path) -> Iterator[str]:
    """A source without comments, docstrings and blanks."""
    marks = {tokenize.INDENT: ">", tokenize.DEDENT: "<", tokenize.NEWLINE: "\n"}
    begins = True
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in (tokenize.COMMENT, tokenize.NL) or (begins and token.type == tokenize.STRING):
                continue
            begins = token.type in marks
            yield marks.get(token.type, token.string)


def gate(chosen: tuple[str, str, int]) -> dict:
    """A row of the table: op, name of the case, architecture."""
    op, name, arch = chosen
    case = cases_of(op)[name]
    row = {"op": op, "case": name, "kernel": case.kernel.__name__, "arch": arch}
    try:
        report = compile(case, arch)
    except Exception as error:  # whatever the compiler raises makes the row red, the others are compiled all the same
        return {**row, "faults": [f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"]}
    row.update(warps=case.num_warps, stages=case.num_stages, **asdict(report))
    return {**row, "faults": faults(case, arch, report)}


def _line(row: dict) -> str:
    def counts(name: str) -> str:
        return " ".join(f"{key}x{count}" for key, count in row[name].items()) or "-"

    start = f"{row['op'] + ' ' + row['case']:60} {row['arch']:4}"
    if "registers" not in row:
        return f"{start} {row['faults'][0]}"
    return (
        f"{start} {row['registers']:4} {row['spill_bytes']:5} {row['shared'] / 1024:6.1f} {row['tensor_memory']:4}"
        f" {row['warps']:5} {row['stages']:6}  {counts('dots'):20} {counts('loads'):26} {counts('stores')}"
    )


HEAD = (
    f"{'case':60} {'arch':>4} {'regs':>4} {'stack':>5} {'KiB':>6} {'tmem':>4} {'warps':>5} {'stages':>6}"
    f"  {'products':20} {'loads, bits x count':26} stores"
)


def compiler_of(table: dict, op: str) -> dict:
    """By what and when the rows of an op were compiled: ``date``, ``triton`` and ``ptxas``."""
    return table.get("merged", {}).get(op, table)


def merge(table: dict, result: dict) -> dict:
    """The table with all rows of the result's ops in the place of those that it has of them."""
    of = {key: result[key] for key in ("date", "triton", "ptxas")}
    rows = []
    for op in table["sources"]:
        rows += [row for row in (result if op in result["sources"] else table)["rows"] if row["op"] == op]
    merged = {**table.get("merged", {}), **dict.fromkeys(result["sources"], of)}
    return {**table, "sources": {**table["sources"], **result["sources"]}, "merged": merged, "rows": rows}


def _compiler(of: dict) -> str:
    versions = ", ".join(f"{version} for sm_{arch}" for arch, version in of["ptxas"].items())
    return f"{of['date']}, Triton {of['triton']}, ptxas {versions}"


def markdown(result: dict) -> str:
    """The table in short: a line for each kernel, the worst of its cases."""
    limits = ", ".join(f"{limit // 1024} KiB on sm_{arch}" for arch, limit in LIMITS.items())
    later = [f"{op} by {_compiler(result['merged'][op])}." for op in result.get("merged", ())]
    lines = [
        "# Compiled ahead of time",
        "",
        "All kernels in all launch settings, on each architecture that a launcher picks them for.",
        f"{_compiler(result)}.",
        *later,
        f"Made by `{COMMAND}`;",
        "every row is in `bench/results/aot.json`. No case uses the stack, which is where spilled registers go, or",
        f"more shared memory than {limits}.",
        "",
        "A cell: most registers of a thread, most KiB of shared memory, and the units that compute the products.",
        "",
        "| op | kernel | cases | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " |",
        "| --- | --- | --- |" + " --- |" * len(ARCHS),
    ]
    for op, kernel in dict.fromkeys((row["op"], row["kernel"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["op"], row["kernel"]) == (op, kernel)]
        cells = [_cell([row for row in rows if row["arch"] == arch]) for arch in ARCHS]
        count = len({row["case"] for row in rows})
        lines.append(f"| {op} | `{kernel}` | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(rows: list[dict]) -> str:
    if not rows:
        return "not used"
    if any(row["faults"] for row in rows):
        return "; ".join(f"{row['case']}: {fault}" for row in rows for fault in row["faults"])
    registers, shared = (max(row[name] for row in rows) for name in ("registers", "shared"))
    return ", ".join([str(registers), f"{shared / 1024:.0f}", *sorted({unit for row in rows for unit in row["dots"]})])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fusekern.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--op", nargs="+", default=OPS, metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--case", default="*", help="names of cases, * for anything")
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHS, choices=ARCHS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--out", type=Path, help="write all rows to this JSON file")
    parser.add_argument("--merge", action="store_true", help="keep what the file has of other ops than --op")
    parser.add_argument("--table", type=Path, help="write a line for each kernel to this Markdown file")
    options = parser.parse_args(arguments)
    if options.merge and not (options.out and options.case == "*" and set(options.arch) == set(ARCHS)):
        parser.error("--merge needs --out, and all cases and architectures of its ops")
    chosen = [
        (op, name, arch)
        for op in options.op
        for name, case in cases_of(op).items()
        if fnmatchcase(name, options.case)
        for arch in options.arch
        if arch in case.archs
    ]
    if not chosen:
        parser.error("no case has such a name")
    print(HEAD, flush=True)
    rows = []
    for row in _in_parallel(chosen, options.jobs):
        rows.append(row)
        print(_line(row), flush=True)
    said = sys.argv[1:] if arguments is None else arguments
    result = {
        "command": shlex.join(["python", "-m", "fusekern.kernels.aot", *said]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "triton": triton.__version__,
        "ptxas": {str(arch): get_ptxas(arch).version for arch in options.arch},
        "limits": {str(arch): LIMITS[arch] for arch in options.arch},
        "sources": {op: source_hash(op) for op in options.op},
    }
    result["rows"] = rows
    if options.merge:
        result = merge(json.loads(options.out.read_text()), result)
    if options.out:
        options.out.write_text(dump(result))
    if options.table:
        options.table.write_text(markdown(result))
    red = [f"{row['op']} {row['case']}, sm_{row['arch']}: {fault}" for row in rows for fault in row["faults"]]
    print(*red, f"{len(rows)} compiled, {len(red)} at fault", sep="\n")
    return 1 if red else 0


def _in_parallel(chosen: list[tuple[str, str, int]], jobs: int) -> Iterator[dict]:
    if jobs == 1:
        yield from map(gate, chosen)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(gate, chosen)


def dump(result: dict) -> str:
    """JSON, a row a line."""
    short = partial(json.dumps, ensure_ascii=False)
    rows = ",\n".join(f"  {short(row)}" for row in result["rows"])
    head = {key: value for key, value in result.items() if key != "rows"}
    return short(head, indent=1).removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n'


if __name__ == "__main__":
    # Under its own name, so that the processes that it starts find it.
    sys.exit(import_module("fusekern.kernels.aot").main())
