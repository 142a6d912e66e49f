"""What turns a raw image or text into a feature vector: timm models, a sentence CNN, sentence-transformers models, and
the towers of open_clip (`models.clip`), by the names in a config.

Shapes: B rows, L words or tokens of the longest text of a batch, F feature dimension."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmgan_dist.config.fields import ImageBackboneConfig, TextBackboneConfig
from cmgan_dist.errors import BadInput
from cmgan_dist.kernels.dropout import dropout
from cmgan_dist.models.backbone import ImageBackbone, PixelBackbone, TextBackbone, TextInput, raw_texts
from cmgan_dist.models.clip import ClipImageBackbone, ClipTextBackbone, is_open_clip, made_for
from cmgan_dist.models.vocabulary import BOUND, PAD, Vocabulary, load_word_vectors
from cmgan_dist.models.weights import (
    LITE_MEAN,
    LITE_STD,
    UNREADABLE,
    check_folder,
    first_line,
    in_package,
    is_lite,
    load_strictly,
    read_weights,
)

CPU_IMAGES = 8
"""Images that a CPU takes at a time: with 64, half the time goes into fetching memory for activations."""
TEXTS, CPU_TEXTS = 64, 32
"""Texts that a backbone takes at a time, and at most on a CPU, where 64 take a quarter longer."""

# timm, sentence_transformers and open_clip take seconds to import: only the backbones that need them do.


# ---------------------------------------------------------------------------------------------- image: timm


class TimmBackbone(PixelBackbone):
    """A timm backbone is any timm model without its classifier: normalisation, and the pooled features before it.

    For VGG these are fc7, the second hidden layer of 4096 after its ReLU, which is what Caffe's in-place fc7 holds."""

    def __init__(self, config: ImageBackboneConfig) -> None:
        """Raises BadInput naming the field."""
        import timm

        name = config.name
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), 3)
            hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
            raise BadInput(f"model.image.name is '{name}', which is not a timm model: {hint}")
        fixed = timm.get_pretrained_cfg_value(name, "fixed_input_size")
        size = {"img_size": config.image_size} if fixed else {}
        try:
            model = timm.create_model(name, pretrained=config.weights == "hub", num_classes=0, **size)
        except (ArithmeticError, *UNREADABLE) as error:
            ways = ["give the path of a file as model.image.weights"] * (config.weights == "hub")
            ways += [f"set another model.image.image_size than {config.image_size}"] * bool(fixed)
            raise BadInput(
                f"model.image: timm cannot make {name} with weights '{config.weights}' ({first_line(error)}): "
                f"{', or '.join([*ways, 'name another model'])}"
            ) from None
        mean, std = model.default_cfg["mean"], model.default_cfg["std"]
        if config.weights not in ("", "hub"):
            state = read_weights(config.weights)
            if is_lite(state):
                mean, std = LITE_MEAN, LITE_STD
            load_strictly(model, state, config.weights)
        super().__init__(model, config, mean, std)
        if config.checkpoint and config.trainable:
            _checkpoint_activations(model, name)
        self.settle()


def _checkpoint_activations(model: nn.Module, name: str) -> None:
    """Raises BadInput when timm cannot do it for this model."""
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError):
        raise BadInput(
            f"model.image.checkpoint: timm has no activation checkpointing for {name}: set it to false, or use "
            "optim.accumulate to save memory"
        ) from None

    def momentum_once(norm: nn.Module, _: object, momentum: float | None) -> None:
        # in the backward pass the rows come by a second time and must not count again
        norm.momentum = 0.0 if torch._C._current_graph_task_id() != -1 else momentum  # type: ignore[assignment]

    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.register_forward_pre_hook(partial(momentum_once, momentum=part.momentum))


def image_size_of(config: ImageBackboneConfig) -> int | None:
    """Return the side in pixels of the square that an image backbone is made for, None where it takes any.

    Raises BadInput."""
    if is_open_clip(config.name):
        return made_for(config, "model.image")
    import timm

    fixed = timm.is_model(config.name) and timm.get_pretrained_cfg_value(config.name, "fixed_input_size")
    return int(timm.get_pretrained_cfg_value(config.name, "input_size")[-1]) if fixed else None


def build_image_backbone(config: ImageBackboneConfig, feature_dim: int | None = None) -> ImageBackbone:
    """Build the image backbone of a config; `feature_dim` is F of precomputed features. Raises BadInput naming the
    field."""
    if config.name == "features":
        if feature_dim is None:
            raise BadInput("model.image.name is 'features' but the data holds raw images: name an image backbone")
        return ImageBackbone(feature_dim, trainable=False)
    return ClipImageBackbone(config) if is_open_clip(config.name) else TimmBackbone(config)


# ---------------------------------------------------------------------------------------------- text: sentence CNN


class SentenceCNN(TextBackbone):
    """The sentence CNN is convolutions over word vectors, ReLU, max over time (Y. Kim, EMNLP 2014, section 2), always
    trained.

    A convolution of width k is taken wherever it touches a word, k - 1 zero vectors standing on both sides of the text,
    as in Kim's code; so a text has the same feature however far its batch is padded."""

    def __init__(self, config: TextBackboneConfig, vocabulary: Vocabulary, vectors: np.ndarray | None = None) -> None:
        """`vectors` [words, word_dim]: None draws them. They are trained if `config.trainable`, else as they are
        ("static"); drawn ones are always trained."""
        super().__init__(len(config.kernel_sizes) * config.channels, trainable=True)
        self.vocabulary, self.max_tokens, self.dropout = vocabulary, config.max_tokens, config.dropout
        table = torch.empty(len(vocabulary), config.word_dim).uniform_(-BOUND, BOUND)
        if vectors is not None:
            table[-len(vectors) :] = torch.from_numpy(vectors)
        table[PAD] = 0
        if vectors is None or config.trainable:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)
        self.kernel_sizes = config.kernel_sizes
        self.convolutions = nn.ModuleList(
            nn.Conv1d(config.word_dim, config.channels, k, padding=k - 1) for k in config.kernel_sizes
        )

    def tokenise(self, texts: list[str] | Tensor, device: torch.device | str = "cpu") -> TextInput:
        """Return {"ids": int64 [B, L]} of B texts, cut at `max_tokens`, with 0 behind the end."""
        ids = [torch.tensor(self.vocabulary.encode(text)[: self.max_tokens]) for text in raw_texts(texts)]
        return {"ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD).to(device)}

    def forward(self, tokens: TextInput) -> Tensor:
        assert isinstance(tokens, Mapping)
        ids = tokens["ids"]
        words = (ids != PAD).unsqueeze(1)  # [B, 1, L]
        x = F.embedding(ids, self.table).transpose(1, 2) * words  # [B, D, L]
        pooled = []
        for k, convolution in zip(self.kernel_sizes, self.convolutions, strict=True):
            maps = F.relu(convolution(x))  # [B, channels, L + k - 1], the window at i ends with word i
            # Windows that touch a word start before the text ends; ReLU leaves nothing below 0, so 0 never wins.
            touched = F.pad(words, (k - 1, 0), value=True)
            pooled.append((maps * touched).amax(dim=2))
        return dropout(torch.cat(pooled, dim=1), self.dropout, self.training).float()


# ---------------------------------------------------------------------------------------------- text: sentence encoder


class SentenceEncoder(TextBackbone):
    """A sentence encoder is a sentence-transformers model, pooled and normalised as that model's own ``encode``
    does."""

    def __init__(self, config: TextBackboneConfig) -> None:
        """Raises BadInput naming the field."""
        weights = config.weights
        if weights.startswith("package:"):
            where = str(in_package(weights, ("modules.json",), "model.text.weights").parent)
        elif weights.startswith("hub:"):
            where = weights.removeprefix("hub:")
        elif (Path(weights) / "modules.json").is_file():
            where = weights
        else:
            raise BadInput(
                f"model.text.weights is '{weights}', which is not the folder of a sentence-transformers model: "
                "give such a folder, 'hub:NAME' or 'package:NAME'"
            )
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # it draws one for reading a local file
        try:
            check_folder(Path(where))
            model = SentenceTransformer(where, device="cpu")
            model.encode("a", show_progress_bar=False)  # what its files say of the way there is not looked at before
        except (ImportError, *UNREADABLE) as error:
            raise BadInput(
                f"model.text.weights: '{weights}' cannot be loaded ({first_line(error)}): restore its files, or name "
                "another model"
            ) from None
        _check_layers(model, weights)
        _check_tokeniser(model, weights)
        _limit_tokens(model, config)
        for module in model.modules():
            if getattr(module, "pooler", None) is not None:
                module.pooler = None  # its output is not used: it would be trained without a gradient
        _check_pools(model, config)
        super().__init__(model.get_embedding_dimension() * len(config.pools), config.trainable)
        self.model, self.pools = model, config.pools
        if config.checkpoint and config.trainable:
            _checkpoint_layers(model, config)
        self.settle()

    def tokenise(self, texts: list[str] | Tensor, device: torch.device | str = "cpu") -> TextInput:
        """Return the model's own tokens of B texts, each [B, L]."""
        tokens = self.model.preprocess(raw_texts(texts))
        return {name: value.to(device) for name, value in tokens.items() if isinstance(value, Tensor)}

    def lengths(self, texts: list[str]) -> list[int]:
        tokens = self.tokenise(texts)
        if "attention_mask" not in tokens:  # a model without padding
            return super().lengths(texts)
        assert isinstance(tokens, Mapping)
        return [int(n) for n in tokens["attention_mask"].sum(1)]

    def forward(self, tokens: TextInput) -> Tensor:
        assert isinstance(tokens, Mapping)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            made = self.model(dict(tokens))
            return torch.cat([self._pooled(pool, made) for pool in self.pools], dim=1)

    @staticmethod
    def _pooled(pool: str, made: Mapping[str, Tensor]) -> Tensor:
        """Return one pool [B, D] of what the model made, float32."""
        if pool == "sentence":
            return made["sentence_embedding"].float()
        words = made["token_embeddings"].float()  # [B, L, D]
        if pool == "cls":
            return F.normalize(words[:, 0], dim=1)
        padding = ~made["attention_mask"].bool().unsqueeze(2)
        return F.normalize(words.masked_fill(padding, -torch.inf).amax(1), dim=1)


def _limit_tokens(model: Any, config: TextBackboneConfig) -> None:
    """Raises BadInput where a model's texts have no length that can be set, as those of averaged word vectors, which
    have no pools of tokens and nothing to checkpoint either."""
    limit = model.max_seq_length
    try:
        model.max_seq_length = config.max_tokens if limit is None else min(limit, config.max_tokens)
    except AttributeError:
        raise BadInput(
            f"model.text.weights: '{config.weights}' is a {type(model[0]).__name__}, whose texts cannot be cut at "
            "model.text.max_tokens: name a transformer"
        ) from None
    marks = getattr(model.tokenizer, "num_special_tokens_to_add", int)()
    if config.max_tokens <= marks:
        raise BadInput(
            f"model.text.max_tokens is {config.max_tokens} and {marks} tokens of each text are marks of "
            f"'{config.weights}', so that no word is left: set it to {marks + 1} or more"
        )


def _check_pools(model: Any, config: TextBackboneConfig) -> None:
    """Raises BadInput where the pools are none, or of tokens that the model makes no features of."""
    pools = config.pools
    if not pools or len(set(pools)) < len(pools):
        raise BadInput(f"model.text.pools is '{','.join(pools)}': name one or more pools, each once")
    if set(pools) - {"sentence"}:
        with torch.no_grad():
            made = model(model.preprocess(["a"]))
        if not {"token_embeddings", "attention_mask"} <= made.keys():
            raise BadInput(
                f"model.text.pools is '{','.join(pools)}', and '{config.weights}' makes no features of tokens: set it "
                "to sentence"
            )


def _checkpoint_layers(model: Any, config: TextBackboneConfig) -> None:
    """Raises BadInput when the model's library cannot do it."""
    try:
        model[0].auto_model.activation_checkpointing_enable({"use_reentrant": False})
    except (AttributeError, ValueError):
        raise BadInput(
            f"model.text.checkpoint: '{config.weights}' has no layers that can be checkpointed: set it to false"
        ) from None


def _check_layers(model: Any, weights: str) -> None:
    """Raises BadInput where a model's file lacks weights: transformers draws them, and every text would have another
    feature in the next process."""
    from transformers import PreTrainedModel

    inner = getattr(model[0], "auto_model", None)
    if not isinstance(inner, PreTrainedModel):
        return
    _, found = type(inner).from_pretrained(inner.name_or_path, config=inner.config, output_loading_info=True)
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))  # which is not used
    if missing:
        raise BadInput(
            f"model.text.weights: '{weights}' lacks {len(missing)} of its model's weights ({', '.join(missing[:3])}"
            f"{', …' * (len(missing) > 3)}): restore its files, or name another model"
        )


def _check_tokeniser(model: Any, weights: str) -> None:
    """Raises BadInput where a model's tokeniser has no words, as without its files, or tokens that the model has not:
    every text would have the same feature, or none."""
    embedded = getattr(model[0], "auto_model", None)
    if embedded is None or not hasattr(model.tokenizer, "get_vocab"):
        return
    ids = model.tokenizer.get_vocab()
    if ids.keys() <= set(model.tokenizer.all_special_tokens):
        raise BadInput(f"model.text.weights: the tokeniser of '{weights}' has no words: restore its tokenizer.json")
    rows = embedded.get_input_embeddings().num_embeddings
    if max(ids.values()) >= rows:
        raise BadInput(
            f"model.text.weights: the tokeniser of '{weights}' has a token {max(ids.values())}, the model {rows} "
            "tokens: restore its tokenizer.json"
        )


def _build_cnn(config: TextBackboneConfig, vocabulary: Vocabulary | None) -> SentenceCNN:
    if vocabulary is None:
        raise BadInput("model.text.name is 'cnn', which needs a vocabulary: build one from the training texts")
    if not config.weights:
        return SentenceCNN(config, vocabulary)
    vectors, _ = load_word_vectors(config.weights, vocabulary.words)
    if vectors.shape[1] != config.word_dim:
        raise BadInput(
            f"model.text.word_dim is {config.word_dim} but the vectors in {config.weights} have {vectors.shape[1]} "
            f"numbers: set it to {vectors.shape[1]}"
        )
    return SentenceCNN(config, vocabulary, vectors)


def build_text_backbone(
    config: TextBackboneConfig, feature_dim: int | None = None, vocabulary: Vocabulary | None = None
) -> TextBackbone:
    """Build the text backbone of a config; `feature_dim` is F of precomputed features, `vocabulary` the CNN's.

    Raises BadInput naming the field."""
    if config.name == "features":
        if feature_dim is None:
            raise BadInput("model.text.name is 'features' but the data holds raw texts: name a text backbone")
        return TextBackbone(feature_dim, trainable=False)
    builders: dict[str, Callable[[], TextBackbone]] = {
        "cnn": lambda: _build_cnn(config, vocabulary),
        "sentence": lambda: SentenceEncoder(config),
    }
    if is_open_clip(config.name):
        return ClipTextBackbone(config)
    if config.name not in builders:
        raise BadInput(f"model.text.name is '{config.name}', expected features, cnn, sentence or open_clip:MODEL")
    return builders[config.name]()


# ---------------------------------------------------------------------------------------------- many items, no gradient


@torch.no_grad()
def image_features(backbone: ImageBackbone, images: Tensor) -> Tensor:
    """Return the features float32 [n, F] of n images, or of n features, which are on the backbone's device.

    A CPU takes few images at a time, which is twice as fast."""
    pieces = images.split(CPU_IMAGES) if images.ndim > 2 and not images.is_cuda else [images]
    return torch.cat([backbone(piece) for piece in pieces])


@torch.no_grad()
def text_features(
    backbone: TextBackbone, texts: list[str] | Tensor, device: torch.device | str, size: int = TEXTS
) -> Tensor:
    """Return the features float32 [m, F] of m texts, or of features [m, F], on `device`.

    `size` texts (CPU_TEXTS on a CPU) go at a time, those of as many tokens together: by characters OpenMoji's names had
    a third more tokens, all of them padding."""
    if isinstance(texts, Tensor):
        return backbone(backbone.tokenise(texts, device))
    size = min(size, CPU_TEXTS) if torch.device(device).type == "cpu" else size
    lengths = backbone.lengths(texts) if len(texts) > size else [0] * len(texts)
    order = sorted(range(len(texts)), key=lengths.__getitem__)
    made = torch.empty(len(texts), backbone.dim, device=device)
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        made[rows] = backbone(backbone.tokenise([texts[i] for i in rows], device))
    return made
