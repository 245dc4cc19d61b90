"""One page about a generation: self-contained HTML, its pictures drawn as SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from nearkin_client.analysis import nearest_pairs, times_listed
from nearkin_client.cli import human
from nearkin_client.cli.names import ClassNames
from nearkin_client.client import NeighbourClient
from nearkin_client.values import Comparison, Generation, NeighbourTable

_LISTED, _BARS = 15, 40
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem } p { color: #555 }
table { border-collapse: collapse } td, th { padding: .2rem 1.2rem .2rem 0; text-align: left }
th { color: #777; font-weight: normal } svg { max-width: 100%; height: auto }
"""


@dataclass(frozen=True, slots=True)
class Findings:
    """What a page tells of; `change` is since `before`, the generation before, where they can be compared."""

    run: str
    generation: Generation
    table: NeighbourTable
    before: Generation | None
    change: Comparison | None


def gather(client: NeighbourClient, number: int | None) -> Findings:
    """Ask the service. NotFound: no such generation."""
    generation = client.generation(number)
    earlier = [each for each in client.generations() if each.generation < generation.generation]
    before = max(earlier, key=lambda each: each.generation, default=None)
    change = None
    if before is not None and before.num_classes == generation.num_classes:
        change = client.compare(before.generation, generation.generation, most_changed=_LISTED)
    table = client.table(generation=generation.generation)
    return Findings(generation.run, generation, table, before, change)


def page(findings: Findings, names: ClassNames) -> str:
    """The page as HTML."""
    title = f"{findings.run}, epoch {findings.generation.epoch}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _about(findings.generation),
        *_scores(findings.table),
        *_conflicts(findings.table, names),
        *_hubs(findings.table, findings.generation.absent_count, names),
        *_changes(findings, names),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _about(g: Generation) -> str:
    exact = "exact" if g.exact else human.recall(g)
    absent = f", {g.absent_count:,} of them absent" if g.absent_count else ""
    return (
        f"<p>Generation {g.generation}: {g.num_classes:,} classes{absent}, k = {g.k}, key {g.key}, engine "
        f"{escape(g.engine)} on {escape(g.device)} ({exact}), built in {human.seconds(g.build_seconds)}.</p>"
    )


def _scores(table: NeighbourTable) -> Iterable[str]:
    if table.scores is None:
        return
    yield "<h2>How alike neighbours are</h2>"
    last = [(table.k - 1, f"neighbour number {table.k}")] if table.k > 1 else []
    for column, what in ((0, "the nearest class"), *last):
        scores = table.scores[:, column]
        scores = scores[np.isfinite(scores)]
        if len(scores):
            yield f"<p>Score of {what}: median {np.median(scores):.3f}</p>"
            yield _histogram(scores)


def _histogram(scores: NDArray[np.float32]) -> str:
    """In float64: between two scores that are near each other float32 has no room for the edges of bars."""
    low, high = float(scores.min()), float(scores.max())
    wide = high if high > low else low + max(1.0, abs(low)) * 1e-6
    counts, _ = np.histogram(scores.astype(np.float64), _BARS, (low, wide))
    tall = 150 * counts / counts.max()
    bars = "".join(
        f'<rect x="{20 * n}" y="{160 - height:.1f}" width="18" height="{height:.1f}">'
        f"<title>{count:,} classes</title></rect>"
        for n, (count, height) in enumerate(zip(counts, tall, strict=True))
    )
    ends = f'<text x="0" y="180">{low:.3f}</text><text x="800" y="180" text-anchor="end">{high:.3f}</text>'
    inside = f'{bars}<g fill="#555">{ends}</g>'
    return f'<svg viewBox="0 0 800 190" width="800" fill="#4878a8" role="img">{inside}</svg>'


def _conflicts(table: NeighbourTable, names: ClassNames) -> Iterable[str]:
    yield "<h2>Conflicts</h2><p>The most alike pairs of nearest classes: two ids of one class are on top.</p>"
    rows = [
        [human.label(first, names), human.label(second, names), f"{score:.4f}"]
        for first, second, score, _ in nearest_pairs(table).first_few(_LISTED)
    ]
    yield _rows(["class", "class", "score"], rows)


def _hubs(table: NeighbourTable, absent: int, names: ClassNames) -> Iterable[str]:
    """Absent classes are nobody's neighbours by their nature: they are not counted."""
    times = times_listed(table)
    none, who = int((times == 0).sum()) - absent, "present classes " if absent else ""
    yield (
        "<h2>Hubs</h2><p>Classes that are neighbours of the most others. "
        f"{none:,} {who}are neighbours of none.</p>"
    )
    most = [each for each in np.argsort(-times, kind="stable")[:_LISTED] if times[each]]
    yield _rows(
        ["class", "neighbour of"], [[human.label(int(each), names), f"{times[each]:,}"] for each in most]
    )


def _changes(findings: Findings, names: ClassNames) -> Iterable[str]:
    before, change = findings.before, findings.change
    if before is None:
        return
    yield f"<h2>Since generation {before.generation}</h2>"
    if change is None:
        yield f"<p>It had {before.num_classes:,} classes: only equal numbers can be compared.</p>"
        return
    yield f"<p>{change.mean_overlap:.1%} of the neighbours were kept. These classes changed most:</p>"
    rows = [[human.label(c.class_id, names), f"{c.overlap:.0%}"] for c in change.most_changed]
    yield _rows(["class", "kept"], rows)


def _rows(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"
