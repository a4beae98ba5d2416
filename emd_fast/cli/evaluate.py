"""The command `emd-fast evaluate`: metrics of a run, an exported generator or images in files."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from emd_fast import config
from emd_fast.cli.errors import report
from emd_fast.config import ConfigError, EvaluationConfig

_FILES = ("detector", "reference", "compare_with", "clip")


def files_of(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the values of the options that are keys of [evaluation]."""
    return {name: getattr(options, name) for name in _FILES if getattr(options, name) is not None}


def evaluate(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast import distributed

    with distributed.process_group(report):
        is_run = (options.source / "config.toml").exists() or not options.detector
        metrics = _evaluate_run(options) if is_run else _evaluate_images(options)
        if distributed.is_main():
            print(json.dumps(metrics, indent=1))
    return 0


def _evaluate_run(options: argparse.Namespace) -> dict[str, Any]:
    from emd_fast.run import distill
    from emd_fast.run.folder import seconds_of, settings_of

    if options.write_reference:
        raise ConfigError("--write-reference is for real images: a folder or .zip of them, with --detector")
    folder = options.source
    settings = settings_of(folder)
    changes: dict[str, Any] = {"evaluation": dataclasses.replace(settings.evaluation, **files_of(options))}
    if options.samples:
        if settings.task in ("digits", "fashion"):
            raise ConfigError(f"--samples is not for {settings.task}: it is the number of held-out images")
        changes["samples"] = options.samples
    settings = dataclasses.replace(settings, **changes)
    # Evaluation samples the teacher too, so its weights must be those of the run.
    _, task, trainer = distill.open_run(folder, best=options.best, settings=settings, trains=True)
    task.open_references()
    return distill.evaluate(settings, folder, task, trainer, seconds_of(folder))


def _evaluate_images(options: argparse.Namespace) -> dict[str, Any]:
    """Computes the metrics of an exported generator or of images in files."""
    from emd_fast import distributed
    from emd_fast.export import pipeline
    from emd_fast.metrics import evaluation
    from emd_fast.metrics.images import ImageFiles, to_uint8
    from emd_fast.reporting.progress import say

    config.from_dict(EvaluationConfig, files_of(options))  # checks which files need others
    if options.best or options.clip:
        raise ConfigError(f"{'--best' if options.best else '--clip'} needs a run folder")
    evaluator = evaluation.Evaluator.read(**files_of(options), device=distributed.default_device())
    if evaluator.compare_with is not None:
        say(evaluator.compare_with.summary)
    if (options.source / pipeline.EXPORTED).exists() or options.source.suffix == ".safetensors":
        if options.write_reference:
            raise ConfigError("--write-reference is for real images: a folder or .zip of them")
        one_step = pipeline.load(options.source, device=distributed.default_device())
        n = options.samples or evaluation.COMPARABLE

        def images(first: int, n: int) -> torch.Tensor:
            return to_uint8(one_step.decode(one_step.sample(n, first_sample=first)))

        found = evaluation.evaluate(evaluator, images, n, options.batch_size)
        return found | evaluation.provenance(evaluator, n, one_step.metadata.seed)
    files = ImageFiles(options.source)
    say(files.summary)
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
