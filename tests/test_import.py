"""``import fusekern`` stays light: each check in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

PROBE = """
import json, sys, time
import torch, numpy
before = set(sys.modules)
start = time.perf_counter()
import fusekern
seconds = time.perf_counter() - start
new = sorted({name.split(".")[0] for name in set(sys.modules) - before})
print(json.dumps({"seconds": seconds, "new": new, "version": fusekern.__version__}))
"""


def _probe(code: str) -> dict | list:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def test_import_needs_torch_and_numpy_alone_and_is_quick():
    probe = _probe(PROBE)
    outsiders = set(probe["new"]) - {"fusekern"} - set(sys.stdlib_module_names)
    assert not outsiders
    assert probe["seconds"] < 0.3  # 0.01 s on an idle core
    assert probe["version"] == "0.1.0"


def test_nothing_of_the_train_side_is_needed():
    """The layer and the info page work where every optional package refuses to be imported."""
    code = """
import sys
for name in ("timm", "open_clip", "accelerate", "PIL", "torchvision", "triton", "jsonargparse", "yaml", "matplotlib"):
    sys.modules[name] = None
import torch, fusekern, fusekern.info
fusekern.info.render(fusekern.info.collect())
layer = fusekern.ConvFormer(16, blocks=1)
print(list(layer(torch.zeros(1, 16, 6, 6), torch.ones(3, 16)).score.shape))
"""
    assert _probe(code) == [1, 3, 6, 6]


def test_public_names_exist():
    import fusekern

    for name in fusekern.__all__:
        assert hasattr(fusekern, name)
    for module in (fusekern.ops, fusekern.nn):
        assert module.__all__ == sorted(module.__all__)
        for name in module.__all__:
            assert getattr(module, name).__doc__
