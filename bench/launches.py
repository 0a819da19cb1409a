"""How often each op starts something on the device: by its plan, and on CUDA as the profiler saw it.

    python -m bench.launches [--device cuda|none] [--out FILE]

A plan is what ``launches`` in an op's kernels says from shapes, strides and dtypes. That of a block is those of its ops
and what PyTorch does between them. On CUDA every pass of every op is recorded, and the exit code is 1 where the device
did anything else; a whole block of the layer is counted too, by the kernels alone, with backend ``auto``, with the
reference and as PyTorch is fastest at it, and the first must be as many as planned. Without a GPU there are the plans
alone, for a device like an H200, and every row says "planned".
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from fusekern.kernels import conv2former, downsample, former, former2conv, inverted_bottleneck, score_map, text_path
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench import layer, numerics, peers, report
from bench.case import Case, Shape, lay_out, make, shapes
from bench.inverted_bottleneck import EPS, Training
from bench.text_path import TextPath, in_order
from fusekern.nn.convformer import ConvFormer, ConvFormerBlock
from fusekern.ops import BatchNorm
from fusekern.ops.text_path import text_path_reference

Plan = dict[str, tuple[str, ...]]
Processor = tuple[int, int]  # architecture and number of multiprocessors
HOPPER = (90, 132)
DTYPE = torch.bfloat16
PLACES = (
    *((shape, "channels_last") for shape in shapes("1,512,16,150", "16,512,16,150", "16,256,64,150")),
    (Shape(1, 512, 16, 150), "NCHW"),
)
CASES = {case.op: case for case in numerics.CASES}
EXPANSION = 6
IN_A_BLOCK = ("downsample", "conv2former", "inverted_bottleneck", "text_path", "former2conv")
# What a block of the layer may launch.
BUDGET = {"fwd": 12, "bwd": 20, "infer": 9}
OURS = ("inverted_bottleneck_", "batch_norm_", "bn_relu6_dw_")
# Names in a plan of what PyTorch does by itself.
TORCH = {
    "copy": r"^Memcpy DtoD|at::native::.*copy_kernel",
    "memcpy": r"^Memcpy",
    "memset": r"^Memset",
    "sum": r"at::native::reduce_kernel<.*sum_functor",
    "fill": r"at::native::.*FillFunctor",
}


@dataclass(frozen=True)
class Entry:
    """An op whose launches are planned.

    Args:
        case: makes its inputs and calls it.
        plan: of the shape, the inputs, the gradient of the result and a processor, none for that of the inputs' device;
            returns the launches of ``"fwd"``, ``"bwd"`` and, where it differs from ``"fwd"``, ``"infer"``.
        inference: the case that ``"infer"`` is of, if it is another.
        shape_of: the shape as the op's benchmark has it, of ``B,C,H,K`` of a block.
    """

    case: Case
    plan: Callable[..., Plan]
    inference: Case | None = None
    shape_of: Callable[[Shape], Shape] = lambda shape: shape


def _conv2former(shape: Shape, inputs: Sequence[Tensor], grad: Tensor, processor: Processor | None) -> Plan:
    return conv2former.launches(*inputs, shape.heads, grad)


def _downsample(shape: Shape, inputs: Sequence[Tensor], grad: Tensor, processor: Processor | None) -> Plan:
    return downsample.launches(*inputs, grad)


def _former(shape: Shape, inputs: Sequence[Tensor], grad: Tensor, processor: Processor | None) -> Plan:
    return former.launches()


def _former2conv(shape: Shape, inputs: Sequence[Tensor], grad: Tensor, processor: Processor | None) -> Plan:
    return former2conv.launches(*inputs, shape.heads, grad, processor)


def _score_map(shape: Shape, inputs: Sequence[Tensor], grad: Tensor, processor: Processor | None) -> Plan:
    return score_map.launches(*inputs, True, True, grad, processor)


def _text_path(shape: Shape, inputs: Sequence[Tensor], grad: Tensor, processor: Processor | None) -> Plan:
    return text_path.launches()


class FourResults(TextPath):
    """As the layer has them: not side by side."""

    fused = TextPath.path

    def reference(self, shape, tokens, gathered, *parts):
        return text_path_reference(tokens, gathered, *in_order(parts), heads=shape.heads)


def _inverted_bottleneck(shape: Shape, inputs: Sequence[Tensor], grad: Tensor, processor: Processor | None) -> Plan:
    image, expand, _, project, *_ = inputs
    return inverted_bottleneck.launches(image, expand.shape[0], project.shape[0])


class PlainNorms(Training):
    """Parameters as they are; of the last two norms' running variances some are negative, which costs no launch."""

    def norms(self, scale1, shift1, scale2, scale3, shift3):
        triples = (scale1, shift1, shift1), (scale2, None, scale2), (scale3, shift3, shift3)
        return tuple(BatchNorm(*two, mean.detach(), two[0].detach(), EPS, self.batch) for *two, mean in triples)


class PlainInference(PlainNorms):
    batch = False


ENTRIES = (
    Entry(CASES["downsample"], _downsample),
    Entry(PlainNorms(), _inverted_bottleneck, PlainInference(), lambda shape: replace(shape, tokens=EXPANSION)),
    Entry(CASES["conv2former"], _conv2former),
    Entry(CASES["former"], _former),
    Entry(FourResults(), _text_path),
    Entry(CASES["former2conv"], _former2conv),
    Entry(CASES["score_map"], _score_map),
)


def row_of(entry: Entry, shape: Shape, layout: str, device: str) -> dict:
    """One op at one shape: its plan, and what the device did, if there is one."""
    case, place = entry.case, entry.shape_of(shape)
    if device == "none":
        tensors = (torch.empty(size, dtype=DTYPE, device="meta") for size in case.sizes(place).values())
        processor = HOPPER
    else:
        tensors, processor = make(case, place, DTYPE, device).values(), None
    # Norms are in fp32, as those of a block under autocast: statistics for others would be copied.
    norms = case.op == "inverted_bottleneck"
    inputs = [lay_out(tensor.float() if norms and tensor.dim() == 1 else tensor, layout) for tensor in tensors]
    results = case.reference(place, *(tensor.to("meta") for tensor in inputs))
    results = [results] if isinstance(results, Tensor) else results
    device_of = inputs[0].device
    grads = [lay_out(torch.ones(result.shape, dtype=DTYPE, device=device_of), layout) for result in results]
    plan = entry.plan(place, inputs, grads[0], processor)
    row = {
        "op": case.op,
        "shape": str(shape),
        "dtype": report.short(DTYPE),
        "layout": layout,
        "state": "planned",
        "planned": plan,
        "wrong": [],
    }
    if device != "none":
        backend = case.kernels[device]
        inference = partial((entry.inference or case).fused, place, backend)
        found = passes(partial(case.fused, place, backend), inference, inputs, grads)
        found = {which: found[which] for which in plan}
        row |= {"state": "measured", "found": {which: list(map(name_of, of)) for which, of in found.items()}}
        row["wrong"] = [fault for which in plan for fault in differences(which, plan[which], found[which])]
    return row


FREE = ("empty", "new_empty", "detach", "promote_types")


class Operations(TorchDispatchMode):
    """While it is entered: names of operations that launch something on CUDA. Views and new memory do not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if not (function.is_view or name.split("::")[1].startswith(FREE)):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


# What an op leaves to another of ours for its backward: kernels by operation.
AGAIN = {"fusekern::inverted_bottleneck_again": "inverted_bottleneck_apply_kernel"}


def between() -> Plan:
    """What is launched in a block besides the ops of ``IN_A_BLOCK``: PyTorch's operations on their results and on
    buffers. It is what three blocks have more than two, on a CPU, where each op is one operation too."""
    found = [operations_of(blocks) for blocks in (2, 3)]
    return {which: tuple((Counter(found[1][which]) - Counter(found[0][which])).elements()) for which in found[0]}


def operations_of(blocks: int) -> dict[str, list[str]]:
    """All operations of a small layer in each pass, but the ops."""
    fuse = ConvFormer(16, blocks=blocks, bridge_heads=2, text_heads=2, backend="cpp")
    image = lay_out(torch.randn(2, 16, 9, 9), "channels_last").requires_grad_()
    text, found = torch.randn(5, 16, requires_grad=True), {}
    with Operations() as seen:
        out = fuse(image, text)
    found["fwd"] = seen.names
    with Operations() as seen:
        torch.autograd.grad(out.image.sum() + out.text.sum(), [image, text, *fuse.parameters()], allow_unused=True)
    found["bwd"] = seen.names
    with torch.no_grad(), Operations() as seen:
        fuse.eval()(image, text)
    found["infer"] = seen.names
    ours = "fusekern::"
    return {
        which: [AGAIN.get(name, name) for name in names if name in AGAIN or not name.startswith(ours)]
        for which, names in found.items()
    }


def of_a_block(rows: Sequence[dict], others: Plan) -> dict[str, int]:
    """How many launches are planned for a block at the first shape, in channels_last."""
    rows = [row["planned"] for row in rows if row["op"] in IN_A_BLOCK and row["layout"] == "channels_last"]
    plans = rows[: len(IN_A_BLOCK)]  # those of the first shape
    return {which: sum(len(plan.get(which, plan["fwd"])) for plan in plans) + len(others[which]) for which in others}


def passes(call, inference, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, list[str]]:
    """What the device did in the forward of a training step, its backward and the forward of inference."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def forward() -> list[Tensor]:
        out = call(*leaves)
        return [out] if isinstance(out, Tensor) else [result for result in out if result is not None]

    def infer() -> None:
        with torch.no_grad():
            inference(*inputs)

    found = {"fwd": activities(forward)}
    out = forward()
    gradients = partial(torch.autograd.grad, out, leaves, grads[: len(out)], retain_graph=True, allow_unused=True)
    found["bwd"] = activities(gradients)
    return {**found, "infer": activities(infer)}


def activities(call: Callable[[], object]) -> list[str]:
    """Names of all that the device does in a call, in order: kernels, and copies and fills of memory."""
    call()  # compiles, and tries out what there is to choose from
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


def name_of(activity: str) -> str:
    """What a plan calls it: a kernel by its function's name."""
    for name, pattern in TORCH.items():
        if re.search(pattern, activity):
            return name
    return re.split("[<(]", activity.replace("(anonymous namespace)::", ""))[0].split("::")[-1].split()[-1]


def differences(which: str, planned: Sequence[str], found: Sequence[str]) -> list[str]:
    """In words how what was found differs from a plan. PyTorch's sum over many numbers clears its counters first, which
    is part of it."""
    names = list(map(name_of, found))
    names = [name for name, after in pairwise([*names, ""]) if (name, after) != ("memset", "sum")]
    if any(name.startswith("aten::") for name in planned):
        # Operations of PyTorch's, planned by what is called and recorded by what that launches: ours among them count.
        planned, names = ([name for name in of if name.startswith(OURS)] for of in (planned, names))
    if names == list(planned):
        return []
    return [f"{which}: planned {', '.join(planned) or 'nothing'}; found {', '.join(names) or 'nothing'}"]


def block_of(shape: Shape, contender: str, device: str) -> dict:
    """Everything that the device does for one block of the layer, within the stack."""
    run, inputs = block_and_inputs(shape, contender, device)
    grads = [torch.ones_like(tensor) for tensor in inputs[:3]]
    found = passes(partial(run, True), partial(run, False), inputs, grads)
    return {
        "shape": str(shape),
        "contender": contender,
        "launches": {which: len(of) for which, of in found.items()},
        "found": {which: list(map(name_of, of)) for which, of in found.items()},
    }


def block_and_inputs(shape: Shape, contender: str, device: str) -> tuple[Callable[..., tuple], list[Tensor]]:
    """A function of "in training?", image, text, its query and parameters, and these four, in channels_last. Only the
    kernels take the query of the block before, and make that of the next, for which the same weights stand."""
    torch.manual_seed(0)
    heads = {"bridge_heads": shape.heads, "text_heads": shape.heads}
    backend = {"eager": "reference", "kernels": "triton"}.get(contender, contender)
    block = ConvFormerBlock(shape.channels, backend=backend, **heads)
    if contender == "kernels":
        block.bottleneck.backend = "cuda"
    block = block.to(device, DTYPE, memory_format=torch.channels_last)
    for norm in (block.bottleneck.norm1, block.bottleneck.norm2, block.bottleneck.norm3):
        norm.float()  # as in training in mixed precision
    names, buffers = [name for name, _ in block.named_parameters()], dict(block.named_buffers())
    image = torch.randn(shape.batch, shape.channels, shape.size, shape.size, device=device, dtype=DTYPE)
    text = torch.randn(shape.batch, shape.tokens, shape.channels, device=device, dtype=DTYPE)
    query = block.image_to_text.query(text).detach()
    bound = layer.Bound(block)

    def run(training: bool, image: Tensor, text: Tensor, query: Tensor, *parameters: Tensor) -> tuple:
        if contender == "eager":
            named = dict(zip(names, parameters, strict=True)) | buffers
            return layer.eager_block(named, "", image, text, shape.heads, peers.attend, training)
        block.train(training)
        return bound(parameters, image, text, query, block)

    return run, [lay_out(image, "channels_last"), text, query, *block.parameters()]


def block_lines(rows: Sequence[dict]) -> list[str]:
    budget = ", ".join(f"{which} {most}" for which, most in BUDGET.items())
    lines = [f"All launches of a block (budget: {budget})", "", "| B,C,H,K | | fwd | bwd | infer |"]
    lines.append("|" + "---|" * 5)
    for row in rows:
        lines.append(f"| {' | '.join([row['shape'], row['contender'], *map(str, row['launches'].values())])} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "none"], default="none")
    parser.add_argument("--out", type=Path, help="JSON; default bench/results/launches.json, on CUDA with the device")
    options = parser.parse_args(arguments)
    on_device = options.device == "cuda"
    if on_device and not torch.cuda.is_available():
        parser.exit(2, "no CUDA device\n")
    name = f"launches-{report.slug('cuda')}.json" if on_device else "launches.json"
    out = options.out or report.ROOT / "bench" / "results" / name
    torch.backends.cudnn.benchmark = True
    words = sys.argv[1:] if arguments is None else arguments
    found = {
        "op": "launches",
        **report.describe("cuda" if on_device else "cpu"),
        "command": shlex.join(["python", "-m", "bench.launches", *words]),
        "processor": processor_name(on_device),
        "budget": BUDGET,
        "between": between(),
        "rows": [row_of(entry, *place, options.device) for place in PLACES for entry in ENTRIES],
        "blocks": [],
    }
    found["planned"] = of_a_block(found["rows"], found["between"])
    print("\n".join(report.launch_lines(found["rows"])), flush=True)
    report.write(found, out)
    if on_device:
        for shape, layout in PLACES:
            if layout == "channels_last":
                found["blocks"] += [block_of(shape, name, "cuda") for name in ("kernels", "auto", "reference", "eager")]
                report.write(found, out)
        print("\n".join(["", *block_lines(found["blocks"])]))
    red = [row for row in found["rows"] if row["wrong"]]
    for row in red:
        print(f"RED: {row['op']} {row['shape']} {row['layout']}: {'; '.join(row['wrong'])}")
    print(f"\n{len(found['rows'])} rows in {out}, {len(red)} red" + ("" if on_device else ", all of them planned"))
    surprise = bool(found["blocks"]) and found["blocks"][0]["launches"] != found["planned"]
    if surprise:
        print(f"RED: a block launches {found['blocks'][0]['launches']}, planned {found['planned']}")
    return 1 if red or surprise else 0


def processor_name(on_device: bool) -> str:
    if on_device:
        of = torch.cuda.get_device_properties("cuda")
        return f"compute capability {of.major}.{of.minor} and {of.multi_processor_count} multiprocessors"
    return f"compute capability {HOPPER[0] / 10:.1f} and {HOPPER[1]} multiprocessors"


if __name__ == "__main__":
    sys.exit(main())
