"""Runs, and everything looked up in them by name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from nearkin_service.catalogue.events import EventHub
from nearkin_service.catalogue.pushes import Push
from nearkin_service.catalogue.signal import Signal
from nearkin_service.errors import NotFoundError
from nearkin_service.values import (
    Generation,
    GenerationRemoved,
    PushState,
    RecoveredRun,
    RunEvent,
    RunRemoved,
    RunView,
)


class Run:
    """One training job's name space. `lock` is held while a push of it begins or it is deleted."""

    def __init__(self, name: str, created: float) -> None:
        self.name = name
        self.created = created
        self.last_generation = 0
        self.leaving = False  # being deleted: its readers are to hear that, not what becomes of its pushes
        self.lock = asyncio.Lock()
        self.generations: dict[int, Generation] = {}
        self.pushes: dict[int, Push] = {}  # by epoch: the latest attempt

    @property
    def newest(self) -> Generation | None:
        return next(reversed(self.generations.values()), None)

    @property
    def live_pushes(self) -> list[Push]:
        return [push for push in list(self.pushes.values()) if push.live]

    @property
    def latest_push(self) -> Push | None:
        """Whose epoch was begun last. Any thread."""
        pushes = list(self.pushes.values())
        return pushes[-1] if pushes else None

    def generation(self, number: int) -> Generation:
        """Generation `number`, or the newest for 0. NotFoundError: there is none."""
        found = self.generations.get(number) if number else self.newest
        if found is None:
            missing = f"generation {number}" if number else "generation yet"
            raise NotFoundError(f"run {self.name!r} has no {missing}")
        return found

    def since(self, epoch: int) -> Generation | None:
        """The newest generation if its epoch, or else the newest of those whose epoch, is at least this."""
        return next((g for g in reversed(self.generations.values()) if g.epoch >= epoch), None)

    def require_hope(self, epoch: int) -> None:
        """FailedPreconditionError: the epoch's push came to nothing, and no later one is on its way."""
        if self.leaving:
            return
        ended = self.pushes.get(epoch)
        hope = any(push.spec.epoch >= epoch for push in self.live_pushes)
        if ended is not None and not hope:
            ended.require_usable()

    def before(self, number: int) -> Generation:
        """The generation published before this one. NotFoundError: it was the first."""
        earlier = [n for n in self.generations if n < number]
        if not earlier:
            raise NotFoundError(f"run {self.name!r} has no generation before {number}")
        return self.generations[max(earlier)]

    def view(self) -> RunView:
        live = self.live_pushes
        stored = sum(len(push.stored) * push.spec.row_bytes for push in live)
        return RunView(
            name=self.name,
            created=self.created,
            newest=self.newest,
            generations=len(self.generations),
            bytes_on_disk=stored + sum(g.bytes_on_disk for g in self.generations.values()),
            pushes=tuple(push.view() for push in live),
        )


class Catalogue:
    """All runs. `changed` fires at whatever a waiting reader may have waited for."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.events = EventHub()
        self.changed = Signal()
        self._pushes: dict[str, Push] = {}

    def restore(self, recovered: Iterable[RecoveredRun]) -> None:
        """Takes over what the data directory remembers."""
        for found in recovered:
            run = Run(found.name, found.created)
            run.last_generation = found.last_generation
            self.runs[run.name] = run
            for push in map(Push.recovered, found.pushes):
                self._remember(run, push)
            for generation in found.generations:
                run.generations[generation.number] = generation
                self._remember(run, Push.of_generation(generation))

    def run(self, name: str) -> Run:
        """NotFoundError: no such run."""
        try:
            return self.runs[name]
        except KeyError:
            raise NotFoundError(f"there is no run {name!r}") from None

    def push(self, push_id: str) -> Push:
        """NotFoundError: no such push."""
        try:
            return self._pushes[push_id]
        except KeyError:
            raise NotFoundError(f"there is no push {push_id[:64]!r}; begin its epoch again") from None

    def generation_of(self, push: Push) -> Generation:
        """What a published push became. NotFoundError: it was removed. Any thread."""
        found = self._look(push.spec.run, push.generation, push.push_id)
        if found is None:
            raise _removed(push.spec.run, push.generation)
        return found

    def present(self, generation: Generation) -> Generation | None:
        """The same as it is by now, or None; another may have its number, in a run made anew. Any thread."""
        return self._look(generation.run, generation.number, generation.push_id)

    def _look(self, run: str, number: int, push_id: str) -> Generation | None:
        there = self.runs.get(run)
        found = there.generations.get(number) if there else None
        return found if found is not None and found.push_id == push_id else None

    @contextmanager
    def kept(self, generation: Generation) -> Iterator[None]:
        """Around the use of a generation's files. Any thread.

        NotFoundError: it was removed before the end: files were missing, or another's may have lain there.
        """
        try:
            yield
        except FileNotFoundError:
            raise _removed(generation.run, generation.number) from None
        finally:
            if self.present(generation) is None:
                raise _removed(generation.run, generation.number)

    def run_of_push(self, push_id: str) -> str | None:
        """None: no such push."""
        push = self._pushes.get(push_id)
        return push.spec.run if push else None

    @property
    def open_pushes(self) -> list[Push]:
        return [push for run in list(self.runs.values()) for push in run.live_pushes]

    def add_run(self, run: Run) -> None:
        self.runs[run.name] = run

    def add_push(self, run: Run, push: Push) -> None:
        self._remember(run, push)
        self._tell(run.name, push.view())

    def _remember(self, run: Run, push: Push) -> None:
        self._pushes[push.push_id] = push
        current = run.pushes.get(push.spec.epoch)
        if current is None or current.state is not PushState.PUBLISHED:
            run.pushes[push.spec.epoch] = push

    def outlived(self, run: str, keep: int) -> list[Push]:
        """A run's pushes that came to nothing, but for the last `keep` of them."""
        over = [
            p
            for p in self._pushes.values()
            if p.spec.run == run and p.state in (PushState.FAILED, PushState.ABORTED)
        ]
        return over[:-keep]

    def forget_push(self, push: Push) -> None:
        """Nobody can ask for it any more."""
        self._pushes.pop(push.push_id, None)
        run = self.runs.get(push.spec.run)
        if run is not None and run.pushes.get(push.spec.epoch) is push:
            del run.pushes[push.spec.epoch]

    def push_changed(self, push: Push) -> None:
        self._tell(push.spec.run, push.view())

    def rows_arrived(self, push: Push) -> None:
        """Only watchers care; readers need not wake for it."""
        self.events.publish(push.spec.run, push.view())

    def publish(self, run: Run, push: Push, generation: Generation) -> None:
        """From here on readers get it."""
        run.generations[generation.number] = generation
        run.last_generation = max(run.last_generation, generation.number)
        push.publish(generation)
        self.events.publish(run.name, push.view())
        self._tell(run.name, generation)

    def replace(self, generation: Generation) -> None:
        """Takes a generation's new state of embeddings, unless it was removed meanwhile."""
        if self.present(generation) is not None:
            self.runs[generation.run].generations[generation.number] = generation

    def remove_generation(self, run: Run, generation: Generation) -> None:
        del run.generations[generation.number]
        self._pushes.pop(generation.push_id, None)
        latest = run.pushes.get(generation.epoch)
        if latest is not None and latest.push_id == generation.push_id:
            del run.pushes[generation.epoch]
        self._tell(run.name, GenerationRemoved(generation.number))

    def remove_run(self, run: Run) -> None:
        del self.runs[run.name]
        for push_id in [i for i, push in self._pushes.items() if push.spec.run == run.name]:
            del self._pushes[push_id]
        self._tell(run.name, RunRemoved())

    def _tell(self, run: str, event: RunEvent) -> None:
        self.events.publish(run, event)
        self.changed.fire()


def _removed(run: str, number: int) -> NotFoundError:
    return NotFoundError(f"generation {number} of run {run!r} was just removed")
