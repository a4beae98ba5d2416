"""A model of diffusers from a folder of others: sizes are bounded by its files, and no weight is missing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emd_fast.io import models, reading


def load(kind: Any, folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model in a folder with config.json and weights.

    Weights are safetensors, or a `.bin` that torch.load reads with weights_only=True, which is what
    diffusers does.

    Args:
        kind: a model class of diffusers.
        folder: its folder.
        dtype: of its weights; that of the class when None.

    Raises:
        ValueError: files of another kind, sizes that the weights do not have, or weights that are missing.
    """
    try:
        models.check_folder(
            folder, lambda config: kind.from_config({key: config[key] for key in config if key != "_class_name"})
        )
        options: dict[str, Any] = {} if dtype is None else {"torch_dtype": dtype}
        model, found = kind.from_pretrained(folder, output_loading_info=True, **quietly(), **options)
        models.check_loaded(found)
    except Exception as error:  # diffusers raises exceptions of many kinds
        # What diffusers goes on to say is advice on arguments that nobody has here.
        said = reading.reason(error).partition(" If you want to")[0].replace("Cannot load  because ", "")
        raise ValueError(f"cannot read the weights in {folder}: {said}") from error
    loaded: nn.Module = model
    return loaded


def quietly() -> dict[str, bool]:
    """diffusers reads without a second copy where accelerate is there, and says so at length where it is not."""
    return {"low_cpu_mem_usage": importlib.util.find_spec("accelerate") is not None}


def load_encoder(kind: Any, folder: Path) -> nn.Module:
    """The text encoder in a folder, a model class of transformers. Raises as `load` does."""
    try:
        models.check_folder(folder, lambda config: kind(kind.config_class.from_dict(config)))
        model, found = kind.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
        models.check_loaded(found)
    except Exception as error:  # transformers raises exceptions of many kinds
        raise ValueError(f"cannot read the weights in {folder}: {reading.reason(error)}") from error
    loaded: nn.Module = model.eval()
    return loaded
