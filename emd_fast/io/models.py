"""Model folders of others: what a config.json may ask for, and how many parameters its weights can hold."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.io import reading, tensors

# Keys that make loaders look for other code or files, at any depth; "org/name" as an attention is code of the hub.
_CODE = ("auto_map", "quantization_config", "transformers_weights")
_IMPLEMENTATION, _PLAIN = "_implementation", (None, "eager", "sdpa")
_ADAPTER = "adapter_config.json"  # it names another folder or hub, from which transformers would load the weights
_LARGEST, _LONGEST, _DEEPEST = 2**20, 64, 256  # a size; a list of blocks; layers in a block
_DEPTHS = ("layer", "depth", "block", "num_heads", "padding")
_SHOWN = 3  # names in a message
_REMEDY = "give the weights that belong to its config.json"
_PREFIXES = {
    "module.": "DataParallel and DistributedDataParallel add it",
    "_orig_mod.": "torch.compile adds it",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel adds it",
    "ema_model.": "averages of the weights have it",
}


def check_folder(folder: Path, build: Callable[[dict[str, Any]], nn.Module]) -> None:
    """Whether a folder with config.json and weights can be loaded in bounded time and memory.

    Args:
        build: the network of a configuration. It is called under the meta device, without memory.

    Raises:
        ValueError: files of another kind, a configuration that is not supported, or one of more
            parameters than the files have bytes. OSError: a file cannot be read.
    """
    reading.check_regular(folder)
    if (folder / _ADAPTER).exists():
        raise ValueError(f"it has {_ADAPTER}: merge the adapter into the weights (merge_and_unload) and remove it")
    config = reading.read_json(folder / "config.json")
    check_config(config)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    with torch.device("meta"):
        needed = sum(parameter.numel() for parameter in build(config).parameters())
    if needed > size:
        raise ValueError(f"its configuration is of {needed:,} parameters, the files have {size:,} bytes")


def check_loaded(model: nn.Module, found: Mapping[str, Any]) -> None:
    """Checks what `from_pretrained(..., output_loading_info=True)` returned.

    Raises:
        ValueError: `check_fits` raises it, or a parameter is not finite.
    """
    check_fits(found)
    check_finite(model.named_parameters())


def check_finite(named: Iterable[tuple[str, Tensor]]) -> None:
    """Checks that tensors are finite.

    Raises:
        ValueError: some are not. The message has the first names and their number.
    """
    # PyTorch looks for NaN in no 8-bit numbers.
    wide = ((name, value if value.itemsize > 1 else value.float()) for name, value in named)
    if names := [name for name, value in wide if not bool(value.isfinite().all())]:
        raise ValueError(f"{told(names, 'not finite')}; {_REMEDY}")


def check_fits(found: Mapping[str, Any]) -> None:
    """Checks loading info that diffusers and transformers return.

    They load what fits, initialise the rest, and go on with a warning. They leave out what the class
    lists in `_keys_to_ignore_on_load_*`.

    Raises:
        ValueError: a tensor that is missing, unexpected or of another shape. The message has the
            first names, their number, and a known prefix of all names.
    """
    missing, unexpected = (_serious(found[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    shapes = sorted(f"{name} is {_shape(was)}, not {_shape(wanted)}" for name, was, wanted in found["mismatched_keys"])
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    parts = [told(names, kind) for kind, names in kinds.items() if names]
    if not parts:
        return
    prefix = next((p for p in _PREFIXES if unexpected and all(name.startswith(p) for name in unexpected)), None)
    helps = _REMEDY
    if prefix is not None:
        helps = f"all of these names begin with {prefix!r} ({_PREFIXES[prefix]}): save the weights without it"
    raise ValueError(f"{'; '.join(parts)}; {helps}")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Context manager: diffusers and transformers log errors only, and show no progress.

    Their warnings list every name that does not fit; `check_loaded` says it in one line.
    """
    logs: list[Any] = [sys.modules[name].utils.logging for name in ("diffusers", "transformers") if name in sys.modules]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    try:
        for log in logs:
            log.set_verbosity_error()
            log.disable_progress_bar()
        yield
    finally:
        for log, (level, shows) in zip(logs, before, strict=True):
            log.set_verbosity(level)
            if shows:
                log.enable_progress_bar()


def _serious(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not tensors.COMPUTED.search(name))


def told(names: list[str], kind: str) -> str:
    """How many tensors are missing or do not fit, with the first names."""
    some = ", ".join(name[:120] for name in names[:_SHOWN])
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names):,} tensor{'s are' if len(names) > 1 else ' is'} {kind} ({some}{more})"


def _shape(size: Iterable[int]) -> str:
    return f"({', '.join(map(str, size))})"


def check_config(config: object) -> None:
    """Whether a model can be built from a config.json in bounded time.

    Raises:
        ValueError: no table, a key that names other code, a size or a list that no network has.
    """
    if not isinstance(config, Mapping):
        raise ValueError("config.json must hold a table")
    for key, value in config.items():
        _check_value(str(key)[:100], value)


def _check_value(key: str, value: Any) -> None:
    if key in _CODE and value is not None:
        raise ValueError(f"its configuration has {key}, which is not supported")
    if key.endswith(_IMPLEMENTATION) and value not in _PLAIN:
        raise ValueError(f"its configuration has {key} = {reading.shown(value)}: 'eager' and 'sdpa' are supported")
    if isinstance(value, (list, tuple)):
        if len(value) > _LONGEST and not all(type(item) is float for item in value):
            raise ValueError(f"its configuration has {len(value):,} values for {key}, at most {_LONGEST} are supported")
        for item in value:
            _check_value(key, item)
    elif isinstance(value, Mapping):
        for inner, item in value.items():
            _check_value(str(inner)[:100], item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        most = _DEEPEST if any(word in key for word in _DEPTHS) and "channels" not in key else _LARGEST
        if not -most <= value <= most:
            raise ValueError(f"its configuration has {key} = {value:.4g}, at most {most:,} is supported")
