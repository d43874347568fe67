"""A pool of processes joined by gloo, started once and shared by all tests of a session."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """Run a function on several ranks and collect what each returns.

    The processes come from a fork server that has torch loaded, so that starting them is cheap and inherits no thread
    of the tests' process. Use as a context manager, once a session:

        with Ranks(4) as ranks:
            results = ranks.run(function, argument, world_size=3)

    where ``function(group, argument)`` is called on ranks 0, 1 and 2 with a process group of just these. It must be
    defined at the top level of a module or of a test file.

    Args:
        size: number of processes, the largest world size.
        timeout: seconds after which a call that has not returned anywhere is given up.
    """

    def __init__(self, size: int = 4, *, timeout: float = 120.0) -> None:
        self.size, self.timeout = size, timeout
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> Ranks:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed"])
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.size, f"{self._folder.name}/rendezvous"), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(0.2)
            process.kill()
            process.join()
        self._folder.cleanup()
        self._connections, self._processes = [], []

    def run(self, function: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
        """Call ``function(group, *args)`` on ranks 0 to world_size - 1 and return their results in rank order.

        Raises:
            RuntimeError: with the traceback of the first rank that failed; or if a rank died or none returned.
        """
        if not 1 <= world_size <= self.size:
            raise ValueError(f"world_size must be between 1 and {self.size}, got {world_size}.")
        if not self._connections:
            raise RuntimeError("Ranks runs inside its context only: with Ranks(4) as ranks: ranks.run(...).")
        file = getattr(sys.modules.get(function.__module__), "__file__", None)
        for connection in self._connections[:world_size]:
            connection.send((function.__module__, file, function.__qualname__, world_size))
            connection.send_bytes(ForkingPickler.dumps(args))
        return self._answers(world_size, function)

    def _answers(self, world_size: int, function: Callable[..., Any]) -> list[Any]:
        """Results in rank order; the first failure is raised, whatever the others still wait for."""
        results: dict[int, Any] = {}
        waiting = {connection: rank for rank, connection in enumerate(self._connections[:world_size])}
        while waiting:
            ready: list[Any] = multiprocessing.connection.wait(list(waiting), self.timeout)
            failure = (
                None if ready else f"no answer from ranks {sorted(waiting.values())} for {self.timeout} s"
            )
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    worked, results[rank] = connection.recv()
                except EOFError:
                    worked, results[rank] = False, "it died"
                if not worked:
                    failure = (
                        f"rank {rank} of {world_size} failed in {function.__qualname__}:\n{results[rank]}"
                    )
            if failure is not None:
                if waiting:  # they may wait for each other: begin anew
                    self.__exit__()
                    self.__enter__()
                raise RuntimeError(failure)
        return [results[rank] for rank in range(world_size)]


def _serve(connection: Connection, rank: int, size: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    groups = {1: dist.new_group([0])} | {n: dist.new_group(list(range(n))) for n in range(2, size + 1)}
    while True:
        try:
            module, file, name, world_size = connection.recv()
            args = connection.recv_bytes()
        except EOFError:
            return
        try:
            function = _find(module, file, name)  # first, as the arguments may come from its file too
            result = function(groups[world_size], *ForkingPickler.loads(args))
            connection.send((True, result))
        except Exception:
            connection.send((False, traceback.format_exc()))


def _find(module: str, file: str | None, name: str) -> Callable[..., Any]:
    """The function by module name, or from its file where that is a test file outside any package."""
    if module not in sys.modules:
        try:
            importlib.import_module(module)
        except ImportError:
            if file is None:
                raise
            spec = importlib.util.spec_from_file_location(module, Path(file))
            assert spec is not None
            assert spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[module] = loaded
            for dot in (place for place, letter in enumerate(module) if letter == "."):
                # What pickle imports first. No package has such a file, so nothing of that name is hidden.
                sys.modules.setdefault(module[:dot], ModuleType(module[:dot]))
            spec.loader.exec_module(loaded)
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]
