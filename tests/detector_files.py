"""Tiny files in the forms that the evaluation reads: detectors, images, a CLIP model. Nothing is downloaded."""

import pickle
import zipfile

import numpy as np
import torch
from torch import Tensor, nn

FEATURES, CLASSES = 6, 5


class Detector(nn.Module):
    """Called as NVlabs' Inception: uint8 images; features, or probabilities of classes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("mixing", torch.randn(FEATURES, 3 * 4, generator=generator))
        self.register_buffer("classes", torch.randn(CLASSES, FEATURES, generator=generator))
        self.register_buffer("bias", torch.randn(CLASSES, generator=generator))

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        assert img.dtype == torch.uint8 and img.shape[1] == 3
        pooled = nn.functional.adaptive_avg_pool2d(img.float() / 128 - 1, [2, 2]).flatten(1)
        features = torch.relu(pooled @ self.mixing.t() + 0.5)
        if return_features:
            return features
        logits = features @ self.classes.t()
        if not no_output_bias:
            logits = logits + self.bias
        return logits.softmax(1)


def detector(path):
    torch.jit.script(Detector()).save(str(path))
    return path


def features_of(images):
    """What the detector says of images (n, 1 or 3, H, W) uint8, in float64 numpy."""
    network = Detector().double()
    x = nn.functional.adaptive_avg_pool2d(images.expand(-1, 3, -1, -1).double() / 128 - 1, [2, 2]).flatten(1)
    return torch.relu(x @ network.mixing.t() + 0.5).numpy()


def statistics(features):
    return features.mean(0), np.cov(features.T)


def npz(path, features):
    mu, sigma = statistics(features)
    np.savez(path, mu=mu, sigma=sigma)
    return path


def edm2_pkl(path, features, protocol=4):
    mu, sigma = statistics(features)
    with open(path, "wb") as file:
        entries = {"fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": {"mu": np.zeros(4), "sigma": np.eye(4)}}
        pickle.dump({"num_images": len(features), **entries}, file, protocol)
    return path


def pictures(n=12, channels=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def folder(path, images):
    from PIL import Image

    for i, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        (path / f"{i // 5:03d}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path / f"{i // 5:03d}" / f"{i:06d}.png")
    return path


def zipped(path, source):
    with zipfile.ZipFile(path, "w") as archive:
        for file in source.rglob("*.png"):
            archive.write(file, file.relative_to(source))
        archive.writestr("dataset.json", "{}")
    return path


def clip(path, seed=6):
    """A random CLIP model whose words are single letters. Needs transformers."""
    import diffusers_folders
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    words = diffusers_folders.tokenizer(path / "made")
    text = {"vocab_size": 54, "max_position_embeddings": 12, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(seed)
    config = CLIPConfig(
        text_config={**text, **sizes}, vision_config={"image_size": 16, "patch_size": 8, **sizes}, projection_dim=8
    )
    CLIPModel(config).save_pretrained(path)
    square = {"height": 16, "width": 16}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=square), words).save_pretrained(path)
    return path
