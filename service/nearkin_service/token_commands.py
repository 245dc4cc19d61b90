"""`nearkin-serve token create | list | revoke`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from nearkin_service.access import Scope, TokenFile, TokenRecord

app = typer.Typer(
    help="Who may call the service over the network. A running service follows changes by itself.",
    no_args_is_help=True,
)

DataDir = Annotated[Path | None, typer.Option(help="The service's data directory: its tokens.json.")]
File = Annotated[Path | None, typer.Option("--token-file", help="Another token file.")]


@app.command()
def create(
    scope: Annotated[
        str, typer.Option(help="read: tables and queries; write: also pushes; admin: also deleting.")
    ],
    run: Annotated[
        list[str] | None, typer.Option(help="Only this run; repeatable. Default: every run.")
    ] = None,
    name: Annotated[str, typer.Option(help="A note of who gets it.")] = "",
    data_dir: DataDir = None,
    token_file: File = None,
) -> None:
    """Make a token and print it, once. From then on every caller over the network needs one."""
    with _complaints():
        print(_file(data_dir, token_file).create(Scope.named(scope), tuple(run or ()), name))  # noqa: T201


@app.command(name="list")
def list_(
    data_dir: DataDir = None,
    token_file: File = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Every token's id, scope, runs and note; never the token itself."""
    with _complaints():
        tokens = _file(data_dir, token_file).read()
    for each in tokens:
        print(json.dumps(_facts(each)) if as_json else _line(each))  # noqa: T201


@app.command()
def revoke(
    token_id: Annotated[str, typer.Argument(help="As `token list` shows it.")],
    data_dir: DataDir = None,
    token_file: File = None,
) -> None:
    """Take a token back; calls that are under way go on to their end."""
    with _complaints():
        _file(data_dir, token_file).revoke(token_id)


def _file(data_dir: Path | None, token_file: Path | None) -> TokenFile:
    if token_file is None and data_dir is None:
        raise ValueError("give --data-dir or --token-file")
    return TokenFile(token_file or Path(data_dir or ".") / "tokens.json")


def _facts(token: TokenRecord) -> dict[str, object]:
    return {
        "id": token.token_id,
        "scope": token.scope,
        "runs": list(token.runs),
        "name": token.name,
        "created": token.created,
    }


def _line(token: TokenRecord) -> str:
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(token.created))
    runs = ", ".join(token.runs) or "every run"
    return f"{token.token_id}  {token.scope:<5}  {day}  {runs}  {token.name}".rstrip()


@contextmanager
def _complaints() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        print(f"nearkin-serve: there are no tokens: {error.filename} does not exist", file=sys.stderr)  # noqa: T201
        raise typer.Exit(2) from error
    except (ValueError, OSError) as error:
        print(f"nearkin-serve: {error}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(2) from error
