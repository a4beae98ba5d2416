"""Model card (README.md) of an exported generator: what a person or a serving engine must know to sample it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emd_fast.diffusion.few_step import FewStepGenerator
from emd_fast.diffusion.generator import Generator
from emd_fast.teachers.diffusers import DiffusersDenoiser, stock

_SEVERAL = """
The times must be given, because those of the pipeline are others. The first m of them make a sample
of m calls. The scheduler adds new noise before each call but the first. Pipelines that do not hand it
their `generator` take this noise from PyTorch's global generator: call `torch.manual_seed` first.
"""


def of_folder(generator: Generator | FewStepGenerator, teacher_hash: str, steps: int) -> str:
    """The card of a pipeline folder that stock diffusers samples.

    Args:
        teacher_hash: fingerprint of the teacher.
        steps: of the training.
    """
    return _card(
        generator,
        ["from diffusers import DiffusionPipeline", "", "pipeline = DiffusionPipeline.from_pretrained(FOLDER)"],
        {"teacher": _teacher(teacher_hash), "steps of training": str(steps)},
    )


def of_lora(
    generator: Generator | FewStepGenerator, teacher_hash: str, steps: int, config: Mapping[str, Any], base_dtype: str
) -> str:
    """The card of a LoRA folder.

    Args:
        teacher_hash: fingerprint of the teacher.
        steps: of the training.
        config: "r" and "lora_alpha" of the adapter.
        base_dtype: of the base that the adapter was trained on.
    """
    assert isinstance(generator.denoiser, DiffusersDenoiser)
    pipeline, scheduler = stock.pipeline_class(generator.denoiser), type(stock.scheduler(generator)).__name__
    return _card(
        generator,
        [
            f"from diffusers import {pipeline}, {scheduler}",
            "",
            f"pipeline = {pipeline}.from_pretrained(TEACHER)",
            "pipeline.load_lora_weights(FOLDER)",
            f'pipeline.scheduler = {scheduler}.from_pretrained(FOLDER, subfolder="scheduler")',
        ],
        {
            "form": f"a LoRA adapter for the {pipeline} of its teacher",
            "teacher": _teacher(teacher_hash),
            "steps of training": str(steps),
            "rank, alpha": f"{config['r']}, {config['lora_alpha']:g}",
            **({} if base_dtype == "auto" else {"base in training": f"{base_dtype}, without gradients"}),
        },
        ["lora"],
    )


def _teacher(teacher_hash: str) -> str:
    return f"SHA-256 {teacher_hash} (emd_fast's fingerprint of its weights)"


def _card(
    generator: Generator | FewStepGenerator,
    lines: list[str],
    rows: Mapping[str, str],
    tags: list[str] | None = None,
) -> str:
    """A card.

    Args:
        lines: of Python that make `pipeline`.
        rows: of the table, besides those about the call.
        tags: besides those of every card.
    """
    calls = len(generator.times) if isinstance(generator, FewStepGenerator) else 1
    kind, number = ("one-step", "one network call") if calls == 1 else ("few-step", f"{calls} network calls")
    told = ", ".join(f"{name}={value}" for name, value in stock.arguments(generator).items())
    rows = {
        **rows,
        "network calls": str(calls),
        "scheduler": f"{type(stock.scheduler(generator)).__name__} (scheduler/scheduler_config.json)",
        "arguments of the pipeline's call": told,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    python = "\n".join(f"    {line}".rstrip() for line in [*lines, stock.call(generator)])
    return f"""---
library_name: diffusers
tags: [{", ".join([*(tags or []), kind, "em-distillation"])}]
---

Generator of {number}, distilled by EM Distillation (arXiv 2405.16852) with emd_fast.

| | |
|---|---|
{table}

{python}
{_SEVERAL if calls > 1 else ""}"""


def for_hub(card: str, name: str, metrics: Mapping[str, Any] | None) -> str:
    """A card of `of_folder` or `of_lora` with the name on the hub, and the figures of the generator.

    Args:
        metrics: those that a run has measured, as in metrics.json.
    """
    text = card.replace("(FOLDER", f'("{name}"')
    found = {
        what: value["generator"]
        for what, value in (metrics or {}).items()
        if isinstance(value, dict) and isinstance(value.get("generator"), (int, float))
    }
    if not found:
        return text
    table = "\n".join(f"| {what} | {value:.4g} |" for what, value in found.items())
    return f"{text}\nFigures of its run:\n\n| | |\n|---|---:|\n{table}\n"


def of_no_pipeline(teacher: Any, teacher_hash: str, steps: int) -> str:
    """The card of a folder that `emd_fast.export.load` alone reads."""
    given = ', generator.encode(["a cat"])' if isinstance(teacher, DiffusersDenoiser) and teacher.takes.tensors else ""
    return f"""---
library_name: emd_fast
tags: [em-distillation]
---

Generator, distilled by EM Distillation (arXiv 2405.16852) with emd_fast, which samples it: no stock
pipeline does.

| | |
|---|---|
| teacher | {_teacher(teacher_hash)} |
| steps of training | {steps} |

    from emd_fast.export import load
    from huggingface_hub import snapshot_download

    generator = load(snapshot_download(FOLDER))
    images = generator.decode(generator.sample(1{given}))
"""
