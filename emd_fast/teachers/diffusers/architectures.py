"""One interface for networks of diffusers: network(x, index, cond) -> output (B, C, H, W)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from emd_fast.config import ConfigError
from emd_fast.diffusion.denoiser import Condition
from emd_fast.io.reading import shown
from emd_fast.teachers.labels import check_labels


@dataclass(frozen=True)
class ConditionSpec:
    """Conditions that a network takes: none, labels, or text embeddings with or without a pooled one."""

    num_classes: int = 0
    embedding: int = 0  # width of a token
    pooled: int = 0  # width of a pooled projection

    def __str__(self) -> str:
        if self.num_classes:
            return f"labels: an int64 tensor (B,) below {self.num_classes}"
        tokens = f"text embeddings (B, tokens, {self.embedding})"
        if self.pooled:
            return f"a dict of prompt_embeds, {tokens}, and pooled_projections (B, {self.pooled})"
        return tokens if self.embedding else "no condition"


@dataclass(frozen=True)
class Architecture:
    """A supported class of diffusers.

    Args:
        component: name of the network's component in a pipeline.
        conditions: configuration -> conditions that the network takes.
        null_label: configuration -> label that means "no label", or None.
    """

    component: str
    conditions: Callable[[Mapping[str, Any]], ConditionSpec]
    null_label: Callable[[Mapping[str, Any]], int | None] = lambda config: None


def _unet(config: Mapping[str, Any]) -> ConditionSpec:
    if config.get("time_embedding_type", "positional") != "positional":
        raise ConfigError(
            f"a UNet2DModel with time_embedding_type = {shown(config['time_embedding_type'])} is not supported: "
            "'positional' is"
        )
    return ConditionSpec(num_classes=_classes(config))


def _text_unet(config: Mapping[str, Any]) -> ConditionSpec:
    for key in ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds"):
        if config.get(key) is not None:
            raise ConfigError(
                f"a UNet2DConditionModel with {key} = {shown(config[key])} is not supported: one that takes text "
                "embeddings alone is"
            )
    return ConditionSpec(embedding=config["cross_attention_dim"])


def _classes(config: Mapping[str, Any]) -> int:
    if config.get("class_embed_type") is not None:
        raise ConfigError(
            f"class_embed_type = {shown(config['class_embed_type'])} is not supported: num_class_embeds alone is"
        )
    return config.get("num_class_embeds") or 0


ARCHITECTURES = {
    "UNet2DModel": Architecture("unet", _unet),
    "UNet2DConditionModel": Architecture("unet", _text_unet),
    # The label after the last class was trained as "no label".
    "DiTTransformer2DModel": Architecture(
        "transformer",
        lambda config: ConditionSpec(num_classes=config["num_embeds_ada_norm"] + 1),
        lambda config: config["num_embeds_ada_norm"],
    ),
    "SD3Transformer2DModel": Architecture(
        "transformer",
        lambda config: ConditionSpec(embedding=config["joint_attention_dim"], pooled=config["pooled_projection_dim"]),
    ),
}


class Network(nn.Module):
    """Adapter with the interface that Denoiser expects of a network.

    `forward` takes x (B, C, H, W), the training index (B,) floating, and a condition. It returns
    (B, C, H, W), or (B, 2 C, H, W) with a learned variance.

    Args:
        model: a model of a class in ARCHITECTURES.

    Raises:
        ValueError, TypeError: the model does not take this condition.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self.takes = ARCHITECTURES[type(model).__name__].conditions(config)

    def forward(self, x: Tensor, index: Tensor, cond: Condition = None) -> Tensor:
        return self.model(x, timestep=index, **self._arguments(x, cond)).sample

    def _arguments(self, x: Tensor, cond: Condition) -> dict[str, Tensor]:
        takes = self.takes
        if takes.num_classes and isinstance(cond, Tensor):
            check_labels(cond, len(x), takes.num_classes)
            return {"class_labels": cond}
        if takes.pooled and isinstance(cond, Mapping) and set(cond) == {"prompt_embeds", "pooled_projections"}:
            tokens, pooled = cond["prompt_embeds"], cond["pooled_projections"]
            floating = tokens.is_floating_point() and pooled.is_floating_point() and tokens.dim() == 3
            if floating and tokens.shape[::2] == (len(x), takes.embedding) and pooled.shape == (len(x), takes.pooled):
                return {"encoder_hidden_states": tokens.to(x.dtype), "pooled_projections": pooled.to(x.dtype)}
        elif takes.embedding and not takes.pooled and isinstance(cond, Tensor):
            if cond.is_floating_point() and cond.dim() == 3 and cond.shape[::2] == (len(x), takes.embedding):
                return {"encoder_hidden_states": cond.to(x.dtype)}
        elif takes == ConditionSpec() and cond is None:
            return {}
        raise ValueError(f"this {type(self.model).__name__} takes {takes}; for a batch of {len(x)} got {_told(cond)}")


def _told(cond: Condition) -> str:
    if isinstance(cond, Tensor):
        return f"a {cond.dtype} tensor {tuple(cond.shape)}".replace("torch.", "")
    if isinstance(cond, Mapping):
        return ", ".join(f"{key}: {_told(value)}" for key, value in cond.items())
    return "none" if cond is None else type(cond).__name__
