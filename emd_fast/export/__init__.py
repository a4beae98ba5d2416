"""Generators handed on: `export` writes one, `load` reads it."""

from emd_fast.export.pipeline import EXPORTED, NotForStock, export, load

__all__ = ["EXPORTED", "NotForStock", "export", "load"]
