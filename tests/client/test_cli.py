"""The `nearkin` command as people and scripts use it: in a process of its own, against a real service."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from nearkin_client import NeighbourClient, NeighbourTable
from nearkin_client.cli import machine
from nearkin_client.cli.app import _only_run, app
from nearkin_client.cli.names import ClassNames, read_names, resolved
from nearkin_client.cli.report import _histogram
from nearkin_client.errors import InvalidArgument, ServiceNotInstalled
from nearkin_client.local import LocalService
from nearkin_client.testing import neighbour_service
from typer.testing import CliRunner

COMMAND = Path(sys.executable).parent / "nearkin"
RUN = "faces"


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    """A service with one run of two generations."""
    generator = np.random.default_rng(1)
    with neighbour_service() as started:
        with NeighbourClient(started.address, run=RUN) as client:
            for epoch in (0, 1):
                client.push(generator.standard_normal((20, 6)).astype(np.float32), epoch=epoch, k=4)
                client.table(epoch=epoch, timeout=60)
        yield started


@pytest.fixture(scope="module")
def table(service: LocalService) -> NeighbourTable:
    with NeighbourClient(service.address, run=RUN) as client:
        return client.table()


def nearkin(*arguments: str, service: str | None = None, status: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "NEARKIN_SERVICE"}
    if service is not None:
        environment["NEARKIN_SERVICE"] = service
    done = subprocess.run(
        [str(COMMAND), *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def answer(service: LocalService, *arguments: str) -> Any:
    return json.loads(nearkin(*arguments, "--json", service=service.address).stdout)


def test_runs(service: LocalService) -> None:
    (run,) = answer(service, "runs")
    assert (run["run"], run["generations"], run["newest"]["epoch"]) == (RUN, 2, 1)
    told = nearkin("runs", service=service.address).stdout
    assert RUN in told
    assert "flat" in told


def test_the_option_goes_before_the_environment(service: LocalService) -> None:
    nearkin("runs", "--service", service.address, service="unix:///nowhere.sock")


def test_generations(service: LocalService) -> None:
    assert [each["generation"] for each in answer(service, "generations", "--run", RUN)] == [2, 1]
    assert "float32" in nearkin("generations", service=service.address).stdout


def test_nearest(service: LocalService, table: NeighbourTable) -> None:
    found = answer(service, "nearest", "3", "14", "--run", RUN, "--k", "4")
    assert found["epoch"] == 1
    assert [row["class"] for row in found["rows"]] == [3, 14]
    for row in found["rows"]:
        assert [each["class"] for each in row["neighbours"]] == table.ids[row["class"]].tolist()
        assert row["neighbours"][0]["score"] >= row["neighbours"][1]["score"]


def test_nearest_shows_ten_or_all_there_are(service: LocalService) -> None:
    assert len(answer(service, "nearest", "0")["rows"][0]["neighbours"]) == 10


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(f"name-{n}" for n in range(20)),
        "class,name\n" + "\n".join(f"{n},name-{n}" for n in range(20)),
    ],
    ids=["lines", "csv"],
)
def test_nearest_with_names(
    service: LocalService, table: NeighbourTable, tmp_path: Path, content: str
) -> None:
    names = tmp_path / "names.csv"
    names.write_text(content)
    first = int(table.ids[3, 0])
    found = answer(service, "nearest", "3", "--names", str(names))
    assert found["rows"][0]["name"] == "name-3"
    assert found["rows"][0]["neighbours"][0]["name"] == f"name-{first}"
    assert answer(service, "nearest", "name-3", "--names", str(names)) == found
    told = nearkin("nearest", "3", "--names", str(names), service=service.address).stdout
    assert f"{first} name-{first}" in told


def test_table_on_the_screen(service: LocalService, table: NeighbourTable) -> None:
    told = nearkin("table", "--run", RUN, "--rows", "2:4", service=service.address).stdout
    assert str(table.ids[2, 0]) in told
    assert "generation 2 (epoch 1)" in told
    found = answer(service, "table", "--rows", "2:4")
    assert [row["ids"] for row in found["rows"]] == table.ids[2:4].tolist()
    assert len(answer(service, "table", "--generation", "1")["rows"]) == 20


@pytest.mark.parametrize("scored", [True, False])
def test_a_table_as_json_row_by_row(capsys: pytest.CaptureFixture[str], scored: bool) -> None:
    ids = np.arange(1500, dtype=np.int32).reshape(500, 3)
    scores = np.linspace(-1, 1, 1500, dtype=np.float32).reshape(500, 3)
    ids[7], scores[7] = -1, -np.inf
    machine.emit_table(NeighbourTable(ids, scores if scored else None, 2, 1, row_start=40))
    (line,) = capsys.readouterr().out.splitlines()
    rows = json.loads(line)["rows"]
    assert [row["class"] for row in rows] == list(range(40, 540))
    assert [row["ids"] for row in rows] == ids.tolist()
    assert [row.get("scores") for row in rows] == [
        None if not scored else [None] * 3 if index == 7 else scores[index].tolist() for index in range(500)
    ]


def test_a_large_table_as_json_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    table = NeighbourTable(np.zeros((20_000, 16), np.int32), np.zeros((20_000, 16), np.float32), 2, 1)
    with Path(os.devnull).open("w") as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        tracemalloc.start()
        machine.emit_table(table)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 2 << 20  # it was ten times that, for an answer of 2.6 MB


def test_table_to_numpy(service: LocalService, table: NeighbourTable, tmp_path: Path) -> None:
    out = tmp_path / "table.npz"
    nearkin("table", "--epoch", "1", "--out", str(out), service=service.address)
    with np.load(out) as arrays:
        np.testing.assert_array_equal(arrays["ids"], table.ids)
        np.testing.assert_array_equal(arrays["scores"], table.scores)
        assert (int(arrays["generation"]), int(arrays["epoch"])) == (2, 1)


def test_conflicts(service: LocalService, table: NeighbourTable, tmp_path: Path) -> None:
    names = tmp_path / "names.csv"
    names.write_text("\n".join(f"name-{n}" for n in range(20)))
    found = answer(service, "conflicts", "--names", str(names), "--most", "3")
    assert table.scores is not None
    assert len(found["pairs"]) == 3
    assert found["pairs"][0]["score"] == pytest.approx(float(table.scores[:, 0].max()))
    first, second = (each["class"] for each in found["pairs"][0]["classes"])
    assert second == table.ids[first, 0] or first == table.ids[second, 0]
    told = nearkin("conflicts", "--names", str(names), service=service.address).stdout
    assert f"{first} name-{first}" in told
    assert answer(service, "conflicts", "--at-least", "1")["pairs_in_all"] == 0


def test_export_with_names(service: LocalService, table: NeighbourTable, tmp_path: Path) -> None:
    out, names = tmp_path / "table.csv", tmp_path / "names.csv"
    names.write_text("\n".join(f"name-{n}" for n in range(20)))
    assert answer(service, "export", str(out), "--names", str(names))["rows"] == 20
    with out.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["neighbour_name"] for row in rows] == [f"name-{n}" for n in table.ids.ravel()]
    arrays = tmp_path / "table.npz"
    nearkin("export", str(arrays), "--generation", "1", service=service.address)
    with np.load(arrays) as loaded:
        assert int(loaded["generation"]) == 1
    assert "must end in" in nearkin("export", "table.xml", service=service.address, status=2).stderr


def test_report(service: LocalService, table: NeighbourTable, tmp_path: Path) -> None:
    out, names = tmp_path / "faces.html", tmp_path / "names.csv"
    names.write_text("\n".join(f"<b>name & {n}" for n in range(20)))
    assert answer(service, "report", str(out), "--names", str(names))["generation"] == 2
    page = out.read_text(encoding="utf-8")
    tree = ElementTree.fromstring(page.replace("<!doctype html>", "").replace('<meta charset="utf-8">', ""))
    assert tree.findtext("body/h1") == "faces, epoch 1"
    assert len(tree.findall(".//svg")) == 2
    assert [each.text for each in tree.findall("body/h2")][-1] == "Since generation 1"
    pairs = tree.findall("body/table")[0]
    assert any("<b>name & " in str(cell.text) for cell in pairs.iter("td"))
    nearkin("report", str(out), "--generation", "1", service=service.address)
    assert "Since generation" not in out.read_text(encoding="utf-8")
    assert "must end in .html" in nearkin("report", "page.pdf", service=service.address, status=2).stderr


def test_table_to_csv(service: LocalService, table: NeighbourTable, tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    facts = answer(service, "table", "--out", str(out))
    assert (facts["rows"], facts["generation"]) == (20, 2)
    with out.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [int(row["neighbour"]) for row in rows] == table.ids.ravel().tolist()
    assert table.scores is not None
    np.testing.assert_array_equal([np.float32(row["score"]) for row in rows], table.scores.ravel())


def test_compare(service: LocalService) -> None:
    found = answer(service, "compare", "1", "2", "--most-changed", "3")
    assert (found["base_generation"], found["generation"]) == (1, 2)
    assert len(found["most_changed"]) == 3
    assert "neighbours kept" in nearkin("compare", service=service.address).stdout


def test_info(service: LocalService) -> None:
    assert {each["name"] for each in answer(service, "info")["engines"]} >= {"flat"}
    assert "nearkin-serve" in nearkin("info", service=service.address).stdout


@pytest.mark.parametrize("as_json", [True, False])
def test_watch(service: LocalService, as_json: bool) -> None:
    run = f"watched-{as_json}".lower()
    command = [str(COMMAND), "watch", "--run", run, "--service", service.address, "--timeout", "4"]
    command += ["--json"] if as_json else []
    with NeighbourClient(service.address, run=run) as client:
        client.push(np.eye(8, dtype=np.float32)[:1], epoch=7, num_classes=8, k=2)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            assert run in watching.stdout.readline()
            client.push(np.eye(8, dtype=np.float32), epoch=7, k=2)
            lines = list(watching.stdout)
        client.delete_run()
    assert watching.returncode == 0
    if as_json:
        events = [json.loads(line) for line in lines]
        assert [e["generation"]["epoch"] for e in events if e["event"] == "GenerationPublished"] == [7]
    else:
        assert sum("published generation 1 (epoch 7)" in line for line in lines) == 1


# ------------------------------------------------------------------------------------------- reports


def reported(service: LocalService, run: str, out: Path) -> ElementTree.Element:
    nearkin("report", str(out), "--run", run, service=service.address)
    page = out.read_text(encoding="utf-8")
    return ElementTree.fromstring(page.replace("<!doctype html>", "").replace('<meta charset="utf-8">', ""))


@pytest.mark.parametrize("scores", [[1.0], [0.46], [1.0, np.nextafter(np.float32(1), np.float32(0))]])
def test_report_of_scores_that_are_nearly_the_same(scores: list[float]) -> None:
    """Float32 has no room for the bars of a histogram between them."""
    drawn = ElementTree.fromstring(_histogram(np.array(scores, np.float32)))
    bars = [bar.findtext("title", "").split()[0] for bar in drawn.findall("rect")]
    assert sum(map(int, bars)) == len(scores)


def test_report_of_two_classes(service: LocalService, tmp_path: Path) -> None:
    with NeighbourClient(service.address, run="two") as client:
        client.push(np.array([[1, 0], [1, 2]], np.float32), epoch=0, k=1)
        client.table(epoch=0)
        tree = reported(service, "two", tmp_path / "two.html")
        client.delete_run()
    assert len(tree.findall(".//svg")) == 1, "the nearest class is the last one, too"


def test_report_where_the_number_of_classes_changed(service: LocalService, tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    with NeighbourClient(service.address, run="grown") as client:
        for epoch, classes in enumerate((20, 30)):
            client.push(generator.standard_normal((classes, 6)).astype(np.float32), epoch=epoch, k=4)
            client.table(epoch=epoch)
        tree = reported(service, "grown", tmp_path / "grown.html")
        client.delete_run()
    assert tree.findall("body/p")[-1].text == "It had 20 classes: only equal numbers can be compared."


def test_report_does_not_count_absent_classes_among_those_without_neighbours(
    service: LocalService, tmp_path: Path
) -> None:
    rows = np.random.default_rng(3).standard_normal((9, 4)).astype(np.float32)
    with NeighbourClient(service.address, run="holes") as client:
        client.push(rows, epoch=0, k=2, absent=[0, 5, 6])
        ids = client.table(epoch=0).ids
        tree = reported(service, "holes", tmp_path / "holes.html")
        client.delete_run()
    present = set(range(9)) - {0, 5, 6}
    orphans = len(present - set(ids.ravel().tolist()))
    assert any(f"{orphans} present classes are neighbours of none" in str(p.text) for p in tree.iter("p"))
    hubs = tree.findall("body/table")[1]
    assert len(hubs.findall("tr")) == 1 + len(present) - orphans


# --------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize(
    "arguments", [("runs",), ("table",), ("table", "--json"), ("watch", "--timeout", "9"), ("--help",)]
)
def test_a_reader_who_goes_away_and_a_full_disk(service: LocalService, arguments: tuple[str, ...]) -> None:
    command = [str(COMMAND), *arguments, *([] if "--help" in arguments else ["--service", service.address])]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.stderr == "nearkin: cannot write to standard output: No space left on device\n"
    assert done.returncode == 1


def test_standard_output_that_is_closed(service: LocalService) -> None:
    done = subprocess.run(
        ["sh", "-c", f"exec {COMMAND} runs --service {service.address} >&-"], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_output_that_cannot_show_every_name(service: LocalService, tmp_path: Path) -> None:
    names = tmp_path / "names.csv"
    names.write_text("3,🙂é\n", encoding="utf-8")
    command = [str(COMMAND), "nearest", "3", "--names", str(names), "--service", service.address]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    told = subprocess.run(command, capture_output=True, env=ascii_only, timeout=60, check=True).stdout
    assert rb"3 \U0001f642\xe9" in told
    told = subprocess.run([*command, "--json"], capture_output=True, env=ascii_only, check=True).stdout
    assert json.loads(told)["rows"][0]["name"] == "🙂é"


def test_a_pipe_gets_one_line_per_class_whatever_its_names(service: LocalService, tmp_path: Path) -> None:
    names = tmp_path / "names.csv"
    names.write_text("\n".join(f'{n},"{"x" * 60}\n\x1b[31m[bold]{n}"' for n in range(20)))
    told = nearkin("table", "--names", str(names), service=service.address).stdout
    assert len(told.splitlines()) == 2 + 10
    assert "\x1b" not in told
    assert "[bold]19" in told


@pytest.mark.parametrize("columns", [30, 40, 60, 80, 100])
def test_a_narrow_terminal_breaks_no_number(service: LocalService, columns: int) -> None:
    told = on_a_terminal(columns, "generations", "--run", RUN, "--service", service.address)
    assert max(map(len, told)) <= columns
    words = " ".join(told).split()
    assert words.count("float32") == words.count("kept") == 2
    if columns < 60:  # a line for each value, and one between the generations
        assert [" ".join(line.split()) for line in told[:3]] == ["generation 2", "epoch 1", "classes 20"]
        assert "" in (line.strip() for line in told)


def on_a_terminal(columns: int, *arguments: str) -> list[str]:
    terminal, side = os.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}
    with os.fdopen(terminal, "rb", buffering=0) as reading:
        subprocess.run([str(COMMAND), *arguments], stdout=side, env=environment, timeout=60, check=True)
        os.close(side)
        told = b""
        with suppress(OSError):  # so ends a terminal that nobody writes to any more
            while piece := reading.read(1 << 16):
                told += piece
    return re.sub(r"\x1b\[[0-9;]*m", "", told.decode()).splitlines()


def test_a_file_whose_name_looks_like_markup(service: LocalService, tmp_path: Path) -> None:
    out = tmp_path / "[/x]" / "[bold]table.csv"
    out.parent.mkdir(parents=True)
    assert str(out) in nearkin("export", str(out), service=service.address).stdout


@pytest.mark.parametrize("ending", ["csv", "npz", "html"])
def test_what_cannot_be_written_leaves_what_was_there(
    service: LocalService, tmp_path: Path, ending: str
) -> None:
    out = tmp_path / f"out.{ending}"
    out.write_text("before")
    command = f"ulimit -f 0; exec {COMMAND} {'report' if ending == 'html' else 'export'} {out}"
    done = subprocess.run(
        ["sh", "-c", f"trap '' XFSZ; {command} --service {service.address}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"cannot write {out}: File too large" in done.stderr
    assert (done.returncode, out.read_text()) == (2, "before")
    assert list(tmp_path.iterdir()) == [out]


def test_a_link_stays_one_and_keeps_its_mode(service: LocalService, tmp_path: Path) -> None:
    out, link = tmp_path / "out.csv", tmp_path / "link.csv"
    out.touch(mode=0o640)
    link.symlink_to(out)
    nearkin("export", str(link), service=service.address)
    assert link.is_symlink()
    assert out.read_text().startswith("class,rank")
    assert out.stat().st_mode & 0o777 == 0o640


# ---------------------------------------------------------------------------------------------- names


def names_of(tmp_path: Path, content: str) -> ClassNames:
    file = tmp_path / "names.csv"
    file.write_text(content, encoding="utf-8")
    return read_names(file)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("\ufeff0,a\n1,b\n", {0: "a", 1: "b"}),
        ("\ufeffa\nb\n", {0: "a", 1: "b"}),
        ("a\n\nc\n\n", {0: "a", 2: "c"}),
        ("class,name\n\n1,b\n", {1: "b"}),
        ('"Smith, John"\n"He said ""no"""\n', {0: "Smith, John", 1: 'He said "no"'}),
        ("", {}),
    ],
)
def test_names_files(tmp_path: Path, content: str, names: dict[int, str]) -> None:
    assert names_of(tmp_path, content) == names


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('a\n"b\nc\n', "line 3"),
        ('a\n"Big" Al\nc\n', "line 2"),
        ("0,a\n²,b\n", "'²,b'"),
        ("²,b\n0,a\n", "'²,b'"),
        ("-1,x\n0,a\n", "'-1,x'"),
        ("a\nSmith, John\n", "in quotes if it holds a comma"),
        ("0,a\n1,b\n0,c\n", "names class 0 twice, 'a' and 'c'"),
    ],
)
def test_names_files_that_would_mislead_are_refused(tmp_path: Path, content: str, told: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(told)):
        names_of(tmp_path, content)


def test_a_name_of_several_classes_is_none_to_ask_for(tmp_path: Path) -> None:
    names = names_of(tmp_path, "twin\nother\ntwin\n")
    with pytest.raises(InvalidArgument, match=r"'twin' is the name of 2 classes \(0, 2\); give the id"):
        resolved(["twin"], names)
    assert resolved(["other", "2"], names) == [1, 2]


@pytest.mark.parametrize(
    "arguments", [("nearest", "3"), ("table",), ("conflicts",), ("export", "x.csv"), ("report", "x.html")]
)
def test_a_file_that_names_more_classes_than_there_are(
    service: LocalService, tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("name\n" + "\n".join(f"name-{n}" for n in range(20)))
    told = nearkin(*arguments, "--names", str(names), service=service.address).stderr
    assert "names class 20, and there are 20 classes (0..19)" in told


def test_no_more_than_some_runs_are_named(monkeypatch: pytest.MonkeyPatch, service: LocalService) -> None:
    with NeighbourClient(service.address) as client:
        (one,) = client.runs()
        monkeypatch.setattr(client, "runs", lambda: [replace(one, run=f"run-{n}") for n in range(12)])
        with pytest.raises(InvalidArgument, match="run-8, run-9 and 2 more"):
            _only_run(client)


# ------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("nearest", "99", "--run", RUN), "99"),
        (("nearest", str(2**63), "--run", RUN), f"{2**63} is not within 0..2147483647"),
        (("nearest", "3", str(10**20), "--run", RUN), f"{10**20} is not within 0..2147483647"),
        (("nearest", "3", "--run", "Not A Run"), "run"),
        (("nearest", "3", "--names", "/no/such/file"), "/no/such/file"),
        (("nearest", "three"), "three"),
        (("table", "--rows", "7"), "START:STOP"),
        (("table", "--rows", "²:³"), "START:STOP"),
        (("table", "--rows", "0:" + "9" * 20), "rows: " + "9" * 20),
        (("table", "--rows", "0:" + "9" * 5000), "START:STOP"),
        (("table", "--generation", "9" * 20), "generation: " + "9" * 20),
        (("table", "--epoch", "9" * 20), "epoch: " + "9" * 20),
        (("nearest", "3", "--k", "3000000000"), "k: 3000000000 is not within 1..2147483647"),
        (("nearest", "9" * 5000), "is not a class id"),
        (("nearest", "٣"), "is not a class id"),
        (("nearest", "3", "--generation", "9" * 20), "generation: " + "9" * 20),
        (("compare", "1", "9" * 20), "generation: " + "9" * 20),
        (("compare", "--k", "3000000000"), "k: 3000000000"),
        (("compare", "--most-changed", "3000000000"), "most_changed: 3000000000"),
        (("pin", "9" * 20), "generation: " + "9" * 20),
        (("table", "--rows", "0:99"), "99"),
        (("table", "--out", "table.docx"), ".npz"),
        (("table", "--epoch", "1", "--generation", "1"), "both"),
        (("runs", "--service", "nonsense"), "nonsense"),
        (("no-such-command",), "no-such-command"),
    ],
)
def test_mistakes_end_with_status_2(service: LocalService, arguments: tuple[str, ...], told: str) -> None:
    done = nearkin(*arguments, service=service.address, status=2)
    assert told in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    "arguments",
    [("nearest", "3", "--run", "no-such-run"), ("table", "--generation", "99"), ("compare", "7", "9")],
)
def test_what_the_service_refuses_ends_with_status_1(
    service: LocalService, arguments: tuple[str, ...]
) -> None:
    done = nearkin(*arguments, service=service.address, status=1)
    assert done.stderr.startswith("nearkin: ")


@pytest.mark.parametrize("seconds", ["inf", "1e300"])
def test_a_timeout_beyond_all_times_is_none(service: LocalService, seconds: str) -> None:
    assert answer(service, "runs", "--timeout", seconds)
    assert answer(service, "table", "--epoch", "1", "--timeout", seconds)


def test_no_service() -> None:
    assert "NEARKIN_SERVICE" in nearkin("runs", status=2).stderr
    told = nearkin("runs", "--service", "unix:///nowhere/nearkin.sock", status=1).stderr
    assert "cannot be reached" in told


@pytest.mark.parametrize("command", ["runs", "generations", "nearest", "table", "watch", "compare", "info"])
def test_every_command_teaches_by_example(command: str) -> None:
    told = CliRunner().invoke(app, [command, "--help"])
    assert told.exit_code == 0
    assert f"Example: nearkin {command}" in told.output


def test_a_run_moves_by_snapshot(tmp_path: Path) -> None:
    file, here, there = tmp_path / "run.tar", tmp_path / "here", tmp_path / "there"
    with LocalService(here) as started, NeighbourClient(started.address, run=RUN) as client:
        client.push(np.eye(20, dtype=np.float32), epoch=0, k=4)
        before = client.table(epoch=0).ids.copy()
    nearkin("snapshot", "save", str(file), "--run", RUN, "--data-dir", str(here))
    assert f"run {RUN} restored" in nearkin("snapshot", "restore", str(file), "--data-dir", str(there)).stdout
    with LocalService(there) as started, NeighbourClient(started.address, run=RUN) as client:
        np.testing.assert_array_equal(client.table(generation=1).ids, before)
    assert "already" in nearkin("snapshot", "restore", str(file), "--data-dir", str(there), status=2).stderr
    assert "restore" in nearkin("snapshot", "--help").stdout


def test_snapshot_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    done = CliRunner().invoke(app, ["snapshot", "save"])
    assert isinstance(done.exception, ServiceNotInstalled)
    assert "nearkin-service" in str(done.exception)
