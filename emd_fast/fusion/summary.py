"""What was fused of a network, what was left and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

SUPPORTED = (
    "diffusers' UNet2DModel, UNet2DConditionModel and their blocks; the UNets of EDM and EDM2, NVlabs' and those of "
    "emd_fast.teachers; emd_fast's SmallUNet; diffusers' Sana and PixArt; of other networks GroupNorm, SiLU behind it "
    "in an nn.Sequential, and diffusers' Attention"
)


@dataclass(frozen=True)
class Part:
    """One module of a report.

    Attributes:
        path: from the network, "" for the network itself.
        name: of its class.
        note: what was done, or why nothing was.
    """

    path: str
    name: str
    note: str


@dataclass(frozen=True)
class FusionReport:
    """What fuse() did to a network: fused modules, modules left, and layers.

    str(report) is the text for people: one line for each class and note, with the number of
    modules.

    Attributes:
        layers: convolutions, linear layers and layer norms, which compute what they did.
    """

    network: str
    fused: tuple[Part, ...]
    left: tuple[Part, ...]
    layers: tuple[Part, ...] = ()

    @property
    def summary(self) -> str:
        """One line."""
        counts = Counter(part.name for part in self.fused)
        what = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
        left = f"; left {len(self.left)} modules" if self.left else ""
        return f"{self.network}: fused {what}{left}"

    def __str__(self) -> str:
        lines = [self.network]
        for title, parts in (("fused", self.fused), ("layers", self.layers), ("left", self.left)):
            lines.append(f"  {title}:" + ("" if parts else " nothing"))
            grouped: dict[tuple[str, str], list[str]] = {}
            for part in parts:
                grouped.setdefault((part.name, part.note), []).append(part.path or "the network itself")
            for (name, note), paths in grouped.items():
                where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
                lines.append(f"    {len(paths):4d} {name} ({where}): {note}")
        return "\n".join(lines)
