"""The commands and their options. Exit status: 0 done, 1 the service says no, 2 the command is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from nearkin_client.analysis import nearest_pairs
from nearkin_client.cli import export, human, machine, output
from nearkin_client.cli import report as reports
from nearkin_client.cli.following import follow
from nearkin_client.cli.names import ClassNames, class_number, read_names, resolved, warn_of_strangers
from nearkin_client.client import NeighbourClient
from nearkin_client.errors import InvalidArgument, NearkinError
from nearkin_client.local import serve_command
from nearkin_client.patience import Patience
from nearkin_client.values import NeighbourTable

ROWS_SHOWN = 10
NEIGHBOURS_SHOWN = 10
RUNS_NAMED = 10

app = typer.Typer(
    help="Look into a nearkin neighbour service: which classes are each other's nearest, epoch by epoch.",
    epilog="Example: nearkin nearest 3 14 --run faces --service unix:///run/nearkin.sock",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Service = Annotated[
    str | None,
    typer.Option(
        metavar="ADDR",
        envvar="NEARKIN_SERVICE",
        help="unix:///path/to.sock or host:port.",
    ),
]
RunName = Annotated[
    str | None,
    typer.Option("--run", "-r", metavar="RUN", help="Which run; may be left out where there is only one."),
]
Json = Annotated[bool, typer.Option("--json", help="Answer with JSON, one line per answer, for machines.")]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", min=0.001, help="Give up after this long.")]
Names = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Class names: a CSV of `class id,name`, or one name per line."),
]
GenerationNumber = Annotated[
    int | None, typer.Option("--generation", "-g", metavar="N", min=1, help="Default: the newest.")
]


def main() -> None:
    """The `nearkin` command."""
    output.prepare()
    try:
        app()
    except InvalidArgument as error:
        _fail(error.message, 2)
    except NearkinError as error:
        _fail(error.message, 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str, status: int) -> NoReturn:
    print(f"nearkin: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(status)


@contextmanager
def _client(service: str | None, timeout: float, run: str | None = None) -> Iterator[NeighbourClient]:
    patience = Patience(
        call=timeout, table=timeout, outage=2.0
    )  # a person waits: say soon that nobody answers
    with NeighbourClient(service, run=run, patience=patience) as client:
        yield client


@contextmanager
def _client_of_run(service: str | None, timeout: float, run: str | None) -> Iterator[NeighbourClient]:
    if run is None:
        with _client(service, timeout) as client:
            run = _only_run(client)
    with _client(service, timeout, run) as client:
        yield client


def _only_run(client: NeighbourClient) -> str:
    names = [each.run for each in client.runs()]
    if len(names) == 1:
        return names[0]
    few = ", ".join(names[:RUNS_NAMED]) + (
        f" and {len(names) - RUNS_NAMED} more" if len(names) > RUNS_NAMED else ""
    )
    known = f"there are {few}" if names else "the service has none yet"
    raise InvalidArgument(f"run: say which one with --run; {known}", field="run")


@app.command(epilog="Example: nearkin runs --service 127.0.0.1:50051")
def runs(service: Service = None, json: Json = False, timeout: Timeout = 10.0) -> None:
    """Every run, its newest generation, and what is under way."""
    with _client(service, timeout) as client:
        found = client.runs()
    machine.emit(found) if json else human.runs(found)


@app.command(epilog="Example: nearkin generations --run faces")
def generations(
    run: RunName = None, service: Service = None, json: Json = False, timeout: Timeout = 10.0
) -> None:
    """Every generation of a run, newest first."""
    with _client_of_run(service, timeout, run) as client:
        found = client.generations()
    machine.emit(found) if json else human.generations(found)


@app.command(epilog="Example: nearkin nearest 3 14 --run faces --k 5 --names names.csv")
def nearest(
    classes: Annotated[
        list[str],
        typer.Argument(metavar="CLASS", help="Class ids, or names of the --names file, which go first."),
    ],
    *,
    run: RunName = None,
    k: Annotated[
        int | None,
        typer.Option("--k", "-k", min=1, help="Neighbours per class. Default: ten, or all there are."),
    ] = None,
    generation: GenerationNumber = None,
    names: Names = None,
    service: Service = None,
    json: Json = False,
    timeout: Timeout = 30.0,
) -> None:
    """The nearest classes of the classes given."""
    known = read_names(names)
    ids = resolved(classes, known)
    with _client_of_run(service, timeout, run) as client:
        asked = client.generation(generation)
        warn_of_strangers(known, asked.num_classes)
        k = k or min(NEIGHBOURS_SHOWN, asked.num_classes - 1)
        found = client.nearest(classes=ids, k=k, generation=asked.generation)
    machine.emit(machine.nearest(ids, found, known)) if json else human.nearest(ids, found, known)


@app.command(epilog="Example: nearkin table --run faces --epoch 3 --out table.npz")
def table(
    *,
    run: RunName = None,
    epoch: Annotated[
        int | None, typer.Option(min=0, help="The newest table of this epoch or a later one; waits for it.")
    ] = None,
    generation: GenerationNumber = None,
    rows: Annotated[
        str | None,
        typer.Option(metavar="START:STOP", help="Only these classes. On a terminal: the first ten."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write to a file instead: .npz (NumPy) or .csv.")
    ] = None,
    names: Names = None,
    service: Service = None,
    json: Json = False,
    timeout: Timeout = 60.0,
) -> None:
    """A neighbour table: to look at, as JSON, or into a file."""
    known, span = read_names(names), _span(rows)
    if out is not None:
        export.check_ending(out, *export.TABLE_ENDINGS)
    with _client_of_run(service, timeout, run) as client:
        found = client.table(generation=generation, epoch=epoch, rows=span)
    if span is None:
        warn_of_strangers(known, len(found))
    if out is not None:
        _write(out, found, known, json)
    elif json:
        machine.emit_table(found)
    else:
        human.table(found, known, most_rows=len(found) if span else ROWS_SHOWN)


def _write(out: Path, found: NeighbourTable, names: ClassNames, json: bool) -> None:
    export.write_table(out, found, names)
    facts = {"out": str(out), "generation": found.generation, "epoch": found.epoch, "rows": len(found)}
    machine.emit(facts) if json else human.written(out, found)


def _span(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    first, end = class_number(start), class_number(stop)
    if not colon or first is None or end is None or first >= end:
        raise InvalidArgument(f"rows: {text!r} is not START:STOP, such as 0:20", field="rows")
    return first, end


@app.command(epilog="Example: nearkin watch --run faces")
def watch(
    run: RunName = None,
    service: Service = None,
    json: Json = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0.001, help="Stop watching after this long.")
    ] = None,
) -> None:
    """What happens in a run, as it happens: pushes, builds, publications. Ctrl-C ends it."""
    with _client_of_run(service, 10.0, run) as client:
        events = client.watch(timeout=timeout)
        if json:
            for each in events:
                machine.emit({"event": type(each).__name__} | machine.plain(each))
        else:
            follow(events, human.console())


@app.command(epilog="Example: nearkin compare 3 7 --run faces")
def compare(
    base: Annotated[
        int | None, typer.Argument(metavar="[FROM]", min=1, help="The earlier one. Default: the one before.")
    ] = None,
    generation: Annotated[
        int | None, typer.Argument(metavar="[TO]", min=1, help="The later one. Default: the newest.")
    ] = None,
    *,
    run: RunName = None,
    k: Annotated[
        int | None, typer.Option("--k", "-k", min=1, help="Neighbours compared. Default: all.")
    ] = None,
    most_changed: Annotated[int, typer.Option(metavar="N", min=1, help="How many classes to list.")] = 10,
    names: Names = None,
    service: Service = None,
    json: Json = False,
    timeout: Timeout = 60.0,
) -> None:
    """How far neighbours and embeddings moved from one generation to another."""
    known = read_names(names)
    with _client_of_run(service, timeout, run) as client:
        found = client.compare(base, generation, k=k, most_changed=most_changed)
    machine.emit(found) if json else human.comparison(found, known)


@app.command(epilog="Example: nearkin conflicts --run faces --at-least 0.9 --names names.csv")
def conflicts(
    *,
    run: RunName = None,
    at_least: Annotated[
        float, typer.Option(metavar="SCORE", min=-1.0, max=1.0, help="Leave out pairs that are less alike.")
    ] = -1.0,
    most: Annotated[int, typer.Option(metavar="N", min=1, help="How many pairs to list.")] = 20,
    generation: GenerationNumber = None,
    names: Names = None,
    service: Service = None,
    json: Json = False,
    timeout: Timeout = 60.0,
) -> None:
    """Classes that may be one and the same: pairs of nearest classes, most alike first."""
    known = read_names(names)
    with _client_of_run(service, timeout, run) as client:
        found = client.table(generation=generation)
    warn_of_strangers(known, len(found))
    pairs = nearest_pairs(found).from_score(at_least)
    if json:
        machine.emit(machine.conflicts(found, pairs, most, known))
    else:
        human.conflicts(found, pairs, most, known)


@app.command("export", epilog="Example: nearkin export table.csv --run faces --names names.csv")
def export_table(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="Ends in .npz (NumPy) or .csv.")],
    *,
    run: RunName = None,
    generation: GenerationNumber = None,
    names: Names = None,
    service: Service = None,
    json: Json = False,
    timeout: Timeout = 60.0,
) -> None:
    """A whole neighbour table into a file: arrays, or one line per class and neighbour."""
    known = read_names(names)
    export.check_ending(out, *export.TABLE_ENDINGS)
    with _client_of_run(service, timeout, run) as client:
        found = client.table(generation=generation)
    warn_of_strangers(known, len(found))
    _write(out, found, known, json)


@app.command(epilog="Example: nearkin report faces.html --run faces --names names.csv")
def report(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="The page to write, .html.")],
    *,
    run: RunName = None,
    generation: GenerationNumber = None,
    names: Names = None,
    service: Service = None,
    json: Json = False,
    timeout: Timeout = 60.0,
) -> None:
    """One page about a generation, to look at in a browser: scores, conflicts, hubs, what moved."""
    known = read_names(names)
    export.check_ending(out, ".html")
    with _client_of_run(service, timeout, run) as client:
        findings = reports.gather(client, generation)
    warn_of_strangers(known, len(findings.table))
    page = reports.page(findings, known).encode()
    with export.writing(out) as file:
        file.write(page)
    about = findings.generation
    facts = {"out": str(out), "generation": about.generation, "epoch": about.epoch}
    machine.emit(facts) if json else human.written(out, findings.table)


@app.command(epilog="Example: nearkin pin 12 --run faces")
def pin(
    generation: Annotated[int, typer.Argument(metavar="N", min=1, help="The generation's number.")],
    *,
    run: RunName = None,
    unpin: Annotated[bool, typer.Option("--unpin", help="Give it back to retention instead.")] = False,
    service: Service = None,
    json: Json = False,
    timeout: Timeout = 10.0,
) -> None:
    """Keep a generation, embeddings included, whatever the run's retention says."""
    with _client_of_run(service, timeout, run) as client:
        found = client.pin(generation, pinned=not unpin)
    machine.emit(found) if json else human.generations([found])


@app.command(epilog="Example: nearkin info --service unix:///run/nearkin.sock")
def info(service: Service = None, json: Json = False, timeout: Timeout = 10.0) -> None:
    """Version, engines, devices and limits of the service."""
    with _client(service, timeout) as client:
        found, address = client.server_info(), client.address
    machine.emit(found) if json else human.server(found, address)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: nearkin snapshot save faces.tar --run faces --data-dir /data",
)
def snapshot(context: typer.Context) -> None:
    """Move a run between servers: `save` and `restore` on data directories that no service uses.

    It is `nearkin-serve snapshot`, which has to be installed where the data directory lies.
    """
    command = serve_command()
    os.execv(command, [command, "snapshot", *(context.args or ["--help"])])  # noqa: S606 - ours, no shell
