"""The catalogue as callers see it, and removing things from it."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import replace

from nearkin_service.catalogue import Run
from nearkin_service.catalogue.events import Subscription
from nearkin_service.errors import InvalidArgumentError, NotFoundError
from nearkin_service.operations.builds import Builds
from nearkin_service.operations.core import Core
from nearkin_service.operations.searching import Searching
from nearkin_service.values import RUN_NAME, Generation, PushState, RunView, check_run_name

log = logging.getLogger("nearkin.catalogue")

_PAGE, _MOST = 100, 1_000
_NUMBER = re.compile(r"[1-9][0-9]{0,11}")


class Administering:
    """Lists, looks up, removes."""

    def __init__(self, core: Core, builds: Builds, searching: Searching) -> None:
        self._core = core
        self._builds = builds
        self._searching = searching

    def runs(
        self, page_size: int, token: str, shown: Callable[[str], bool] = lambda _: True
    ) -> tuple[list[RunView], str]:
        """A page of the runs that may be `shown`, by name, and the next page's token ("" after the last)."""
        if token and not RUN_NAME.fullmatch(token):
            raise _strange(token)
        names = sorted(name for name in self._core.catalogue.runs if name > token and shown(name))
        page = names[: _page_size(page_size)]
        views = [self._core.catalogue.runs[name].view() for name in page]
        return views, page[-1] if len(page) < len(names) else ""

    def run(self, name: str) -> RunView:
        return self._core.catalogue.run(check_run_name(name)).view()

    def find_run(self, name: str) -> RunView | None:
        """The run, or None while there is none."""
        run = self._core.catalogue.runs.get(check_run_name(name))
        return run.view() if run else None

    def generations(self, name: str, page_size: int, token: str) -> tuple[list[Generation], str]:
        """A page of generations, newest first, and the token of the next page."""
        run = self._core.catalogue.run(check_run_name(name))
        if token and not (_NUMBER.fullmatch(token) and int(token) <= run.last_generation):
            raise _strange(token)
        below = int(token) if token else run.last_generation + 1
        numbers = sorted((n for n in run.generations if n < below), reverse=True)
        page = numbers[: _page_size(page_size)]
        return [run.generations[n] for n in page], str(page[-1]) if len(page) < len(numbers) else ""

    def subscribe(self, name: str) -> AbstractContextManager[Subscription]:
        return self._core.catalogue.events.subscribe(check_run_name(name))

    @asynccontextmanager
    async def _locked(self, name: str) -> AsyncIterator[Run]:
        """A run that nobody else changes. NotFoundError: no such run."""
        run = self._core.catalogue.run(check_run_name(name))
        async with run.lock:
            if self._core.catalogue.runs.get(name) is not run:
                raise NotFoundError(f"there is no run {name!r}")
            yield run

    async def delete_run(self, name: str) -> None:
        """NotFoundError: no such run."""
        async with self._locked(name) as run:
            run.leaving = True
            try:
                for push in run.live_pushes:
                    while push.publishing:
                        await self._core.catalogue.changed.wait()
                    self._builds.drop(push, PushState.ABORTED, "its run was deleted")
                await self._core.io(self._core.directory.delete_run, name)
                self._core.catalogue.remove_run(run)  # afterwards: its name is free once its place is
                for generation in run.generations.values():
                    self._searching.forget(generation)  # afterwards: nobody can open it any more
            finally:
                run.leaving = False
        log.info("run %s deleted", name)

    async def delete_generation(self, name: str, number: int) -> None:
        """NotFoundError: no such run or generation."""
        if number < 1:
            raise InvalidArgumentError("generation", f"{number} is not a generation's number (1, 2, ...)")
        async with self._locked(name) as run:
            generation = run.generation(number)
            await self._core.io(self._core.directory.delete_generation, generation)
            if self._core.catalogue.present(generation) is not None:  # retention may have come first
                self._core.catalogue.remove_generation(run, generation)
            self._searching.forget(generation)
        log.info("run %s: generation %d deleted", name, number)

    async def pin(self, name: str, number: int, *, pinned: bool) -> Generation:
        """Keeps a generation whatever retention says, or no longer. NotFoundError: there is none."""
        if number < 0:
            raise InvalidArgumentError("generation", f"{number} is negative")
        async with self._locked(name) as run:
            before = run.generation(number)
            generation = replace(before, pinned=pinned)
            self._core.catalogue.replace(generation)  # first: a sweep from now on knows
            try:
                with self._core.catalogue.kept(generation):
                    await self._core.io(self._core.directory.pin, generation, pinned=pinned)
            except OSError:
                now = self._core.catalogue.present(generation)
                self._core.catalogue.replace(replace(now or before, pinned=before.pinned))
                raise
        log.info("run %s: generation %d %s", name, generation.number, "pinned" if pinned else "unpinned")
        return generation


def _strange(token: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        "page_token", f"{token[:80]!r} is none that this list gave out; leave it empty to begin anew"
    )


def _page_size(asked: int) -> int:
    if asked < 0:
        raise InvalidArgumentError("page_size", f"{asked} is negative")
    return min(asked or _PAGE, _MOST)
