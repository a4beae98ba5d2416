"""The command line `emd-fast`. Exit codes: 0 done, 2 usage, 130 and 143 interrupted, 1 otherwise."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import json
import math
import os
import platform
import re
import sys
import tomllib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import tomli_w
import torch
from torch.utils import _pytree as pytree

import emd_fast
from emd_fast import config
from emd_fast.config import (
    ConfigError,
    EMDConfig,
    EvaluationConfig,
    MixtureConfig,
    PretrainedConfig,
    RunConfig,
    TeacherConfig,
)
from emd_fast.distributed import GroupError
from emd_fast.files import write_whole

_TABLES = {
    "emd": EMDConfig,
    "teacher": TeacherConfig,
    "mixture": MixtureConfig,
    "pretrained": PretrainedConfig,
    "evaluation": EvaluationConfig,
}
_FILES = ("detector", "reference", "compare_with", "clip")  # what a pretrained task is judged by


class _Parser(argparse.ArgumentParser):
    """argparse, but a wrong word gets the nearest right one, and no part of a word passes for it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if choice:
            near = difflib.get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]), 1)
            message += f"; did you mean {near[0]!r}?" if near else ""
        self.exit(2, f"{self.prog}: {message}\nsee {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="emd-fast",
        description="EM Distillation: a diffusion teacher becomes a generator that needs one network call.",
        epilog="examples:\n"
        "  emd-fast distill digits --out runs/digits          train, distil, evaluate, report\n"
        "  emd-fast distill gmm --study --out runs/gmm        K = 1 to 16 on a mixture with exact scores\n"
        "  emd-fast distill --teacher FOLDER --out runs/mine  distil a model of diffusers, or of your own\n"
        "  emd-fast sample runs/digits -n 100 --out grid.png  pictures of the one-step generator\n"
        "  emd-fast evaluate runs/mine --detector inception.pt --reference imagenet-64x64.npz\n"
        "  emd-fast export runs/mine one-step                 a folder that DiffusionPipeline.from_pretrained loads\n"
        "  emd-fast plan digits --devices 64                  memory and traffic of each device, beforehand\n"
        "  emd-fast replay runs/digits --step 400 --sample 7  one sample's E-step again, step by step\n"
        "  emd-fast info                                      every op, its backend here, and why not a faster one",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"emd-fast {emd_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    distill = commands.add_parser(
        "distill",
        help="train a teacher where the recipe has one, distil it, evaluate",
        description="Runs a recipe into a folder. The same command on the same folder goes on where it stopped.",
        epilog=_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    distill.add_argument(
        "recipe", help=f"{', '.join(config.recipes())}, or a .toml file; may be left out for --teacher"
    )
    distill.add_argument("--teacher", metavar="FOLDER", help="of diffusers, a hub name, or package.module:function")
    distill.add_argument("--prompts", metavar="FILE", help="for --teacher: a prompt in each line, or .safetensors")
    _judged_by(distill)
    distill.add_argument("--out", type=Path, help="run folder (default: runs/RECIPE)")
    distill.add_argument("--short", action="store_true", help="a tenth of all steps: shows that it works, not how well")
    distill.add_argument("--study", action="store_true", help="the recipe's study: several K and seeds, a table")
    distill.add_argument(
        "--dry-run", action="store_true", help="print the configuration and what it needs of each device, then stop"
    )
    distill.add_argument("--devices", type=_positive, help="with --dry-run: on so many devices (default: these)")
    distill.add_argument(
        "--device-memory", type=_above_0, help="with --dry-run: refuse what does not fit into so many GiB"
    )
    distill.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    distill.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")

    plan = commands.add_parser(
        "plan",
        help="what a recipe would need of each device: memory, traffic, time",
        description="Counted from the sizes of the networks, for every way to lay them out; nothing is run. Times are "
        "those of the ceilings that you give: what cannot be undercut, not what will be seen.",
        epilog="takes the configuration keys that distill takes: see emd-fast distill --help",
    )
    plan.add_argument("recipe", help=f"{', '.join(config.recipes())}, or the path of a .toml file")
    plan.add_argument("--devices", type=_positive, required=True, help="how many")
    plan.add_argument("--device-memory", type=_above_0, help="refuse what does not fit into so many GiB")
    plan.add_argument("--tflops", type=_above_0, help="of a device, in the compute dtype: for the time of a step")
    plan.add_argument("--gb-per-second", type=_above_0, help="that a device receives from others, in 10^9 bytes")

    sample = commands.add_parser("sample", help="pictures of a run's one-step generator, or of an exported one")
    sample.add_argument("run", type=Path, help="run folder, or what `emd-fast export` wrote")
    sample.add_argument("-n", type=_positive, default=100, help="how many samples (default 100)")
    sample.add_argument(
        "--out", type=Path, required=True, help=".png for a grid or scatter, .pt for (n, ...), or a folder"
    )
    sample.add_argument("--label", type=int, help="one class for all; classes in turn by default")
    sample.add_argument("--prompt", help="one prompt for all; the run's prompts in turn by default")
    sample.add_argument("--first", type=int, default=0, help="index of the first sample in the stream (default 0)")
    sample.add_argument("--raw", action="store_true", help="the generator itself, not the average of its weights")
    sample.add_argument("--best", action="store_true", help="of the run's best checkpoint, not its last")

    export = commands.add_parser(
        "export",
        help="a run's one-step generator as a pipeline folder of diffusers, or one file",
        epilog="docs/export.md says which pipelines sample it, and how",
    )
    export.add_argument("run", type=Path, help="run folder")
    export.add_argument("out", type=Path, help="a new folder, or a .safetensors file")
    export.add_argument("--raw", action="store_true", help="the generator itself, not the average of its weights")
    export.add_argument("--best", action="store_true", help="the run's best checkpoint, not its last")

    evaluate = commands.add_parser(
        "evaluate",
        help="metrics.json and report.md of a run, again; Fréchet distance and others of a run, a generator or images",
        description="By the figures of the run's task; with --detector by that, of whatever makes or holds images.",
        epilog="docs/evaluation.md says what the numbers are and what they compare with",
    )
    evaluate.add_argument(
        "source", type=Path, help="run folder; with --detector also what `emd-fast export` wrote, or images"
    )
    _judged_by(evaluate)
    evaluate.add_argument("--samples", type=_positive, help="how many to draw (default: the run's; 50,000)")
    evaluate.add_argument("--batch-size", type=_positive, default=64, help="of a generator or images (default 64)")
    evaluate.add_argument("--best", action="store_true", help="the run's best checkpoint, not its last")
    evaluate.add_argument(
        "--write-reference",
        type=Path,
        metavar="OUT.npz",
        help="the images' statistics, as a reference for others",
    )

    replay = commands.add_parser(
        "replay",
        help="one sample's E-step of a run again, Langevin step by step",
        description="On one process, however many the run had: noise, time and condition are those of the run. The "
        "weights are those of the last checkpoint at or before the step.",
    )
    replay.add_argument("run", type=Path, help="run folder")
    replay.add_argument("--step", type=int, required=True, help="optimizer step, counted from 0")
    replay.add_argument("--sample", type=int, required=True, help="index in the batch of all devices")
    replay.add_argument("--out", type=Path, help="folder of table and pictures (default: RUN/replay/step-N-sample-I)")
    replay.add_argument(
        "--catch-up",
        action="store_true",
        help="first repeat on the whole batch what the run did since the checkpoint, the student's updates included",
    )

    bench = commands.add_parser(
        "bench",
        help="time the ops beside PyTorch and other libraries (from a checkout)",
        description="Contenders that were found right, timed in turn in one process. Without OP: every op.",
        epilog="--against gets the op's own arguments, all by keyword, and does what the op does: docs/benchmarks.md",
    )
    bench.add_argument("ops", nargs="*", metavar="OP", help="names of files in benchmarks/, as langevin_eps")
    bench.add_argument(
        "--shape", type=_sizes, action="append", help="as 16,320,64,64; again for more (default: a table)"
    )
    bench.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of the networks' tensors (default bf16)")
    bench.add_argument("--layout", choices=("nchw", "nhwc"), help="of the networks' tensors (default nchw)")
    bench.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    bench.add_argument("--backend", action="append", default=[], help="of ours, this alone; again for more")
    bench.add_argument("--against", action="append", default=[], metavar="MODULE:FUNCTION", help="one more contender")
    bench.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave out a contender")
    bench.add_argument("--threads", type=_positive, help="of PyTorch on the CPU")
    bench.add_argument("--rounds", type=_positive, default=50, help="readings of each contender (default 50)")
    bench.add_argument("--warm", action="store_true", help="one set of inputs, which may stay in the cache")
    bench.add_argument("--no-graph", dest="graph", action="store_false", help="GPU: time launches, not a CUDA graph")
    bench.add_argument("--json", type=Path, metavar="FILE", help="everything about the run")
    bench.add_argument("--markdown", type=Path, metavar="FILE", help="the tables")
    bench.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture")
    bench.add_argument("--compare", type=Path, metavar="OLD.json", help="exit code 1 on a regression beyond the noise")
    bench.add_argument("--ncu", action="store_true", help="print the command of Nsight Compute for OP, and run it")
    bench.add_argument("--one-call", action="store_true", help="one call of ours for a profiler, untimed")

    convert = commands.add_parser(
        "convert",
        help="a checkpoint of EDM or EDM2 as safetensors",
        description="Reads the average of the weights from a pickle of NVlabs, and runs nothing that is in it.",
    )
    convert.add_argument("file", type=Path, metavar="FILE.pkl", help="what NVlabs published, or their code wrote")
    convert.add_argument("out", type=Path, metavar="OUT.safetensors", help="what emd_fast.teachers.edm.load reads")

    info = commands.add_parser("info", help="ops, backends, versions")
    info.add_argument("--json", action="store_true", help="for programs")
    return parser


def _judged_by(command: argparse.ArgumentParser) -> None:
    command.add_argument("--detector", metavar="FILE", help="TorchScript, as EDM's Inception (docs/evaluation.md)")
    command.add_argument("--reference", metavar="FILE.npz", help="statistics of real images, for the Fréchet distance")
    command.add_argument("--compare-with", metavar="IMAGES", help="folder or .zip, for precision and recall")
    command.add_argument("--clip", metavar="FOLDER", help="of a CLIP model, for the score of prompts given as text")


def _keys() -> str:
    lines = ["configuration (TOML keys as options; those of [emd] also without the prefix):"]
    for table, cls in {"": RunConfig, **_TABLES}.items():
        for item in dataclasses.fields(cls):
            if item.name not in _TABLES:
                name = f"{table}.{item.name}" if table else item.name
                default = getattr(cls(**({"emd": EMDConfig(num_classes=10)} if cls is RunConfig else {})), item.name)
                default = config.to_dict(default) if dataclasses.is_dataclass(default) else default
                lines.append(f"  --{name.replace('_', '-'):34} {default}")
    lines += [
        "units: t-star in the schedule's t (sigma for EDM); time distributions in sigma / alpha; step sizes a number",
        "or pairs, as in --gamma-z '[[0.05, 1e-4], [0.5, 0.01]]'; steps are optimizer steps of the generator.",
        "examples: emd-fast distill digits --langevin-steps 8 --seed 1 --out runs/k8",
        "          emd-fast distill digits --noise-cancellation false --teacher.steps 1000 --out runs/noisy",
    ]
    return "\n".join(lines)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _above_0(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be sizes as 16,320,64,64, got {text!r}") from None
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be positive sizes, got {text!r}")
    return sizes


def _overrides(words: Sequence[str]) -> dict[str, Any]:
    """{"emd.gamma_z": 0.02} from ["--gamma-z", "0.02"].

    Raises:
        ConfigError: an unknown option, with the nearest right one, or one without a value.
    """
    known = {item.name: item.name for item in dataclasses.fields(RunConfig) if item.name not in _TABLES}
    for table, cls in _TABLES.items():
        known |= {f"{table}.{item.name}": f"{table}.{item.name}" for item in dataclasses.fields(cls)}
    known |= {item.name: f"emd.{item.name}" for item in dataclasses.fields(EMDConfig)}
    overrides: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, has_value, value = word.partition("=")
        key = option.removeprefix("--").replace("-", "_")
        nested = key.rpartition(".")[0] in ("emd.time_distribution", "emd.student_time_distribution")
        if not option.startswith("--") or (key not in known and not nested):
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean --{near[0].replace('_', '-')}?" if near else ""
            raise ConfigError(f"unknown option {option!r}{hint}")
        if not has_value:
            if not rest:
                raise ConfigError(f"{option} needs a value")
            value = rest.pop(0)
        overrides[known.get(key, key)] = _value(value)
    return overrides


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(_with_recipe(sys.argv[1:] if arguments is None else list(arguments)))
    try:
        if rest and options.command not in ("distill", "plan"):
            raise ConfigError(f"unknown option {rest[0]!r}; see emd-fast {options.command} --help")
        return _COMMANDS[options.command](options, rest)
    except (ConfigError, GroupError) as error:
        return _fail(error, 2)
    except (OSError, RuntimeError, ValueError, ModuleNotFoundError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        return code


def _with_recipe(words: list[str]) -> list[str]:
    """`distill --teacher X` is `distill pretrained --teacher X`. An optional argument would take the value of a key of
    the configuration, which argparse does not know, for the recipe."""
    names_teacher = any(word.partition("=")[0] == "--teacher" for word in words)
    if words[:1] == ["distill"] and names_teacher and words[1].startswith("-"):
        return ["distill", "pretrained", *words[1:]]
    return words


def _fail(error: BaseException, code: int) -> int:
    if getattr(error, "main", True):  # what all ranks raise alike is said by one of them
        print(f"emd-fast: {error}", file=sys.stderr)
    return code


def _distill(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast import distributed, run, study

    overrides = _overrides(rest)
    for key in ("teacher", "prompts"):
        if getattr(options, key) is not None:
            overrides |= {"task": "pretrained", f"pretrained.{key}": getattr(options, key)}
    overrides |= {f"evaluation.{key}": value for key, value in _files(options).items()}
    settings = config.load(options.recipe, overrides)
    if options.short:
        settings = run.shortened(settings)
    if options.dry_run:
        print(tomli_w.dumps(config.to_dict(settings)))
        return _show_plan(settings, options.devices or int(os.environ.get("WORLD_SIZE", 1)), options.device_memory)
    if options.devices is not None or options.device_memory is not None:
        raise ConfigError("--devices and --device-memory are for --dry-run")
    folder = options.out or Path("runs") / Path(options.recipe).stem
    sinks = tuple(name for name in ("tensorboard", "wandb") if getattr(options, name))
    with distributed.process_group():
        if options.study:
            study.conduct(settings, folder)
        else:
            run.distill(settings, folder, sinks)
        if distributed.is_main():
            print(folder / ("study.md" if options.study else "report.md"))
    return 0


def _plan(options: argparse.Namespace, rest: Sequence[str]) -> int:
    settings = config.load(options.recipe, _overrides(rest))
    return _show_plan(settings, options.devices, options.device_memory, options.tflops, options.gb_per_second)


def _show_plan(
    settings: RunConfig,
    devices: int,
    memory: float | None,
    tflops: float | None = None,
    gb_per_second: float | None = None,
) -> int:
    from emd_fast import run
    from emd_fast.plan import GIB, Ceilings

    ceilings = Ceilings(
        None if tflops is None else tflops * 1e12, None if gb_per_second is None else gb_per_second * 1e9
    )
    plan = run.plan_of(settings, devices, ceilings)
    print(plan.table())
    if memory is not None:
        plan.check(memory * GIB)
    return 0


def _sample(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast import report

    if options.out.suffix not in (".png", ".pt", ""):
        raise ConfigError(f"--out must end in .png or .pt, or be a folder, got {options.out}")
    into_folder = not options.out.suffix
    if into_folder and options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"{options.out} exists already and is not empty: choose another folder")
    generate, decode, encode, num_classes = _generator(options)
    if options.label is not None and options.prompt is not None:
        raise ConfigError("give --label or --prompt, not both")
    if options.label is not None and not 0 <= options.label < num_classes:
        raise ConfigError(f"--label must be in [0, {num_classes}), got {options.label}")
    one = None
    if options.label is not None:
        one = torch.tensor([options.label])
    elif options.prompt is not None:
        one = encode([options.prompt])  # once: it reads the text encoders

    def samples_of(first: int, n: int) -> torch.Tensor:
        cond = None if one is None else pytree.tree_map(lambda leaf: leaf.expand(n, *leaf.shape[1:]), one)
        return generate(n, cond, first_sample=options.first + first)

    if into_folder:
        report.save_each(options.out, lambda first, n: decode(samples_of(first, n)), options.n, options.first)
        print(options.out)
        return 0
    samples = samples_of(0, options.n)
    if options.out.suffix == ".pt":
        write_whole(options.out, lambda file: torch.save(samples.cpu(), file))
    elif samples.dim() == 4:
        report.save_grid(options.out, decode(samples).cpu())
    else:
        report.scatter(options.out, {"generator": samples.cpu()})
    print(options.out)
    return 0


def _generator(options: argparse.Namespace) -> tuple[Callable, Callable, Callable, int]:
    """How to generate, decode and encode prompts, and the number of classes: of a run, or of what was exported."""
    from emd_fast import export, run
    from emd_fast.tasks.pretrained import decoded

    if (options.run / export.EXPORTED).exists() or options.run.is_file():
        if options.raw:
            raise ConfigError("--raw needs a run folder: what was exported has one set of weights")
        if options.best:
            raise ConfigError("--best needs a run folder: what was exported is one checkpoint")
        one_step = export.load(options.run, device="cuda" if torch.cuda.is_available() else "cpu")
        return one_step.sample, one_step.decode, one_step.encode, one_step.facts.num_classes
    _, _, trainer = run.open_run(options.run, best=options.best)
    teacher: Any = trainer.teacher
    generate = functools.partial(trainer.generate, ema=not options.raw)

    def encode(prompts: list[str]) -> Any:
        if not hasattr(teacher, "encode"):
            raise ConfigError("this run's teacher takes no prompts")
        return teacher.encode(prompts)

    return generate, functools.partial(decoded, teacher), encode, trainer.config.num_classes


def _export(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast import export, run
    from emd_fast.progress import say

    _, _, trainer = run.open_run(options.run, best=options.best)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        is_file = options.out.suffix == ".safetensors"
        export.export(trainer, options.out, "safetensors" if is_file else "diffusers", ema=not options.raw)
    for warning in said:
        if issubclass(warning.category, export.NotForStock):
            say(f"warning: {warning.message}")
    print(options.out)
    return 0


def _evaluate(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast import distributed

    with distributed.process_group():
        is_run = (options.source / "config.toml").exists() or not options.detector
        metrics = _evaluate_run(options) if is_run else _evaluate_images(options)
        if distributed.is_main():
            print(json.dumps(metrics, indent=1))
    return 0


def _evaluate_run(options: argparse.Namespace) -> dict[str, Any]:
    from emd_fast import run

    if options.write_reference:
        raise ConfigError("--write-reference is for real images: a folder or .zip of them, with --detector")
    folder = options.source
    settings = run.settings_of(folder)
    changes: dict[str, Any] = {"evaluation": dataclasses.replace(settings.evaluation, **_files(options))}
    if options.samples:
        if settings.task == "digits":
            raise ConfigError("--samples is not for digits: they are as many as there are held-out images")
        changes["samples"] = options.samples
    settings = dataclasses.replace(settings, **changes)
    _, task, trainer = run.open_run(folder, best=options.best, settings=settings)
    task.prepare_to_judge()
    path = folder / "metrics.json"
    seconds = json.loads(path.read_text())["seconds"] if path.exists() else {}
    return run.evaluate(settings, folder, task, trainer, seconds)


def _evaluate_images(options: argparse.Namespace) -> dict[str, Any]:
    """Of what was exported, or of images in files."""
    from emd_fast import evaluate, export
    from emd_fast.metrics.images import ImageFiles, to_uint8

    config.from_dict(EvaluationConfig, _files(options))  # what needs what
    if options.best or options.clip:
        raise ConfigError(f"{'--best' if options.best else '--clip'} needs a run folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judges = evaluate.Judges.read(**_files(options), device=device)
    if (options.source / export.EXPORTED).exists() or options.source.suffix == ".safetensors":
        if options.write_reference:
            raise ConfigError("--write-reference is for real images: a folder or .zip of them")
        one_step = export.load(options.source, device=device)
        n = options.samples or evaluate.COMPARABLE

        def images(first: int, n: int) -> torch.Tensor:
            return to_uint8(one_step.decode(one_step.sample(n, first_sample=first)))

        found = evaluate.judge(judges, images, n, options.batch_size)
        return found | evaluate.facts(judges, n, one_step.facts.seed)
    files = ImageFiles(options.source)
    if options.samples not in (None, len(files)):
        raise ConfigError(f"{options.source} has {len(files)} images, --samples is {options.samples}")
    if options.write_reference:
        return _write_reference(options.write_reference, judges, files, options.batch_size)
    return evaluate.judge(judges, files, len(files), options.batch_size) | evaluate.facts(judges, len(files))


def _write_reference(out: Path, judges: Any, files: Any, batch: int) -> dict[str, Any]:
    from emd_fast import distributed, evaluate
    from emd_fast.metrics import reference

    if out.suffix != ".npz":
        raise ConfigError(f"--write-reference must end in .npz, got {out}")
    moments = evaluate.moments_of(judges.detector, files, len(files), batch)
    detector = judges.detector.sha256
    distributed.on_main(lambda: reference.save(out, moments, files.shape, detector))
    written = reference.load(out)
    return {"n": len(files), "reference": {"file": str(out), "sha256": written.sha256}, "detector": detector}


def _files(options: argparse.Namespace) -> dict[str, Any]:
    """The files to judge by that were given as options."""
    return {name: getattr(options, name) for name in _FILES if getattr(options, name) is not None}


def _replay(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast.replay import replay

    found = replay(options.run, options.step, options.sample, catch_up=options.catch_up)
    print(found.table())
    folder = options.out or options.run / "replay" / f"step-{options.step:08d}-sample-{options.sample}"
    print(*found.write(folder), sep="\n")
    return 0


def _bench(options: argparse.Namespace, rest: Sequence[str]) -> int:
    folder = Path(emd_fast.__file__).resolve().parents[1] / "benchmarks"
    if not (folder / "harness" / "command.py").exists():
        raise RuntimeError("the bench is not part of an installation: it runs from a checkout, as emd-fast bench there")
    # By its path: another package of this name may be installed.
    loaded = getattr(sys.modules.get("benchmarks"), "__file__", None)
    if loaded is None or Path(loaded).resolve() != folder / "__init__.py":
        spec = importlib.util.spec_from_file_location(
            "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules["benchmarks"] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # where --against looks, besides what is installed
    code: int = importlib.import_module("benchmarks.harness.command").run(options)
    return code


def _convert(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast.teachers import edm

    if options.out.suffix != ".safetensors":
        raise ConfigError(f"the second file must end in .safetensors, got {options.out}")
    print(f"{options.out}: {edm.convert(options.file, options.out)}")
    return 0


def _info(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast.backends import native

    report = emd_fast.backend_report()
    facts = {
        "emd_fast": emd_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: _found(name) for name in ("triton", "xformers", "diffusers", "sklearn")},
        "apex": _apex(),
        "native": native.facts(),
    }
    if options.json:
        print(json.dumps({**facts, "ops": report}, indent=1))
        return 0
    for name, value in facts.items():
        print(f"{name:12} {value}")
    print(f"\n{'op':22} {'cpu tensors':12} {'cuda tensors':12}")
    for op, by_device in report.items():
        print(f"{op:22} {by_device['cpu']['backend']:12} {by_device['cuda']['backend']:12}")
    reasons = {
        f"{device}: {row['reason']}"
        for by_device in report.values()
        for device, row in by_device.items()
        if row["reason"]
    }
    print("\nwhy not a faster backend:", *(sorted(reasons) or ["every op has its fastest"]), sep="\n  ")
    return 0


def _found(package: str) -> str:
    """Whether it could be imported, without importing it."""
    return "installed" if importlib.util.find_spec(package) else "not installed"


def _apex() -> str:
    """NVIDIA's apex is known by its features: the package called apex on PyPI is another thing."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return "not installed"
    folders = [Path(folder) for folder in found.submodule_search_locations or []]
    nvidia = any((folder / "optimizers" / "fused_adam.py").exists() for folder in folders)
    return "NVIDIA's" if nvidia else "installed, but not NVIDIA's apex"


_COMMANDS = {
    "distill": _distill,
    "plan": _plan,
    "sample": _sample,
    "export": _export,
    "evaluate": _evaluate,
    "replay": _replay,
    "bench": _bench,
    "convert": _convert,
    "info": _info,
}
