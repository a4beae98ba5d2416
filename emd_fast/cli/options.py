"""The words of the command line: its commands and their options, and every key of the configuration as an option."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

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

_TABLES = {
    "emd": EMDConfig,
    "teacher": TeacherConfig,
    "mixture": MixtureConfig,
    "pretrained": PretrainedConfig,
    "evaluation": EvaluationConfig,
}


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command and its options, and the words that are neither: keys of the configuration, for `overrides`."""
    return _parser().parse_known_args(_with_recipe(list(words)))


def overrides(words: Sequence[str]) -> dict[str, Any]:
    """{"emd.gamma_z": 0.02} from ["--gamma-z", "0.02"].

    Raises:
        ConfigError: an unknown option, with the nearest right one, or one without a value.
    """
    known = {item.name: item.name for item in dataclasses.fields(RunConfig) if item.name not in _TABLES}
    for table, cls in _TABLES.items():
        known |= {f"{table}.{item.name}": f"{table}.{item.name}" for item in dataclasses.fields(cls)}
    known |= {item.name: f"emd.{item.name}" for item in dataclasses.fields(EMDConfig)}
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, has_value, value = word.partition("=")
        key = option.removeprefix("--").replace("-", "_")
        nested = key.rpartition(".")[0] in ("emd.time_distribution", "emd.fake_score_time_distribution")
        if not option.startswith("--") or (key not in known and not nested):
            near = difflib.get_close_matches(key.replace("student", "fake_score"), known, 1)
            hint = f"; did you mean --{near[0].replace('_', '-')}?" if near else ""
            raise ConfigError(f"unknown option {option!r}{hint}")
        if not has_value:
            if not rest:
                raise ConfigError(f"{option} needs a value")
            value = rest.pop(0)
        found[known.get(key, key)] = _value(value)
    return found


def _value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _with_recipe(words: list[str]) -> list[str]:
    """`distill --teacher X` is `distill pretrained --teacher X`. An optional argument would take the value of a key of
    the configuration, which argparse does not know, for the recipe."""
    names_teacher = any(word.partition("=")[0] == "--teacher" for word in words)
    if names_teacher and words[0] in ("distill", "study", "plan") and words[1].startswith("-"):
        return [words[0], "pretrained", *words[1:]]
    return words


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
        "  emd-fast study gmm                                 K = 1 to 16 on a mixture with exact scores\n"
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
    _settings(distill)
    distill.add_argument("--out", type=Path, help="run folder (default: runs/RECIPE)")
    distill.add_argument("--tensorboard", action="store_true", help="log to TensorBoard too")
    distill.add_argument("--wandb", action="store_true", help="log to Weights & Biases too")

    study = commands.add_parser(
        "study",
        help="a recipe with several K and seeds: a table",
        description="Runs the study of the recipe digits or gmm. The same command on the same folder resumes it.",
        epilog="takes the configuration keys that distill takes: see emd-fast distill --help",
    )
    _settings(study)
    study.add_argument("--out", type=Path, help="folder of the study (default: runs/RECIPE-study)")

    plan = commands.add_parser(
        "plan",
        help="what a recipe would need of each device: memory, traffic, time",
        description="Prints the configuration, and what it needs with every way to lay the networks out. Counted "
        "from the sizes of the networks; nothing is run. Times are lower bounds from the ceilings that you give.",
        epilog="takes the configuration keys that distill takes: see emd-fast distill --help",
    )
    _settings(plan)
    plan.add_argument("--devices", type=_positive, help="how many (default: those of torchrun, or one)")
    plan.add_argument("--device-memory", type=_above_0, help="refuse what does not fit into so many GiB")
    plan.add_argument("--tflops", type=_above_0, help="of a device, in the compute dtype: for the time of a step")
    plan.add_argument("--gb-per-second", type=_above_0, help="that a device receives from others, in 10^9 bytes")

    sample = commands.add_parser("sample", help="pictures of a run's one-step generator, or of an exported one")
    _teacher_code(sample)
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
    _teacher_code(export)
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
    _teacher_code(evaluate)
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
    _teacher_code(replay)
    replay.add_argument("run", type=Path, help="run folder")
    replay.add_argument("--step", type=int, required=True, help="optimizer step, counted from 0")
    replay.add_argument("--sample", type=int, required=True, help="index in the batch of all devices")
    replay.add_argument("--out", type=Path, help="folder of table and pictures (default: RUN/replay/step-N-sample-I)")
    replay.add_argument(
        "--catch-up",
        action="store_true",
        help="first repeat on the whole batch what the run did since the checkpoint, the fake score's updates included",
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


def _settings(command: argparse.ArgumentParser) -> None:
    """The options that choose a configuration, besides its keys."""
    command.add_argument(
        "recipe", help=f"{', '.join(config.recipes())}, or a .toml file; may be left out for --teacher"
    )
    command.add_argument(
        "--teacher",
        metavar="FOLDER",
        help="of diffusers, a hub name, or package.module:function, which naming it here allows to run",
    )
    command.add_argument("--prompts", metavar="FILE", help="for --teacher: a prompt in each line, or .safetensors")
    _judged_by(command)
    command.add_argument("--short", action="store_true", help="a tenth of all steps: shows that it works, not how well")


def _judged_by(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--detector",
        metavar="FILE",
        help="TorchScript, as EDM's Inception: code, which naming it here allows to run (docs/evaluation.md)",
    )
    command.add_argument("--reference", metavar="FILE.npz", help="statistics of real images, for the Fréchet distance")
    command.add_argument("--compare-with", metavar="IMAGES", help="folder or .zip, for precision and recall")
    command.add_argument("--clip", metavar="FOLDER", help="of a CLIP model, for the score of prompts given as text")


def _teacher_code(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--teacher", metavar="MODULE:FUNCTION", help="the Python code that this run gets its teacher from: allows it"
    )


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
