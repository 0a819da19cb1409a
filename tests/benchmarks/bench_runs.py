"""The benchmarks, and tiny runs of them."""

from __future__ import annotations

import json

from bench import common, conv2former, downsample, former, former2conv, inverted_bottleneck, layer, score_map, text_path

MODULES = {
    module.CASES[0].op: module
    for module in (former2conv, conv2former, score_map, downsample, inverted_bottleneck, former, text_path, layer)
}
ALL_CASES = [case for module in MODULES.values() for case in module.CASES]
TINY = ["--quick", "--backend", "reference", "--seconds-a-pass", "0.01", "--shapes", "1,128,9,5"]
FAST = ["--peers", "reference", "eager"]
# Ways in which a kernel may be wrong.
WRONG = {
    "values": lambda true: lambda *a, **k: true(*a, **k) * 1.001,
    "gradients": lambda true: lambda *a, **k: _scaled_gradient(true(*a, **k)),
    "a crash": lambda true: lambda *a, **k: 1 / 0,
}


def _scaled_gradient(out):
    return out.detach() + 1.01 * (out - out.detach())


def run(op: str, out, *options: str) -> tuple[int, dict]:
    code = common.main(MODULES[op].CASES, [*TINY, *FAST, "--out", str(out), *options])
    return code, json.loads(out.read_text())
