"""The modality discriminator against its equation written out."""

from __future__ import annotations

import pytest
import torch

from cmgan_dist.config.fields import ModelConfig
from cmgan_dist.models.discriminators import ModalityDiscriminator
from cmgan_dist.models.generator import SLOPE


def written_out(judge: ModalityDiscriminator, common: torch.Tensor, labels: torch.Tensor | None) -> list[float]:
    """Miyato & Koyama, eq. 4, row by row: out(h) + <h, mean of the embeddings of the row's classes>."""
    logits = []
    for i, row in enumerate(common):
        h = judge.hidden.weight @ row + judge.hidden.bias
        h = torch.where(h > 0, h, SLOPE * h)
        logit = (judge.out.weight[0] * h).sum() + judge.out.bias[0]
        own = [] if labels is None else labels[i].nonzero()[:, 0].tolist()
        for label in own:
            assert judge.classes is not None
            logit = logit + (h * judge.classes.weight[:, label]).sum() / len(own)
        logits.append(logit.item())
    return logits


@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("classes", [0, 3])
def test_the_projection_discriminator_row_by_row(classes: int, spectral: bool) -> None:
    torch.manual_seed(0)
    config = ModelConfig(common_dim=5, discriminator_dim=7, spectral_norm=spectral)
    judge, common = ModalityDiscriminator(classes, config).eval(), torch.randn(4, 5)
    labels = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]]).bool() if classes else None
    assert judge(common, labels).tolist() == pytest.approx(written_out(judge, common, labels), abs=1e-5)
    if classes:
        assert judge(common, None).tolist() == pytest.approx(written_out(judge, common, None), abs=1e-5)
