"""Compare shared layers compiled as one graph, statistics over all processes, with eager torch; see test_gradients.py.

torchrun --nproc_per_node W tests/distributed/compile_worker.py torch|triton    (triton with TRITON_INTERPRET=1)
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor

from cmgan_dist.config.fields import ModelConfig
from cmgan_dist.distributed.engine import AdamSettings
from cmgan_dist.distributed.processes import Parallel
from cmgan_dist.models.generator import SharedLayers


def main() -> None:
    path = sys.argv[1]
    parallel = Parallel()
    torch.manual_seed(0)
    eager = SharedLayers(ModelConfig(hidden_dim=6, common_dim=8, kernels="torch"))
    compiled = copy.deepcopy(eager)
    compiled.norm[0].kernels = path
    for layers in (eager, compiled):
        parallel.engine(layers, AdamSettings(0.0, 0.5, 0.999))
    torch.manual_seed(parallel.rank)
    inputs = [torch.randn(rows, 6, requires_grad=True) for rows in (5 + parallel.rank, 4)]
    found: list[list[Tensor]] = []
    # The interpreter runs on memory: nothing below dynamo may trace its kernels
    # (test_operators.py does, on fake tensors).
    backend = "aot_eager" if path == "torch" else "eager"
    for run in (eager, torch.compile(compiled, fullgraph=True, backend=backend)):
        outputs = run(*inputs)
        wanted = (*inputs, *(eager if run is eager else compiled).parameters())
        made = torch.autograd.grad(sum(out.pow(3).sum() for out in outputs), wanted)
        found.append([*outputs, *made])
    found[0] += eager.buffers()
    found[1] += compiled.buffers()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if parallel.main:
        print(f"{path}: one graph on {parallel.world}")
    parallel.close()


if __name__ == "__main__":
    main()
