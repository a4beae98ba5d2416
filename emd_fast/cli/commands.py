"""What the commands of `emd-fast` do.

Exit codes: 0 done, 2 wrong input, 128 + N ended by signal N, 1 otherwise. An error is one line on
stderr.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import emd_fast
from emd_fast import config
from emd_fast.cli.errors import exit_code, report
from emd_fast.cli.evaluate import evaluate, files_of
from emd_fast.cli.info import info
from emd_fast.cli.keys import overrides
from emd_fast.cli.named import named
from emd_fast.cli.options import TAKE_KEYS, parse
from emd_fast.config import ConfigError, RunConfig
from emd_fast.io import code
from emd_fast.io.files import write_atomic


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    options, rest = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if rest and options.command not in TAKE_KEYS:
            raise ConfigError(f"unknown option {rest[0]!r}; see emd-fast {options.command} --help")
        with code.allow(*named(options, rest)):
            return _COMMANDS[options.command](options, rest)
    except Exception as error:
        report(error)
        return exit_code(error)
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        if not hasattr(error, "exit_code"):
            raise
        return exit_code(error)


def _settings(options: argparse.Namespace, rest: Sequence[str]) -> RunConfig:
    """Loads the configuration that the options of distill, study and plan describe."""
    from emd_fast.run.distill import shortened

    keys = overrides(rest)
    for key in (
        "teacher",
        "teacher_config",
        "prompts",
        "negative_prompt",
        "sample_shape",
        "height",
        "width",
        "frames",
        "sizes",
        "embedded_guidance",
        "guidance_2",
    ):
        if getattr(options, key) is not None:
            keys |= {"task": "pretrained", f"pretrained.{key}": getattr(options, key)}
    for key in ("data", "resolution"):
        if getattr(options, key) is not None:
            keys[f"fashion.{key}"] = getattr(options, key)
    keys |= {f"evaluation.{key}": value for key, value in files_of(options).items()}
    settings = config.load(options.recipe, keys)
    if settings.task != "fashion" and (options.data, options.resolution) != (None, None):
        raise ConfigError(f"--data and --resolution are for the task fashion, not for {settings.task}: leave them out")
    return shortened(settings) if options.short else settings


def _distill(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast import distributed
    from emd_fast.run import distill

    settings = _settings(options, rest)
    folder = options.out or Path("runs") / Path(options.recipe).stem
    sinks = tuple(name for name in ("tensorboard", "wandb") if getattr(options, name))
    with distributed.process_group(report):
        distill.distill(settings, folder, sinks)
        if distributed.is_main():
            print(folder / "report.md")
    return 0


def _study(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast import distributed
    from emd_fast.run import fashion_cells, fashion_study, study

    settings = _settings(options, rest)
    of = "study" if options.vary == "langevin_steps" else f"study-of-{options.vary}"
    folder = options.out or Path("runs") / f"{Path(options.recipe).stem}-{of}"
    fashion = settings.task == "fashion"
    if not fashion and (options.cells is not None or options.seeds is not None):
        raise ConfigError(f"--cells and --seeds are for the study of fashion, not of {settings.task}")
    if fashion and options.vary != "langevin_steps":
        raise ConfigError(f"--vary {options.vary} is not for the study of fashion, which has cells")
    cells = fashion_cells.chosen(options.cells) if options.cells is not None else fashion_cells.ALL
    with distributed.process_group(report):
        if fashion:
            fashion_study.conduct(settings, folder, cells, options.seeds or 3)
        else:
            study.conduct(settings, folder, options.vary)
        if distributed.is_main():
            print(folder / "study.md")
    return 0


def _plan(options: argparse.Namespace, rest: Sequence[str]) -> int:
    import tomli_w

    from emd_fast.run import distill
    from emd_fast.run.plan import Ceilings
    from emd_fast.train.memory import GIB

    settings = _settings(options, rest)
    print(tomli_w.dumps(config.to_dict(settings)))
    ceilings = Ceilings(
        None if options.tflops is None else options.tflops * 1e12,
        None if options.gb_per_second is None else options.gb_per_second * 1e9,
    )
    room = None if options.device_memory is None else options.device_memory * GIB
    plan = distill.plan_of(settings, options.devices or int(os.environ.get("WORLD_SIZE", 1)), ceilings, room)
    print(plan.table())
    if room is not None:
        plan.check(room)
    return 0


def _sample(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast.reporting import pictures, video

    if options.out.suffix not in (".png", ".pt", "", *video.ENDINGS):
        raise ConfigError(f"--out must end in .png, .mp4, .gif or .pt, or be a folder, got {options.out}")
    if options.out.suffix == ".mp4" and video.ending() != ".mp4":
        raise ConfigError(video.REMEDY)
    into_folder = not options.out.suffix
    if into_folder and options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ConfigError(f"{options.out} exists already and is not empty: choose another folder")
    generate, decode, encode, num_classes = _generator(options)
    if options.label is not None and options.prompt is not None:
        raise ConfigError("give --label or --prompt, not both")
    if options.label is not None and not num_classes:
        raise ConfigError("this generator has no classes: leave --label out")
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
        pictures.save_each(options.out, lambda first, n: decode(samples_of(first, n)), options.n, options.first)
        print(options.out)
        return 0
    samples = samples_of(0, options.n)
    if options.out.suffix == ".pt":
        write_atomic(options.out, lambda file: torch.save(samples.cpu(), file))
    elif options.out.suffix in video.ENDINGS:
        if samples.dim() != 5:
            raise ConfigError(f"these samples are no videos: give --out a name that ends in .png, got {options.out}")
        pictures.save_video(options.out, decode(samples).cpu())
    elif samples.dim() in (4, 5):
        pictures.save_grid(options.out, decode(samples).cpu())
    else:
        pictures.scatter(options.out, {"generator": samples.cpu()})
    print(options.out)
    return 0


def _generator(options: argparse.Namespace) -> tuple[Callable, Callable, Callable, int]:
    """Opens a run or an exported generator.

    Returns:
        Functions that generate, decode and encode prompts, and the number of classes.
    """
    from emd_fast import distributed
    from emd_fast.export import pipeline
    from emd_fast.run import distill
    from emd_fast.tasks.pretrained import decoded

    if (options.run / pipeline.EXPORTED).exists() or options.run.is_file():
        if options.raw:
            raise ConfigError("--raw needs a run folder: what was exported has one set of weights")
        if options.best:
            raise ConfigError("--best needs a run folder: what was exported is one checkpoint")
        one_step = pipeline.load(options.run, device=distributed.default_device())
        generate = functools.partial(one_step.sample, calls=options.calls, shape=_shape(options, one_step))
        return generate, one_step.decode, one_step.encode, one_step.metadata.num_classes
    _, _, trainer = distill.open_run(options.run, best=options.best)
    teacher: Any = trainer.teacher
    shape = _shape(options, teacher)
    generate = functools.partial(trainer.generate, ema=not options.raw, calls=options.calls, shape=shape)

    def encode(prompts: list[str]) -> Any:
        if not hasattr(teacher, "encode"):
            raise ConfigError("this run's teacher takes no prompts")
        return teacher.encode(prompts)

    return generate, functools.partial(decoded, teacher), encode, trainer.config.num_classes


def _shape(options: argparse.Namespace, owner: Any) -> tuple[int, ...] | None:
    """Shape of the samples that --height, --width and --frames ask for; None without them.

    Args:
        owner: a teacher or an exported generator, which knows the shape of a size if it is of diffusers.
    """
    size = {name: getattr(options, name) for name in ("height", "width", "frames")}
    if all(side is None for side in size.values()):
        return None
    if not hasattr(owner, "resized"):
        raise ConfigError("--height, --width and --frames need a teacher from a folder of diffusers: leave them out")
    shape: tuple[int, ...] = owner.resized(**size)
    return shape


def _export(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast.export import hub, pipeline
    from emd_fast.reporting.progress import say
    from emd_fast.run import distill, folder

    is_file = options.out.suffix == ".safetensors"
    for option, given in (("--lora", options.lora), ("--push-to-hub", options.push_to_hub)):
        if given and is_file:
            raise ConfigError(f"{option} writes a folder, got {options.out}")
    if options.public and not options.push_to_hub:
        raise ConfigError("--public is for --push-to-hub NAME")
    repository = hub.Repository(options.push_to_hub) if options.push_to_hub else None
    _, _, trainer = distill.open_run(options.run, best=options.best)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        form: Any = "lora" if options.lora else "safetensors" if is_file else "diffusers"
        pipeline.export(trainer, options.out, form, ema=not options.raw)
    for warning in said:
        if issubclass(warning.category, pipeline.NotForStock):
            say(f"warning: {warning.message}")
    print(options.out)
    if (options.out / "model_index.json").exists():
        say(f"diffusers samples it with these lines:\n{pipeline.example(trainer, options.out)}")
    if repository is not None:
        # What a run has measured is the average of the last weights.
        metrics = None if options.raw or options.best else folder.metrics_of(options.run)
        if metrics is not None and metrics.get("steps") != trainer.steps_done:
            metrics = None  # `evaluate --best` measured other weights
        hub.write_card(options.out, repository.name, trainer, metrics)
        print(repository.push(options.out, public=options.public))
    return 0


def _replay(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast.run.replay import replay

    found = replay(options.run, options.step, options.sample, catch_up=options.catch_up)
    print(found.table())
    folder = options.out or options.run / "replay" / f"step-{options.step:08d}-sample-{options.sample}"
    print(*found.write(folder), sep="\n")
    return 0


def _bench(options: argparse.Namespace, rest: Sequence[str]) -> int:
    folder = Path(emd_fast.__file__).resolve().parents[1] / "benchmarks"
    if not (folder / "harness" / "command.py").exists():
        raise RuntimeError("emd-fast bench needs a checkout: an installation has no benchmarks/")
    # Loaded by its path, since another package named benchmarks may be installed.
    loaded = getattr(sys.modules.get("benchmarks"), "__file__", None)
    if loaded is None or Path(loaded).resolve() != folder / "__init__.py":
        spec = importlib.util.spec_from_file_location(
            "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules["benchmarks"] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # so that --against finds modules here
    code_of_bench: int = importlib.import_module("benchmarks.harness.command").run(options)
    return code_of_bench


def _convert(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast.teachers import edm

    if options.out.suffix != ".safetensors":
        raise ConfigError(f"the second file must end in .safetensors, got {options.out}")
    print(f"{options.out}: {edm.convert(options.file, options.out)}")
    return 0


_COMMANDS = {
    "distill": _distill,
    "study": _study,
    "plan": _plan,
    "sample": _sample,
    "export": _export,
    "evaluate": evaluate,
    "replay": _replay,
    "bench": _bench,
    "convert": _convert,
    "info": info,
}
