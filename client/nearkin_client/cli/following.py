"""Events of a run as they happen: lines, and on a terminal one bar at the bottom for what moves."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nearkin_client.cli import human
from nearkin_client.values import BuildProgress, PushChanged, RunEvent


def follow(events: Iterable[RunEvent], out: Console) -> None:
    """Print until the events end."""
    if not out.is_terminal:
        for each in events:
            out.print(human.event(each), markup=False)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[about]}"))
    with Progress(*columns, console=out, transient=True) as bars:
        bar = bars.add_task("", visible=False, about="")
        for each in events:
            match each:
                case BuildProgress():
                    what, about = f"epoch {each.epoch}: {each.stage}", human.pace(each)
                    done, total = each.rows_done, each.rows_total
                case PushChanged(push=push) if push.state == "open":
                    what, about = f"epoch {push.epoch}: rows arriving", ""
                    done, total = push.rows_stored, push.num_classes
                case _:
                    bars.update(bar, visible=False)
                    bars.print(human.event(each), markup=False)
                    continue
            bars.update(bar, visible=True, description=what, completed=done, total=total, about=about)
