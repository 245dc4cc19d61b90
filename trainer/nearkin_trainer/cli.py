"""`nearkin-train`, and `torchrun -m nearkin_trainer`: one command, alone or as one of several processes."""

import os
import signal
import sys
from collections.abc import Sequence

from nearkin_trainer.stopping import Stopped, Stopping

STARTED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0 done, 1 the service (or another process) failed, 2 something to correct, 130
            interrupted, 143 stopped by SIGTERM.
    """
    alone = STARTED_BY_TORCHRUN not in os.environ  # else whoever started the processes says so, once
    signals = [signal.SIGINT]
    if os.environ.get("WORLD_SIZE", "1") == "1":
        signals.append(signal.SIGTERM)  # one of several would wait for others, which are ended too
    with Stopping(*signals, speaks=alone, stays=arguments is None) as stopping:
        from nearkin_trainer.command import run  # takes seconds

        try:
            status = run(list(sys.argv[1:] if arguments is None else arguments), stopping, alone=alone)
        except Stopped as stopped:
            if alone:
                print(stopped, file=sys.stderr)  # noqa: T201
            status = stopped.status
        return stopping.ends_with(status)
