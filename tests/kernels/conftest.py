"""The same numbers in every run, and products in the precision of their dtype."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
