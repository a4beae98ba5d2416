"""Imports of packages that log warnings about what a user has not asked for."""

from __future__ import annotations

import importlib
import importlib.util
import logging


def import_with_torchao(*names: str) -> None:
    """Imports torchao and then these modules without what they log, if torchao is installed.

    peft and diffusers import it wherever it is installed. It then warns of kernels for GPUs that do
    not load here, and diffusers of tensors that it does not know.

    Args:
        names: modules that import torchao.
    """
    if importlib.util.find_spec("torchao") is None:
        return
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        for name in ("torchao", *names):
            importlib.import_module(name)
    except ImportError:
        pass  # whoever needs it says so
    finally:
        logging.disable(before)
