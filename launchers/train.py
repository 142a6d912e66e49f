"""Train a cross-modal GAN.

accelerate launch launchers/train.py --preset openmoji --data DIR --output RUN [--resume auto|never] [overrides]

Overrides: --optim.generator-lr 1e-4 or optim.generator_lr=1e-4.
Exit codes: 0 done, 2 bad input, 85 saved after a signal.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cmgan_dist.cli import log_to_stderr, parse
from cmgan_dist.config import Config, to_yaml, validate
from cmgan_dist.errors import EXIT_BAD_INPUT, BadInput, run_main
from cmgan_dist.presets import load_config, preset


@dataclass
class Arguments(Config):
    """Train a cross-modal GAN on a folder of shards. Values start from --preset or --config; overrides go on top."""

    config: str = ""
    """YAML file to start from instead of a preset alone."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest checkpoint in --output; never starts again and moves an earlier run aside."""
    dry_run: bool = False
    """Print the full config and stop."""


def value_of(args: Sequence[str], flag: str) -> str | None:
    """The value of ``--flag VALUE`` or ``--flag=VALUE`` in args."""
    for at, arg in enumerate(args):
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
        if arg == flag and at + 1 < len(args):
            return args[at + 1]
    return None


def parse_arguments(args: Sequence[str]) -> tuple[Config, Arguments]:
    """(config, all arguments). Raises BadInput naming the flag, field or file."""
    file, name = value_of(args, "--config"), value_of(args, "--preset")
    if file and name:
        raise BadInput("--preset and --config are both given: name the preset inside the config file")
    base = load_config(file) if file else preset(name or "reference")
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(Config)}
    chosen = parse(Arguments, args, prog="launchers/train.py", default=Arguments(**fields))
    config = Config(**{name: getattr(chosen, name) for name in fields})
    return validate(config), chosen


def check_places(config: Config) -> None:
    """Raises BadInput when --data or --output is missing."""
    for flag, value in (("--data", config.data), ("--output", config.output)):
        if not value:
            raise BadInput(f"{flag} is missing: name a folder, see launchers/train.py --help")


def main() -> int:
    log_to_stderr()
    try:
        config, arguments = parse_arguments(sys.argv[1:])
        if arguments.dry_run:
            print(to_yaml(config), end="")
            return 0
        check_places(config)
        # after the cheap checks: torch and its friends take seconds to import
        from cmgan_dist.parallel import start_all_processes
        from cmgan_dist.train import prepare, run_session

        start_all_processes()
        session = prepare(config, arguments.resume)
    except BadInput:
        if os.environ.get("RANK", "0") != "0":
            return EXIT_BAD_INPUT  # every process finds the same: the first one says it
        raise
    return run_session(session)


if __name__ == "__main__":
    run_main(main)
