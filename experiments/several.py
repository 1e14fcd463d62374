"""Several runs, each in a process of its own, some at a time, with one bar over all of them.

A process of its own makes a method's peak memory its own. With several at a time each gets its share of the cores: small
products gain little from a second thread, and two runs beside each other take about half the time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Protocol

from tqdm import tqdm

#: How far a run's own bar is: "lora:  50%|##   | 480/960 [...".
PROGRESS = re.compile(r"\| (\d+)/\d+ \[")


class Planned(Protocol):
    """A run to be done: its name, the command that does it, and how many sentences it sees, each as often as it is seen."""

    name: str
    command: Sequence[str]
    examples: int

    def outcome(self) -> str:
        """What came of it, in a line; asked when it is done."""


class Several:
    """The runs that are under way.

    Args:
        todo: what is to be done, in this order.
        before: sentences of the runs that are done already.
        jobs: how many run at a time.
    """

    def __init__(self, todo: Sequence[Planned], before: int, jobs: int) -> None:
        self.todo, self.before, self.jobs = todo, before, jobs
        self.lock, self.children, self.stopped, self.started = threading.Lock(), set(), False, 0

    def run(self) -> list[str]:
        """Does each; returns a line for each that failed."""
        failed: list[str] = []
        if not self.todo:
            return failed
        total = self.before + sum(one.examples for one in self.todo)
        interval = 0.2 if sys.stderr.isatty() else 30
        # The rate is that of the whole comparison, not of the last run: the methods differ in speed.
        bar = {"total": total, "initial": self.before, "unit": "ex", "smoothing": 0, "mininterval": interval}
        with tqdm(**bar) as self.bar, ThreadPoolExecutor(self.jobs) as pool:
            waiting = {pool.submit(self._one, one): one for one in self.todo}
            try:
                for future in as_completed(waiting):
                    if error := future.result():
                        failed.append(f"{waiting[future].name} ({error})")
                        self.bar.write(failed[-1], file=sys.stderr)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise
        return failed

    def _one(self, one: Planned) -> str | None:
        """Does one run, moving the bar along; returns what went wrong, or None."""
        with self.lock:
            self.started += 1
            self.bar.set_description(f"{self.started}/{len(self.todo)} {one.name}")
        seen, said = 0, ""
        with self._process(one.command) as process:
            for line in process.stderr:  # a carriage return ends a line too, in text mode
                if place := PROGRESS.search(line):
                    seen = self._moved(seen, min(int(place[1]), one.examples))
                elif line.strip():
                    said = line.strip()
        self._moved(seen, one.examples)
        with self.lock:
            self.children.discard(process)
        if process.returncode:
            return said.removeprefix("error: ") or f"exit code {process.returncode}"
        self.bar.write(one.outcome())
        return None

    def _process(self, command: Sequence[str]) -> subprocess.Popen:
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))} if self.jobs > 1 else {}
        settings: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        with self.lock:
            if self.stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen(command, env={**os.environ, **threads}, **settings)
            self.children.add(process)
        return process

    def _moved(self, seen: int, now: int) -> int:
        with self.lock:
            self.bar.update(now - seen)
        return now

    def _stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.children:
                process.kill()
