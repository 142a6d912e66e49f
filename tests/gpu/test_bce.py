"""The fused cross-entropy compiled and run on a GPU: all of tests/kernels/bce_cases.py."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.bce_cases import *  # noqa: F403

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
