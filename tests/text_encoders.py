"""Tiny text encoders and tokenizers of the kinds that pipelines of diffusers have, made offline."""

import json
import string
import tempfile
from pathlib import Path

import torch
import transformers

LETTERS = string.ascii_letters
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
CHAT = "{% for message in messages %}{{ message['content'] }} x{% endfor %}"


def seeded(kind, config):
    torch.manual_seed(4)
    return kind(config).eval()


def clip(width, projection=0):
    """A CLIP encoder whose pooled embedding has `width`, or `projection` where that is given, and its tokenizer."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokens = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    sizes = {"hidden_size": width, "projection_dim": projection or width, "max_position_embeddings": 77, **SIZES}
    config = transformers.CLIPTextConfig(vocab_size=len(words), **sizes, **tokens)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    vocabulary = {word: i for i, word in enumerate(words)}
    return seeded(kind, config), from_files(transformers.CLIPTokenizer, vocabulary, model_max_length=77)


def from_files(kind, vocabulary, **options):
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps(vocabulary))
        merges.write_text("#version: 0.2\n")
        return kind(str(vocab), str(merges), **options)


def t5(width, kind="T5EncoderModel"):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(start + letter, -1.0 - (not start)) for letter in LETTERS for start in ("▁", "")]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    model = getattr(transformers, kind)
    return seeded(model, model.config_class(vocab_size=len(pieces), **sizes)), tokenizer


def gemma(width):
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    tokenizer = transformers.GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    sizes = {"hidden_size": width, "head_dim": 8, "num_key_value_heads": 1, **SIZES}
    return seeded(transformers.Gemma2Model, transformers.Gemma2Config(vocab_size=len(words), **sizes)), tokenizer


def llama(width):
    words = ["<unk>", "<s>", "</s>", "▁", *LETTERS]
    tokenizer = transformers.LlamaTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], pad_token="</s>", padding_side="right"
    )
    sizes = {"hidden_size": width, "num_key_value_heads": 1, **SIZES}
    return seeded(transformers.LlamaModel, transformers.LlamaConfig(vocab_size=len(words), **sizes)), tokenizer


def qwen_tokenizer():
    words = [*LETTERS, *(f"Ġ{letter}" for letter in LETTERS), "Ġ", "Ċ", *",.:", "<|endoftext|>"]
    return from_files(transformers.Qwen2Tokenizer, {word: i for i, word in enumerate(words)}), len(words) + 8


def qwen3(width, kind="Qwen3Model", layers=3):
    tokenizer, words = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    sizes = {"hidden_size": width, "head_dim": 8, "num_key_value_heads": 1, **SIZES, "num_hidden_layers": layers}
    return seeded(getattr(transformers, kind), transformers.Qwen3Config(vocab_size=words, **sizes)), tokenizer


def qwen_vl(width):
    tokenizer, words = qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {"hidden_size": width, "num_key_value_heads": 2, "vocab_size": words, "rope_parameters": rope, **SIZES}
    text["num_attention_heads"] = width // 8
    text["num_key_value_heads"] = 1
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": width}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return seeded(transformers.Qwen2_5_VLForConditionalGeneration, config), tokenizer


def parts(*pairs):
    """Components of a pipeline for pairs of an encoder and its tokenizer."""
    found = {}
    for i, (encoder, tokenizer) in enumerate(pairs):
        end = f"_{i + 1}" if i else ""
        found |= {f"text_encoder{end}": encoder, f"tokenizer{end}": tokenizer}
    return found


class PixtralProcessor(transformers.ProcessorMixin):
    """A processor of texts alone. That of transformers needs torchvision, for images."""

    def __init__(self, tokenizer=None, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)


def mistral(width):
    tokenizer, words = qwen_tokenizer()
    sizes = {"hidden_size": width, "head_dim": 8, "num_key_value_heads": 1, **SIZES, "num_hidden_layers": 30}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(vocab_size=words, **sizes),
        vision_config=transformers.PixtralVisionConfig(image_size=16, patch_size=16, **vision),
        image_token_index=0,
    )
    parts = (
        "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }} x{% endfor %}{% endfor %}"
    )
    processor = PixtralProcessor(tokenizer, chat_template=parts)
    return seeded(transformers.Mistral3ForConditionalGeneration, config), processor
