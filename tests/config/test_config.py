"""Configs: validation, YAML there and back, the command line."""

from __future__ import annotations

import dataclasses

import pytest

from cmgan_dist.config.cli import parse_arguments
from cmgan_dist.config.fields import Config
from cmgan_dist.config.load import load_config, to_yaml, validate
from cmgan_dist.config.presets import PRESETS, preset
from cmgan_dist.errors import BadInput


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


def test_overrides_in_both_spellings() -> None:
    args = ["--preset", "smoke", "--optim.generator-lr", "1e-4", "loss.inter=0.5", "model.share_layers=false"]
    config, arguments = parse_arguments([*args, "--data", "/d", "--output=/o", "model.text.kernel_sizes=2,5"])
    assert (config.optim.generator_lr, config.loss.inter, config.model.share_layers) == (1e-4, 0.5, False)
    assert (config.data, config.output, config.model.text.kernel_sizes) == ("/d", "/o", (2, 5))
    assert config.model.common_dim == preset("smoke").model.common_dim
    assert arguments.resume == "auto"
    expected = {f.name for f in dataclasses.fields(Config)}
    assert set(vars(config)) == expected


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--nope", "1"], "Unrecognized options: --nope"),
        (["--preset", "opnmoji"], "unknown preset 'opnmoji'"),
        (["--optim.generator-lr", "fast"], "could not convert string to float: 'fast'"),
        (["--config", "/nowhere.yaml"], "config file /nowhere.yaml does not exist"),
        (["--preset", "smoke", "stream.global_batch=60", "stream.logical_streams=16"], "does not divide"),
    ],
)
def test_bad_command_lines_get_one_sentence(args: list[str], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence) as caught:
        parse_arguments(args)
    assert "\n" not in str(caught.value)
