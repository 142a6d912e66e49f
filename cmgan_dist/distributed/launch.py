"""Starts the processes of a run as torchrun does, with torchrun's options, and ends with the sentence and the exit
code of the process that failed first, in place of a traceback of its own.

python -m cmgan_dist.distributed.launch --standalone --nproc_per_node 2 [--config_file FILE] launchers/train.py ...

--config_file: accelerate's, such as launchers/configs/zero2.yaml, of which the part about DeepSpeed is taken. How many
processes and machines there are torchrun's options say.
"""

from __future__ import annotations

if __name__ == "__main__":
    from cmgan_dist.interrupts import heed

    heed()

import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cmgan_dist.distributed.launch_config import CONFIG_FLAG, environment_of, launch_config
from cmgan_dist.errors import EXIT_LOST, BadInput, run_main
from cmgan_dist.interrupts import EXIT_SIGNALLED
from cmgan_dist.jobs.startup import ended_by_signals

if TYPE_CHECKING:  # torch takes seconds to import, and SLURM's launcher has no use for it
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

USAGE = """usage: python -m cmgan_dist.distributed.launch [OPTIONS] launchers/train.py [ITS OPTIONS]

Starts the processes of a run as torchrun does, and ends with the sentence and the exit code of the process that failed
first. Options are torchrun's, all of which `torchrun --help` lists, and one more:

  --standalone                  one machine
  --nproc_per_node N            processes on this machine, one a GPU
  --nnodes N                    machines; each runs this command
  --rdzv_backend c10d           how machines meet
  --rdzv_endpoint HOST:PORT     where: one of them, the same in all commands
  --rdzv_id ID                  name of the run, the same in all commands
  --max_restarts N              how often all processes start again after a failure
  --config_file FILE            an accelerate configuration, of which the part about DeepSpeed is taken
"""

PASSED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that torchrun passes on to the processes before it ends."""


def take(arguments: list[str], flag: str) -> str | None:
    """Take ``--flag VALUE`` or ``--flag=VALUE`` out of the arguments; the value, or None where it is not there.

    Raises BadInput when the value is missing."""
    for at, word in enumerate(arguments):
        if word.startswith(f"{flag}="):
            return arguments.pop(at).partition("=")[2]
        if word == flag:
            if at + 1 == len(arguments):
                raise BadInput(f"{flag} has no value: write {flag} VALUE")
            arguments.pop(at)
            return arguments.pop(at)
    return None


def main(words: Sequence[str]) -> int:
    """Start the processes that torchrun's command line `words` asks for and return the exit code of the first that
    failed (EXIT_LOST where a signal ended it), or 0. Raises BadInput as `launch_config` does."""
    if words and words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    with ended_by_signals():  # until torch has processes, and handlers that pass a signal on to them, which save
        return _launch(list(words))


def _launch(arguments: list[str]) -> int:
    path = take(arguments, CONFIG_FLAG)
    if path is not None:
        config = launch_config(path)
        _check_processes(path, config, arguments)
        os.environ.update(environment_of(config))
    import torch.distributed
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would repeat which one failed
    try:
        run.run(run.parse_args([f"--signals-to-handle={PASSED_ON}", *arguments]))
    except SignalException as error:
        name = signal.Signals(error.sigval).name
        print(f"ended by {name}, which was passed on to all processes: start again to go on", file=sys.stderr)
        return EXIT_SIGNALLED
    except (ValueError, ImportError, AssertionError) as error:  # of torchrun's options
        raise BadInput(f"{str(error) or 'a count is not positive'}: see torchrun --help") from None
    except (RendezvousError, torch.distributed.DistError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0] or "one did not come in time"
        raise BadInput(
            f"the machines of the run could not meet ({reason}): see that --rdzv-endpoint, or --master_addr and "
            "--master_port, name one that all reach, and that each is started"
        ) from None
    except ChildFailedError as error:
        return _end_with_cause(error.failures)
    return 0


def _check_processes(path: str, config: dict[str, Any], arguments: Sequence[str]) -> None:
    """Raises BadInput where a configuration file asks for several processes that torchrun's options do not."""
    asked = config.get("num_processes", 1)
    counted = any(re.match("--nproc[-_]per[-_]node(=|$)", word) for word in arguments)
    if asked not in (None, 1, -1) and not counted:
        raise BadInput(f"{CONFIG_FLAG} {path} has num_processes {asked}: say it as --nproc_per_node, a machine's share")


def _end_with_cause(failures: dict[int, ProcessFailure]) -> int:
    """Print why the process that failed first did, unless that is the last on stderr already; return its exit code."""
    rank = min(failures, key=lambda rank: (_ended_by_launcher(failures[rank]), failures[rank].timestamp))
    cause, sentence = failures[rank], _sentence_of(rank, failures[rank])
    if {_sentence_of(of, failure) for of, failure in failures.items() if _has_said(failure)} != {sentence}:
        print(sentence, file=sys.stderr)
    code: int = cause.error_file_data.get("code", cause.exitcode)
    return code if code > 0 else EXIT_LOST


def _sentence_of(rank: int, failure: ProcessFailure) -> str:
    """Return in words why a process failed: its own, or what its exit code tells."""
    if "said" in failure.error_file_data:
        return failure.message
    if failure.exitcode < 0:
        return f"error: process {rank} was ended by {failure.signal_name()}: start again to go on"
    return f"error: a process ended with exit code {failure.exitcode}, and has said why above"


def _has_said(failure: ProcessFailure) -> bool:
    """Return whether a process has said on stderr why it ended."""
    said: bool = failure.error_file_data.get("said", failure.exitcode > 0)
    return said


def _ended_by_launcher(failure: ProcessFailure) -> bool:
    """Return whether this is how torchrun ends the others when a process has failed."""
    return failure.exitcode in (-signal.SIGTERM, EXIT_SIGNALLED) and "said" not in failure.error_file_data


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
