"""What holds for all tests."""

import os

# A graph that was compiled before an op's results changed is found again by its inputs, and runs into the change.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
