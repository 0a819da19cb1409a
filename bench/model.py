"""The whole segmenter: images a second, and on CUDA peak memory, vanilla beside guided by text.

    python -m bench.model [--device cpu|cuda] [--size 512] [--batch 1 ...] [--quick] [--out FILE]

MobileNetV2 with Semantic FPN for ADE20K's 150 classes, as ``fusekern train ade20k/mobilenetv2-*`` builds it, with
random weights and hashed text: neither changes a time. ``reference`` and ``auto`` are the backends of the fusion layer.
Inference makes the label map; a training step is forward, both losses and backward, without the optimizer. The two
guided models are compared first: their logits on one image must agree as PyTorch's own layouts do.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench import report
from bench.case import LAYOUTS
from bench.timing import STATISTIC, Burst, interleaved, keep_freed_memory
from fusekern.config import TextConfig
from fusekern.data.spec import load_spec
from fusekern.models import Segmenter, build_segmenter, embed_names
from fusekern.recipes import load

MODELS = {
    "vanilla": ("ade20k/mobilenetv2-fpn",),
    "reference": ("ade20k/mobilenetv2-convformer", "--model.guidance.backend=reference"),
    "auto": ("ade20k/mobilenetv2-convformer", "--model.guidance.backend=auto"),
}
DTYPES = {"cpu": (None, torch.bfloat16), "cuda": (None, torch.bfloat16, torch.float16)}  # of autocast


def build(name: str, device: str) -> Segmenter:
    recipe = load(*MODELS[name], "--model.backbone.weights=none")
    names = load_spec(recipe.data.dataset).names
    text = embed_names(names, TextConfig(source="hash", width=512)).vectors if name != "vanilla" else None
    model = build_segmenter(recipe.model, recipe.data, len(names), text, seed=0)
    return model.to(device, memory_format=torch.channels_last)


def infer(model: Segmenter, image: Tensor, dtype: torch.dtype | None) -> Tensor:
    model.eval()
    with torch.inference_mode(), torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        return model.predict_logits(image, tuple(image.shape[2:])).argmax(1)


def step(model: Segmenter, image: Tensor, label: Tensor, dtype: torch.dtype | None) -> None:
    model.train()
    with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        losses = model.loss(model(image), label)
    sum(losses.values()).backward()
    model.zero_grad()


def disagreement(models: dict[str, Segmenter], image: Tensor) -> str:
    """What is wrong with ``auto`` beside ``reference``, in fp32; empty if nothing is."""
    logits = []
    for name, layout in (("reference", "channels_last"), ("reference", "NCHW"), ("auto", "channels_last")):
        with torch.inference_mode():
            logits.append(models[name].eval()(image.contiguous(memory_format=LAYOUTS[layout])).logits)
    apart, own = (logits[2] - logits[0]).abs().max().item(), (logits[1] - logits[0]).abs().max().item()
    allowed = 4 * own + 1e-5 * logits[0].abs().max().item()
    return "" if apart <= allowed else f"logits differ by {apart:.3g}, PyTorch's layouts by {own:.3g}"


def measure(models: dict[str, Segmenter], batch: int, size: int, dtype, device: str, seconds: float) -> dict:
    generator = torch.Generator(device).manual_seed(0)
    image = torch.rand(batch, 3, size, size, generator=generator, device=device)
    image = image.contiguous(memory_format=torch.channels_last)
    label = torch.randint(150, (batch, size, size), generator=generator, device=device)
    row = {"batch": batch, "size": size, "dtype": "fp32" if dtype is None else f"autocast {report.short(dtype)}"}
    row["statistic"] = STATISTIC[device]
    for which, call in (("inference", infer), ("training", partial(step, label=label))):
        runs = {name: partial(call, model, image, dtype=dtype) for name, model in models.items()}
        row[which] = interleaved({name: Burst(run) for name, run in runs.items()}, device, seconds)
        if device == "cuda":
            row[f"{which}_peak_bytes"] = {name: peak(run) for name, run in runs.items()}
    return row


def peak(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", type=int, default=512, help="side of the images")
    parser.add_argument("--batch", type=int, nargs="+", help="default 1 on a CPU; 1, 4 and 16 on CUDA")
    parser.add_argument("--quick", action="store_true", help="one small batch, short rounds, result under runs/bench")
    parser.add_argument("--out", type=Path, help="JSON; default bench/results/model-DEVICE.json")
    parser.add_argument("--seconds-a-pass", type=float, default=10.0)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "no CUDA device\n")
    if options.quick:
        options.size, options.seconds_a_pass = 128, 0.2
    folder = report.ROOT / ("runs/bench" if options.quick else "bench/results")
    out = options.out or folder / f"model-{report.slug(options.device)}.json"
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    heap_kept = options.device == "cpu" and keep_freed_memory()
    models = {name: build(name, options.device) for name in MODELS}
    wrong = disagreement(models, torch.rand(1, 3, 224, 224, device=options.device))
    if wrong:
        print(f"RED, no speed: {wrong}")
        return 1
    rows = []
    for batch in options.batch or ([1] if options.device == "cpu" or options.quick else [1, 4, 16]):
        for dtype in DTYPES[options.device][: 1 if options.quick else None]:
            rows.append(measure(models, batch, options.size, dtype, options.device, options.seconds_a_pass))
            print("\n".join(report.model_lines(rows)[2 * len(rows) :]), flush=True)
    command = shlex.join(["python", "-m", "bench.model", *(sys.argv[1:] if arguments is None else arguments)])
    facts = {"op": "model", **report.describe(options.device), "command": command, "freed_memory_kept": heap_kept}
    report.write({**facts, "rows": rows}, out)
    print("\n".join(["", *report.model_lines(rows), "", str(out)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
