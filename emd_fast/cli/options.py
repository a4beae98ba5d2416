"""Commands of the command line and their options. keys.py has the keys of the configuration."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import emd_fast
from emd_fast import config
from emd_fast.cli import keys, named

_SIDES = {"height": "PIXELS", "width": "PIXELS", "frames": "N"}
TAKE_KEYS = ("distill", "study", "plan")  # commands that take keys of the configuration as options


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the command and its options; what is left is for `keys.overrides`."""
    return _parser().parse_known_args(_with_recipe(list(words)))


def _with_recipe(words: list[str]) -> list[str]:
    """Completes `distill --teacher X` to `distill pretrained --teacher X`.

    An optional argument would not do: argparse would take the value of a key for the recipe.
    """
    names_teacher = any(word.partition("=")[0] == "--teacher" for word in words)
    if names_teacher and words[0] in TAKE_KEYS and words[1].startswith("-"):
        return [words[0], "pretrained", *words[1:]]
    return words


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that names the nearest right word, and accepts no abbreviations."""

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
        description="EM Distillation: turns a diffusion model into a one-step generator.",
        epilog="examples:\n"
        "  emd-fast distill digits --out runs/digits          train, distil, evaluate, report\n"
        "  emd-fast study gmm                                 compare K = 1 to 16 on a mixture\n"
        "  emd-fast study digits --vary calls                 compare generators of 1, 2 and 4 calls\n"
        "  emd-fast distill --teacher FOLDER --out runs/mine  distil a model of your own\n"
        "  emd-fast sample runs/digits -n 100 --out grid.png  draw samples of the generator\n"
        "  emd-fast evaluate runs/mine --detector inception.pt --reference imagenet-64x64.npz\n"
        "  emd-fast export runs/mine one-step                 write a diffusers pipeline\n"
        "  emd-fast plan digits --devices 64                  estimate memory and traffic of a device\n"
        "  emd-fast replay runs/digits --step 400 --sample 7  repeat one sample's E-step\n"
        "  emd-fast info                                      list ops, backends and versions",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"emd-fast {emd_fast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    distill = commands.add_parser(
        "distill",
        help="distil a recipe's teacher, and evaluate the generator",
        description="Runs a recipe. The same command on the same folder resumes the run.",
        epilog=keys.described(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _settings(distill)
    distill.add_argument("--out", type=Path, help="run folder (default: runs/RECIPE)")
    distill.add_argument("--tensorboard", action="store_true", help="also log to TensorBoard")
    distill.add_argument("--wandb", action="store_true", help="also log to Weights & Biases")

    study = commands.add_parser(
        "study",
        help="compare several K, numbers of calls, adapters, or EMD with score distillation, over several seeds",
        description="Runs a study of digits, gmm or fashion. The same command on the same folder resumes it.",
        epilog="takes the keys of the configuration too: see emd-fast distill --help",
    )
    _settings(study)
    study.add_argument("--out", type=Path, help="folder of the study (default: runs/RECIPE-study)")
    study.add_argument(
        "--vary",
        choices=("langevin_steps", "calls", "adapters"),
        default="langevin_steps",
        help="compare several K (the default), 1, 2 and 4 calls, or adapters with whole networks (digits)",
    )
    study.add_argument("--cells", metavar="a,b", help="cells of the study of fashion to run (default: all)")
    study.add_argument("--seeds", type=_positive, help="seeds of each variant of the study of fashion (default 3)")

    plan = commands.add_parser(
        "plan",
        help="estimate memory, traffic and time of a recipe on each device",
        description="Prints the configuration and its requirements under each parallel mode, computed "
        "from the sizes of the networks. Nothing is run. Times are lower bounds that follow from the "
        "peak rates given as options.",
        epilog="takes the keys of the configuration too: see emd-fast distill --help",
    )
    _settings(plan)
    plan.add_argument("--devices", type=_positive, help="number of devices (default: that of torchrun, or 1)")
    plan.add_argument("--device-memory", type=_above_0, help="memory of a device in GiB: fail if the run does not fit")
    plan.add_argument("--tflops", type=_above_0, help="peak TFLOP/s of a device in the compute dtype")
    plan.add_argument("--gb-per-second", type=_above_0, help="peak rate at which a device receives, in 10^9 bytes/s")

    sample = commands.add_parser("sample", help="draw samples of a run's generator, or of an exported one")
    named.add_teacher(sample)
    sample.add_argument("run", type=Path, help="run folder, or an exported generator")
    sample.add_argument("-n", type=_positive, default=100, help="number of samples (default 100)")
    sample.add_argument(
        "--out",
        type=Path,
        required=True,
        help=".png for one picture, .mp4 or .gif for one video, .pt for a tensor (n, ...), or a folder",
    )
    sample.add_argument("--label", type=int, help="class of all samples (default: each class in turn)")
    sample.add_argument("--prompt", help="prompt of all samples (default: each of the run's in turn)")
    for name, metavar in _SIDES.items():
        sample.add_argument(
            f"--{name}", type=_positive, metavar=metavar, help=f"{name} of samples (default: the run's)"
        )
    sample.add_argument("--first", type=int, default=0, help="index of the first sample (default 0)")
    sample.add_argument(
        "--calls", type=_positive, help="stop after that many calls (default: one on each of its rungs)"
    )
    sample.add_argument("--raw", action="store_true", help="use the raw weights, not their average")
    sample.add_argument("--best", action="store_true", help="use the best checkpoint, not the last")

    export = commands.add_parser(
        "export",
        help="write a run's generator as a diffusers pipeline, or as one file",
        epilog="docs/export.md has the pipelines that can sample it",
    )
    named.add_teacher(export)
    export.add_argument("run", type=Path, help="run folder")
    export.add_argument("out", type=Path, help="a new folder, or a .safetensors file")
    export.add_argument(
        "--lora", action="store_true", help="write the adapter alone, for load_lora_weights of diffusers, as a folder"
    )
    export.add_argument("--raw", action="store_true", help="use the raw weights, not their average")
    export.add_argument("--best", action="store_true", help="use the best checkpoint, not the last")

    export.add_argument(
        "--push-to-hub", metavar="NAME", help="upload the folder to this model of the Hugging Face hub, with a card"
    )
    export.add_argument("--public", action="store_true", help="make a new model on the hub public (default: private)")

    evaluate = commands.add_parser(
        "evaluate",
        help="compute the metrics of a run, an exported generator, or images",
        description="Writes metrics.json and report.md of a run again. With --detector it also takes an "
        "exported generator, or a folder or .zip of images.",
        epilog="docs/evaluation.md defines the metrics",
    )
    evaluate.add_argument("source", type=Path, help="run folder; with --detector also an exported generator, or images")
    _judged_by(evaluate)
    named.add_teacher(evaluate)
    evaluate.add_argument("--samples", type=_positive, help="number of samples (default: the run's, or 50,000)")
    evaluate.add_argument("--batch-size", type=_positive, default=64, help="images in a pass (default 64)")
    evaluate.add_argument("--best", action="store_true", help="use the best checkpoint, not the last")
    evaluate.add_argument(
        "--write-reference",
        type=Path,
        metavar="OUT.npz",
        help="write the images' statistics as a reference",
    )

    replay = commands.add_parser(
        "replay",
        help="repeat the E-step of one sample of a run",
        description="Repeats it in one process, with the noise, time and condition of the run. The weights "
        "are those of the last checkpoint at or before the step.",
    )
    named.add_teacher(replay)
    replay.add_argument("run", type=Path, help="run folder")
    replay.add_argument("--step", type=int, required=True, help="optimizer step, counted from 0")
    replay.add_argument("--sample", type=int, required=True, help="index in the global batch")
    replay.add_argument("--out", type=Path, help="output folder (default: RUN/replay/step-N-sample-I)")
    replay.add_argument(
        "--catch-up",
        action="store_true",
        help="first repeat the steps from the checkpoint on, on the whole batch",
    )

    bench = commands.add_parser(
        "bench",
        help="time the ops against PyTorch and other libraries (needs a checkout)",
        description="Verifies the contenders, then times them in turn in one process.",
        epilog="--against takes a function with the op's keyword arguments: docs/benchmarks.md",
    )
    bench.add_argument("ops", nargs="*", metavar="OP", help="op to time, as langevin_eps (default: all)")
    bench.add_argument("--shape", type=_sizes, action="append", help="as 16,320,64,64; repeatable (default: the op's)")
    bench.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="dtype of the networks' tensors (default bf16)"
    )
    bench.add_argument("--layout", choices=("nchw", "nhwc"), help="layout of the networks' tensors (default nchw)")
    bench.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if present)")
    bench.add_argument("--backend", action="append", default=[], help="the only backend of ours to time; repeatable")
    bench.add_argument("--against", action="append", default=[], metavar="MODULE:FUNCTION", help="another contender")
    bench.add_argument("--skip", action="append", default=[], metavar="NAME", help="contender to leave out; repeatable")
    bench.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave out contenders that torch.compile makes"
    )
    bench.add_argument("--threads", type=_positive, help="CPU threads of PyTorch")
    bench.add_argument("--rounds", type=_positive, default=50, help="timings of each contender (default 50)")
    bench.add_argument("--warm", action="store_true", help="reuse one set of inputs, so that caches are warm")
    bench.add_argument(
        "--no-graph", dest="graph", action="store_false", help="time kernel launches instead of a CUDA graph"
    )
    bench.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    bench.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    bench.add_argument("--plot", type=Path, metavar="FILE.png", help="write a plot")
    bench.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="exit with code 1 on a regression beyond the noise"
    )
    bench.add_argument("--ncu", action="store_true", help="print and run the Nsight Compute command for OP")
    bench.add_argument("--one-call", action="store_true", help="make one untimed call of ours, for a profiler")

    convert = commands.add_parser(
        "convert",
        help="convert a checkpoint of EDM or EDM2 to safetensors",
        description="Reads the averaged weights of an NVlabs pickle without running code from it.",
    )
    convert.add_argument(
        "file", type=Path, metavar="FILE.pkl", help="pickle that NVlabs published, or their code wrote"
    )
    convert.add_argument("out", type=Path, metavar="OUT.safetensors", help="file for emd_fast.teachers.edm.load")

    info = commands.add_parser("info", help="list ops, backends and versions")
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _settings(command: argparse.ArgumentParser) -> None:
    """Adds the options that choose a configuration, besides its keys."""
    command.add_argument("recipe", help=f"{', '.join(config.recipes())}, or a .toml file; optional with --teacher")
    command.add_argument("--teacher", metavar="FOLDER", help=keys.help_of("pretrained.teacher"))
    config_help = keys.help_of("pretrained.teacher_config")
    command.add_argument("--teacher-config", metavar="FOLDER", help=config_help)
    command.add_argument("--prompts", metavar="FILE", help=keys.help_of("pretrained.prompts"))
    negative = keys.help_of("pretrained.negative_prompt")
    command.add_argument("--negative-prompt", metavar="TEXT", help=negative)
    shape = keys.help_of("pretrained.sample_shape")
    command.add_argument("--sample-shape", type=_sizes, metavar="C,H,W", help=shape)
    for name, metavar in _SIDES.items():
        command.add_argument(f"--{name}", type=int, metavar=metavar, help=keys.help_of(f"pretrained.{name}"))
    for name in ("embedded-guidance", "guidance-2"):
        text = keys.help_of(f"pretrained.{name.replace('-', '_')}")
        command.add_argument(f"--{name}", type=float, metavar="W", help=text)
    sizes = keys.help_of("pretrained.sizes")
    command.add_argument("--sizes", type=keys.value_of, metavar="[[H,W],...]", help=sizes)
    command.add_argument("--data", metavar="FOLDER", help=keys.help_of("fashion.data"))
    command.add_argument("--resolution", type=int, metavar="PIXELS", help=keys.help_of("fashion.resolution"))
    _judged_by(command)
    command.add_argument("--short", action="store_true", help="run a tenth of all steps, as a smoke test")


def _judged_by(command: argparse.ArgumentParser) -> None:
    for name, metavar in {"detector": "FILE", "reference": "FILE", "compare-with": "IMAGES", "clip": "FOLDER"}.items():
        text = keys.help_of(f"evaluation.{name.replace('-', '_')}")
        command.add_argument(f"--{name}", metavar=metavar, help=text)


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
