"""Embeddings of a whole split to a file, part by part: a long one can be interrupted and goes on where it was."""

from __future__ import annotations

import csv
import hashlib
import re
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm  # type: ignore[import-untyped]

from cl_core import _checks
from cl_core.method import Method
from cl_core.training.data import Data, Split
from cl_core.training.evaluating import embed_dataset, in_evaluation
from cl_core.training.files import make_folder, read_json, text_of, to_json, write_atomically
from cl_core.training.settings import data_settings, read_back

_HEAD = ("row", "name", "label")
_PART_FILES = r"whole\.json|\d{6,}\.safetensors|\..*\.part"


class Embedded(NamedTuple):
    """What was written.

    Attributes:
        path: safetensors file of ``embeddings`` (N, D) and ``labels`` (N,).
        table: CSV file of each row's name and label; None where rows have no names.
        rows: N.
        width: D.
    """

    path: Path
    table: Path | None
    rows: int
    width: int


def embed_to_file(
    method: Method,
    data: Data,
    split: Split,
    output: str | Path,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 512,
    rows_per_part: int = 8192,
    progress: bool = True,
) -> Embedded:
    """Write the embeddings and labels of a split, and a table of names where rows have some.

    Parts lie in ``<output>.parts`` until all are there. Called again with the same method and data after an
    interruption, it goes on after the last whole part; parts of anything else are thrown away.

    Args:
        method: gives the embeddings, in evaluation mode; it is left on ``device``.
        data: whose rows.
        split: which of them.
        output: safetensors file to write; the table lies beside it, with the ending ``.csv``.
        device: where to compute.
        batch_size: inputs at a time.
        rows_per_part: rows after which a part is written.
        progress: show a bar.

    Raises:
        OSError: in one sentence, if a file cannot be written; also if something else than an earlier embedding lies
            where the parts or the table belong.
        ValueError: if ``output`` has the name of the table.
        KeyboardInterrupt: after Ctrl-C; says that the parts are kept.
    """
    _checks.count("batch_size", batch_size)
    _checks.count("rows_per_part", rows_per_part)
    output = Path(output)
    _check_free(output, table=data.row_names(split) is not None)
    dataset: Any = data.evaluation_dataset(split)
    total, parts = len(dataset), _parts(output)
    described = data_settings(data)
    for beside in ("batch_size", "num_workers"):
        described["data"]["init_args"].pop(beside, None)
    whole = {
        "weights": _digest(method.state_dict()),
        "split": split,
        "rows": total,
        "rows_per_part": rows_per_part,
        **described,
    }
    _begin(parts, whole)
    bar = tqdm(total=total, unit="row", desc=f"embedding {split}", disable=not progress)
    done: list[dict[str, Tensor]] = []
    try:
        with bar, in_evaluation(method, device):
            for number, start in enumerate(range(0, total, rows_per_part)):
                stop, file = min(start + rows_per_part, total), parts / f"{number:06d}.safetensors"
                part = _read(file, stop - start)
                if part is None:
                    rows, labels = embed_dataset(
                        method.embed,
                        Subset(dataset, range(start, stop)),
                        data,
                        device=device,
                        batch_size=batch_size,
                    )
                    part = {"embeddings": rows.contiguous(), "labels": labels.contiguous()}
                    write_atomically(file, partial(save_file, part))
                done.append(part)
                bar.update(stop - start)
    except KeyboardInterrupt as error:
        kept = sum(len(part["labels"]) for part in done)
        raise type(error)(f"{kept} of {total} rows are kept in {parts}; the same command goes on") from None
    tensors = {
        name: torch.cat([part[name] for part in done]) if done else torch.empty(0)
        for name in ("embeddings", "labels")
    }
    write_atomically(output, lambda temporary: save_file(tensors, temporary, metadata={"split": split}))
    table = _write_names(data, split, tensors["labels"], output.with_suffix(".csv"))
    shutil.rmtree(parts)
    rows = tensors["embeddings"]
    return Embedded(output, table, len(rows), rows.shape[1] if rows.ndim == 2 else 0)


def _check_free(output: Path, *, table: bool) -> None:
    """Refuse what would overwrite anything but an earlier embedding."""
    if output.is_dir():
        raise IsADirectoryError(f"output must be a file to write, got the folder {output}.")
    parts, names = _parts(output), output.with_suffix(".csv")
    if parts.is_dir():
        foreign = [file.name for file in parts.iterdir() if not re.fullmatch(_PART_FILES, file.name)]
        if foreign:
            raise FileExistsError(
                f"{parts} is where the parts of {output} belong, but holds {min(foreign)!r}: choose another output."
            )
    if not table:
        return
    if output.suffix.lower() == ".csv":
        raise ValueError(f"output must not end in .csv, as the table of names beside it does, got {output}.")
    if names.is_file():
        with names.open(errors="replace") as file:
            if file.readline().strip() != ",".join(_HEAD):
                raise FileExistsError(
                    f"{names} is where the table of names belongs, but is another file: choose another output."
                )


def _parts(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


def _begin(parts: Path, whole: Mapping[str, Any]) -> None:
    """Keep parts of the same embedding, throw away those of another."""
    told = parts / "whole.json"
    try:
        same = told.is_file() and read_json(told) == read_back(whole)
    except ValueError:
        same = False
    if parts.is_dir() and not same:
        shutil.rmtree(parts)
    make_folder(parts)
    write_atomically(told, to_json(whole))


def _read(file: Path, rows: int) -> dict[str, Tensor] | None:
    """A part that was written whole, or None."""
    try:
        part = load_file(file) if file.is_file() else {}
    except (SafetensorError, OSError):
        return None
    fits = set(part) == {"embeddings", "labels"} and all(len(tensor) == rows for tensor in part.values())
    return part if fits else None


def _write_names(data: Data, split: Split, labels: Tensor, path: Path) -> Path | None:
    names = data.row_names(split)
    if names is None:
        return None
    classes = data.class_names

    def write(file: Any) -> None:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_HEAD)
        for row, (name, label) in enumerate(zip(names, labels.tolist(), strict=True)):
            known = classes is not None and label >= 0
            writer.writerow([row, name, classes[label] if known and classes else ""])

    return write_atomically(path, text_of(write))


def _digest(state: Mapping[str, Any]) -> str:
    """Of names and values of a state."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
