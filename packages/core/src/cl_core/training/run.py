"""The folder of a run: what was asked, what was measured, what came out."""

from __future__ import annotations

import errno
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from filelock import FileLock, Timeout

from cl_core.training.artifacts import is_export
from cl_core.training.checkpoints import LAST
from cl_core.training.files import make_folder, read_json, to_json, write_atomically

_CHILD = "CL_RUN_DIR"
"""Environment variable by which the processes that Lightning starts learn the folder of the first one."""


_ALWAYS = (
    "model",
    "data",
    "evaluation",
    "seed",
    "processes",
    "global_batch_size",
    "weights",
)  # in settings.json


class RunFolder:
    """One folder a run.

    ``config.yaml`` (what was asked, resolved), ``settings.json`` (what was built of it), ``versions.json``,
    ``metrics.csv`` (a row an epoch), ``metrics.json`` (final), ``similarities.safetensors``, ``scores.safetensors``
    (where they are recorded), ``checkpoints/``, ``export/``, ``figures/``.

    Args:
        path: an existing folder of a run; :meth:`create` makes one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.settings = self.path / "settings.json"
        self.metrics_table = self.path / "metrics.csv"
        self.metrics = self.path / "metrics.json"
        self.scores = self.path / "scores.safetensors"
        self.checkpoints = self.path / "checkpoints"
        self.last_checkpoint = self.checkpoints / LAST
        self.export = self.path / "export"
        self.figures = self.path / "figures"

    @classmethod
    def create(cls, name: str, *, run_dir: str | Path | None = None, processes: int = 1) -> RunFolder:
        """Make a new folder: ``run_dir``, else ``runs/<name>-<first free number>``.

        Args:
            name: stem of the folder.
            run_dir: the folder itself; None for a numbered one.
            processes: that train together and need to agree on it.

        Raises:
            FileExistsError: if ``run_dir`` already holds a run.
            OSError: in one sentence, if the folder cannot be made.
        """
        if os.environ.get("LOCAL_RANK", "0") != "0":  # the first process makes it
            return cls(run_dir or os.environ.get(_CHILD) or _told(None, processes) or "runs")
        if run_dir is not None:
            run = cls(make_folder(run_dir))
            run.check_free()
        else:
            run = cls(_first_free(make_folder("runs"), re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"))
            _told(str(run.path.resolve()), processes)
        return run

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """The run at ``path``.

        Raises:
            FileNotFoundError: if there is none.
        """
        run = cls(path)
        if not run.config.is_file():
            raise FileNotFoundError(f"{path} is not a run: there is no config.yaml in it.")
        return run

    def check_free(self) -> None:
        """Refuse a folder that holds a run.

        Raises:
            FileExistsError: if it does.
        """
        if self.config.exists():
            raise FileExistsError(
                f"{self.path} already holds a run: go on with --resume {self.path}, or choose another --run_dir."
            )

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Tell the processes that Lightning starts meanwhile, which know the arguments only, where the run is."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.environ[_CHILD] = str(self.path.resolve())
        try:
            yield
        finally:
            os.environ.pop(_CHILD, None)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder; the lock ends with the process at the latest.

        Raises:
            BlockingIOError: in one sentence, if another process holds it.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise BlockingIOError(errno.EAGAIN, f"another process trains in {self.path}") from None
        except NotImplementedError:
            warnings.warn(
                f"the file system of {self.path} has no locks: see to it that only one process trains there.",
                stacklevel=3,
            )
        try:
            for left in self.path.rglob(".*.part"):  # by a process that was killed while it wrote
                left.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def write_settings(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Write ``config.yaml`` and ``settings.json``."""
        write_atomically(self.settings, to_json(settings))
        write_atomically(self.config, str(yaml.safe_dump(dict(config), sort_keys=False)))

    def read_settings(self) -> dict[str, Any]:
        """``settings.json``.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: in one sentence, if it is not readable.
        """
        if not self.settings.is_file():
            raise FileNotFoundError(f"{self.path} cannot be resumed: there is no {self.settings.name} in it.")
        settings = self._read_object(self.settings)
        if lost := [name for name in _ALWAYS if name not in settings]:
            raise ValueError(f"{self.settings} is truncated: it lacks {', '.join(lost)}.")
        for kind, names in ((dict, ("model", "data", "evaluation")), (int, ("seed",))):
            if wrong := [name for name in names if not isinstance(settings[name], kind)]:
                raise ValueError(f"{self.settings} is damaged: {wrong[0]} is {settings[wrong[0]]!r:.40}.")
        return settings

    def read_config(self) -> dict[str, Any]:
        """``config.yaml``.

        Raises:
            ValueError: in one sentence, if it is not readable.
        """
        try:
            config = yaml.safe_load(self.config.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            config = None
        if not isinstance(config, dict):
            raise ValueError(f"{self.config} is not readable YAML: it is truncated or corrupt.")
        if wrong := [name for name in ("model", "data") if not isinstance(config.get(name, {}), dict)]:
            raise ValueError(f"{self.config} is damaged: {wrong[0]} is {config[wrong[0]]!r:.40}.")
        return config

    def write_versions(self, package: str) -> None:
        """Write the versions and the device that this run uses."""
        names = [package, "cl-core", "lightning", "numpy"]
        versions = {name: _version(name) for name in dict.fromkeys(names)}
        accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        write_atomically(
            self.path / "versions.json",
            to_json(
                {
                    "python": platform.python_version(),
                    "platform": platform.platform(),
                    "accelerator": accelerator,
                    "torch": str(torch.__version__),
                    **versions,
                }
            ),
        )

    def write_metrics(self, **entries: Any) -> dict[str, Any]:
        """Add entries to ``metrics.json`` and return all of it."""
        metrics = self.read_metrics() | entries
        write_atomically(self.metrics, to_json(metrics))
        return metrics

    def reopen(self) -> None:
        """Take back what ``metrics.json`` says of a result that is about to change."""
        stale = ("trained", "train", "steps", "seed", "test", "validate", "finished")
        kept = {name: value for name, value in self.read_metrics().items() if name not in stale}
        write_atomically(self.metrics, to_json(kept))

    def read_metrics(self) -> dict[str, Any]:
        """``metrics.json``, empty if there is none yet.

        Raises:
            ValueError: in one sentence, if it is not readable.
        """
        metrics = self._read_object(self.metrics) if self.metrics.is_file() else {}
        for name in ("trained", "untrained", "raw", "train"):
            if not isinstance(metrics.get(name) or {}, dict):
                raise ValueError(f"{self.metrics} is damaged: {name} is {metrics[name]!r:.40}.")
        return metrics

    def snapshot(self) -> Callable[[], None]:
        """A function that puts back what the run said of itself when this was called, nothing if it was none yet."""
        files = (self.settings, self.config, self.metrics, self.path / "versions.json")
        contents = {file: file.read_bytes() for file in files if file.is_file()}

        def restore() -> None:
            for file in files:
                if file in contents:
                    write_atomically(file, contents[file])
                else:
                    file.unlink(missing_ok=True)

        return restore

    @staticmethod
    def _read_object(path: Path) -> dict[str, Any]:
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(
                f"{path} is damaged: it must hold a JSON object, not a {type(content).__name__}."
            )
        return content

    @property
    def finished(self) -> bool:
        """Whether the trained method has been exported and evaluated."""
        return is_export(self.export) and bool(self.read_metrics().get("finished"))

    @property
    def result(self) -> Path | None:
        """What the run has learnt so far: the export of a finished run, else the last checkpoint; None before it."""
        if is_export(self.export) and (self.finished or not self.last_checkpoint.is_file()):
            return self.export
        return self.last_checkpoint if self.last_checkpoint.is_file() else None

    @classmethod
    def around(cls, path: str | Path) -> RunFolder | None:
        """The run that a run folder, its export or one of its checkpoints belongs to."""
        path = Path(path)
        whole = path.absolute()  # where a relative path ends above the working directory
        for folder in (path, path.parent, path.parent.parent, whole.parent, whole.parent.parent):
            run = cls(folder)
            if run.config.is_file() and run.settings.is_file():
                return run
        return None


def _told(path: str | None, processes: int) -> str | None:
    """What the first process says, to those of an earlier training in this program; None before there were any."""
    if processes == 1 or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    paths = [path]
    torch.distributed.broadcast_object_list(paths, src=0)
    return paths[0]


def _first_free(parent: Path, name: str) -> Path:
    taken = [
        int(found[1])
        for entry in parent.iterdir()
        if (found := re.fullmatch(re.escape(name) + r"-(\d+)", entry.name))
    ]
    number = max(taken, default=0) + 1
    while True:
        try:
            return make_folder(parent / f"{name}-{number:03d}", exist_ok=False)
        except FileExistsError:
            number += 1


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
