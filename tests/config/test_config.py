"""Configs: validation, YAML there and back, the command line."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cmgan_dist.config.cli import join_data, parse_arguments
from cmgan_dist.config.fields import DATA_SEPARATOR, Config
from cmgan_dist.config.load import LOSS_TERMS, load_config, to_yaml, validate
from cmgan_dist.config.markers import Range
from cmgan_dist.config.paths import find_setting, get_value, settings, with_values
from cmgan_dist.config.presets import PRESETS, preset
from cmgan_dist.config.safe_yaml import MOST_BYTES, MOST_VALUES
from cmgan_dist.errors import BadInput
from cmgan_dist.training.run import check_same_run


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_survives_yaml(name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = validate(preset(name))
    assert config.preset == name
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


def test_every_field_has_a_docstring() -> None:
    """tyro shows them as help."""
    import ast
    import inspect

    from cmgan_dist.config import fields as module

    for cls in ast.parse(inspect.getsource(module)).body:
        if isinstance(cls, ast.ClassDef) and cls.name != "Config":
            body = cls.body[1:]
            for at, node in enumerate(body):
                if isinstance(node, ast.AnnAssign) and cls.name not in ("ModelConfig",):
                    assert isinstance(body[at + 1], ast.Expr), f"{cls.name}.{ast.unparse(node.target)}"


def test_partial_yaml_starts_from_the_preset_that_it_names(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "c.yaml"
    path.write_text("preset: smoke\noptim:\n  generator_lr: 1e-4\n")
    config = load_config(path)
    assert config.optim.generator_lr == 1e-4
    assert config.model.common_dim == preset("smoke").model.common_dim


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim: {generator_lrr: 1}", r"unknown config field optim.generator_lrr: did you mean optim.generator_lr\?"),
        ("optim: {generator_lr: fast}", "optim.generator_lr is 'fast', expected float"),
        ("optim: {generator_steps: 1.5}", "optim.generator_steps is 1.5, expected int"),
        ("loss: {adversarial: lsgan}", "loss.adversarial is 'lsgan', expected one of bce, hinge, wgan-gp"),
        ("preset: nope", "unknown preset 'nope'"),
        ("optim: [1]", "optim is .1., expected a mapping"),
        ("a: b: c", "is not YAML"),
        ("- 1", "is not a mapping"),
        ("[" * 100_000, "is nested too deeply"),
        ("data: 2026-99-99", "has a value that is not of its type"),
        ("loss: {inter: !!bool x}", "has a value that is not of its type"),
        ("train: {epochs: 010}", "010, which YAML 1.1 reads by another base than ten"),
        ("train: {epochs: 1:30}", "1:30, which YAML 1.1 reads by another base than ten"),
        ("train: {epochs: 1:30.5}", "1:30.5, which YAML 1.1 reads by another base than ten"),
        ('data: "\\x01\x01', "is not YAML"),
        ("loss: {inter: true}", "loss.inter is True, expected float"),
        (f"loss: {{inter: 1{'0' * 400}}}", r"loss.inter is 10+\.\.\., expected float"),
        (f"loss: {{adversarial: {'x' * 1000}}}", r"loss.adversarial is 'x+\.\.\., expected one of"),
        ('? "a\\nb"\n: 1', "unknown config field a b: known: preset"),
    ],
)
def test_bad_yaml_names_file_and_field(text: str, sentence: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=sentence) as caught:
        load_config(path)
    assert "bad.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("optim.generator_lr", -1.0), ("loss.inter", float("nan")), ("stream.global_batch", 1), ("train.epochs", 0.0)],
)
def test_values_out_of_range_are_named(field: str, value: float) -> None:
    config = Config()
    section, name = field.split(".")
    setattr(getattr(config, section), name, value)
    with pytest.raises(BadInput, match=f"{field} is {value}"):
        validate(config)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("model.text.dropout", 7.0, "is 7.0, expected 0 to 0.999"),
        ("model.text.kernel_sizes", (3, 0), "has 0, expected 1 to 1000"),
        ("model.text.kernel_sizes", (2.5,), "has 2.5, expected a whole number from 1 to 1000"),
        ("model.text.kernel_sizes", (), "is empty"),
        ("stream.weights", (1.0, 0.0), "has 0.0, expected 1e-09 to 1e\\+09"),
        ("stream.weights", (float("nan"),), "has nan, expected"),
        ("model.text.word_dim", 0, "is 0, expected"),
        ("model.text.channels", -1, "is -1, expected"),
        ("model.text.vocabulary_size", 0, "is 0, expected"),
        ("model.text.min_count", 0, "is 0, expected"),
        ("loss.inter", True, "is True, expected a number from 0"),
        ("optim.generator_steps", True, "is True, expected a whole number from 1 to 1000"),
        ("train.epochs", float("inf"), "is inf, expected"),
        ("stream.val_split", "test", "is 'test', and the test split has no part in training: use 'val'"),
        ("stream.train_split", "test", "is 'test', and the test split has no part in training: use 'train'"),
        ("stream.val_split", "train", "and stream.train_split are both 'train': use two splits"),
    ],
)
def test_a_value_that_is_impossible_is_named(path: str, value: Any, sentence: str) -> None:
    with pytest.raises(BadInput, match=f"^{path} {sentence}"):
        validate(with_values(Config(), {path: value}))


def test_a_run_without_a_loss_term_is_refused() -> None:
    nothing = {f"loss.{name}": 0.0 for name in LOSS_TERMS}
    with pytest.raises(BadInput, match=r"no loss term trains the generator: set one of loss\.intra, .* above 0"):
        validate(with_values(Config(), nothing))
    for name in nothing:
        validate(with_values(Config(), nothing | {name: 0.1}))


@pytest.mark.parametrize("term", [{"loss.r1": 1.0}, {"loss.adversarial": "wgan-gp"}])
def test_penalties_are_not_compiled(term: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"set train\.compile to false"):
        validate(with_values(Config(), {**term, "train.compile": True}))
    validate(with_values(Config(), term))


def test_every_number_has_a_range_and_its_default_lies_in_it() -> None:
    numbers = {path: setting for path, setting in settings().items() if setting.number}
    assert {"stream.weights", "model.text.kernel_sizes", "train.seed"} < numbers.keys()
    assert not numbers.keys() & {"train.report", "model.kernels", "data"}
    for path, setting in numbers.items():
        assert setting.range is not None, path
        assert setting.range.low < setting.range.high
    for path, setting in settings().items():
        assert setting.number or setting.range is None, f"{path} is no number and has a range"


def test_settings_are_every_leaf_of_a_config() -> None:
    def leaves(record: dict[str, Any], prefix: str = "") -> list[str]:
        return [
            leaf
            for name, value in record.items()
            for leaf in (leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name])
        ]

    record = dataclasses.asdict(Config())
    assert list(settings()) == leaves(record)
    assert get_value(Config(), "model.text.kernel_sizes") == record["model"]["text"]["kernel_sizes"]
    assert settings()["stream.max_bad_share"].range == Range(0, 1)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("optim.generator_lrr", "no config field: did you mean optim.generator_lr"),
        ("model.text", "a section of the config: name a field in it"),
        ("zzz", "no config field: see"),
    ],
)
def test_a_name_that_is_no_setting_is_named(path: str, sentence: str) -> None:
    for call in (lambda: find_setting(path), lambda: with_values(Config(), {path: 1})):
        with pytest.raises(BadInput, match=f"^{path} is {sentence}"):
            call()


RESUMABLE = {
    *("preset", "data", "output", "model.kernels", "train.select", "eval.objective", "eval.score"),
    *("eval.pair_head", "eval.class_head", "eval.bank", "eval.batch"),
    *("stream.workers", "stream.max_bad_share", "stream.cache", "stream.cache_gib", "stream.retries"),
    *("stream.timeout_s", "optim.generator_lr", "optim.discriminator_lr", "optim.clip"),
    *(f"train.{field.name}" for field in dataclasses.fields(Config().train) if field.name != "seed"),
}


def another(value: Any, kind: Any) -> Any:
    """A value of the same kind that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return (*value, 1)
    return next((choice for choice in getattr(kind, "__args__", ()) if choice != value), value + "x")


@pytest.mark.parametrize("path", settings())
def test_a_resumed_run_may_change_these_settings_and_no_others(path: str, tmp_path: Path) -> None:
    assert settings()[path].resumable == (path in RESUMABLE)
    (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    changed = with_values(Config(), {path: another(get_value(Config(), path), settings()[path].kind)})
    check_same_run(tmp_path, changed, [path])
    if path in RESUMABLE:
        check_same_run(tmp_path, changed)
    else:
        with pytest.raises(BadInput, match=f"was trained with {path} "):
            check_same_run(tmp_path, changed)


def test_faults_of_a_file_get_one_sentence(tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(BadInput) as caught:
            load_config(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path = tmp_path / "config.yaml"
    assert "does not exist" in refused(path)
    path.write_bytes("data: café\n".encode("latin-1"))
    assert "is not UTF-8 (byte 9)" in refused(path)
    path.write_bytes(b"# " + b"x" * MOST_BYTES)
    assert "is larger than 1 MiB" in refused(path)
    assert "is a folder" in refused(tmp_path)
    assert "cannot be read (Not a directory)" in refused(path / "below")
    assert "cannot be read (File name too long)" in refused(tmp_path / ("x" * 300))


def test_a_file_without_permission_gets_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("preset: smoke\n")
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root reads everything
        with pytest.raises(BadInput, match=r"config.yaml cannot be read \(Permission denied\)"):
            load_config(path)
    finally:
        os.seteuid(user)


def bomb(leaf: str, node: str) -> str:
    """A YAML text whose entries are each ten times the one before, ten levels deep."""
    levels = [f"- &l0 {leaf}"]
    levels += [f"- &l{k} " + node.format(", ".join([f"*l{k - 1}"] * 10)) for k in range(1, 10)]
    return "\n".join(["data:", *levels]) + "\n"


BOMBS = {
    "a list of lists": bomb("[1, 2]", "[{}]"),
    "merged mappings": bomb("{a: 1, b: 2}", "{{<<: [{}]}}"),
    "a list in itself": "data: &a [*a, *a]\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_aliases_take_no_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(BOMBS[name])
    done = subprocess.run(
        [sys.executable, "-c", f"from cmgan_dist.config.load import load_config; load_config({str(path)!r})"],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)),
        cwd=Path(__file__).parents[2],
    )
    assert f"BadInput: config file {path} holds more than {MOST_VALUES} values" in done.stderr


def test_aliases_that_repeat_little_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("optim: {generator_lr: &rate 0.01, discriminator_lr: *rate}\n")
    assert load_config(path).optim.discriminator_lr == 0.01


def test_overrides_in_both_spellings() -> None:
    args = ["--preset", "smoke", "--optim.generator-lr", "1e-4", "loss.inter=0.5", "model.share_layers=false"]
    config, arguments = parse_arguments([*args, "--data", "/d", "--output=/o", "model.text.kernel_sizes=2,5"])
    assert (config.optim.generator_lr, config.loss.inter, config.model.share_layers) == (1e-4, 0.5, False)
    assert (config.data, config.output, config.model.text.kernel_sizes) == ("/d", "/o", (2, 5))
    assert config.model.common_dim == preset("smoke").model.common_dim
    assert arguments.resume == "auto"
    expected = {f.name for f in dataclasses.fields(Config)}
    assert set(vars(config)) == expected
    config, _ = parse_arguments(["--model.text.kernel-sizes", "2", "5", "stream.weights=0.5,1e-3"])
    assert (config.model.text.kernel_sizes, config.stream.weights) == ((2, 5), (0.5, 1e-3))


def test_help_shows_docstring_type_default_and_range(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--preset", "smoke", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for shown in (
        "--model.dropout FLOAT Dropout after the encoder's first layer. (default: 0.0, from 0 to 0.999)",
        "--model.text.kernel-sizes [INT [INT ...]] cnn: widths of the convolutions in words. (default: 3 4 5, from",
        "--optim.generator-steps INT Generator updates per batch, after one update of each discriminator. (default: 1,",
        "--train.tracker {tensorboard,wandb,none} Where metrics go beside metrics.jsonl. (default: tensorboard)",
        "--train.report, --train.no-report Whether the launcher writes OUTPUT/report.html at the end. (default: True)",
    ):
        assert shown in text
    assert "Annotated" not in text


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--nope", "1"], "Unrecognized options: --nope"),
        (["--preset", "opnmoji"], "unknown preset 'opnmoji'"),
        (
            ["--model.image.trainable", "true"],
            "true: write --model.image.trainable or --model.image.no-trainable without",
        ),
        (["--model.image.no-trainable", "0"], "0: write --model.image.trainable or --model.image.no-trainable without"),
        (["model.image.trainable=yes"], "yes: write --model.image.trainable or --model.image.no-trainable without a"),
        (["--dry-run", "1"], "1: write --dry-run or --no-dry-run without a value"),
        (["train.log_every", "3"], "write train.log_every=VALUE or --train.log-every VALUE"),
        (["--train.epochs", "3", "4"], "4: put a value of several words in quotes"),
        (["seed=-1"], "seed=-1: write train.seed=VALUE, see"),
        (["nothing_such=1"], "Unrecognized options: nothing_such=1: see"),
        (["--optim.generator-lr", "fast"], "could not convert string to float: 'fast'"),
        (["--config", "/nowhere.yaml"], "config file /nowhere.yaml does not exist"),
        (["--preset", "smoke", "stream.global_batch=60", "stream.logical_streams=16"], "does not divide"),
        (["--model.text.kernel-sizes", "2", "wide"], "Could not find valid parse"),
        (["--model.text.dropout", "7"], "model.text.dropout is 7.0, expected 0 to 0.999"),
        (["--preset", "smoke", "--config", "a.yaml"], "--preset and --config are both given"),
    ],
)
def test_bad_command_lines_get_one_sentence(args: list[str], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence) as caught:
        parse_arguments(args)
    assert "\n" not in str(caught.value)


def test_a_missing_flag_is_one_sentence_without_a_frame_in_any_locale() -> None:
    words = [sys.executable, "-m", "shards", "split", "data"]
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = subprocess.run(words, env=plain, capture_output=True, text=True).stderr
    assert said.startswith(
        "error: Missing from python -m shards split: --output STR Folder or URL (s3, gs) for the new data set"
    ), said
    assert "---" not in said


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("loss.adversarial", "bec", "loss.adversarial is 'bec', expected one of bce, hinge, wgan-gp"),
        ("train.precision", "fp61", "train.precision is 'fp61'"),
        ("model.input_norm", "bacth", "model.input_norm is 'bacth'"),
        ("stream.augment", "no", "stream.augment is 'no', expected bool"),
        ("data", Path("here"), "data is PosixPath"),
        ("preset", "zzz", "unknown preset 'zzz'"),
    ],
)
def test_a_config_made_in_python_is_checked_like_one_from_a_file(field: str, value: object, said: str) -> None:
    with pytest.raises(BadInput, match=re.escape(said)):
        validate(with_values(preset("smoke"), {field: value}))


@pytest.mark.parametrize(
    "text",
    [
        "train: {epochs: 0x%s}" % ("f" * 5000),
        "train: {epochs: %s}" % ("9" * 5000),
        "stream: {window: 0x%s}" % ("f" * 900),
        "stream: {weights: [0b%s]}" % ("1" * 900),
        "data: 0x%s" % ("f" * 900),
        "preset: 0x%s" % ("f" * 900),
        "? 0x%s\n: 1" % ("f" * 900),
        "train: {epochs: %s1}" % ("1:" * 300_000),
        "train: {seed: !!int '%s'}" % ("9" * 5000),
    ],
    ids=range(9),
)
def test_a_number_of_any_length_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(BadInput) as caught:
        validate(load_config(tmp_path / "config.yaml"))
    assert len(str(caught.value)) < 500


def test_a_number_that_python_cannot_write_is_shown() -> None:
    with pytest.raises(BadInput, match=r"stream.window is a number of thousands of digits, expected 1 to 1e"):
        validate(with_values(Config(), {"stream.window": 1 << 20_000}))


def test_data_given_several_times_are_several_data_sets() -> None:
    for words in (["--data", "a,b", "--data=https://x/y?k=1,2"], ["--data=a,b", "--data", "https://x/y?k=1,2"]):
        config, _ = parse_arguments([*words, "--preset", "features", "--output", "r"])
        assert config.data.split(DATA_SEPARATOR) == ["a,b", "https://x/y?k=1,2"]
    assert join_data(["--preset", "features", "--data", "a"]) == ["--preset", "features", "--data", "a"]
    assert join_data(["--data"]) == ["--data"]
