"""The losses of every preset are those that were recorded."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cmgan_dist.presets import PRESETS
from tests.golden.record import GOLDEN, curve

# fp32 sums in another order (threads, processors) move the curves by less than a tenth of this after 50 batches.
TOLERANCE = {"first": 1e-3, "all": 5e-2}


@pytest.mark.parametrize("name", PRESETS)
def test_losses_follow_the_golden_curve(name: str) -> None:
    expected = json.loads((GOLDEN / f"{name}.json").read_text())
    found = curve(name)
    assert found.keys() == expected.keys()
    for term, values in expected.items():
        np.testing.assert_allclose(found[term][:5], values[:5], rtol=TOLERANCE["first"], atol=1e-3, err_msg=term)
        np.testing.assert_allclose(found[term], values, rtol=TOLERANCE["all"], atol=2e-2, err_msg=term)
