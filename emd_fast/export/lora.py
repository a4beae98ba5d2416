"""Writes the adapter of a generator as a LoRA file that diffusers' `load_lora_weights` reads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from emd_fast.diffusion.few_step import FewStepGenerator
from emd_fast.diffusion.generator import Generator
from emd_fast.export import card, facts
from emd_fast.teachers.diffusers import DiffusersDenoiser, stock
from emd_fast.train import adapters

FILE = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for in a folder


def write(out: Path, generator: nn.Module, teacher_hash: str, steps: int, base_dtype: str = "auto") -> Path:
    """Writes a folder with the LoRA file, the scheduler, and a model card (README.md).

    Args:
        out: a new or empty folder.
        generator: with an adapter in a network of diffusers.
        teacher_hash: fingerprint of the teacher.
        steps: of the training.
        base_dtype: of the base that the adapter was trained on.

    Raises:
        ValueError: a generator without an adapter of plain LoRA, or one that no stock pipeline samples.
    """
    from safetensors.torch import save_file

    of_denoiser = (Generator, FewStepGenerator)
    if not isinstance(generator, of_denoiser) or not isinstance(generator.denoiser, DiffusersDenoiser):
        raise ValueError("a LoRA file needs a teacher from a folder of diffusers; use format='safetensors'")
    if not adapters.has_adapter(generator):
        raise ValueError("this generator has no adapter: train it with adapter_rank, or use format='diffusers'")
    facts.check_new(out)
    denoiser = generator.denoiser
    component = denoiser.folder.component
    tensors, config = lora_of(denoiser.network.model)
    stock.pipeline_class(denoiser)  # raises where there is none
    scheduler = stock.scheduler(generator)
    told = {f"{component}.{key}": value for key, value in config.items()}
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        scheduler.save_pretrained(unfinished / "scheduler")
        save_file(
            {f"{component}.{name}": tensor for name, tensor in tensors.items()},
            unfinished / FILE,
            {"format": "pt", "lora_adapter_metadata": json.dumps(told, sort_keys=True)},
        )
        (unfinished / "README.md").write_text(card.of_lora(generator, teacher_hash, steps, config, base_dtype))
        if out.exists():
            out.rmdir()
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def lora_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a model's adapter under peft's names, and its LoraConfig: rank, alpha, layers.

    Raises:
        ValueError: several adapters, or one that is not plain LoRA of one rank and alpha.
    """
    tensors: dict[str, Tensor] = {}
    found: set[tuple[str, int, float]] = set()
    layers = []
    for path, module in model.named_modules():
        layer: Any = module
        if not hasattr(layer, "base_layer"):
            continue
        for name in layer.active_adapters:
            if name not in getattr(layer, "lora_A", {}) or layer.lora_variant.get(name) is not None:
                raise ValueError(f"{path} has an adapter that is not plain LoRA: merge it with format='diffusers'")
            found.add((name, layer.r[name], layer.scaling[name] * layer.r[name]))
            tensors[f"{path}.lora_A.weight"] = layer.lora_A[name].weight.detach().cpu().contiguous()
            tensors[f"{path}.lora_B.weight"] = layer.lora_B[name].weight.detach().cpu().contiguous()
        layers.append(path)
    if len(found) != 1:
        raise ValueError("a LoRA file holds one adapter of one rank and alpha: merge these with format='diffusers'")
    ((_, rank, alpha),) = found
    return tensors, {"r": rank, "lora_alpha": alpha, "target_modules": sorted(layers)}
