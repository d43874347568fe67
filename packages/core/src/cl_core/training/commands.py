"""The verbs that compute: fit, validate, test, embed, reproduce."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cl_core.method import Method
from cl_core.training import artifacts
from cl_core.training.checkpoints import Checkpointing, Terminated
from cl_core.training.cli import Domain
from cl_core.training.data import SPLITS
from cl_core.training.evaluating import Evaluation, accuracies, embed_split, has_labels
from cl_core.training.files import sentence, write_atomically
from cl_core.training.fitting import FitResult, fit, weights_of
from cl_core.training.optimization import Optimization
from cl_core.training.parsing import Parser
from cl_core.training.run import RunFolder
from cl_core.training.settings import Monitoring, TrainerOptions

_NOT_KEPT = ("config", "resume", "run_dir", "debug", "print_config")


def run(domain: Domain, verb: str, args: Sequence[str]) -> int:
    """Run one verb; see :func:`cl_core.training.cli.main`."""
    from cl_core.training.reproduce import reproduce_command

    verbs: dict[str, Callable[[Domain, list[str]], None]] = {
        "fit": fit_command,
        "validate": validate_command,
        "test": test_command,
        "embed": embed_command,
        "reproduce": reproduce_command,
    }
    try:
        verbs[verb](domain, list(args))
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
    resume, rest = _without_option(args, "--resume")
    if resume is not None:
        config = parser.parse_over(RunFolder.existing(resume).read_config(), rest)
    else:
        config = parser.parse(args)
    if config.model is None and config.init_from is not None:
        exported = artifacts.read_export_config(_export_of(config.init_from))
        config = parser.parse_over({"model": artifacts.as_config(exported["model"])}, args)
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


def test_command(domain: Domain, args: list[str]) -> None:
    """``test``: accuracies on the test split, to the terminal and ``metrics.json``."""
    _judge(domain, args, "test")


def validate_command(domain: Domain, args: list[str]) -> None:
    """``validate``: accuracies on the validation split, to the terminal and ``metrics.json``."""
    _judge(domain, args, "validation")


def embed_command(domain: Domain, args: list[str]) -> None:
    """``embed``: embeddings and labels of a split to a safetensors file."""
    parser = _trained_parser(domain, "embed")
    help_ = "train, validation or test; default test, or train where nothing is held out"
    parser.parser.add_argument("--split", type=str, default=None, help=help_)
    parser.parser.add_argument("--output", type=str, required=True, help="safetensors file to write")
    config, method, built = _trained(domain, parser, args)
    sizes: dict[str, int] = {split: len(built.data.evaluation_dataset(split)) for split in SPLITS}
    split: Any = config.split or ("test" if sizes["test"] else "train")
    if not sizes.get(split):
        filled = ", ".join(f"{name} ({size})" for name, size in sizes.items() if size)
        raise ValueError(f"--split must be one that has rows: {filled}, got {split!r}.")
    rows, labels = embed_split(
        method, built.data, split, device=_device(), batch_size=built.evaluation.batch_size
    )
    tensors = {"embeddings": rows.contiguous(), "labels": labels.contiguous()}
    path = write_atomically(
        config.output, lambda temporary: save_file(tensors, temporary, metadata={"split": split})
    )
    print(f"{len(rows)} embeddings of width {rows.shape[1]} ({split}): {path}")


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
        return "no labels in all of train, validation and test, so nothing to evaluate; embed writes the embeddings."
    lines = [f"{'test accuracy':<20}{'kNN':>8}{'linear probe':>15}"]
    lines += [f"{name:<20}{100 * row['knn']:>7.2f}%{100 * row['linear']:>14.2f}%" for name, row in rows]
    return "\n".join([*lines, "(neighbours and penalty chosen on validation; one seed)"])


def _judge(domain: Domain, args: list[str], split: str) -> None:
    verb = "test" if split == "test" else "validate"
    config, method, built = _trained(domain, _trained_parser(domain, verb), args)
    if not has_labels(built.data):
        raise ValueError(f"{type(built.data).__name__} has no labels in all splits, so nothing to {verb}.")
    size = built.evaluation.batch_size
    train, validation = (
        embed_split(method, built.data, name, device=_device(), batch_size=size)
        for name in ("train", "validation")
    )
    judged = validation
    if split == "test":
        judged = embed_split(method, built.data, "test", device=_device(), batch_size=size)
    found = accuracies(train, validation, judged, built.evaluation)
    print(f"{split} accuracy: kNN {100 * found['knn']:.2f}%, linear probe {100 * found['linear']:.2f}%")
    target = _run_of(Path(config.ckpt)) or RunFolder(config.ckpt)
    target.write_metrics(**{verb: found})
    print(f"written: {target.metrics}")


def _trained_parser(domain: Domain, verb: str) -> Parser:
    parser = Parser(domain, verb, parts=("data", "evaluation"))
    parser.add_config()
    parser.add_data()
    parser.add_settings(evaluation=Evaluation)
    parser.parser.add_argument("--ckpt", type=str, required=True, help="run folder, export or checkpoint")
    parser.parser.add_argument("--debug", action="store_true", help="show where an error came from")
    return parser


def _trained(domain: Domain, parser: Parser, args: list[str]) -> tuple[Any, Method, Any]:
    """The parsed configuration, the trained method, and the built data and settings."""
    if any(arg in ("-h", "--help") for arg in args):
        parser.parse(args)
    ckpt, _ = _without_option(args, "--ckpt")
    if ckpt is None:
        raise ValueError("--ckpt is missing: the run folder, export or checkpoint to use.")
    run = _run_of(Path(ckpt))
    stored = run.read_config() if run is not None else {}
    wanted: dict[str, Any] = {key: stored[key] for key in ("data", "evaluation") if key in stored}
    config = parser.parse_over(wanted, args) if wanted else parser.parse(args)
    if config.data is None:
        raise ValueError(f"{ckpt} does not say which data it belongs to: pass --data CLASS.")
    if artifacts.is_export(_export_of(ckpt)) and Path(ckpt).is_dir():
        method = artifacts.load_export(_export_of(ckpt))
    else:
        method = _from_checkpoint(domain, stored, ckpt)
    built = parser.instantiate(config)
    built.data.set_seed(int(stored.get("seed", 0)))
    return config, method, built


def _from_checkpoint(domain: Domain, stored: Mapping[str, Any], ckpt: str) -> Method:
    weights = weights_of(ckpt, package=domain.distribution)
    if "model" not in stored:
        raise ValueError(f"{ckpt} lies in no run folder whose config.yaml says what model it is.")
    parser = Parser(domain, "fit")
    parser.add_config()
    parser.add_model()
    method: Method = parser.instantiate(parser.parse_over({"model": stored["model"]}, [])).model
    if left := artifacts.initialise(method, weights, source=ckpt):
        raise ValueError(f"{ckpt} lacks {', '.join(left[:3])} of {type(method).__name__}.")
    return method.eval()


def _run_of(path: Path) -> RunFolder | None:
    """The run that a run folder, its export or one of its checkpoints belongs to."""
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "config.yaml").is_file():
            return RunFolder(folder)
    if not path.exists():
        raise FileNotFoundError(f"{path} is neither a run, nor an export, nor a checkpoint.")
    return None


def _export_of(source: str) -> Path:
    path = Path(source)
    return path if artifacts.is_export(path) else RunFolder(path).export


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


def _load(target: str | None) -> Any:
    if target is None:
        return None
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
