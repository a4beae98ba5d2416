"""Names and shapes of loaded weights: nothing is missing, left over or of another shape."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from emd_fast.config import ConfigError

_SHOWN = 3
# Buffers that older versions of transformers saved and newer ones compute.
_BENIGN = re.compile(r"(^|\.)position_ids$")
_PREFIXES = {
    "module.": "DataParallel and DistributedDataParallel add it",
    "_orig_mod.": "torch.compile adds it",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel adds it",
    "ema_model.": "averages of the weights have it",
}


def check_names(folder: Path, found: Mapping[str, Any]) -> None:
    """Checks the loading info of `from_pretrained(..., output_loading_info=True)`.

    diffusers and transformers load what fits, initialise the rest, and go on with a warning. They
    leave out what the class lists in `_keys_to_ignore_on_load_*`.

    Raises:
        ConfigError: a tensor that is missing, unexpected or of another shape. The message has the
            first names, their number, and a known prefix of all names.
    """
    missing, unexpected = (_serious(found[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    shapes = sorted(f"{name} is {_shape(was)}, not {_shape(wanted)}" for name, was, wanted in found["mismatched_keys"])
    parts = [
        _told(names, kind)
        for names, kind in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        if names
    ]
    if not parts:
        return
    prefix = next((p for p in _PREFIXES if unexpected and all(name.startswith(p) for name in unexpected)), None)
    helps = "give the weights that belong to its config.json"
    if prefix is not None:
        helps = f"all of these names begin with {prefix!r} ({_PREFIXES[prefix]}): save the weights without it"
    raise ConfigError(f"the weights in {folder} do not fit its config.json: {'; '.join(parts)}; {helps}")


def _serious(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not _BENIGN.search(name))


def _told(names: list[str], kind: str) -> str:
    some = ", ".join(name[:120] for name in names[:_SHOWN])
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names):,} tensor{'s are' if len(names) > 1 else ' is'} {kind} ({some}{more})"


def _shape(size: Iterable[int]) -> str:
    return f"({', '.join(map(str, size))})"


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Context manager: diffusers and transformers log errors only.

    Their warnings list every name that does not fit; `check_names` says it in one line.
    """
    import diffusers

    logs: list[Any] = [diffusers.utils.logging]
    with contextlib.suppress(ModuleNotFoundError):
        import transformers

        logs.append(transformers.utils.logging)
    before = [log.get_verbosity() for log in logs]
    try:
        for log in logs:
            log.set_verbosity_error()
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.set_verbosity(level)
