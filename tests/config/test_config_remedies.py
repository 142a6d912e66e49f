"""What sentences on settings say to do leads out: a wrong command line, its sentence, and one that follows it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from cmgan_dist.config.cli import parse_arguments
from cmgan_dist.config.load import check_places, from_yaml, validate
from cmgan_dist.config.presets import preset
from cmgan_dist.errors import BadInput

SHARDED = "train.shard_backbones=true model.text.name=cnn"


def parsed(words: str) -> None:
    preset = [] if "--preset" in words else ["--preset", "smoke"]
    config, _ = parse_arguments([*preset, *words.split()])
    check_places(config)


PLACES = "--data data --output run "
WORDS = [
    ("", r"--data is missing: name a folder", ["--data data --output run"]),
    ("--data data", r"--output is missing: name a folder", ["--data data --output run"]),
    ("--data data --output s3://b/run", r"--output is a URL .* copy it here, name that", ["--data data --output run"]),
    (PLACES + "--preset smok", r"did you mean 'smoke'\?|presets are .*smoke", [PLACES + "--preset smoke"]),
    (
        PLACES + "loss=1",
        r"name a field of that section, such as loss\.adversarial=VALUE",
        [f"{PLACES} loss.adversarial=hinge"],
    ),
    ("--data data output=run", "write --output VALUE", ["--data data --output run"]),
    (PLACES + "optim.accumulate=3", "into such parts of 2 or more", [PLACES + "optim.accumulate=2"]),
    (
        PLACES + "stream.val_split=train",
        "are both 'train': use two splits",
        [PLACES + "stream.val_split=train stream.train_split=other", PLACES + "stream.val_split=other"],
    ),
    (
        PLACES + f"{SHARDED} train.compile=true",
        "set one to false",
        [PLACES + f"{SHARDED} train.compile=false", PLACES + "train.shard_backbones=false train.compile=true"],
    ),
    (
        PLACES + "train.shard_backbones=true",
        r"set model\.image\.trainable or model\.text\.trainable to true, or train\.shard_backbones to false",
        [
            PLACES + "train.shard_backbones=true model.image.trainable=true model.image.name=resnet18",
            PLACES + "train.shard_backbones=true model.text.trainable=true model.text.name=sentence",
            PLACES + "train.shard_backbones=false",
        ],
    ),
    (
        PLACES + "train.compile=true loss.adversarial=wgan-gp",
        r"set train\.compile to false",
        [PLACES + "train.compile=false loss.adversarial=wgan-gp"],
    ),
]


@pytest.mark.parametrize(("wrong", "sentence", "right"), WORDS)
def test_a_command_line(wrong: str, sentence: str, right: list[str]) -> None:
    with pytest.raises(BadInput, match=sentence):
        parsed(wrong)
    for words in right:
        parsed(words)


TEXTS = [
    ("optim: {}\noptim: {}\n", "has 'optim' twice in one place: keep one", "optim: {}\n"),
    ("loss: 3\n", "loss is 3, expected a mapping", "loss: {intra: 3}\n"),
    ("loss: {intar: 1}\n", r"did you mean loss\.intra\?", "loss: {intra: 1}\n"),
    ("- a\n", "it is not a mapping of fields", "optim: {accumulate: 1}\n"),
    ("preset: smok\n", "smoke", "preset: smoke\n"),
    ("loss: [\n", "is not YAML .*: mend it", "loss: {}\n"),
    ("optim: {accumulate: 1.5}\n", "optim.accumulate is 1.5, expected int", "optim: {accumulate: 2}\n"),
]


@pytest.mark.parametrize(("wrong", "sentence", "right"), TEXTS)
def test_a_configuration(wrong: str, sentence: str, right: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        from_yaml(wrong, "config.yaml")
    from_yaml(right, "config.yaml")


@pytest.mark.parametrize(
    ("name", "value"), [("loss.adversarial", "x"), ("stream.sampling", "x"), ("train.tracker", "x")]
)
def test_each_choice_that_is_offered_is_one(name: str, value: str) -> None:
    section, field = name.split(".")
    with pytest.raises(BadInput) as caught:
        from_yaml(f"{section}: {{{field}: x}}", "config.yaml")
    offered = str(caught.value).partition("expected one of ")[2].split(", ")
    assert len(offered) > 1
    for choice in offered:
        from_yaml(f"{section}: {{{field}: {choice}}}", "config.yaml")


def test_a_configuration_file_of_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes("output: B\u00e4r\ndata: data\n".encode("latin-1"))
    words = ["--config", str(path)]
    with pytest.raises(BadInput, match=r"is not UTF-8 \(byte 9\): save it as UTF-8"):
        parse_arguments(words)
    path.write_text(path.read_bytes().decode("latin-1"), encoding="utf-8")
    parse_arguments(words)
    with pytest.raises(BadInput, match="name the preset inside the config file"):
        parse_arguments([*words, "--preset", "smoke"])
    path.write_text("preset: smoke\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert parse_arguments(words)[0].preset == "smoke"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("optim.generator_rl", 1e-3, r"optim\.generator_rl is no config field: did you mean optim\.generator_lr\?"),
        ("epochs", 3, "epochs is no config field"),
        ("stream", None, "stream is None: give a StreamConfig, as preset"),
        ("model.image", "resnet18", r"model\.image is 'resnet18': give a ImageBackboneConfig"),
    ],
)
def test_an_attribute_that_is_no_field_is_not_lost(path: str, value: object, said: str) -> None:
    config = preset("smoke")
    *sections, leaf = path.split(".")
    setattr(functools.reduce(getattr, sections, config), leaf, value)
    with pytest.raises(BadInput, match=said):
        validate(config)
    with pytest.raises(BadInput, match="config is 'smoke': give a Config, as preset"):
        validate("smoke")  # type: ignore[arg-type]
    validate(preset("smoke"))
