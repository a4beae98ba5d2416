"""Fingerprints of the classes of EDM and EDM2, whose source NVlabs publishes.

Projects copy these classes, keep the names and change the code. No version and no module path
tells a copy from the original, so the source does. A fingerprint covers the forward of a class and
the functions of its module that the forward calls, without comments and formatting.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
from typing import Any

from emd_fast.fusion.fused_class import OVERRIDDEN, is_a, named

# Of training/networks.py in NVlabs/edm and of training/networks_edm2.py in NVlabs/edm2.
PUBLISHED: dict[str, set[str]] = {
    "Linear": {"687417a91220424d"},
    "Conv2d": {"270b24029ee1b177"},
    "GroupNorm": {"ee2750dc9b474d5f"},
    "UNetBlock": {"4a374f6b9d792463"},
    "SongUNet": {"7869cc9ecf64b8aa"},
    "DhariwalUNet": {"61fe24cc7a73f4b2"},
    "VPPrecond": {"1c6eb6ada068811d"},
    "VEPrecond": {"c23226b88323e566"},
    "iDDPMPrecond": {"0efb3fa0bcce66c5"},
    "EDMPrecond": {"ff9e807e32dfef7f"},
    "MPConv": {"4b5bd21163dd4f21"},
    "Block": {"1ad9c714a97d7e3f"},
    "UNet": {"27331ef9dc61fa9d"},
    "Precond": {"99e82ea7fc32274e"},
}


def unpublished(module: Any, name: str) -> str | None:
    """Why a module of a class of this name is left, None where its class is the published one."""
    if not is_a(module, name):
        return OVERRIDDEN
    found = fingerprint(type(module))
    if found is None or found not in PUBLISHED[name]:
        return f"its source is not that of the {name} that NVlabs publishes"
    return None


def is_published(module: Any, name: str) -> bool:
    return named(module, name) is not None and unpublished(module, name) is None


def fingerprint(cls: Any) -> str | None:
    """The fingerprint of a class, None if its source cannot be read or its forward was replaced."""
    return _fingerprint(cls, cls.forward)


@functools.cache
def _fingerprint(cls: Any, forward: Any) -> str | None:
    defining = next((base for base in cls.__mro__ if "forward" in vars(base)), None)
    if defining is None:
        return None
    # A class that was unpickled by torch_utils.persistence has no file, and carries its source.
    source = getattr(cls, "_orig_module_src", None) or _source_of(defining.__module__)
    nodes = {} if source is None else _definitions(source)
    node = _forward_in(nodes.get(defining.__name__))
    code = getattr(forward, "__code__", None)
    if node is None or code is None or code.co_name != "forward" or code.co_firstlineno != node.lineno:
        return None
    parts: dict[str, str] = {}
    _collect("forward", node, nodes, parts)
    return hashlib.sha256("\n".join(parts[name] for name in sorted(parts)).encode()).hexdigest()[:16]


@functools.cache
def _source_of(module: str) -> str | None:
    try:
        return inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return None


@functools.cache
def _definitions(source: str) -> dict[str, ast.stmt]:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.name: node for node in ast.parse(source).body if isinstance(node, kinds)}


def _forward_in(node: ast.stmt | None) -> ast.FunctionDef | None:
    body = node.body if isinstance(node, ast.ClassDef) else []
    return next((part for part in body if isinstance(part, ast.FunctionDef) and part.name == "forward"), None)


def _collect(name: str, node: ast.stmt, nodes: dict[str, ast.stmt], parts: dict[str, str]) -> None:
    parts[name] = ast.unparse(node)
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id in nodes and part.id not in parts:
            _collect(part.id, nodes[part.id], nodes, parts)
