"""The command line `emd-fast`. Exit codes: 0 done, 2 usage, 130 and 143 interrupted, 1 otherwise."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import emd_fast
from emd_fast import config
from emd_fast.cli.options import overrides, parse
from emd_fast.config import ConfigError, EvaluationConfig, RunConfig
from emd_fast.distributed import GroupError
from emd_fast.io import code
from emd_fast.io.code import CodeRefused
from emd_fast.io.files import write_whole

_FILES = ("detector", "reference", "compare_with", "clip")  # what a pretrained task is judged by


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    options, rest = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if rest and options.command not in ("distill", "study", "plan"):
            raise ConfigError(f"unknown option {rest[0]!r}; see emd-fast {options.command} --help")
        with code.allow(*_named(options, rest)):
            return _COMMANDS[options.command](options, rest)
    except (ConfigError, GroupError, CodeRefused) as error:
        return _fail(error, 2)
    except (OSError, RuntimeError, ValueError, ModuleNotFoundError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        exit_code: int | None = getattr(error, "exit_code", None)
        if exit_code is None:
            raise
        return exit_code


def _named(options: argparse.Namespace, rest: Sequence[str]) -> list[str | None]:
    """The code that the command line names: a teacher's function, a detector's file."""
    keys = overrides(rest) if rest else {}
    folder = getattr(options, "source", getattr(options, "run", None))
    if folder is not None and options.teacher is not None:
        from emd_fast.run.folder import settings_of

        has = settings_of(folder).pretrained.teacher
        if options.teacher != has:
            raise ConfigError(f"{folder} has the teacher {has!r}, not {options.teacher!r}")
    names = [getattr(options, "teacher", None), getattr(options, "detector", None)]
    names += [keys.get("pretrained.teacher"), keys.get("evaluation.detector")]
    return [name if name is None else str(name) for name in names]


def _fail(error: BaseException, code: int) -> int:
    if getattr(error, "main", True):  # what all ranks raise alike is said by one of them
        print(f"emd-fast: {error}", file=sys.stderr)
    return code


def _settings(options: argparse.Namespace, rest: Sequence[str]) -> RunConfig:
    """The configuration that the options of distill, study and plan describe."""
    from emd_fast.run.distill import shortened

    keys = overrides(rest)
    for key in ("teacher", "prompts"):
        if getattr(options, key) is not None:
            keys |= {"task": "pretrained", f"pretrained.{key}": getattr(options, key)}
    keys |= {f"evaluation.{key}": value for key, value in _files(options).items()}
    settings = config.load(options.recipe, keys)
    return shortened(settings) if options.short else settings


def _distill(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast import distributed
    from emd_fast.run import distill as run

    settings = _settings(options, rest)
    folder = options.out or Path("runs") / Path(options.recipe).stem
    sinks = tuple(name for name in ("tensorboard", "wandb") if getattr(options, name))
    with distributed.process_group():
        run.distill(settings, folder, sinks)
        if distributed.is_main():
            print(folder / "report.md")
    return 0


def _study(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast import distributed
    from emd_fast.run import study

    settings = _settings(options, rest)
    folder = options.out or Path("runs") / f"{Path(options.recipe).stem}-study"
    with distributed.process_group():
        study.conduct(settings, folder)
        if distributed.is_main():
            print(folder / "study.md")
    return 0


def _plan(options: argparse.Namespace, rest: Sequence[str]) -> int:
    import tomli_w

    from emd_fast.run import distill as run
    from emd_fast.run.plan import GIB, Ceilings

    settings = _settings(options, rest)
    print(tomli_w.dumps(config.to_dict(settings)))
    ceilings = Ceilings(
        None if options.tflops is None else options.tflops * 1e12,
        None if options.gb_per_second is None else options.gb_per_second * 1e9,
    )
    plan = run.plan_of(settings, options.devices or int(os.environ.get("WORLD_SIZE", 1)), ceilings)
    print(plan.table())
    if options.device_memory is not None:
        plan.check(options.device_memory * GIB)
    return 0


def _sample(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast.reporting import pictures

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
        pictures.save_each(options.out, lambda first, n: decode(samples_of(first, n)), options.n, options.first)
        print(options.out)
        return 0
    samples = samples_of(0, options.n)
    if options.out.suffix == ".pt":
        write_whole(options.out, lambda file: torch.save(samples.cpu(), file))
    elif samples.dim() == 4:
        pictures.save_grid(options.out, decode(samples).cpu())
    else:
        pictures.scatter(options.out, {"generator": samples.cpu()})
    print(options.out)
    return 0


def _generator(options: argparse.Namespace) -> tuple[Callable, Callable, Callable, int]:
    """How to generate, decode and encode prompts, and the number of classes: of a run, or of what was exported."""
    from emd_fast.export import pipeline as export
    from emd_fast.run import distill as run
    from emd_fast.tasks.pretrained import decoded

    if (options.run / export.EXPORTED).exists() or options.run.is_file():
        if options.raw:
            raise ConfigError("--raw needs a run folder: what was exported has one set of weights")
        if options.best:
            raise ConfigError("--best needs a run folder: what was exported is one checkpoint")
        one_step = export.load(options.run, device="cuda" if torch.cuda.is_available() else "cpu")
        return one_step.sample, one_step.decode, one_step.encode, one_step.metadata.num_classes
    _, _, trainer = run.open_run(options.run, best=options.best)
    teacher: Any = trainer.teacher
    generate = functools.partial(trainer.generate, ema=not options.raw)

    def encode(prompts: list[str]) -> Any:
        if not hasattr(teacher, "encode"):
            raise ConfigError("this run's teacher takes no prompts")
        return teacher.encode(prompts)

    return generate, functools.partial(decoded, teacher), encode, trainer.config.num_classes


def _export(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast.export import pipeline as export
    from emd_fast.reporting.progress import say
    from emd_fast.run import distill as run

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
    from emd_fast.run import distill as run
    from emd_fast.run.folder import seconds_of, settings_of

    if options.write_reference:
        raise ConfigError("--write-reference is for real images: a folder or .zip of them, with --detector")
    folder = options.source
    settings = settings_of(folder)
    changes: dict[str, Any] = {"evaluation": dataclasses.replace(settings.evaluation, **_files(options))}
    if options.samples:
        if settings.task == "digits":
            raise ConfigError("--samples is not for digits: they are as many as there are held-out images")
        changes["samples"] = options.samples
    settings = dataclasses.replace(settings, **changes)
    _, task, trainer = run.open_run(folder, best=options.best, settings=settings)
    task.open_references()
    return run.evaluate(settings, folder, task, trainer, seconds_of(folder))


def _evaluate_images(options: argparse.Namespace) -> dict[str, Any]:
    """Of what was exported, or of images in files."""
    from emd_fast.export import pipeline as export
    from emd_fast.metrics import evaluation
    from emd_fast.metrics.images import ImageFiles, to_uint8

    config.from_dict(EvaluationConfig, _files(options))  # what needs what
    if options.best or options.clip:
        raise ConfigError(f"{'--best' if options.best else '--clip'} needs a run folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    evaluator = evaluation.Evaluator.read(**_files(options), device=device)
    if (options.source / export.EXPORTED).exists() or options.source.suffix == ".safetensors":
        if options.write_reference:
            raise ConfigError("--write-reference is for real images: a folder or .zip of them")
        one_step = export.load(options.source, device=device)
        n = options.samples or evaluation.COMPARABLE

        def images(first: int, n: int) -> torch.Tensor:
            return to_uint8(one_step.decode(one_step.sample(n, first_sample=first)))

        found = evaluation.evaluate(evaluator, images, n, options.batch_size)
        return found | evaluation.provenance(evaluator, n, one_step.metadata.seed)
    files = ImageFiles(options.source)
    if options.samples not in (None, len(files)):
        raise ConfigError(f"{options.source} has {len(files)} images, --samples is {options.samples}")
    if options.write_reference:
        return _write_reference(options.write_reference, evaluator, files, options.batch_size)
    found = evaluation.evaluate(evaluator, files, len(files), options.batch_size)
    return found | evaluation.provenance(evaluator, len(files))


def _write_reference(out: Path, evaluator: Any, files: Any, batch: int) -> dict[str, Any]:
    from emd_fast import distributed
    from emd_fast.metrics import evaluation, reference

    if out.suffix != ".npz":
        raise ConfigError(f"--write-reference must end in .npz, got {out}")
    moments = evaluation.moments_of(evaluator.detector, files, len(files), batch)
    detector = evaluator.detector.sha256
    distributed.on_main(lambda: reference.save(out, moments, files.shape, detector))
    written = reference.load(out)
    return {"n": len(files), "reference": {"file": str(out), "sha256": written.sha256}, "detector": detector}


def _files(options: argparse.Namespace) -> dict[str, Any]:
    """The files to judge by that were given as options."""
    return {name: getattr(options, name) for name in _FILES if getattr(options, name) is not None}


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
    exit_code: int = importlib.import_module("benchmarks.harness.command").run(options)
    return exit_code


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
    "study": _study,
    "plan": _plan,
    "sample": _sample,
    "export": _export,
    "evaluate": _evaluate,
    "replay": _replay,
    "bench": _bench,
    "convert": _convert,
    "info": _info,
}
