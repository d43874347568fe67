"""What the command ``scores`` draws of runs, and the pictures themselves."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cl_core.scores import ScoreRecorder
from cl_vision import figures, score_figures
from cl_vision.cli import main
from cl_vision.score_figures import STATISTICS


def opened(source):
    with Image.open(source) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def has(pixels, colour):
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return bool((pixels == wanted).all(2).any())


def curves(steps=60, height=1.0):
    at = np.arange(steps)
    return at, {name: height * np.sin(at / 9 + place) for place, name in enumerate(STATISTICS)}


def histograms(blocks=5, centre=0.5):
    edges = np.linspace(-1, 1, 65)
    rows = np.random.default_rng(0).normal(centre, 0.1, (2, blocks, 500))
    counts = [[np.histogram(values, edges)[0] for values in kind] for kind in rows]
    return (10 * np.arange(1, blocks + 1), edges, *counts)


def test_curves_of_one_run_and_of_several(tmp_path):
    one = opened(score_figures.plot_score_curves(tmp_path / "new" / "one.png", {"a": curves()}))
    assert has(one, score_figures.KINDS["positive"]) and has(one, score_figures.KINDS["negative"])
    runs = {f"run {place}": curves(40 + place, place) for place in range(9)}
    several = opened(score_figures.plot_score_curves(tmp_path / "nine.png", runs))
    assert all(has(several, colour) for colour in figures.COLOURS[:7])
    accurate = score_figures.plot_score_curves(
        tmp_path / "nine.png", runs, accuracies={"run 0": 0.41, "run 1": None}
    )
    assert opened(accurate).shape == several.shape and not np.array_equal(opened(accurate), several)


def test_numbers_that_are_not_there_leave_gaps(tmp_path):
    steps, values = curves()
    values = {
        **values,
        "negative_mean": np.full(60, np.nan),
        "negative_variance": values["negative_mean"].copy(),
    }
    values["negative_variance"][:20] = np.nan
    path = tmp_path / "picture.png"
    gaps, whole = (
        opened(score_figures.plot_score_curves(path, {"a": given})) for given in ((steps, values), curves())
    )
    assert gaps.shape == whole.shape and not np.array_equal(gaps, whole)
    gaps, whole = (
        opened(score_figures.plot_score_waterfall(path, "name", [("1", given), ("2", curves())]))
        for given in ((steps, values), curves())
    )
    assert gaps.shape == whole.shape and not np.array_equal(gaps, whole)


@pytest.mark.parametrize("count", [1, 2, 40, 1000])
def test_running_means(count):
    values = np.random.default_rng(0).normal(size=count)
    values[count // 2] = np.nan if count > 2 else 1.0
    reach, found = count // 50, score_figures.smoothed(values)
    for place in range(count):
        window = values[max(0, place - reach) : place + reach + 1]
        wanted = np.nanmean(window) if np.isfinite(window).any() else np.nan
        np.testing.assert_allclose(found[place], wanted, rtol=1e-9, atol=1e-12)


def test_histograms_of_one_run_and_of_several(tmp_path):
    path = tmp_path / "histograms.png"
    one = opened(score_figures.plot_score_histograms(path, {"a": histograms()}))
    assert has(one, score_figures.KINDS["positive"]) and has(one, score_figures.KINDS["negative"])
    few = opened(score_figures.plot_score_histograms(path, {"a": histograms(50)}, rows=3))
    many = opened(score_figures.plot_score_histograms(path, {"a": histograms(50)}))
    assert few.shape[0] < many.shape[0]
    sizes = [
        opened(
            score_figures.plot_score_histograms(path, {str(n): histograms(n + 1) for n in range(count)})
        ).shape
        for count in (2, 3, 6)
    ]
    assert sizes[0][1] < sizes[1][1] == sizes[2][1] and sizes[1][0] < sizes[2][0]


def test_scores_that_are_all_the_same(tmp_path):
    edges = np.linspace(-1, 1, 65)
    counts = np.zeros((2, 64), dtype=int)
    counts[:, 63] = 7
    nothing = np.zeros_like(counts)
    path = tmp_path / "h.png"
    drawn = opened(score_figures.plot_score_histograms(path, {"a": ([1, 2], edges, counts, nothing)}))
    assert has(drawn, score_figures.KINDS["positive"])
    flat = {name: np.ones(5) for name in STATISTICS}
    opened(score_figures.plot_score_waterfall(tmp_path / "w.png", "x", [("1", (range(5), flat))]))
    one = {name: np.ones(1) for name in STATISTICS}
    opened(score_figures.plot_score_waterfall(tmp_path / "w.png", "x", [("1", ([0], one))]))
    opened(score_figures.plot_score_curves(tmp_path / "c.png", {"a": ([0], one)}))


def test_names_are_drawn_as_they_are(tmp_path):
    """Dollars, a leading underscore, tags."""
    pictures = []
    for name in ("$a_$$", "_b", "<b>"):
        runs = {name: curves(), "other": curves()}
        pictures.append(opened(score_figures.plot_score_curves(tmp_path / "c.png", runs)))
        opened(
            score_figures.plot_score_histograms(tmp_path / "h.png", {name: histograms(), "o": histograms()})
        )
        values = [(name, curves()), ("b", curves())]
        opened(score_figures.plot_score_waterfall(tmp_path / "w.png", name, values))
    assert not np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda path: score_figures.plot_score_curves(path, {}), "runs must hold at least one, got none"),
        (lambda path: score_figures.plot_score_histograms(path, {}), "runs must hold at least one, got none"),
        (
            lambda path: score_figures.plot_score_waterfall(path, "x", []),
            "values must hold at least one, got none",
        ),
        (
            lambda path: score_figures.plot_score_curves(path, {"a": (range(9), curves()[1])}),
            r"as many values as steps, at least 1, got \(60,\) and 9",
        ),
        (lambda path: score_figures.plot_score_curves(path, {"a": curves(0)}), "at least 1"),
        (
            lambda path: score_figures.plot_score_histograms(path, {"a": histograms(0)}),
            "must hold B >= 1 ends",
        ),
        (
            lambda path: score_figures.plot_score_histograms(path, {"a": histograms()}, rows=0),
            "rows must be >= 1",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, call, said):
    with pytest.raises(ValueError, match=said):
        call(tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())


def run_of(path, *, momentum=0.9, seed=0, accuracy=None, steps=12, label="MoCo", spread=1.0):
    """A run folder as far as ``scores`` reads it."""
    path.mkdir(parents=True)
    model = {
        "class_path": f"cl_vision.methods.{label}",
        "init_args": {"momentum": momentum, "projector": None},
    }
    settings = {
        "model": model,
        "data": {"class_path": "cl_vision.data.Digits", "init_args": {}},
        "evaluation": {},
    }
    settings |= {"seed": seed, "processes": 1, "global_batch_size": 8, "weights": "drawn"}
    (path / "settings.json").write_text(json.dumps(settings))
    (path / "config.yaml").write_text("{}")
    if accuracy is not None:
        (path / "export").mkdir()
        (path / "export" / "config.json").write_text("{}")
        (path / "export" / "model.safetensors").write_bytes(b"")
        trained = {"knn": accuracy, "linear": accuracy + 0.1}
        (path / "metrics.json").write_text(json.dumps({"trained": trained, "finished": True}))
    recorder, generator = ScoreRecorder(5), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        query, noise = torch.randn(2, 8, 4, generator=generator)
        recorder.update(query, query + spread * noise)
    save_file(recorder.flush(), path / "scores.safetensors")
    return path


class Page(HTMLParser):
    """Tags, texts and pictures; every tag that is opened is closed."""

    def __init__(self, path):
        super().__init__()
        self.open, self.texts, self.pictures, self.attributes = [], [], [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def check(self, *pictures):
        """It needs nothing from elsewhere, and shows the pictures that lie beside it."""
        text = re.sub('base64,[^"]*', "", self.text)
        assert not any(word in text for word in ("http", "<script", "url(", "@import"))
        assert all(value.startswith("data:") for name, value in self.attributes if name in ("src", "href"))
        contents = [
            base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in self.pictures
        ]
        assert contents == [path.read_bytes() for path in pictures]
        for content in contents:
            opened(io.BytesIO(content))


@pytest.fixture
def scores(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def scores(*args):
        status = main(["scores", *args])
        captured = capsys.readouterr()
        assert (status == 0) == (captured.err == ""), captured.err
        return captured.err or captured.out

    return scores


def test_one_run(scores):
    run_of(Path("runs/one"))
    out = scores("runs/one")
    names = ("curves.png", "histograms.png")
    assert out == "".join(f"figure: scores/{name}\n" for name in names) + "page:   scores/scores.html\n"
    page = Page(Path("scores/scores.html"))
    page.check(*(Path("scores", name) for name in names))
    assert {"Scores over training: MoCo, Digits", "MoCo, Digits", "runs/one", "12"} <= set(page.texts)


def test_several_runs_and_a_waterfall(scores):
    for seed in (0, 1):
        run_of(Path(f"runs/slow-{seed}"), momentum=0.99, seed=seed, accuracy=0.5, spread=0.1)
        run_of(Path(f"runs/fast-{seed}"), seed=seed, steps=9 + seed)
    out = scores("runs", "--by", "model.momentum", "--output", "new/folder")
    assert "figure: new/folder/waterfall.png" in out
    page = Page(Path("new/folder/scores.html"))
    page.check(*(Path("new/folder", f"{name}.png") for name in ("curves", "histograms", "waterfall")))
    labels = {f"momentum {value}, seed {seed}" for value in (0.9, 0.99) for seed in (0, 1)}
    assert labels <= set(page.texts) and page.texts.count("50.0 %") == 2 and page.texts.count("60.0 %") == 2


def test_a_waterfall_shows_means_over_seeds_in_ascending_order(tmp_path):
    from cl_core.training.run import RunFolder
    from cl_vision.scoring import by_setting, recorded_runs

    folders = [run_of(tmp_path / "b", momentum=10), run_of(tmp_path / "a", momentum=9, steps=11)]
    folders.append(run_of(tmp_path / "c", momentum=10, seed=1, steps=7))
    recorded = recorded_runs([RunFolder(folder) for folder in folders])
    assert [each.label for each in recorded] == ["momentum 10, seed 0", "momentum 9", "momentum 10, seed 1"]
    (low, (steps, values)), (high, (common, means)) = by_setting(recorded, "model.momentum")
    assert (low, high, len(steps), len(common)) == ("9", "10", 11, 7)
    np.testing.assert_array_equal(values["positive_mean"], recorded[1].scores["positive_mean"])
    both = [recorded[place].scores["negative_variance"][:7] for place in (0, 2)]
    np.testing.assert_allclose(means["negative_variance"], np.mean(both, axis=0))
    methods = [run_of(tmp_path / name, label=name) for name in ("SimCLR", "BYOL")]
    grouped = by_setting(recorded_runs([RunFolder(folder) for folder in methods]), "model")
    assert [value for value, _ in grouped] == ["BYOL", "SimCLR"]


def test_runs_of_the_same_settings_are_told_apart_by_their_folders(scores):
    for name in ("a", "b"):
        run_of(Path("runs", name))
    scores("runs")
    assert {"seed 0, runs/a", "seed 0, runs/b"} <= set(Page(Path("scores/scores.html")).texts)


def test_texts_are_escaped(scores):
    run_of(Path("runs/<i>&"), label="<script>")
    run_of(Path("runs/b"), label="B")
    scores("runs")
    page = Page(Path("scores/scores.html"))
    assert {"model <script>", "runs/<i>&"} <= set(page.texts)
    assert "<script>" not in page.text and "<i>" not in page.text


def test_refused_in_one_sentence(scores):
    run_of(Path("runs/one"))
    run_of(Path("runs/two"), seed=1)
    run_of(Path("other/none"), steps=0)
    run_of(Path("other/gone"))
    Path("other/gone/scores.safetensors").unlink()
    run_of(Path("other/cut"))
    Path("other/cut/scores.safetensors").write_bytes(b"xx")
    for args, said in (
        ((), "scores needs at least one run folder, got none."),
        (("nowhere",), "nowhere is not a run and holds none: there is no config.yaml in it."),
        (("runs/one", "runs/../runs/one"), "every run must be given once, got runs/one, runs/../runs/one."),
        (("other/none",), "other/none/scores.safetensors holds no histogram yet."),
        (
            ("other/gone",),
            "there is no other/gone/scores.safetensors: scores are recorded by fit --monitor.scores",
        ),
        (("other/cut",), "other/cut/scores.safetensors is truncated or corrupt"),
        (("runs", "--by", "model.momentun"), "no setting 'model.momentun'; did you mean 'model.momentum' or"),
        (
            ("runs", "--by", "model.momentum"),
            "--by must name a setting in which the runs differ, got model.momentum, 0.9 in all.",
        ),
        (("runs", "--size", "3"), "unrecognized arguments"),
    ):
        out = scores(*args)
        assert out.startswith("cl-vision: ") and said in out and out.count("\n") == 1, out
    assert not Path("scores").exists()


def test_a_run_of_the_command_is_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.max_steps=3", "--trainer.progress_bar=false", "--trainer.accelerator=cpu"]
    options += ["--data.image_size=8", "--model.encoder.width=4", "--evaluation.baselines=false"]
    options += ["--evaluation.neighbours=[1]", "--evaluation.regularizations=[0.01]"]
    options += ["--monitor.scores=true", "--monitor.scores_every=2"]
    assert main(["fit", "--config", "moco/digits", *options, "--run_dir=run"]) == 0
    assert main(["fit", "--config", "finetune/digits", *options, "--run_dir=other"]) == 2
    assert not Path("other").exists()
    assert main(["scores", "run"]) == 0
    page = Page(Path("scores/scores.html"))
    page.check(Path("scores/curves.png"), Path("scores/histograms.png"))
    assert "3" in page.texts and "MoCo, Digits" in page.texts
