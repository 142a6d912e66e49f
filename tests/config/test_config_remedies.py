"""What sentences on settings say to do leads out: a wrong command line, its sentence, and one that follows it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest

from cmgan_dist.config.cli import parse, parse_arguments
from cmgan_dist.config.commands import choose
from cmgan_dist.config.fields import Range
from cmgan_dist.config.load import check_places, from_yaml, validate
from cmgan_dist.config.paths import find_setting
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
    (
        PLACES + "stream.global_batch=60 stream.logical_streams=8",
        "does not divide the 60 samples .*: set it to 4 or another divisor of theirs, or to 0",
        [PLACES + f"stream.global_batch=60 stream.logical_streams={n}" for n in (4, 15, 0)],
    ),
    (
        PLACES + "stream.global_batch=60 stream.logical_streams=12 optim.accumulate=2",
        "the 30 samples of .* / optim.accumulate 2: set it to 6 or",
        [PLACES + "stream.global_batch=60 stream.logical_streams=6 optim.accumulate=2"],
    ),
    (PLACES + "loss.intra=-1", "loss.intra is -1.0, expected .*0 to", [PLACES + "loss.intra=0 loss.inter=1"]),
    (
        PLACES + "stream.logical_streams=2000000",
        r"stream.logical_streams is 2000000, expected .*0 to",
        [PLACES + "stream.logical_streams=0"],
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
    ("stream: {weights: 1}\n", "stream.weights is 1, expected a list", "stream: {weights: [1]}\n"),
    ("[" * 2000, "is nested too deeply: write settings only", "preset: smoke\n"),
    ("output: 2026-99-99\n", "has a value that is not of its type .*: mend it", "output: '2026-99-99'\n"),
    (
        f"a: &a [{'1, ' * 400}]\nb: [{'*a, ' * 400}]\n",
        "holds more than 100000 values.*: keep to the settings",
        "preset: smoke\n",
    ),
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
        ("model.text.kernel_sizes", (), "kernel_sizes is empty: name the width of one convolution or more"),
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


def test_a_configuration_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: None, f"config file {path} does not exist: check the path"),
        (path.mkdir, f"config file {path} is a folder: name a YAML file"),
        (lambda: os.mkfifo(path), f"config file {path} is a pipe or a device: name a YAML file"),
        (lambda: path.symlink_to(path), f"config file {path} cannot be read .*: check the path and its permissions"),
        (
            lambda: path.write_text("#" * (1 << 20) + "\n"),
            f"config file {path} is larger than 1 MiB: name a YAML file of",
        ),
    ]
    (tmp_path / "right.yaml").write_text("preset: smoke\n")
    for make, sentence in cases:
        make()
        with pytest.raises(BadInput, match=sentence):
            parse_arguments(["--config", str(path), *PLACES.split()])
        parse_arguments(["--config", str(tmp_path / "right.yaml"), *PLACES.split()])
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def test_a_number_of_a_program_that_is_not_given() -> None:
    @dataclasses.dataclass
    class Arguments:
        sizes: Annotated[tuple[int, ...], Range(1, 9)] = (1,)

    with pytest.raises(BadInput, match="--sizes is empty: name one number or more, each from 1 to 9"):
        parse(Arguments, ["--sizes"], prog="program")
    assert parse(Arguments, ["--sizes", "3", "9"], prog="program").sizes == (3, 9)


def test_a_command_that_is_not_named() -> None:
    with pytest.raises(BadInput, match=r"name a command: train, search$") as caught:
        choose(["train", "search"], [])
    for name in str(caught.value).partition(": ")[2].split(", "):
        assert choose(["train", "search"], [name]) == name


def test_a_section_in_the_place_of_a_field() -> None:
    for section in ("optim", "model.image"):
        with pytest.raises(
            BadInput, match=f"{section} is a section of the config: name a field in it, such as"
        ) as caught:
            find_setting(section)
        find_setting(str(caught.value).rpartition(" ")[2])
