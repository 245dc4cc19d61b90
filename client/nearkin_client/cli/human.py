"""Answers as tables for people."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.measure import measure_renderables
from rich.table import Table
from rich.text import Text

from nearkin_client import values as v
from nearkin_client.analysis import NearestPairs
from nearkin_client.cli.names import ClassNames
from nearkin_client.cli.output import one_line

_UNFOLDED = 1 << 20
_GAP, _LEAST_HEADING = 2, 5
"""Between columns; and of a heading that is folded, in letters."""
_NOT_MOVED = "not known: embeddings are gone, or their rows had another shape"


def console() -> Console:
    """Standard output. Where nobody looks (a pipe), lines are not folded to a guessed width."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """A plain table; headings that start with ">" are of numbers, set to the right.

    Where words and numbers would have to be broken, each row is a block of lines, one per heading.
    """
    out = Console(highlight=False, width=None if sys.stdout.isatty() else _UNFOLDED)
    if title:
        out.print(f"[bold]{title}[/bold]", soft_wrap=True)
    lines = [[Text(str(cell)) for cell in row] for row in rows]  # Text: names are not markup
    names = [heading.lstrip(">") for heading in headings]
    widths = _widths(out, names, lines)
    if widths is None:
        for line in lines:
            out.print(_block(names, line))
        return
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    for heading, name, width in zip(headings, names, widths, strict=True):
        justify: JustifyMethod = "right" if heading.startswith(">") else "left"
        table.add_column(name, justify=justify, width=width, overflow="fold")
    for line in lines:
        table.add_row(*line)
    out.print(table)


def _widths(out: Console, headings: Sequence[str], lines: Sequence[Sequence[Text]]) -> list[int] | None:
    """Of columns that fold headings, and cells between their words; None: that is not enough."""
    widths, least = [], []
    for heading, *cells in zip(headings, *lines, strict=True):
        content = measure_renderables(out, out.options.update_width(_UNFOLDED), cells)
        widths.append(max(len(heading), content.maximum))
        least.append(max(min(len(heading), _LEAST_HEADING), content.minimum))
    excess = sum(widths) + _GAP * (len(widths) - 1) - out.width
    if sum(widths) - sum(least) < excess:
        return None
    for _ in range(excess):
        widths[max(range(len(widths)), key=lambda at: widths[at] - least[at])] -= 1
    return widths


def _block(headings: Sequence[str], line: Sequence[Text]) -> Table:
    """A row as lines, one per heading, and an empty one."""
    block = Table(box=None, pad_edge=False, show_header=False)
    block.add_column(style="bold dim", overflow="fold")
    block.add_column(overflow="fold")
    for heading, cell in zip(headings, line, strict=True):
        block.add_row(heading, cell)
    block.add_row()
    return block


def runs(found: Sequence[v.Run]) -> None:
    """One line per run."""
    if not found:
        console().print("no runs yet: a training job makes one with its first push")
        return
    print_table(
        ["run", ">generations", ">epoch", ">classes", ">k", "engine", ">on disk", "under way", "published"],
        (_run_line(each) for each in found),
    )


def _run_line(run: v.Run) -> list[object]:
    newest = run.newest
    about = (newest.epoch, newest.num_classes, newest.k, newest.engine) if newest else ("-",) * 4
    return [
        run.run,
        run.generations,
        *about,
        size(run.bytes_on_disk),
        ", ".join(under_way(each) for each in run.pushes) or "-",
        ago(newest.published) if newest else "-",
    ]


def under_way(push: v.Push) -> str:
    """One push in a few words."""
    share = f" {push.rows_stored / push.num_classes:.0%}" if push.state == "open" else ""
    return f"epoch {push.epoch} {push.state}{share}"


def generations(found: Sequence[v.Generation]) -> None:
    """One line per generation."""
    numbers = [">generation", ">epoch", ">classes", "row", ">k"]
    print_table(
        [*numbers, "key", "engine", ">build", "exact", "embeddings", "published"],
        (
            [
                g.generation,
                g.epoch,
                g.num_classes,
                f"{'×'.join(map(str, g.row_shape))} {g.dtype}",
                g.k,
                g.key,
                f"{g.engine} ({g.device})",
                seconds(g.build_seconds),
                "yes" if g.exact else recall(g),
                g.embeddings,
                ago(g.published),
            ]
            for g in found
        ),
    )


def nearest(classes: Sequence[int], found: v.NearestClasses, names: ClassNames) -> None:
    """The neighbours of each class, one line per neighbour."""
    rows: list[list[object]] = []
    for one, ids, scores in zip(classes, found.ids, found.scores, strict=True):
        for rank, (other, score) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True), start=1):
            if other == v.NO_NEIGHBOUR:
                continue
            rows.append([label(one, names) if rank == 1 else "", rank, label(other, names), f"{score:.4f}"])
        if not (ids >= 0).any():
            rows.append([label(one, names), "-", "absent: it has no neighbours", ""])
    title = f"nearest classes in generation {found.generation} (epoch {found.epoch})"
    print_table(["class", ">rank", "neighbour", ">score"], rows, title)


def written(path: Path, found: v.NeighbourTable) -> None:
    """What went into a file."""
    about = f"generation {found.generation} (epoch {found.epoch})"
    console().print(one_line(f"{path}: {len(found)} classes x {found.k} neighbours of {about}"), markup=False)


def table(found: v.NeighbourTable, names: ClassNames, most_rows: int) -> None:
    """Some rows of a table, as many neighbours as fit."""
    shown = min(found.k, 8)
    rows = []
    for index, ids in enumerate(found.ids[:most_rows]):
        cells = []
        for column in range(shown):
            other = int(ids[column])
            score = "" if found.scores is None else f" {found.scores[index, column]:.3f}"
            cells.append("-" if other == v.NO_NEIGHBOUR else f"{label(other, names)}{score}")
        rows.append([label(found.row_start + index, names), *cells])
    more = f", {shown} of {found.k} neighbours" if shown < found.k else ""
    more += f", {most_rows} of {len(found)} rows" if most_rows < len(found) else ""
    title = f"generation {found.generation} (epoch {found.epoch}){more}"
    headings = ["class" if names else ">class", *(str(rank) for rank in range(1, shown + 1))]
    print_table(headings, rows, title)


def conflicts(found: v.NeighbourTable, pairs: NearestPairs, most: int, names: ClassNames) -> None:
    """Pairs of classes, most alike first."""
    rows = (
        [label(first, names), label(second, names), f"{score:.4f}", "yes" if mutual else "no"]
        for first, second, score, mutual in pairs.first_few(most)
    )
    about = f"generation {found.generation} (epoch {found.epoch})"
    title = f"most alike in {about}, {min(most, len(pairs))} of {len(pairs)} pairs"
    print_table(["class", "class", ">score", "each other's nearest"], rows, title)


def comparison(found: v.Comparison, names: ClassNames) -> None:
    """Overlap and movement, and the classes that changed most."""
    out = console()
    out.print(f"[bold]generation {found.base_generation} → {found.generation}[/bold], k = {found.k}")
    out.print(f"neighbours kept   {found.mean_overlap:.1%} on average over {found.classes_compared} classes")
    if found.overlap_deciles:
        out.print("by deciles        " + "  ".join(f"{each:.0%}" for each in found.overlap_deciles))
    moved = _NOT_MOVED if found.mean_movement is None else f"{found.mean_movement:.4f}"
    out.print(f"mean movement     {moved} (1 - cosine)")
    out.print()
    print_table(
        ["changed most", ">kept", ">movement"],
        (
            [label(c.class_id, names), f"{c.overlap:.0%}", "-" if c.movement is None else f"{c.movement:.4f}"]
            for c in found.most_changed
        ),
    )


def server(info: v.ServerInfo, address: str) -> None:
    """Version, engines and limits."""
    out = console()
    out.print(f"[bold]nearkin-serve {escape(info.version)}[/bold]", end="")
    out.print(f" on {address}, started {ago(info.started)}", markup=False)
    out.print(f"devices  {', '.join(info.devices)}", markup=False)
    out.print()
    print_table(
        ["engine", "available", "exact", "about"],
        (
            [e.name, "yes" if e.available else "no", "yes" if e.exact else "no", e.reason]
            for e in info.engines
        ),
    )
    limits = ([name, f"{value:,}" if value else "none"] for name, value in info.limits.items())
    out.print()
    print_table(["limit", ">value"], limits)
    out.print()
    print_table(["package", "version"], info.versions.items())


def event(happened: v.RunEvent) -> str:
    """One event in one line."""
    clock = f"{happened.time.astimezone():%H:%M:%S}  "
    match happened:
        case v.RunSnapshot(run=run):
            newest = f"epoch {run.newest.epoch}" if run.newest else "nothing published yet"
            return clock + f"{run.run}: {run.generations} generations, {newest}"
        case v.PushChanged(push=push):
            return clock + f"push of {under_way(push)}" + (f": {push.error}" if push.error else "")
        case v.BuildProgress():
            return clock + progress(happened)
        case v.GenerationPublished(generation=g):
            return clock + (
                f"published generation {g.generation} (epoch {g.epoch}): {g.num_classes} classes, "
                f"k = {g.k}, {g.engine} on {g.device}, {seconds(g.build_seconds)}"
            )
        case v.GenerationRemoved(generation=number):
            return clock + f"removed generation {number}"
        case v.RunRemoved():
            return clock + "the run was removed"


def progress(build: v.BuildProgress) -> str:
    """How far a build is, in one line."""
    return f"building epoch {build.epoch}: {build.stage}, {pace(build)}"


def pace(build: v.BuildProgress) -> str:
    """How far and how fast."""
    share = build.rows_done / build.rows_total if build.rows_total else 0.0
    left = "" if build.seconds_left is None else f", {seconds(build.seconds_left)} left"
    return f"{share:.0%}, {build.rows_per_second:,.0f} rows/s{left}"


def label(class_id: int, names: ClassNames) -> str:
    """A class id, with its name where there is one."""
    return f"{class_id} {one_line(names[class_id])}" if class_id in names else str(class_id)


def recall(generation: v.Generation) -> str:
    """Measured recall with its interval."""
    r = generation.recall
    return "no" if r is None else f"recall {r.value:.3f} ({r.low:.3f}-{r.high:.3f})"


def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    if count < 1:
        return "0 B"
    power = min(4, int(math.log2(count) // 10))
    return f"{count / 1024**power:.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def ago(moment: datetime) -> str:
    """How long ago."""
    passed = (datetime.now(UTC) - moment).total_seconds()
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (129_600, 3600, "h")):
        if passed < limit:
            return f"{max(0, passed) / unit:.0f} {name} ago"
    return f"{passed / 86_400:.0f} days ago"
