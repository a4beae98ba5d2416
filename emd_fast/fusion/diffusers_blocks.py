"""Residual blocks, attention and transformers of diffusers, which is never imported here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.cache.conditioning import remember
from emd_fast.fusion.compiled_blocks import run
from emd_fast.fusion.fused_class import OVERRIDDEN, Fused, check_head_dim, has, is_a, kind_of, named, unknown_attributes
from emd_fast.fusion.norm import Norm
from emd_fast.ops.biases import convolved, convolved_and_added, remember_added, without_bias
from emd_fast.ops.layers import SERVED, attention
from emd_fast.ops.layers import residual as residual_sum

DIFFUSERS = "diffusers."
# The attributes of these classes in diffusers 0.42. An option of a later version has a name that
# is not among them.
_RESNET = frozenset(
    "conv1 conv2 conv_shortcut down downsample dropout in_channels nonlinearity norm1 norm2 "
    "out_channels output_scale_factor pre_norm skip_time_act time_emb_proj time_embedding_norm up "
    "upsample use_conv_shortcut use_in_shortcut".split()
)
_ATTENTION = frozenset(
    "add_k_proj add_q_proj add_v_proj added_kv_proj_dim added_proj_bias context_pre_only "
    "cross_attention_dim dropout fused_projections group_norm heads inner_dim inner_kv_dim is_causal "
    "is_cross_attention norm_added_k norm_added_q norm_cross norm_k norm_q only_cross_attention "
    "out_context_dim out_dim pre_only processor query_dim rescale_output_factor residual_connection scale "
    "scale_qk sliceable_head_dim spatial_norm to_add_out to_k to_out to_q to_v upcast_attention "
    "upcast_softmax use_bias".split()
)
_OUTPUT = "_get_output_for_continuous_inputs"


class ResnetBlock(Fused):
    """A ResnetBlock2D whose norms also apply the embedding and both SiLUs."""

    does = "norms, embedding and SiLUs by two kernels"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return named(module, "ResnetBlock2D", DIFFUSERS) is not None

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if not is_a(module, "ResnetBlock2D", DIFFUSERS):
            return OVERRIDDEN
        if why := unknown_attributes(module, _RESNET):
            return why
        if not is_a(module.nonlinearity, "SiLU", "torch.nn."):
            return f"its activation is {type(module.nonlinearity).__name__}, not SiLU"
        if module.time_emb_proj is not None and module.time_embedding_norm not in ("default", "scale_shift"):
            return f"time_embedding_norm is {module.time_embedding_norm!r}"
        for name in ("norm1", "norm2"):
            norm = getattr(module, name)
            if not Norm.recognises(norm):
                return f"{name} is {type(norm).__name__}"
            if why := Norm.why_not(norm):
                return f"{name}: {why}"
        return None

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        projection: nn.Module | None = self.time_emb_proj
        if (projection is None) != (temb is None) or kind_of(self.norm1) is not Norm or kind_of(self.norm2) is not Norm:
            return super().forward(input_tensor, temb, *args, **kwargs)
        embedded = None
        if projection is not None and self.time_embedding_norm == "scale_shift":
            embedded = remember(projection, self._embed, temb)
        elif projection is not None:
            embedded = remember_added(projection, self.conv1, self._embed, temb)
        return run(self, _residual_block, input_tensor, embedded)

    def _embed(self, temb: Tensor) -> Tensor:
        temb = temb if self.skip_time_act else self.nonlinearity(temb)
        return self.time_emb_proj(temb)


def _residual_block(block: Any, x: Tensor, embedded: Tensor | None) -> Tensor:
    h = block.norm1(x, activation="silu")
    resample = block.upsample if block.upsample is not None else block.downsample
    if resample is not None:
        x, h = resample(x), resample(h)
    if embedded is not None and block.time_embedding_norm == "default":
        h = block.norm2(without_bias(block.conv1, h), add=embedded, activation="silu")
    else:
        scale, shift = (None, None) if embedded is None else embedded.chunk(2, dim=1)
        h, add = convolved_and_added(block.conv1, h)
        h = block.norm2(h, add=add, scale=scale, shift=shift, activation="silu")
    h, bias = convolved(block.conv2, block.dropout(h))
    x, skip_bias = (x, None) if block.conv_shortcut is None else convolved(block.conv_shortcut, x)
    return residual_sum(x, h, skip_bias, bias, 1 / block.output_scale_factor)


class Processor:
    """An attention processor of ours, and the one that was there before."""

    def __init__(self, original: Any) -> None:
        self.original = original


class AttentionProcessor(Processor):
    """An attention processor of diffusers that calls ops.attention without transposing.

    The projections are called as the modules that they are, so LoRA in them is served. Keys and
    values of a condition are computed once inside conditioning_cache. What ops.attention does not
    have (a mask, another dtype) goes to the processor that was there before.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        key_value: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Returns the shape of `hidden_states`: (B, tokens, C) or (B, C, H, W).

        Args:
            key_value: what `keys_and_values` returned, None to compute it here.
        """
        if attention_mask is not None or hidden_states.dtype not in SERVED:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        tokens = x
        if x.ndim == 4:
            # The norm before the tokens are made: on channels_last images that costs no copy.
            tokens = (x if attn.group_norm is None else attn.group_norm(x)).flatten(2).transpose(1, 2)
        elif attn.group_norm is not None:
            tokens = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        query = attn.to_q(tokens)
        if encoder_hidden_states is None:
            key, value = attn.to_k(tokens), attn.to_v(tokens)
        else:
            key, value = key_value or keys_and_values(attn, encoder_hidden_states)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)) for part in (query, key, value))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        # A norm of q or k may compute in float32.
        mixed = attention(query, key.to(query.dtype), value.to(query.dtype), _scale(attn, self.original))
        out = attn.to_out[1](attn.to_out[0](mixed.flatten(2)))
        if hidden_states.ndim == 4:
            out = out.transpose(1, 2).reshape(hidden_states.shape)
        scale = 1 / attn.rescale_output_factor
        if attn.residual_connection:
            return residual_sum(out, hidden_states, scale=scale)
        return out if scale == 1 else out * scale


class JointAttentionProcessor(Processor):
    """The same for Stable Diffusion 3: tokens of image and text attend to all of them together."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, tokens, C), and (B, text tokens, C) where there is text."""
        if attention_mask is not None or hidden_states.dtype not in SERVED:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)

        def heads(tokens: Tensor, norm: Any = None) -> Tensor:
            tokens = tokens.unflatten(-1, (attn.heads, -1))
            return tokens if norm is None else norm(tokens)

        text, count = encoder_hidden_states, hidden_states.shape[1]
        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states))
        if text is not None:
            query = torch.cat([query, heads(attn.add_q_proj(text), attn.norm_added_q)], dim=1)
            key = torch.cat([key, heads(attn.add_k_proj(text), attn.norm_added_k)], dim=1)
            value = torch.cat([value, heads(attn.add_v_proj(text))], dim=1)
        mixed = attention(query, key.to(query.dtype), value.to(query.dtype)).flatten(2)
        image = attn.to_out[1](attn.to_out[0](mixed[:, :count]))
        if text is None:
            return image
        return image, mixed[:, count:] if attn.context_pre_only else attn.to_add_out(mixed[:, count:])


# By the name of the class that each takes the place of.
_PROCESSORS: dict[str, type[Processor]] = {
    "AttnProcessor": AttentionProcessor,
    "AttnProcessor2_0": AttentionProcessor,
    "JointAttnProcessor2_0": JointAttentionProcessor,
}


def keys_and_values(attn: Any, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Those of a condition, (B, keys, heads head_dim) each, by an Attention of diffusers."""
    if attn.norm_cross is not None:
        encoder_hidden_states = remember(attn.norm_cross, attn.norm_encoder_hidden_states, encoder_hidden_states)
    return (
        remember(attn.to_k, attn.to_k, encoder_hidden_states),
        remember(attn.to_v, attn.to_v, encoder_hidden_states),
    )


def _scale(attn: Any, original: Any) -> float | None:
    """AttnProcessor2_0 always takes 1 / sqrt(head_dim), whatever scale the module has."""
    return attn.scale if type(original).__name__ == "AttnProcessor" else None


class Attention(Fused):
    """An Attention of diffusers with a plain processor. It keeps its class and gets our processor."""

    does = "attention by ops.attention, as its processor"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return has(module, "processor", "set_processor", "to_q", "to_k", "heads")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if isinstance(module.processor, Processor):
            return None
        if not is_a(module, "Attention", DIFFUSERS):
            return "attention of a kind that is not known"
        if why := unknown_attributes(module, _ATTENTION):
            return why
        processor = type(module.processor)
        own = processor.__module__.startswith(DIFFUSERS) and processor.__call__.__module__ == processor.__module__
        if processor.__name__ not in _PROCESSORS or not own:
            return f"its processor is {processor.__name__}, which computes something of its own"
        if module.to_k is None or module.inner_kv_dim != module.inner_dim:
            return "it has fewer heads of keys than of queries"
        return None

    @classmethod
    def check(cls, module: Any) -> None:
        if cls.why_not(module) is None:
            check_head_dim(module.inner_dim // module.heads)

    @classmethod
    def fuse(cls, module: Any, **state: Any) -> None:
        module.set_processor(_PROCESSORS[type(module.processor).__name__](module.processor))

    @classmethod
    def unfuse(cls, module: Any) -> None:
        module.set_processor(module.processor.original)


class Transformer(Fused):
    """A Transformer2DModel on images. The result of channels_last images is channels_last."""

    does = "no copies to another layout behind the last block, on channels_last images"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return is_a(module, "Transformer2DModel", DIFFUSERS) and has(module, _OUTPUT, "proj_out")

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if residual.is_contiguous():
            return self._emd_fast_base._get_output_for_continuous_inputs(
                self, hidden_states, residual, batch_size, height, width, inner_dim
            )

        def image(tokens: Tensor) -> Tensor:
            return tokens.transpose(1, 2).unflatten(2, (height, width))

        project = self.proj_out
        if self.use_linear_projection:
            return image(project(hidden_states)) + residual
        projected, bias = convolved(project, image(hidden_states))
        return residual_sum(projected, residual, bias)


class TransformerBlock(Fused):
    """A compiled BasicTransformerBlock that is given the keys and values of the condition."""

    does = "repeated block, compiled"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return False  # only where fuse() compiles: see takes_keys_and_values

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        condition = kwargs.get("encoder_hidden_states")
        unmasked = kwargs.get("encoder_attention_mask") is None
        if condition is not None and unmasked and isinstance(self.attn2.processor, AttentionProcessor):
            given = kwargs.get("cross_attention_kwargs") or {}
            kwargs["cross_attention_kwargs"] = {**given, "key_value": keys_and_values(self.attn2, condition)}
        return run(self, self._emd_fast_base.forward, hidden_states, *args, **kwargs)


def takes_keys_and_values(block: nn.Module) -> bool:
    """Whether TransformerBlock can hand keys and values to the second attention of this block."""
    return (
        is_a(block, "BasicTransformerBlock", DIFFUSERS) and not block.only_cross_attention and block.attn2 is not None
    )
