"""What the benchmarks of all ops share: cases and shapes, the parity check before any speed, rows, table and JSON.

    python -m bench.former2conv --device cpu
    python -m bench.former2conv --device cuda --shapes headline --dtypes bfloat16 --compile

A row is one case, shape, dtype and layout, and holds forward and forward+backward of every contender (``bench.peers``).
Each row is judged first: the result and all gradients of fusekern's kernel against float64, by the rule of
``fusekern.testing``. Where that is red no speed is measured, the reason stands in its place, and the exit code is 1.

Around a ReLU6 two right gradients differ where a value lies beside a kink, so that such cases are judged far from
kinks, and their result once more on what is timed: norms as PyTorch starts them, behind which half of the numbers are
zero. A row tells the share of these zeros; kernels may pass over them.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean
from time import perf_counter

import torch
from torch import Tensor

from bench import peers, report
from bench.case import LAYOUTS, Case, Shape, Truth, draws, judge, lay_out, make
from bench.peers import FUSED, GRAPHED, WIDE
from bench.timing import STATISTIC, Burst, Ceilings, capture, interleaved, keep_freed_memory, rotation
from bench.zeros import Zeros

RESULTS = report.ROOT / "bench" / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "forward_backward")
STOPPED = 3  # exit code: --seconds is over and rows are left


def measure(case: Case, truths: list[Truth], layout: str, options: argparse.Namespace, ceilings: Ceilings) -> dict:
    """One row."""
    truth = truths[0]
    shape, device = truth.shape, options.device
    tensors = dict(zip(truth.tensors, truth.laid_out(layout), strict=True))
    dtype = str(truth.grad.dtype).removeprefix("torch.")
    backend = case.kernels[device] if options.backend == "kernel" else options.backend
    # Compiling takes minutes: once a shape will do.
    compiled = options.compile and shape in case.shapes["compile"]
    compiled = compiled and layout == "channels_last" and dtype == options.dtypes[0]
    row = {
        "case": case.name,
        "shape": str(shape),
        "heads": shape.heads,
        "sizes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "dtype": dtype,
        "layout": layout,
        "backend": backend,
        "auto": case.resolved(shape, *tensors.values()),
        "draws": len(truths),
        "wrong": [],
        "not": {},
        "memory": {},
    }
    contenders = {}
    for name in peers.names(case, device, compiled):
        if options.peers is not None and name not in (FUSED, *options.peers):
            continue
        try:
            contender = peers.build(name, case, shape, tensors, layout == "channels_last", backend)
            faults = _first_call(name, contender, truths, layout)
        except peers.Unavailable as reason:
            row["not"][name] = str(reason)
            continue
        except Exception as error:  # where a peer fails the others go on; where fusekern fails the row is red
            faults = [in_one_line(error)]
        if faults:
            row["not"][name] = "; ".join(faults)
        else:
            contenders[name] = contender
        if name == FUSED:
            row["wrong"] = faults
    if not row["wrong"] and FUSED in contenders:
        row["wrong"] = _as_timed(contenders[FUSED], case, truth, layout, row)
    if row["wrong"]:
        return row
    row["memory"] = {
        name: _memory(contender, truth, layout)
        for name, contender in contenders.items()
        if contender.gradients and not contender.graphed
    }
    sets, grads = _sets(case, truth, layout, device)
    row["input_sets"] = len(sets)
    for which in PASSES:
        bursts = _bursts(contenders, which, sets, grads, row)
        row[which] = interleaved(bursts, device, options.seconds_a_pass)
        del bursts
    compare(case, row, ceilings)
    return row


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _first_call(name: str, contender: peers.Contender, truths: list[Truth], layout: str) -> list[str]:
    """What is wrong with a contender's results; fusekern's are judged over all draws."""
    truth, tensors = truths[0], contender.taken(truths[0].laid_out(layout))
    if contender.graphed:  # it is tied to the tensors of its first call; `compile` runs the same code
        return []
    with contender.context():
        with torch.no_grad():
            inference = contender.call(*tensors)
            if name == FUSED and inference.is_cuda and not _captures(contender.call, tensors, inference):
                return ["inside a CUDA graph the result is another"]
        if not contender.gradients:
            return truth.sane(inference)
        seen = truths if name == FUSED else truths[:1]
        found = []
        for of in seen:
            *leaves, grad = contender.taken([*of.laid_out(layout), lay_out(of.grad, layout)])
            found.append(of.learn(contender.call, leaves, grad))
    if name != FUSED:
        return truth.sane(found[0][0])
    wrong = judge(truths, found)
    return wrong if torch.equal(inference, found[0][0]) else wrong + _of_inference(contender, truths, found, layout)


def _of_inference(contender: peers.Contender, truths: list[Truth], found: list, layout: str) -> list[str]:
    with torch.no_grad(), contender.context():
        others = [contender.call(*of.laid_out(layout)) for of in truths]
    return judge(truths, [(other, *gradients) for other, (_, *gradients) in zip(others, found, strict=True)])


def _as_timed(contender: peers.Contender, case: Case, truth: Truth, layout: str, row: dict) -> list[str]:
    """What is wrong with the result on the values that are timed, of whose zeros this makes a note."""
    if type(case).timed is Case.timed:
        return []
    timed = draws(case, truth.shape, truth.grad.dtype, truth.grad.device.type, timed=True)
    tensors = [of.laid_out(layout) for of in timed]
    with torch.no_grad():
        with Zeros() as seen:
            case.eager(truth.shape, *tensors[0])
        row["zeros"] = fmean(seen.before_products())
        with contender.context():
            found = [[contender.call(*of)] for of in tensors]
        return [f"as timed, {fault}" for fault in judge(timed, found)]


def _captures(call, tensors: Sequence[Tensor], expected: Tensor) -> bool:
    results = []
    graph = capture(lambda: results.append(call(*tensors)))
    results[-1].zero_()
    graph.replay()
    return torch.equal(results[-1], expected)


def _memory(contender: peers.Contender, truth: Truth, layout: str) -> dict[str, int]:
    """Bytes that forward keeps for backward, the inputs' own among them and not; on CUDA the peak above the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in contender.taken(truth.laid_out(layout))]
    [grad] = contender.taken([lay_out(truth.grad, layout)])
    inputs = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    found = {}
    if grad.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with contender.context():
        out, kept = saved(partial(contender.call, *leaves))
    torch.autograd.grad(out, leaves, grad)
    if grad.is_cuda:
        torch.cuda.synchronize()
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    found["saved_bytes"] = sum(kept.values())
    found["saved_beyond_inputs_bytes"] = sum(size for where, size in kept.items() if where not in inputs)
    return found


def saved(call: Callable[[], Tensor]) -> tuple[Tensor, dict[int, int]]:
    """What a call returns, and the bytes that it saves for its backward by where they lie."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return call(), kept


def _sets(case: Case, truth: Truth, layout: str, device: str) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Input sets to rotate through, and as many gradients."""
    bytes_of_inputs = sum(tensor.numel() * tensor.element_size() for tensor in (*truth.tensors.values(), truth.grad))
    sets, grads = [], []
    for seed in range(rotation(device, bytes_of_inputs)):
        made = make(case, truth.shape, truth.grad.dtype, device, seed, timed=True)
        sets.append([lay_out(tensor, layout) for tensor in made.values()])
        grads.append(lay_out(truth.grad, layout).clone())
    return sets, grads


def _bursts(contenders, which: str, sets, grads, row: dict) -> dict[str, Burst]:
    bursts = {}
    for name, contender in contenders.items():
        if which == "forward_backward" and not contender.gradients:
            continue
        # A graph by itself copies inputs in unless they stay where they are: rotating would time the copies.
        used = [contender.taken(tensors) for tensors in (sets[:1] if contender.graphed else sets)]
        run = _one_pass(contender.call, which, used, contender.taken(grads), static=contender.graphed)
        try:
            with contender.context():
                run()
            bursts[name] = Burst(run, len(used), contender.context)
            if contender.capture and grads[0].is_cuda:
                name += GRAPHED
                with contender.context():
                    bursts[name] = Burst(capture(run).replay, len(used))
        except Exception as error:
            row["not"][f"{name}, {which}"] = in_one_line(error)
    return bursts


def _one_pass(call, which: str, sets, grads, static: bool):
    """A function that runs one pass over all sets of inputs."""
    learning = which == "forward_backward"
    leaves = [[tensor.detach().requires_grad_(learning) for tensor in tensors] for tensors in sets]
    if static:
        for tensor in leaves[0]:
            torch._dynamo.mark_static_address(tensor)

    def run() -> None:
        with torch.set_grad_enabled(learning):
            for tensors, grad in zip(leaves, grads, strict=False):
                out = call(*tensors)
                if learning:
                    torch.autograd.grad(out, tensors, grad)

    return run


def compare(case: Case, row: dict, ceilings: Ceilings) -> None:
    """Adds each contender's share of the roofline, and its time over fusekern's: both inside a graph or both not."""
    width, shape = DTYPES[row["dtype"]].itemsize, Shape.parse(row["shape"])
    flops, moved = case.flops(shape), [width * elements for elements in case.elements(shape)]
    floors = [ceilings.floor(*work, row["dtype"]) for work in zip(flops, moved, strict=True)]
    row["statistic"], row["roofline"], row["ratio"] = STATISTIC[ceilings.device], {}, {}
    for which, parts in zip(PASSES, (slice(0, 1), slice(0, 2)), strict=True):
        times = {name: found[row["statistic"]] for name, found in row[which].items()}
        floor = sum(seconds for seconds, _ in floors[parts])
        row["roofline"][which] = {
            "flops": sum(flops[parts]),
            "bytes": sum(moved[parts]),
            "floor_s": floor,
            "bound": floors[parts][-1][1],
            "share": {name: floor / seconds for name, seconds in times.items() if name != WIDE},
        }
        row["ratio"][which] = {}
        for name, seconds in times.items():
            graphed = name.endswith(GRAPHED) or name == "compile-reduce-overhead"
            ours = times.get(FUSED + GRAPHED if graphed else FUSED)
            if ours and name not in (FUSED, FUSED + GRAPHED):
                row["ratio"][which][name] = seconds / ours


def plan(cases: Sequence[Case], options: argparse.Namespace) -> Iterator[tuple[Case, Shape, str]]:
    """Case, shape and dtype; the shapes with goals first."""
    for case in cases:
        if options.shapes in (["headline"], ["compile"]):
            chosen = case.shapes[options.shapes[0]]
        elif options.shapes != ["all"]:
            chosen = [Shape.parse(text) for text in options.shapes]
        elif options.quick:
            chosen = case.shapes["quick"]
        else:
            chosen = case.shapes[options.device]
        first = [shape for shape in chosen if shape in case.shapes["headline"]]
        for shape in dict.fromkeys([*first, *chosen]):
            for dtype in options.dtypes:
                yield case, shape, dtype


def parse(cases: Sequence[Case], arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="few shapes, short rounds, results under runs/bench")
    parser.add_argument("--out", type=Path, help="JSON; default bench/results/OP-DEVICE.json")
    parser.add_argument("--shapes", nargs="+", default=["all"], help="all, headline, compile, or B,C,H,K ...")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES))
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--backend", default="kernel", help="what fusekern runs; default: the kernel of this device")
    parser.add_argument("--peers", nargs="*", help="only these contenders beside fusekern")
    parser.add_argument("--compile", action="store_true", help="torch.compile and FlexAttention, at few shapes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no shape after so many")
    parser.add_argument("--seconds-a-pass", type=float, help="default 1.5 on a CPU, 0.6 on CUDA, 0.3 with --quick")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of --out that are of these sources; measure red ones again"
    )
    parser.add_argument("--plots", type=Path, help="folder; default docs/performance, or that of --out")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "no CUDA device\n")
    options.dtypes = options.dtypes or (["float32"] if options.quick else ["float32", "bfloat16"])
    if options.seconds_a_pass is None:
        options.seconds_a_pass = 0.3 if options.quick else 0.6 if options.device == "cuda" else 1.5
    folder = report.ROOT / "runs" / "bench" if options.quick else RESULTS
    published = options.out is None and not options.quick
    options.out = options.out or folder / f"{cases[0].op}-{report.slug(options.device)}.json"
    options.plots = options.plots or (report.ROOT / "docs" / "performance" if published else options.out.parent)
    return options


def _key(row: dict) -> tuple[str, str, str, str]:
    return row["case"], row["shape"], row["dtype"], row["layout"]


def main(cases: Sequence[Case], arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes, draws.

    Returns:
        The exit code: 0; 1 if a row is red; ``STOPPED``.
    """
    options = parse(cases, arguments)
    torch.set_num_threads(1)
    heap_kept = options.device == "cpu" and keep_freed_memory()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    start = perf_counter()
    dtypes = [DTYPES[name] for name in options.dtypes]
    command = shlex.join(["python", "-m", f"bench.{cases[0].op}", *(sys.argv[1:] if arguments is None else arguments)])
    earlier = report.kept(options.out, options.device) if options.resume else None
    planned = {
        (case.name, str(shape), dtype, layout)
        for case, shape, dtype in plan(cases, options)
        for layout in options.layouts
    }
    # A red row is measured again, or stays.
    rows = [row for row in earlier["rows"] if not row["wrong"] or _key(row) not in planned] if earlier else []
    commands = earlier["command"].split(" && ") if earlier else []
    found = {
        "op": cases[0].op,
        **report.describe(options.device),
        "command": " && ".join(dict.fromkeys([*commands, command])),
        "freed_memory_kept": heap_kept,
        "complete": False,
        "rows": rows,
    }
    columns = list(dict.fromkeys(name for case in cases for name in columns_of(case, options)))
    print(f"{found['op']} on {found['device']}, commit {found['commit']}; times in ms\n")
    print("\n".join(report.head(columns)), flush=True)
    ceilings = Ceilings(options.device)
    ceilings.measure(dtypes, options.seconds_a_pass, options.quick)
    found["ceilings_before"] = ceilings.as_json()
    if earlier:
        ceilings.include(earlier["ceilings"])
    done = set(map(_key, rows))
    stopped = False
    for case, shape, dtype in plan(cases, options):
        left = [layout for layout in options.layouts if (case.name, str(shape), dtype, layout) not in done]
        stopped = stopped or (bool(left) and perf_counter() - start > options.seconds)
        if stopped or not left:
            continue
        ceilings.measure(dtypes, options.seconds_a_pass / 10, options.quick)
        truths = draws(case, shape, DTYPES[dtype], options.device)
        for layout in left:
            rows.append(measure(case, truths, layout, options, ceilings))
            print("\n".join(report.lines(rows[-1], columns)), flush=True)
            found["ceilings"] = ceilings.as_json()
            report.write(found, options.out)
        del truths
        if options.compile:
            torch._dynamo.reset()
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    # All rows against the best that was seen. If that is more than at first, the machine was not quiet then.
    for row in rows:
        if not row["wrong"]:
            compare({case.name: case for case in cases}[row["case"]], row, ceilings)
    found["ceilings"], found["complete"] = ceilings.as_json(), not stopped
    report.write(found, options.out)
    print("\n".join(["", *report.memory_lines(rows), ""]))
    draw_if_possible(options.out, options.plots)
    print("\n".join(report.slower_than_reference(rows)))
    red = sum(bool(row["wrong"]) for row in rows)
    print(f"{len(rows)} rows in {options.out}, {red} red" + (", stopped by --seconds" if stopped else ""))
    return 1 if red else STOPPED if stopped else 0


def columns_of(case: Case, options: argparse.Namespace) -> list[str]:
    names = peers.names(case, options.device, options.compile)
    names = [name for name in names if options.peers is None or name in (FUSED, *options.peers)]
    if options.device == "cuda":
        names += [name + GRAPHED for name in names if name in (FUSED, "reference", "eager", *peers.PINNED)]
    return names


def draw_if_possible(out: Path, folder: Path) -> None:
    try:
        plots = import_module("bench.plots")
    except ImportError as reason:
        print(f"no plots ({reason}); draw them elsewhere: python -m bench.plots {out}")
        return
    for picture in plots.draw(out, folder):
        print(picture)
