"""The verbs that compute: fit, validate, test, embed; reproduce and compare have files of their own."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from cl_core.method import Method
from cl_core.training import artifacts
from cl_core.training.checkpoints import Checkpointing, Terminated
from cl_core.training.cli import Domain
from cl_core.training.data import SPLITS, Data, Split
from cl_core.training.embedding import embed_to_file
from cl_core.training.evaluating import CLASSIFIER, Evaluation, evaluate, has_labels, shown
from cl_core.training.files import sentence
from cl_core.training.fitting import FitResult, fit, weights_of
from cl_core.training.optimization import Optimization
from cl_core.training.parsing import Parser
from cl_core.training.run import RunFolder
from cl_core.training.settings import Monitoring, TrainerOptions, brief, changes, data_settings, placed

_NOT_KEPT = ("config", "resume", "run_dir", "debug", "import", "print_config")


def run(domain: Domain, verb: str, args: Sequence[str]) -> int:
    """Run one verb; see :func:`cl_core.training.cli.main`."""
    verbs: dict[str, Callable[[Domain, list[str]], None]] = {
        "fit": fit_command,
        "validate": validate_command,
        "test": test_command,
        "embed": embed_command,
    }
    elsewhere = {
        "reproduce": "cl_core.training.reproduce:reproduce_command",
        "compare": "cl_core.training.comparing:compare_command",
        **{name: target for name, (_, target) in domain.verbs.items()},
    }
    try:
        command = verbs[verb] if verb in verbs else _load(elsewhere[verb])
        command(domain, _without_imports(args))
    except SystemExit as stop:  # --help and --print_config
        return int(stop.code or 0)
    except KeyboardInterrupt as interrupt:
        print(f"\n{domain.command}: interrupted; {interrupt}".rstrip("; "), file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if "--debug" in args:
            raise
        print(f"{domain.command}: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


def fit_command(domain: Domain, args: list[str]) -> None:
    """``fit``: train, print the table and the run folder."""
    result = fit_from(domain, args)
    if not result.metrics:  # another process than the first
        return
    print(table(domain, result.metrics))
    print(f"run folder: {result.run.path}")
    for figure in sorted(result.run.figures.glob("*.png")):
        print(f"figure:     {figure}")


def fit_from(domain: Domain, args: list[str]) -> FitResult:
    """Train as ``fit`` does with these arguments, without printing the result."""
    parser = _fit_parser(domain)
    resume, rest = _without_option(args, "--resume")
    if resume == "":
        raise ValueError("--resume must name a run folder, got an empty text.")
    if resume is not None:
        config = parser.parse_over(RunFolder.existing(resume).read_config(), rest)
    elif (source := _without_option(args, "--init_from")[0]) and not _names(args, "--config", "--model"):
        config = parser.parse_over({"model": _model_of(source)}, args)
    else:
        config = parser.parse(args)
    for name, topic in (("data", "data"), ("model", "methods")):
        if config[name] is None:
            raise ValueError(
                f"no {name}: pass --config NAME ({domain.command} list configs) "
                f"or --{name} CLASS ({domain.command} list {topic})."
            )
    torch.manual_seed(config.seed)
    built = parser.instantiate(config)
    return fit(
        built.model,
        built.data,
        optimization=built.optimization,
        trainer=built.trainer,
        checkpoint=built.checkpoint,
        monitor=built.monitor,
        evaluation=built.evaluation,
        seed=config.seed,
        run_dir=config.run_dir,
        name=_run_name(domain, args),
        resume=resume,
        init_from=config.init_from,
        gradient_cache_chunk=config.gradient_cache_chunk,
        config=parser.dump(config, without=_NOT_KEPT),
        artist=_load(domain.artist),
        package=domain.distribution,
    )


def planned(domain: Domain, args: list[str]) -> dict[str, Any]:
    """The configuration that ``fit`` would begin a run with, as its folder would hold it."""
    parser = _fit_parser(domain)
    return placed(yaml.safe_load(parser.dump(parser.parse(args), without=_NOT_KEPT)))


def _fit_parser(domain: Domain) -> Parser:
    parser = Parser(domain, "fit")
    parser.add_config()
    parser.add_model()
    parser.add_data()
    parser.add_settings(
        optimization=Optimization,
        trainer=TrainerOptions,
        checkpoint=Checkpointing,
        monitor=Monitoring,
        evaluation=Evaluation,
    )
    add = parser.parser.add_argument
    add("--seed", type=int, default=0, help="of weights, order and augmentations")
    add("--run_dir", type=str, default=None, help="run folder; default runs/<config>-<number>")
    add("--resume", type=str, default=None, help="run folder to continue")
    add("--init_from", type=str, default=None, help="run, export or checkpoint whose weights to start from")
    add("--gradient_cache_chunk", type=int | None, default=None, help="rows encoded at a time; default all")
    add("--debug", action="store_true", help="show where an error came from")
    return parser


def test_command(domain: Domain, args: list[str]) -> None:
    """``test``: accuracies on the test split, to the terminal and ``metrics.json``."""
    _judge(domain, args, "test")


def validate_command(domain: Domain, args: list[str]) -> None:
    """``validate``: accuracies on the validation split, to the terminal and ``metrics.json``."""
    _judge(domain, args, "validation")


def embed_command(domain: Domain, args: list[str]) -> None:
    """``embed``: embeddings and labels of a split to a safetensors file, names of the rows to a table beside it."""
    parser = trained_parser(domain, "embed")
    help_ = "train, validation or test; default test, or train where nothing is held out"
    parser.parser.add_argument("--split", type=str, default=None, help=help_)
    parser.parser.add_argument("--output", type=str, required=True, help="safetensors file to write")
    parser.parser.add_argument("--progress_bar", type=bool, default=True, help="show a progress bar")
    trained = load_trained(domain, parser, args)
    datasets: dict[str, Any] = {split: trained.data.evaluation_dataset(split) for split in SPLITS}
    sizes = {split: len(dataset) for split, dataset in datasets.items()}
    split: Any = trained.config.split or ("test" if sizes["test"] else "train")
    if not sizes.get(split):
        filled = ", ".join(f"{name} ({size})" for name, size in sizes.items() if size)
        raise ValueError(f"--split must be one that has rows: {filled}, got {split!r}.")
    written = embed_to_file(
        trained.method,
        trained.data,
        split,
        trained.config.output,
        device=_device(),
        batch_size=trained.evaluation.batch_size,
        progress=trained.config.progress_bar,
    )
    print(f"{written.rows} embeddings of width {written.width} ({split}): {written.path}")
    if written.table is not None:
        print(f"names and labels of the rows: {written.table}")


def table(domain: Domain, metrics: Mapping[str, Any]) -> str:
    """The accuracies of a run as text."""
    rows = [
        (name, metrics[key])
        for key, name in (
            ("trained", "trained encoder"),
            ("untrained", "untrained encoder"),
            ("raw", domain.inputs),
        )
        if metrics.get(key)
    ]
    if not rows:
        return "no labelled rows in all of train, validation and test, so nothing to evaluate; embed writes embeddings."
    columns = shown(row for _, row in rows)
    lines = [f"{'test accuracy':<20}" + "".join(f"{title:>{len(title) + 5}}" for title in columns.values())]
    for name, row in rows:
        cells = (f"{100 * row[key]:.2f}%" if key in row else "none" for key in columns)
        line = "".join(
            f"{cell:>{len(title) + 5}}" for cell, title in zip(cells, columns.values(), strict=True)
        )
        lines.append(f"{name:<20}{line}")
    return "\n".join([*lines, "(neighbours and penalty chosen on validation; one seed)"])


def _judge(domain: Domain, args: list[str], split: Split) -> None:
    verb = "test" if split == "test" else "validate"
    trained = load_trained(domain, trained_parser(domain, verb), args)
    data, settings = trained.data, trained.evaluation
    if not has_labels(data):
        raise ValueError(f"{type(data).__name__} has no labelled rows in all splits, so nothing to {verb}.")
    found = evaluate(trained.method, data, settings, device=_device(), judged=split)
    strange = _other_classes(trained) if CLASSIFIER[0] in found else ""
    if strange:
        found = {name: value for name, value in found.items() if name not in CLASSIFIER}
    cells = (f"{title} {100 * found[key]:.2f}%" for key, title in shown([found]).items())
    on = f" on {type(data).__name__}" if trained.other.startswith("data.") else ""
    print(f"{split} accuracy{on}: {', '.join(cells)}")
    if strange:
        print(f"  its own classifier is left out: {strange}")
    if trained.run is None or trained.other:
        print(f"not written to a run: {trained.other or 'it belongs to none'}")
        return
    trained.run.write_metrics(**{verb: found})
    print(f"written: {trained.run.metrics}")


def _other_classes(trained: Trained) -> str:
    """Why the columns of a classifier's scores do not speak for the classes of these data; empty if nothing says so."""
    known, names = trained.class_names, trained.data.class_names
    if known is None or names is None or known == (here := [str(name) for name in names]):
        return ""
    return f"it tells {_listed(known)} apart, these data have {_listed(here)}"


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} classes)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def trained_parser(domain: Domain, verb: str) -> Parser:
    """Options of a command on something trained: ``--ckpt``, its data, how it is evaluated."""
    parser = Parser(domain, verb, parts=("data", "evaluation"))
    parser.add_config()
    parser.add_data()
    parser.add_settings(evaluation=Evaluation)
    parser.parser.add_argument("--ckpt", type=str, required=True, help="run folder, export or checkpoint")
    parser.parser.add_argument("--debug", action="store_true", help="show where an error came from")
    return parser


@dataclass(frozen=True)
class Trained:
    """What the verbs on a trained method work with."""

    config: Any
    method: Method
    data: Data
    evaluation: Evaluation
    run: RunFolder | None
    other: str  # in what it is not the run's own result on its own data; empty if it is
    class_names: list[str] | None  # that its own classifier tells apart, where that is known


def load_trained(domain: Domain, parser: Parser, args: list[str]) -> Trained:
    """Parse the arguments, load the method that they name, build its data."""
    if any(arg in ("-h", "--help") for arg in args):
        parser.parse(args)
    ckpt, _ = _without_option(args, "--ckpt")
    if not ckpt:
        raise ValueError("--ckpt is missing: the run folder, export or checkpoint to use.")
    run, place = RunFolder.around(ckpt), Path(ckpt)
    if run is None and not artifacts.is_export(place) and place.suffix != ".ckpt":
        raise FileNotFoundError(f"{ckpt} is neither a run, nor an export, nor a checkpoint.")
    stored = run.read_config() if run is not None else {}
    wanted: dict[str, Any] = {key: stored[key] for key in ("data", "evaluation") if key in stored}
    config = parser.parse_over(wanted, args) if wanted else parser.parse(args)
    if config.data is None:
        raise ValueError(f"{ckpt} does not say which data it belongs to: pass --data CLASS.")
    result = run.result if run is not None and run.path == place else place
    known = {} if run is None else run.read_metrics()
    built = parser.instantiate(config)
    built.data.set_seed(int(stored.get("seed", 0)))
    if result is not None and artifacts.is_export(result):
        method = artifacts.load_export(result)
        known = known if run is not None else artifacts.read_export_config(result)
    else:
        method = _from_checkpoint(domain, stored, ckpt, built.data)
    other = "" if run is None else _other(run, result, built)
    return Trained(config, method, built.data, built.evaluation, run, other, known.get("class_names"))


def _other(run: RunFolder, result: Path | None, built: Any) -> str:
    """In what something trained is not the result of a run on its own data, as a clause."""
    if result is None or run.result is None or result.resolve() != run.result.resolve():
        return f"{result} is not what {run.path} has come to"
    began = run.read_settings()
    now = brief(data_settings(built.data, evaluation=built.evaluation))
    try:
        changes({name: began[name] for name in now}, now, run=run.path)
    except ValueError as error:
        return str(error).partition(": resume it")[0]
    places = [each["data"].get("init_args", {}).get("root") for each in (began, now)]
    if places[0] != places[1]:  # a resume takes them for the same data, moved; here they may be others
        return f"data.root was {places[0]} when {run.path} began and is {places[1]} now"
    return ""


def _from_checkpoint(domain: Domain, stored: Mapping[str, Any], ckpt: str, data: Data) -> Method:
    weights = weights_of(ckpt, package=domain.distribution)
    if "model" not in stored:
        raise ValueError(f"{ckpt} lies in no run folder whose config.yaml says what model it is.")
    parser = Parser(domain, "fit")
    parser.add_config()
    parser.add_model()
    method: Method = parser.instantiate(parser.parse_over({"model": stored["model"]}, [])).model
    method.build(data)
    if left := artifacts.initialise(method, weights, source=ckpt):
        raise ValueError(f"{ckpt} lacks {', '.join(left[:3])} of {type(method).__name__}.")
    return method.eval()


def _model_of(source: str) -> Any:
    """The model that a run or an export holds, in the words of a configuration."""
    place = Path(source)
    run = RunFolder.around(place)
    if run is not None:
        return run.read_config().get("model")
    if not artifacts.is_export(place):
        raise FileNotFoundError(
            f"{source} is neither a run nor an export: name a --model to initialise from it."
        )
    return artifacts.as_config(artifacts.read_export_config(place)["model"])


def _names(args: list[str], *options: str) -> bool:
    """Whether any of the options is given."""
    return any(arg == option or arg.startswith(f"{option}=") for arg in args for option in options)


def _run_name(domain: Domain, args: list[str]) -> str | None:
    config, _ = _without_option(args, "--config")
    if config is None:
        return None
    return Path(config).stem if Path(config).is_file() else config.removesuffix(".yaml")


def _without_option(args: list[str], option: str) -> tuple[str | None, list[str]]:
    """Value of an option and the arguments without it."""
    value, rest, skip = None, [], False
    for place, arg in enumerate(args):
        if skip:
            skip = False
        elif arg == option and place + 1 < len(args):
            value, skip = args[place + 1], True
        elif arg.startswith(f"{option}="):
            value = arg.partition("=")[2]
        else:
            rest.append(arg)
    return value, rest


def _without_imports(args: Sequence[str]) -> list[str]:
    """Import what ``--import`` names; the other arguments.

    Reading what somebody sent imports nothing: this says whose classes it may name.
    """
    rest: list[str] = []
    names: list[str] = []
    for place, arg in enumerate(args):
        if arg.startswith("--import="):
            names.append(arg.partition("=")[2])
        elif place > 0 and args[place - 1] == "--import":
            names.append(arg)
        elif arg != "--import":
            rest.append(arg)
    if names.count("") or (args and args[-1] == "--import"):
        raise ValueError("--import must name a module, such as my_package.nets.")
    for name in names:
        try:
            import_module(name)
        except Exception as error:  # a module of somebody's may raise anything
            raise ImportError(f"--import {name} failed: {type(error).__name__}: {sentence(error)}") from error
    return rest


def _load(target: str | None) -> Any:
    if target is None:
        return None
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
