"""Command lines by tyro, with dotted overrides and errors as one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console
from rich.logging import RichHandler
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from cmgan_dist.config.commands import program_name
from cmgan_dist.config.fields import DATA_SEPARATOR, Config
from cmgan_dist.config.load import check_numbers, load_config, validate
from cmgan_dist.config.markers import range_of
from cmgan_dist.config.paths import get_value, settings, walk
from cmgan_dist.config.presets import preset
from cmgan_dist.errors import BadInput, refuse_url, shown

T = TypeVar("T")


def log_to_stderr() -> None:
    """Write our own log from INFO on, and everybody else's from WARNING on, to stderr; stdout is for results."""
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    handler.addFilter(_escape)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("cmgan_dist").setLevel(logging.INFO)


def _escape(record: logging.LogRecord) -> bool:
    """Escape what a terminal would obey in a line of the log, such as in the key of a sample."""
    record.msg, record.args = shown(record.getMessage()), ()
    return True


def _flag_form(args: Sequence[str]) -> list[str]:
    """Return dotted overrides in tyro's form: ``a.b_c=1`` becomes ``--a.b-c=1``, ``a.b=false`` becomes ``--a.no-b``,
    and a list ``a.b=1,2`` becomes ``--a.b 1 2``."""
    tokens: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if equals and "." in name and " " not in name and "/" not in name:
            arg = "--" + name.removeprefix("--").replace("_", "-") + "=" + value
            name = arg.partition("=")[0]
            if value.lower() in ("true", "false"):
                group, _, leaf = name.rpartition(".")
                arg = name if value.lower() == "true" else f"{group}.no-{leaf}"
            elif "," in value:
                tokens += [name, *value.split(",")]
                continue
        tokens.append(arg)
    return tokens


def _with_range(spec: StructFieldSpec) -> StructFieldSpec:
    """Return a field of a command line with its range, where it has one, behind its default in ``--help``."""
    found = range_of(spec.type)
    if found is None:
        return spec
    shown = tyro.conf.arg(help_behavior_hint=lambda default: f"(default: {default}, from {found})")
    hint: Any = Annotated[spec.type, shown]
    return dataclasses.replace(spec, type=hint)


def _ranges_in_help() -> ConstructorRegistry:
    """Return rules for tyro: dataclasses as ever, and ``--help`` tells the ranges of their fields."""
    registry, asking = ConstructorRegistry(), False

    @registry.struct_rule
    def with_ranges(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal asking
        if asking or not dataclasses.is_dataclass(info.type):
            return None
        asking = True  # what tyro itself would say
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            asking = False
        if not isinstance(spec, StructConstructorSpec):
            return None
        return dataclasses.replace(spec, fields=tuple(_with_range(field) for field in spec.fields))

    return registry


def parse(cls: type[T], args: Sequence[str], *, prog: str, default: T | None = None) -> T:
    """Return the dataclass `cls` that `args` describe, on top of `default`; ``--help`` prints and exits with 0.

    `prog`: the program's own name, for usage and hints. Overrides may be written ``--optim.generator-lr 1e-4`` or
    ``optim.generator_lr=1e-4``. Raises BadInput with one sentence that names the flag."""
    errors = io.StringIO()
    arguments, prog = _flag_form(args), program_name(prog)
    try:
        with contextlib.redirect_stderr(errors):
            base: dict[str, Any] = {} if default is None else {"default": default}
            found: T = tyro.cli(cls, args=arguments, prog=prog, registry=_ranges_in_help(), **base)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip(" │╭╮╰╯─|+") for line in errors.getvalue().splitlines()]
        text = " ".join(line for line in lines[1:] if line.strip("-"))  # a frame, where the locale has no lines
        sentence = text.split("Argument helptext:")[0].split("For full helptext")[0].strip(" ─.")
        wrong, _, close = sentence.partition(" Perhaps you meant:")
        flags = re.findall(r"--[\w.-]+", close)
        hint = f"did you mean {' or '.join(flags[:3])}? " if flags else ""
        if wrong.startswith("Unrecognized options:") and "--" not in wrong:
            hint = _hint_for_word(wrong.partition(": ")[2].split(", ")[0], arguments)
        raise BadInput(f"{wrong}: {hint}see '{prog} --help'") from None
    _refuse_urls(found, arguments)
    _refuse_numbers(found)
    return found


def _refuse_urls(parsed: object, args: Sequence[str]) -> None:
    """Raise BadInput when an argument that is a path is a URL: pathlib would make a path of it that nobody named."""
    for field in dataclasses.fields(parsed) if dataclasses.is_dataclass(parsed) else ():
        value, flag = getattr(parsed, field.name), f"--{field.name.replace('_', '-')}"
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Path):
                refuse_url(each, field.name.upper() if flag_value(args, flag) is None else flag)


def _refuse_numbers(parsed: object) -> None:
    """Raise BadInput when a number lies outside the range of its annotation, or there is none where one or more belong.

    Those of a Config are left to `validate`, which sees those from files too."""
    if isinstance(parsed, Config) or not dataclasses.is_dataclass(parsed):
        return
    for path, setting in walk(type(parsed)):
        flag, value = f"--{path.replace('_', '-')}", get_value(parsed, path)
        if value == () and setting.range is not None:
            raise BadInput(f"{flag} is empty: name one number or more, each from {setting.range}")
        check_numbers(flag, value, setting)


def _hint_for_word(word: str, arguments: Sequence[str]) -> str:
    """Return what to do about the first word of a command line that is no flag and no flag's value.

    It may stand behind a switch, which takes none."""
    before = [first for first, then in itertools.pairwise(arguments) if then == word]
    before += [flag for flag, _, value in (each.partition("=") for each in arguments) if value == word]
    switches = [flag for flag in before if flag.startswith("--") and "=" not in flag]
    if switches:
        group, dot, leaf = switches[0].removeprefix("--").rpartition(".")
        name = leaf.removeprefix("no-")
        on, off = f"--{group}{dot}{name}", f"--{group}{dot}no-{name}"
        return f"write {on} or {off} without a value, "
    if re.fullmatch(r"\w+(\.[\w-]+)+", word):
        return f"write {word}=VALUE or --{word.replace('_', '-')} VALUE, "
    name, equals, _ = word.partition("=")
    if equals and name in Config.__dataclass_fields__:
        field = next((path for path in settings() if path.startswith(f"{name}.")), None)
        return f"name a field of that section, such as {field}=VALUE, " if field else f"write --{name} VALUE, "
    if equals:
        near = [path for path in settings() if path.rpartition(".")[2] == name]
        return f"write {' or '.join(f'{path}=VALUE' for path in near)}, " if near else ""
    return "put a value of several words in quotes, "


@dataclass
class TrainArguments(Config):
    """Train a cross-modal GAN on a folder of shards. Values start from --preset or --config; overrides go on top."""

    config: str = ""
    """YAML file to start from instead of a preset alone."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest checkpoint in --output; never starts again and moves an earlier run aside."""
    dry_run: bool = False
    """Print the full config and stop."""


def flag_value(args: Sequence[str], flag: str) -> str | None:
    """Return the value of ``--flag VALUE`` or ``--flag=VALUE`` in `args`, None when it is not there."""
    for at, arg in enumerate(args):
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
        if arg == flag and at + 1 < len(args):
            return args[at + 1]
    return None


def join_data(args: Sequence[str]) -> list[str]:
    """Return `args` with the values of all ``--data`` in one, as Config.data has them."""
    rest, values, words = list[str](), list[str](), iter(args)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--data":
            rest.append(word)
        elif (given := value if equals else next(words, None)) is not None:
            values.append(given)
        else:
            rest.append(word)
    return [*rest, "--data", DATA_SEPARATOR.join(values)] if values else rest


def parse_arguments(args: Sequence[str]) -> tuple[Config, TrainArguments]:
    """Return the validated config of a training run and all its arguments.

    Raises BadInput naming the flag, field or file."""
    args = join_data(args)
    file, name = flag_value(args, "--config"), flag_value(args, "--preset")
    if file and name:
        raise BadInput("--preset and --config are both given: name the preset inside the config file")
    base = load_config(file) if file else preset(name or "reference")
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(Config)}
    chosen = parse(TrainArguments, args, prog="launchers/train.py", default=TrainArguments(**fields))
    config = Config(**{name: getattr(chosen, name) for name in fields})
    return validate(config), chosen
