"""The whole job with a real service: one process, two processes, interrupted and resumed."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nearkin_client import NeighbourClient
from nearkin_client.errors import ResourceExhausted
from nearkin_client.local import LocalService
from nearkin_trainer import checkpoint
from nearkin_trainer.cli import main

from tests.trainer.pictures import write_csv_set

SMALL = [
    *("--image.height", "16", "--image.width", "16", "--model.width", "4", "--model.channels", "8"),
    *("--batch.classes", "4", "--batch.images", "2", "--batch.steps", "3", "--neighbour.k", "5"),
    *("--model.matching", "plain", "--no-tensorboard", "--device", "cpu"),
]
KEYS = {
    *("rank1", "rank5", "rank10", "mAP", "train_seconds", "images_per_second"),
    *("refresh_stall_seconds", "epochs", "world_size"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv_set(tmp_path_factory.mktemp("pictures"), cameras=True)


def _train(data: Path, out: Path, *more: str) -> dict[str, Any]:
    assert main(["--data", str(data), "--out", str(out), *SMALL, *more]) == 0
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "NEARKIN_SERVICE"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def _status(arguments: list[str]) -> int:
    """The exit status, however the command ends."""
    try:
        return main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)


def _weights(out: Path) -> dict[str, torch.Tensor]:
    tree = checkpoint.load(out / "checkpoint.npz")
    optimiser = tree["learner"]["optimiser"]["state"]
    moments = {f"moment {i}": state["exp_avg"] for i, state in optimiser.items()}
    return {**tree["model"], **tree["learner"]["row_optimiser"], **moments}


def _same(first: Path, second: Path) -> None:
    one, other = _weights(first), _weights(second)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("keeping", ["learnable", "memory"])
def test_one_process(data: Path, tmp_path: Path, nearkin_server: LocalService, keeping: str) -> None:
    arguments = (
        "--service",
        nearkin_server.address,
        "--run-name",
        f"one-{keeping}",
        "--embedding.keeping",
        keeping,
    )
    metrics = _train(data, tmp_path, *arguments, "--epochs", "2", "--evaluate.baselines")
    assert metrics.keys() >= KEYS
    assert metrics["epochs"] == 2
    assert metrics["world_size"] == 1
    assert metrics["queries"] == 4
    assert 0 <= metrics["rank1"] <= metrics["rank5"] <= metrics["rank10"] <= 1
    assert 0 <= metrics["baseline_pixels_rank1"] <= 1
    assert len(metrics["history"]) == 2
    assert json.loads((tmp_path / "classes.json").read_text())[1] == "class 1"
    with NeighbourClient(nearkin_server.address, run=f"one-{keeping}") as client:
        generations = client.generations()
        assert [g.epoch for g in generations] == [2, 1, 0]
        final = checkpoint.load(tmp_path / "checkpoint.npz")["model"]["sparse.classes.weight"]
        rows = torch.nn.functional.normalize(final.flatten(1).double(), dim=1)
        similarity = (rows @ rows.T).fill_diagonal_(-9)
        assert (client.table(epoch=2).ids[:, 0] == similarity.argmax(1).numpy()).all()


def test_curves_for_tensorboard(data: Path, tmp_path: Path, nearkin_server: LocalService) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    service = ("--service", nearkin_server.address, "--run-name", "curves")
    metrics = _train(data, tmp_path, *service, "--epochs", "2", "--evaluate.every", "1", "--tensorboard")
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    losses = [event.value for event in curves.Scalars("train/loss")]
    assert losses == pytest.approx([entry["loss"] for entry in metrics["history"]], rel=1e-5)
    assert len(curves.Scalars("qaconv/rank1")) == 2


def test_training_learns(data: Path, tmp_path: Path, nearkin_server: LocalService) -> None:
    still = [f"--augment.{name}" for name in ("rotate", "zoom", "hue", "grey", "erase")]
    history = _train(
        data,
        tmp_path,
        *(
            "--service",
            nearkin_server.address,
            "--run-name",
            "learns",
            "--epochs",
            "6",
            "--batch.steps",
            "12",
        ),
        *(
            "--optimise.rate",
            "0.003",
            "--embedding.rate",
            "0.03",
            *(x for name in still for x in (name, "0")),
        ),
    )["history"]
    assert history[-1]["softmax"] < 0.8 * history[0]["softmax"]


@pytest.mark.parametrize("refresh", ["blocking", "background"])
def test_resumed_is_as_uninterrupted(
    data: Path, tmp_path: Path, nearkin_server: LocalService, refresh: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    service = ("--service", nearkin_server.address, "--refresh", refresh, "--epochs", "3")
    metrics = _train(data, whole, *service, "--run-name", f"whole-{refresh}")
    # The same schedule, ended after one epoch as by a power cut: its checkpoint is all that is left.
    job = (*service, "--run-name", f"parts-{refresh}")
    _train(data, parts, *job)
    _cut_after_first_epoch(data, parts, job)
    _train(data, parts, *job, "--resume")
    _same(whole, parts)
    tables = [0, 1, 2] if refresh == "blocking" else [0, 0, 1]
    assert [entry["table_epoch"] for entry in metrics["history"]] == tables
    assert (metrics["refresh"], metrics["staleness"]) == (refresh, int(refresh == "background"))


def _cut_after_first_epoch(data: Path, out: Path, job: tuple[str, ...]) -> None:
    """Stops a job after its first checkpoint."""
    from nearkin_trainer.job import Job

    class PowerCutError(Exception):
        pass

    save = Job._save

    def save_and_fail(job: Job) -> None:
        save(job)
        raise PowerCutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "_save", save_and_fail)
        with pytest.raises(PowerCutError):
            _train(data, out, *job, "--overwrite")
    assert checkpoint.load(out / "checkpoint.npz")["progress"]["epoch"] == 1


def test_a_push_that_fails_in_the_background_ends_the_job(
    data: Path, tmp_path: Path, nearkin_server: LocalService, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the job can go on where it was."""
    push = NeighbourClient.push

    def fails_once(client: NeighbourClient, *rows: Any, epoch: int, **more: Any) -> Any:
        if epoch == 2:
            raise ResourceExhausted("the disk is full")
        return push(client, *rows, epoch=epoch, **more)

    job = ("--service", nearkin_server.address, "--refresh", "background", "--epochs", "4")
    arguments = ["--data", str(data), "--out", str(tmp_path / "out"), *SMALL, *job]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NeighbourClient, "push", fails_once)
        assert main(arguments) == 1
    assert "nearkin-train: the disk is full" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    _train(data, tmp_path / "whole", *job)
    _same(tmp_path / "whole", tmp_path / "out")


def test_two_processes_with_their_own_service(data: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(data), "--out", str(tmp_path), *SMALL, "--epochs", "2", "--processes", "2"]
    arguments += ["--refresh", "background"]
    done = _command("-m", "nearkin_trainer", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["world_size"] == 2
    assert metrics["generation"] == 3
    assert [entry["table_epoch"] for entry in metrics["history"]] == [0, 0]
    waited = np.array([entry["refresh_stall_seconds_per_rank"] for entry in metrics["history"]])
    assert waited.shape == (2, 2)
    assert waited.sum(0) == pytest.approx(metrics["refresh_stall_seconds_per_rank"])
    assert waited.max(1) == pytest.approx([entry["refresh_stall_seconds"] for entry in metrics["history"]])
    assert metrics["refresh_stall_seconds"] == max(metrics["refresh_stall_seconds_per_rank"])
    assert (tmp_path / "service").is_dir()
    assert "epoch 2/2" in done.stdout
    assert done.stdout.count("epoch 2/2") == 1


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=lambda end: end.name)
def test_processes_end_with_the_command(data: Path, tmp_path: Path, end: signal.Signals) -> None:
    job = ["--data", str(data), "--out", str(tmp_path), *SMALL, "--epochs", "100000", "--processes", "2"]
    with (tmp_path / "said").open("wb") as said:
        command = subprocess.Popen([sys.executable, "-m", "nearkin_trainer", *job], stderr=said, stdout=said)
    while not (tmp_path / "checkpoint.npz").exists():  # an epoch is over
        time.sleep(0.1)
        assert command.poll() is None, (tmp_path / "said").read_text()
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    workers = [os.pidfd_open(int(each)) for each in children]
    command.send_signal(end)
    status = command.wait(60)
    for worker in workers:
        assert select.select([worker], [], [], 60)[0], "it outlives the command"
        os.close(worker)
    shown = (tmp_path / "said").read_text()
    assert len(workers) == 2
    assert status == {signal.SIGKILL: -9, signal.SIGINT: 130}[end]
    assert "Traceback" not in shown
    assert shown.count("--resume continues") == (end == signal.SIGINT)


def test_processes_end_with_a_command_that_ends_while_they_start(data: Path, tmp_path: Path) -> None:
    job = ["--data", str(data), "--out", str(tmp_path), *SMALL, "--processes", "2"]
    with subprocess.Popen(
        [sys.executable, "-m", "nearkin_trainer", *job], stderr=subprocess.DEVNULL
    ) as command:
        children: list[str] = []
        while len(children) < 2:
            time.sleep(0.01)
            children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
        workers = [os.pidfd_open(int(each)) for each in children]
        command.kill()
    for worker in workers:
        ended = select.select([worker], [], [], 30)[0]
        if not ended:
            signal.pidfd_send_signal(worker, signal.SIGKILL)
        os.close(worker)
        assert ended, "it outlives the command"


def test_torchrun_and_resume(data: Path, tmp_path: Path, nearkin_server: LocalService) -> None:
    """Two processes under torchrun continue, in shards, what one process has begun; one process ends it."""
    service = ("--service", nearkin_server.address, "--run-name", "t")
    _train(data, tmp_path, *service, "--epochs", "1")
    done = _command(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nearkin_trainer"),
        *("--data", str(data), "--out", str(tmp_path), *SMALL, *service),
        *("--epochs", "2", "--resume", "--embedding.sharded", "--embedding.storage", "bfloat16"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 processes before, 2 now" in done.stderr
    assert len([*tmp_path.glob("checkpoint-2-*-of-2.npz")]) == 2
    metrics = _train(data, tmp_path, *service, "--epochs", "3", "--resume")
    assert [entry["epoch"] for entry in metrics["history"]] == [0, 1, 2]
    assert not [*tmp_path.glob("checkpoint-*.npz")]
    with NeighbourClient(nearkin_server.address, run="t") as client:
        assert [g.epoch for g in client.generations()] == [3, 2, 1, 0]


def test_a_table_in_host_memory_or_a_file_gives_the_same_bits(
    data: Path, tmp_path: Path, nearkin_server: LocalService
) -> None:
    fixed = ("--service", nearkin_server.address, "--optimise.schedule", "constant", "--optimise.warmup", "0")
    _train(data, tmp_path / "device", *fixed, "--run-name", "place-device", "--epochs", "3")
    other = (data, tmp_path / "other", *fixed, "--run-name", "place-other", "--resume")
    few = ("--embedding.device-cache-rows", "4")
    _train(*other, *few, "--epochs", "1", "--embedding.place", "host")
    _train(*other, *few, "--epochs", "2", "--embedding.place", "file", "--embedding.sharded")
    _train(*other, "--epochs", "3", "--embedding.place", "host")
    _same(tmp_path / "device", tmp_path / "other")
    assert not [*(tmp_path / "other").glob(".rows*")]


def test_without_validation_images_metrics_are_null(tmp_path: Path, nearkin_server: LocalService) -> None:
    data = write_csv_set(tmp_path, train_classes=3, validation_classes=0)
    arguments = ("--service", nearkin_server.address, "--run-name", "blind", "--epochs", "1")
    metrics = _train(data, tmp_path / "out", *arguments)
    assert metrics["rank1"] is None
    assert metrics["k"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "epochs=0 must be at least 1"),
        (["--refresh", "background", "--staleness", "0"], "staleness=0 must be at least 1"),
        (["--resume", "--overwrite"], "contradict"),
        (["--data", "nowhere.csv"], "nowhere.csv: no such file"),
        (["--out", "/dev/null"], "out=/dev/null is no folder and cannot be made one: File exists"),
        (["--out", "/dev/null/here"], "out=/dev/null/here is no folder and cannot be made one"),
        (["--service", "nonsense"], "is not unix:///path"),
    ],
)
def test_mistakes_are_explained(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert _status(["--data", str(data), "--out", str(tmp_path / "o"), *SMALL, *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_earlier_results_are_not_overwritten_by_mistake(
    data: Path, tmp_path: Path, nearkin_server: LocalService, capsys: pytest.CaptureFixture[str]
) -> None:
    service = ("--service", nearkin_server.address, "--run-name", "precious")
    _train(data, tmp_path, *service, "--epochs", "1")
    again = ["--data", str(data), "--out", str(tmp_path), *SMALL, *service, "--epochs", "1"]
    assert main(again) == 2
    assert "--resume, or replace it with --overwrite" in capsys.readouterr().err
    assert main([*again[:3], str(tmp_path / "other"), *again[4:]]) == 2
    assert "already has 2 generations" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0


def test_resuming_with_other_classes_is_refused(
    data: Path, tmp_path: Path, nearkin_server: LocalService, capsys: pytest.CaptureFixture[str]
) -> None:
    service = ("--service", nearkin_server.address, "--run-name", "other")
    _train(data, tmp_path / "out", *service, "--epochs", "1")
    fewer = write_csv_set(tmp_path / "fewer", train_classes=8)
    arguments = ["--data", str(fewer), "--out", str(tmp_path / "out"), *SMALL, *service, "--resume"]
    assert main(arguments) == 2
    assert "was made with another set of classes" in capsys.readouterr().err


def test_resuming_with_other_images_is_said(
    tmp_path: Path, nearkin_server: LocalService, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that moved is the same; a file that was replaced is not."""
    service = ("--service", nearkin_server.address, "--run-name", "images")
    data = write_csv_set(tmp_path / "here", train_classes=4)
    _train(data, tmp_path / "out", *service, "--epochs", "1")
    (tmp_path / "here").rename(tmp_path / "there")
    again = (tmp_path / "there" / "data.csv", tmp_path / "out", *service, "--resume")
    _train(*again, "--epochs", "2")
    assert "images are not those" not in caplog.text
    with (tmp_path / "there" / "images" / "0_1.png").open("ab") as image:
        image.write(b"changed")
    _train(*again, "--epochs", "3")
    assert "the training images are not those that" in caplog.text
    assert "--overwrite begins again" in caplog.text


def test_a_shard_that_is_missing_is_named(
    data: Path, tmp_path: Path, nearkin_server: LocalService, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ("--service", nearkin_server.address, "--run-name", "shard", "--embedding.sharded")
    _train(data, tmp_path, *job, "--epochs", "1")
    (shard,) = tmp_path.glob("checkpoint-1-0-of-1.npz")
    shard.unlink()
    again = ["--data", str(data), "--out", str(tmp_path), *SMALL, *job, "--epochs", "2", "--resume"]
    assert main(again) == 2
    assert f"{shard.name} is not beside it. Put a copy in its place" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--model.width", "--model.blocks"])
def test_resuming_with_another_network_is_refused(
    data: Path, tmp_path: Path, nearkin_server: LocalService, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    service = ("--service", nearkin_server.address, "--run-name", f"net{option.replace('--model', '')}")
    _train(data, tmp_path, *service, "--epochs", "1")
    again = ["--data", str(data), "--out", str(tmp_path), *SMALL, *service, "--resume", "--epochs", "2"]
    assert main([*again, option, "3"]) == 2
    shown = capsys.readouterr().err
    assert "was made with another network" in shown
    assert "such as backbone." in shown
    assert main(again) == 0


def test_an_image_that_one_process_cannot_read_ends_all_of_them(tmp_path: Path) -> None:
    data = write_csv_set(tmp_path, train_classes=3)
    (tmp_path / "images" / "0_1.png").write_bytes(b"\x89PNG")  # the second: the second process decodes it
    done = _command(
        *("-m", "nearkin_trainer", "--data", str(data), "--out", str(tmp_path / "out"), *SMALL),
        *("--processes", "2"),
    )
    assert done.returncode in {1, 2}, done.stderr[-3000:]
    assert "0_1.png cannot be read as an image" in done.stderr
    assert "Traceback" not in done.stderr


def test_images_that_do_not_fit_into_memory(data: Path, tmp_path: Path, nearkin_server: LocalService) -> None:
    """Reading files again for every batch trains the same network as keeping them."""
    service = ("--service", nearkin_server.address, "--epochs", "1")
    _train(data, tmp_path / "kept", *service, "--run-name", "kept")
    _train(data, tmp_path / "read", *service, "--run-name", "read", "--image.memory-gib", "0")
    _same(tmp_path / "kept", tmp_path / "read")
    assert np.isfinite(_weights(tmp_path / "read")["sparse.classes.weight"].numpy()).all()


def test_a_time_limit_makes_fewer_epochs_and_a_generation_for_each(data: Path, tmp_path: Path) -> None:
    metrics = _train(data, tmp_path / "out", "--epochs", "100000", "--minutes", "0.03")
    assert 1 <= metrics["epochs"] < 1000
    assert len(metrics["history"]) == metrics["epochs"]
    assert metrics["generation"] == metrics["epochs"] + 1
