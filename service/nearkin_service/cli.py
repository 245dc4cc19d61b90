"""`nearkin-serve`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nearkin_service import logs, offline_commands, settings, token_commands
from nearkin_service.access import TlsFiles
from nearkin_service.allocation import keep_message_buffers
from nearkin_service.config import ServiceConfig
from nearkin_service.errors import lacking
from nearkin_service.resources import allow_many_connections

if TYPE_CHECKING:
    from nearkin_service.server import NeighbourServer

log = logging.getLogger("nearkin.service")

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(token_commands.app, name="token")
app.add_typer(offline_commands.snapshot, name="snapshot")
app.command()(offline_commands.check)

_HELP = """Builds and serves neighbour tables of class embeddings.

Training workers push one row per class each epoch; the service publishes a [num_classes, k] table of each
class's nearest classes and answers queries. Everything is kept in the data directory; a restarted service
finds all of it again. The commands below do not serve.

Examples:

  nearkin-serve --data-dir ./nearkin-data

  nearkin-serve --data-dir /data --listen unix:///run/nearkin.sock --listen 127.0.0.1:50051

  nearkin-serve --data-dir /data --engine ivf --target-recall 0.95

  nearkin-serve --data-dir /data --http 127.0.0.1:9090 --device cpu

Then look at it with `nearkin runs --service unix:///run/nearkin.sock`. SIGTERM and Ctrl-C stop it gently:
builds and readers finish, nothing new is taken.
"""


@app.callback(help=_HELP, invoke_without_command=True)
def serve(  # noqa: PLR0917 - one parameter per option
    context: typer.Context,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where everything is kept. Made if it does not exist. Required.")
    ] = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(
            help="unix:///path or host:port; repeatable. Default: 127.0.0.1:50051. Port 0 takes a free one."
        ),
    ] = None,
    bulk_port: Annotated[
        str,
        typer.Option(
            help="Port of the bulk lane beside a host:port, where rows and tables go fastest; 0: any free; "
            "off: no lane, everything goes through gRPC."
        ),
    ] = "0",
    engine: Annotated[str, typer.Option(help="The engine for pushes that do not name one.")] = "auto",
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda. cuda fails where FAISS sees no GPU; auto logs its choice.")
    ] = "auto",
    target_recall: Annotated[
        float,
        typer.Option(help="What engine ivf tunes itself to; each generation says what it measured."),
    ] = 0.99,
    http: Annotated[
        str | None, typer.Option(help="host:port of /metrics, /livez and /readyz. Default: not served.")
    ] = None,
    health: Annotated[
        str | None,
        typer.Option(
            help="unix:///path or host:port where gRPC's health is served on threads of its own, which no "
            "stream can starve. It is at every --listen too. Default: not served apart."
        ),
    ] = None,
    keep_embeddings: Annotated[
        int, typer.Option(help="Embeddings of how many generations are kept, unless a push says otherwise.")
    ] = 2,
    drain_seconds: Annotated[
        float, typer.Option(help="How long a stop waits for builds and readers.")
    ] = 30.0,
    io_threads: Annotated[int, typer.Option(help="Threads that check and store rows and read tables.")] = 4,
    tls_certificate: Annotated[
        Path | None, typer.Option(help="PEM file of this service's certificate: host:port addresses use TLS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its private key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Callers must show a certificate that this CA signed (mutual TLS).")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="Who may do what, see `token`. Default: tokens.json in the data directory."),
    ] = None,
    require_tokens: Annotated[
        bool, typer.Option("--require-tokens", help="Ask for a token always, on unix sockets too.")
    ] = False,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Let other machines in without asking, or without TLS."),
    ] = False,
    ready_file: Annotated[
        Path | None,
        typer.Option(help="Written once the service is ready: one address it listens on per line."),
    ] = None,
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error; the log goes to stderr.")
    ] = "info",
    log_format: Annotated[str, typer.Option(help="text, or json: one object per line.")] = "text",
    limit: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE, such as max_push_bytes=100GiB; repeatable. `nearkin info` shows all."),
    ] = None,
    limits: Annotated[Path | None, typer.Option(help="TOML file of limits, NAME = VALUE.")] = None,
) -> None:
    if context.invoked_subcommand is not None:
        return
    if data_dir is None:
        raise typer.BadParameter("it is needed", param_hint="--data-dir")
    # While it starts there is nobody to wait for, and what is on disk may be left at any moment.
    _when_asked_to_stop(lambda *_: os._exit(0))
    try:
        logs.configure(log_level, log_format)
        allow_many_connections()
        config = ServiceConfig(
            data_dir=data_dir,
            listen=tuple(listen or ["127.0.0.1:50051"]),
            engine=engine,
            device=_device(device),
            target_recall=target_recall,
            bulk_port=_bulk_port(bulk_port),
            http=http,
            health=health,
            keep_embeddings=keep_embeddings,
            drain_seconds=drain_seconds,
            io_threads=io_threads,
            insecure=insecure,
            tls=TlsFiles.given(tls_certificate, tls_key, tls_client_ca),
            token_file=token_file,
            require_tokens=require_tokens,
            limits=settings.limits(limits, limit or ()),
        )
        asyncio.run(_serve(config, ready_file))
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and lacking(error) is None:
            raise
        typer.echo(f"nearkin-serve: {error}", err=True)
        raise typer.Exit(2) from error


def _device(name: str) -> Literal["auto", "cpu", "cuda"]:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {name!r} is not auto, cpu or cuda")
    return name  # type: ignore[return-value]


def _bulk_port(text: str) -> int | None:
    if text == "off":
        return None
    if not text.isdecimal():
        raise ValueError(f"--bulk-port {text!r} is neither a port nor off")
    return int(text)


async def _serve(config: ServiceConfig, ready_file: Path | None) -> None:
    from nearkin_service import engines
    from nearkin_service.server import NeighbourServer

    if not keep_message_buffers():
        log.info("this C library gives freed buffers back at once: receiving rows costs more")
    device = engines.resolve_device(config.device)
    server = NeighbourServer(config, engines, device)
    if ready_file:
        ready_file.unlink(missing_ok=True)  # of a service that was killed
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    await server.start()
    _when_asked_to_stop(lambda *_: loop.call_soon_threadsafe(stopping.set))
    _announce(server, config.data_dir, ready_file)
    await stopping.wait()
    log.info("stopping; up to %g s for builds and readers", config.drain_seconds)
    if ready_file:  # before the next service may write it
        ready_file.unlink(missing_ok=True)
    ended = await server.stop()
    _when_asked_to_stop(signal.SIG_IGN)  # all is done: another SIGTERM must not make a failure of it
    if not ended:  # this interpreter would wait for them
        log.warning("a thread is at work that cannot be broken off; it ends with this process")
        logging.shutdown()
        os._exit(0)


def _when_asked_to_stop(handler: Callable[..., object] | signal.Handlers) -> None:
    """Not by asyncio, which would give both signals their default meaning while this process ends."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _announce(server: NeighbourServer, data_dir: Path, ready_file: Path | None) -> None:
    addresses, http, health = server.addresses, server.http_address, server.health_address
    if ready_file:
        aside = ready_file.with_name(f".{ready_file.name}.{os.getpid()}")
        aside.write_text("".join(f"{address}\n" for address in addresses), encoding="utf-8")
        aside.replace(ready_file)
    also = (f", http on {http}" if http else "") + (f", health on {health}" if health else "")
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(
            f"nearkin-serve ready: listening on {', '.join(addresses)}{also}, data in {data_dir}\n"
        )
        sys.stdout.flush()


def main() -> None:
    """The `nearkin-serve` command. Whatever it makes is its user's alone, wherever it lies."""
    os.umask(0o077)
    app(prog_name="nearkin-serve")


if __name__ == "__main__":
    main()
