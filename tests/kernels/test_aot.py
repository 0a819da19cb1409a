"""The ahead-of-time gate: its committed table is that of the sources as they are, and it can turn red."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
import triton.language as tl
from fusekern.kernels import aot
from fusekern.kernels.aot import ARCHS, COMMAND, LIMITS, OPS, Case

ROOT = Path(__file__).parents[2]
FILE = ROOT / "bench" / "results" / "aot.json"
TABLE = json.loads(FILE.read_text())
AGAIN = f"run the gate again: {COMMAND}"


@pytest.mark.parametrize("op", OPS)
def test_table_is_of_these_sources(op):
    assert TABLE["sources"][op] == aot.source_hash(op), f"kernels/{op}.py is not what was compiled; {AGAIN}"
    rows = [(row["case"], row["arch"]) for row in TABLE["rows"] if row["op"] == op]
    cases = [(name, arch) for name, case in aot.cases_of(op).items() for arch in ARCHS if arch in case.archs]
    assert len(cases) > 0
    assert sorted(rows) == sorted(cases), f"{op} has other cases than the table; {AGAIN}"


def test_table_has_no_fault():
    assert {row["op"] for row in TABLE["rows"]} == set(OPS)
    for row in TABLE["rows"]:
        name = f"{row['op']} {row['case']}, sm_{row['arch']}"
        assert row["faults"] == [], f"{name}: {row['faults']}"
        assert row["spill_bytes"] == 0, name
        assert 0 < row["registers"] <= 255, name
        assert row["shared"] <= LIMITS[row["arch"]], name
        assert row["tensor_memory"] <= aot.TENSOR_MEMORY, name


def test_page_is_made_from_the_table():
    assert (ROOT / "docs" / "aot.md").read_text() == aot.markdown(TABLE), AGAIN


@pytest.mark.parametrize("op", OPS)
def test_table_is_what_the_compiler_says(op, tmp_path):
    """For one case of an op, which changes with the source."""
    rows = [row for row in TABLE["rows"] if row["op"] == op and row["arch"] == 90]
    expected = rows[int(aot.source_hash(op), 16) % len(rows)]
    out = tmp_path / "aot.json"
    command = ["--op", op, "--case", expected["case"], "--arch", "90", "--jobs", "1", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "fusekern.kernels.aot", *command],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    fresh = json.loads(out.read_text())
    assert len(fresh["rows"]) == 1
    by = aot.compiler_of(TABLE, op)
    if fresh["triton"] == by["triton"] and fresh["ptxas"]["90"] == by["ptxas"]["90"]:
        assert fresh["rows"][0] == expected, AGAIN


@triton.jit(do_not_specialize=["count"])
def toy_kernel(source, out, count, BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    o_m = tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    b_out = tl.zeros([BM, BM], tl.float32)
    for i in range(0, count):
        b_a = tl.load(source + i * BK + o_m[:, None] * BK * 8 + o_k[None, :])
        b_out = tl.dot(b_a, tl.trans(b_a), b_out, input_precision=PRECISION)
    tl.store(out + o_m[:, None] * BM + o_m[None, :], b_out)


def toy(dtype="bf16", size=64, depth=64, precision="ieee", **keywords):
    signature = {"source": f"*{dtype}", "out": "*fp32", "count": "i32"}
    constexprs = {"BM": size, "BK": depth, "PRECISION": precision}
    return Case(toy_kernel, "toy", signature, constexprs, **{"divisible": ("source", "out"), **keywords})


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def judge(case, arch=90):
        report = aot.compile(case, arch)
        return report, aot.faults(case, arch, report)

    return judge


@pytest.mark.parametrize("arch, unit", [(80, "mma"), (90, "wgmma"), (100, "tcgen05")])
def test_tells_the_unit_and_the_widths(compiled, arch, unit):
    report, faults = compiled(toy(size=128), arch)
    assert faults == []
    assert list(report.dots) == [unit]
    assert list(report.loads) == ["128"] and list(report.stores) == ["128"]
    report, _ = compiled(toy(size=128, divisible=()), arch)
    assert list(report.stores) == ["32"]


def unguarded(ptx: str) -> list[str]:
    """Releases with no barrier between them and a store before, which another thread may leave behind.

    And acquires with none between them and an access behind.
    """
    lines = ptx.splitlines()

    def access_first(some, *accesses: str) -> bool:
        first = next(line for line in some if any(word in line for word in ("bar.sync", *accesses)))
        return "bar.sync" not in first

    found = []
    for i, line in enumerate(lines):
        if re.search(r"(atom|red)\.global\S*\.release", line) and access_first(reversed(lines[:i]), "st.global"):
            found.append(line)
        accesses = "ld.global", "st.global", "cp.async"
        if re.search(r"(ld|atom)\.global\S*\.acquire", line) and access_first(lines[i + 1 :], *accesses):
            found.append(line)
    return found


@pytest.mark.parametrize(
    "case, waits",
    [
        ("fwd chain exits small bf16 512 64", 5),
        ("bwd chain bridged small bf16 512", 4),
        ("bwd entry bridged small bf16 512", 2),
    ],
)
def test_chains_wait(case, waits, tmp_path, monkeypatch):
    """A loop with nothing in it but a condition is there after all passes of the compiler, no load before it, and a
    barrier for all threads on either side."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    built = aot.build(aot.cases_of("former")[case], 90).asm
    for order in ("acquire", "release"):
        assert built["ttgir"].count(f"tt.atomic_rmw add, {order}, gpu") == waits
        assert re.search(rf"\b(?:ld|atom)\.global\S*\.{order}", built["ptx"])
    assert "ld.global.nc" not in built["ptx"]  # a load that need not see what others store
    assert unguarded(built["ptx"]) == []
    assert len(unguarded(built["ptx"].replace("bar.sync", "bar.arrive"))) > waits


def test_a_spill_is_a_fault(compiled):
    report, faults = compiled(toy(size=128, depth=16, num_warps=1))
    assert report.spill_bytes > 0
    assert faults == [f"{report.spill_bytes} bytes of stack"]


def test_too_much_shared_memory_is_a_fault(compiled):
    case = toy(size=128, depth=256, num_stages=4, num_warps=8)
    report, faults = compiled(case)
    assert report.shared > LIMITS[90] and report.spill_bytes == 0
    assert faults == [f"{report.shared} bytes of shared memory, {LIMITS[90]} is the limit"]


def test_tf32_unasked_is_a_fault(compiled):
    case = toy("fp32", depth=16, precision="tf32")
    report, faults = compiled(case)
    assert report.tf32 and faults == []
    unasked = "an fp32 product in tf32, for which no constexpr of the case asks"
    assert aot.faults(toy("fp32", depth=16), 90, report) == [unasked]
    report, _ = compiled(toy("fp32", depth=16))
    assert not report.tf32 and list(report.dots) == ["fma"]


def test_the_command_fails_and_names_the_case(compiled, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(aot, "cases_of", lambda op: {"toy": toy(size=128, depth=16, num_warps=1)})
    command = ["--op", "score_map", "--arch", "90", "--jobs", "1", "--out", str(tmp_path / "red.json")]
    assert aot.main(command) == 1
    assert "score_map toy, sm_90: " in capsys.readouterr().out
    assert json.loads((tmp_path / "red.json").read_text())["rows"][0]["faults"]
    monkeypatch.setattr(aot, "cases_of", lambda op: {"toy": toy()})
    assert aot.main(command) == 0
    monkeypatch.setattr(aot, "cases_of", lambda op: {"toy": toy(size=48)})  # no power of 2
    assert aot.main(command) == 1
    assert "CompilationError" in capsys.readouterr().out


def test_a_case_that_does_not_fit_its_kernel_is_refused():
    case = toy()
    with pytest.raises(ValueError, match=r"toy: arguments \['BM', 'BN'\] are missing"):
        aot.compile(Case(toy_kernel, "toy", case.signature, {"BN": 64, "BK": 64, "PRECISION": "ieee"}), 90)
    with pytest.raises(ValueError, match="toy: Triton does not look whether count can be divided by 16"):
        aot.compile(toy(divisible=("count",)), 90)


def test_rows_of_an_op_replace_those_in_a_table(monkeypatch, tmp_path, capsys):
    def row(op, case):
        return {"op": op, "case": case, "kernel": case, "arch": 90, "faults": ["a fault"]}

    old = {"date": "2000-01-01", "triton": "1", "ptxas": {"90": "1"}, "sources": {"a": "1", "b": "1", "c": "1"}}
    table = {**old, "rows": [row("a", "1"), row("b", "1"), row("c", "1")]}
    new = {"date": "2000-01-02", "triton": "2", "ptxas": {"90": "2"}}
    merged = aot.merge(table, {**new, "sources": {"b": "2"}, "rows": [row("b", "2"), row("b", "3")]})
    assert [(found["op"], found["case"]) for found in merged["rows"]] == [
        *(("a", "1"), ("b", "2"), ("b", "3"), ("c", "1"))
    ]
    assert merged["sources"] == {"a": "1", "b": "2", "c": "1"} and merged["triton"] == "1"
    assert aot.compiler_of(merged, "b") == new and aot.compiler_of(merged, "a")["triton"] == "1"
    assert "b by 2000-01-02, Triton 2, ptxas 2 for sm_90." in aot.markdown(merged)
    with pytest.raises(SystemExit):
        aot.main(["--merge", "--op", "batch_norm", "--arch", "90", "--out", str(tmp_path / "a.json")])
    assert "--merge needs --out" in capsys.readouterr().err


def test_hash_of_what_kernels_call(monkeypatch):
    assert aot.source_hash("inverted_bottleneck") != aot.source_hash("batch_norm")
    before = aot.source_hash("inverted_bottleneck")
    monkeypatch.setattr(aot, "USES", {})
    assert aot.source_hash("inverted_bottleneck") != before


@pytest.mark.parametrize("op", OPS)
def test_kernels_lie_in_files_that_the_hash_knows(op):
    found = {case.kernel.__module__.removeprefix("fusekern.kernels.") for case in aot.cases_of(op).values()}
    assert found <= {op, *aot.PARTS.get(op, ())}


def test_hash_leaves_comments_out(tmp_path):
    def code(text):
        (tmp_path / "a.py").write_text(text)
        return list(aot._tokens(tmp_path / "a.py"))

    assert code("def f(x):\n    if x:\n        x = 1\n    return x\n") == code(
        "def f(x):\n    # why\n    if x:\n\n        x = 1  # or not\n    return x\n"
    )
    assert code("if x:\n    y = 1\n    z = 2\n") != code("if x:\n    y = 1\nz = 2\n")
    assert code("y = 'a'\n") != code("y = 'b'\n")
