from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cl_core.training.embedding import embed_to_file
from cl_core.training.evaluating import embed_split


def embed(tiny, method, output="z.safetensors", **options):
    settings = {"rows_per_part": 10, "progress": False, **options}
    return embed_to_file(method, tiny.TinyData(), "test", output, **settings)


def calls_of(method, monkeypatch, stop_at=None):
    """Rows that the method embeds; it is interrupted at a call."""
    seen, plain = [], method.embed

    def counted(inputs):
        if stop_at is not None and len(seen) == stop_at:
            raise KeyboardInterrupt
        seen.append(len(inputs))
        return plain(inputs)

    monkeypatch.setattr(method, "embed", counted)
    return seen


def test_parts_make_the_whole(tiny):
    method = tiny.method().train()
    written = embed(tiny, method)
    rows, labels = embed_split(method, tiny.TinyData(), "test")
    tensors = load_file(written.path)
    torch.testing.assert_close(tensors["embeddings"], rows)
    assert torch.equal(tensors["labels"], labels)
    assert (written.rows, written.width, written.table) == (44, 5, None)
    assert method.training
    assert [path.name for path in Path().iterdir()] == ["z.safetensors"]


def test_an_interrupted_embedding_goes_on_after_its_last_whole_part(tiny, monkeypatch):
    method = tiny.method()
    with monkeypatch.context() as patched:
        seen = calls_of(method, patched, stop_at=2)
        with pytest.raises(
            KeyboardInterrupt, match=r"20 of 44 rows are kept in z\.safetensors\.parts; the same"
        ):
            embed(tiny, method)
    assert seen == [10, 10]
    assert not Path("z.safetensors").exists()
    Path("z.safetensors.parts/000001.safetensors").write_bytes(b"cut")
    with monkeypatch.context() as patched:
        seen = calls_of(method, patched)
        written = embed(tiny, method)
    assert seen == [10, 10, 10, 4]  # the damaged part and what was missing
    torch.testing.assert_close(
        load_file(written.path)["embeddings"], embed_split(method, tiny.TinyData(), "test")[0]
    )
    assert not Path("z.safetensors.parts").exists()


def test_parts_of_other_weights_are_not_mixed_in(tiny, monkeypatch):
    method = tiny.method()
    with monkeypatch.context() as patched:
        calls_of(method, patched, stop_at=2)
        with pytest.raises(KeyboardInterrupt):
            embed(tiny, method)
    with torch.no_grad():
        method.encoder.layers[0].weight.add_(1)
    written = embed(tiny, method)
    torch.testing.assert_close(
        load_file(written.path)["embeddings"], embed_split(method, tiny.TinyData(), "test")[0]
    )


def test_names_and_labels_make_a_table(tiny, monkeypatch):
    names = [f"photo, {row}.jpg" for row in range(44)]
    monkeypatch.setattr(tiny.TinyData, "row_names", lambda self, split: names)
    written = embed(tiny, tiny.method(), "out/z.safetensors")
    assert written.table == Path("out/z.csv")
    head, *lines = csv.reader(written.table.read_text().splitlines())
    assert head == ["row", "name", "label"]
    assert lines[5] == ["5", "photo, 5.jpg", "b"]
    assert len(lines) == 44


def test_what_is_not_an_embedding_is_left_alone(tiny, monkeypatch):
    """Refused before anything is computed or written."""
    monkeypatch.setattr(tiny.TinyData, "row_names", lambda self, split: list(map(str, range(44))))
    method = tiny.method()
    seen = calls_of(method, monkeypatch)
    Path("z.safetensors.parts").mkdir()
    Path("z.safetensors.parts/thesis.tex").write_text("mine")
    Path("labels.csv").write_text("name,label\na,b\n")
    Path("folder").mkdir()
    for output, error, words in (
        ("z.safetensors", FileExistsError, "holds 'thesis.tex': choose another output"),
        ("labels.safetensors", FileExistsError, "labels.csv is where the table of names belongs"),
        ("z.csv", ValueError, "output must not end in .csv"),
        ("folder", IsADirectoryError, "got the folder folder"),
    ):
        with pytest.raises(error, match=words):
            embed(tiny, method, output)
    assert seen == []
    assert Path("z.safetensors.parts/thesis.tex").read_text() == "mine"
    assert Path("labels.csv").read_text() == "name,label\na,b\n"
    assert embed(tiny, method, "new.safetensors").table == embed(tiny, method, "new.safetensors").table


def test_progress_is_shown_unless_told_otherwise(tiny, capsys):
    embed(tiny, tiny.method(), progress=True)
    assert "embedding test: 100%" in capsys.readouterr().err
    embed(tiny, tiny.method())
    assert capsys.readouterr().err == ""
