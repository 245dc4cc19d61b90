"""`make demo`: images ─▶ service ─▶ two training workers ─▶ unseen emoji recognised ─▶ nearest kin."""

import argparse
import logging
import os
import time
from pathlib import Path

from nearkin_client.local import LocalService
from rich.console import Console

from examples.demo import kin, show, training
from examples.demo.prepare import prepare


def main() -> None:
    """Runs all of it and says how long it took."""
    options = read_options()
    started = time.monotonic()
    console = Console(highlight=False)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)

    show.step(console, 1, "Images: the same emoji drawn by seven vendors")
    show.data(console, prepare(out / "data"), out / "data")

    show.step(console, 2, "A neighbour service")
    with LocalService(out / "service", log_path=out / "service.log") as service:
        console.print(f"nearkin-serve answers on {service.address}, its data in {out / 'service'}")

        show.step(console, 3, f"{options.processes} workers train against it")
        training.train(out, service.address, options.processes, options.minutes)

        show.step(console, 4, "Emoji that were never learned, drawn by a vendor that was never seen")
        show.results(console, training.metrics(out))

        show.step(console, 5, "Three emoji and their nearest kin, asked from the service")
        kin.ask(console, out, service.address)

    show.step(console, 6, "Where everything is")
    show.places(console, out)
    console.print(f"\nThe demo took {show.minutes(time.monotonic() - started)}.")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything it makes")
    parser.add_argument("--processes", type=int, default=2, help="training workers")
    parser.add_argument("--minutes", type=float, default=5.0, help="time for the training epochs")
    return parser.parse_args()


if __name__ == "__main__":
    logging.getLogger("nearkin").addHandler(logging.NullHandler())
    os.environ.pop("NEARKIN_SERVICE", None)  # the demo starts its own
    main()
