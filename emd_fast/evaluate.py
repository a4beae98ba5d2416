"""How good samples are: Fréchet distance, k-nearest-neighbour precision and recall, class accuracy, mass by mode.

Every comparison is between two sets of the same size, since all of these numbers depend on it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from emd_fast import ops
from emd_fast.noise import Noise, Stream
from emd_fast.teachers import digits
from emd_fast.teachers.small_unet import initialise

_CHUNK = 1024  # rows of a distance matrix at a time
# Substeps of stream 9 for what this file draws; the samples that it judges are drawn from that stream at low ones.
_PICK_TEST, _PICK_TRAIN, _EXACT_MODE, _EXACT_NOISE = range(60_000, 60_004)


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the normal distributions fitted to two sets: |mean difference|^2 + tr(A + B - 2 (A B)^1/2).

    Args:
        a, b: (n, D) features, any floating dtype; the arithmetic is float64. n at least 2.

    Returns:
        The squared distance, in squared units of the features; 0 for equal sets.

    Raises:
        ValueError: sets of unequal size or width, too few samples, or features that are not finite.

    Source: Heusel et al. (arXiv 1706.08500). The covariances A and B are R^T R of triangular factors of the centred
    features, and the trace of (A B)^1/2 is the sum of the singular values of R_a R_b^T: the same as by the eigenvalues
    of the symmetric A^1/2 B A^1/2, without the square roots of rounding errors that those bring where A is singular.
    """
    a, b = _pair(a, b)
    means = a.mean(0), b.mean(0)
    scale = 1 / math.sqrt(len(a) - 1)
    r_a, r_b = (torch.linalg.qr((x - mean) * scale, mode="r").R for x, mean in zip((a, b), means, strict=True))
    overlap = torch.linalg.svdvals(r_a @ r_b.T).sum()
    distance = (means[0] - means[1]).square().sum() + r_a.square().sum() + r_b.square().sum() - 2 * overlap
    return max(distance.item(), 0.0)  # 0 is where rounding may fall to either side


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision: the share of generated samples in the manifold of the real ones. Recall: the other way round.

    The manifold of a set is the union of balls around its samples, each as far as the k-th nearest other sample.

    Args:
        real, generated: (n, D) features, any floating dtype; distances are in float64.
        k: at least 1, below n.

    Returns:
        (precision, recall), each in [0, 1].

    Raises:
        ValueError: sets of unequal size or width, k out of range, or features that are not finite.

    Source: Kynkäänniemi et al. (arXiv 1904.06991).
    """
    real, generated = _pair(real, generated)
    if not 1 <= k < len(real):
        raise ValueError(f"k must be at least 1 and below the {len(real)} samples, got {k}")
    return _share_within(generated, real, k), _share_within(real, generated, k)


def _share_within(samples: Tensor, manifold: Tensor, k: int) -> float:
    # The smallest of the k + 1 distances of a sample to its own set is 0, to itself.
    radii = torch.cat([_distances(rows, manifold).kthvalue(k + 1, dim=1).values for rows in manifold.split(_CHUNK)])
    within = [(_distances(rows, manifold) <= radii).any(1) for rows in samples.split(_CHUNK)]
    return torch.cat(within).double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # By differences: a^2 + b^2 - 2ab cancels for near samples, which are the ones that decide.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(f"two sets of features need one shape (n, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    if len(a) < 2:
        raise ValueError(f"a set of features needs at least 2 samples, got {len(a)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features must be finite: a set holds NaN or infinite values")
    return a.detach().double(), b.detach().double()


class DigitFeatures:
    """A small classifier of the real digits; its last hidden layer is the space in which samples are compared.

    Trained on the train split when built, in a few seconds, all randomness from the noise contract. It is right on more
    than 98% of the held-out digits.

    Args:
        seed: of its weights and of its training. The shipped figures are for seed 0.
        steps: of training, at batch 128.
        device: where it is trained and used.
    """

    def __init__(self, seed: int = 0, steps: int = 400, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._network = _Classifier()
        initialise(self._network, seed)
        self._network.to(device)
        with _one_thread():
            self._train(seed, steps)

    def _train(self, seed: int, steps: int) -> None:
        images, labels = (data.to(self.device) for data in digits.load("train"))
        optimizer = torch.optim.AdamW(self._network.parameters(), lr=_LEARNING_RATE, weight_decay=0.05)
        noise = Noise(seed, device=self.device)
        for step in range(steps):
            noise.set(step=step)
            chosen = ops.integers(len(images), (_BATCH,), noise, stream=Stream.TEACHER_ORDER)
            level = torch.full((_BATCH,), _AUGMENTATION, device=self.device)
            # A little noise on the images keeps the features from being sharper on the train split than on new digits.
            noisy = ops.perturb(images[chosen], torch.ones_like(level), level, noise=noise, stream=Stream.TEACHER_NOISE)
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * digits.learning_rate_factor(step, steps, warmup=20)
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(self._network(noisy), labels[chosen]).backward()
            optimizer.step()
        self._network.eval().requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """(N, 64) float32 of images (N, 1, 8, 8) in [-1, 1]. Raises ValueError for another shape."""
        return torch.cat([self._network.features(batch) for batch in self._batches(images)])

    def predict(self, images: Tensor) -> Tensor:
        """Labels (N,) int64 of images (N, 1, 8, 8) in [-1, 1]. Raises ValueError for another shape."""
        return torch.cat([self._network(batch).argmax(1) for batch in self._batches(images)])

    def _batches(self, images: Tensor) -> list[Tensor]:
        if images.shape[1:] != digits.SHAPE:
            raise ValueError(
                f"images must have shape (N, {', '.join(map(str, digits.SHAPE))}), got {tuple(images.shape)}"
            )
        return list(images.detach().to(self.device, torch.float32).split(_CHUNK))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """At this size a second thread gains nothing, where the cores are shared it costs tenfold, and sums in another
    order would be other features on other machines."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_BATCH = 128
_LEARNING_RATE = 3e-3
_AUGMENTATION = 0.3  # standard deviation of the noise, images in [-1, 1]


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * 16, 64)
        self.last = nn.Linear(64, digits.CLASSES)

    def features(self, images: Tensor) -> Tensor:
        return silu(self.hidden(silu(self.conv2(silu(self.conv1(images)))).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.features(images))


def digits_metrics(
    samples: Mapping[str, tuple[Tensor, Tensor | None]], features: DigitFeatures | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compares sets of digits with the held-out test split, at equal numbers.

    Args:
        samples: name -> images (N, 1, 8, 8) in [-1, 1] and the labels (N,) int64 they were made for, or None where
            they were made for none (accuracy is then left out); one N for all, 4 to 599. "real" is added: as many
            images of the train split, drawn by `seed`.
        features: the classifier; one of seed 0 is trained when None.
        seed: draws the train images and, where N is below 599, the test images.

    Returns:
        "frechet", "recall", "precision" (k = 3) and "accuracy" (the classifier's label is the one asked for), each a
        dict from "real" and the names of `samples` to a number; "n"; "seed".

    Raises:
        ValueError: sets of unequal size, N out of range, a set called "real", images of another shape or not finite.

    The labels of a set are best those of the test split (`digits.load("test")`), so that a difference in the
    frequencies of classes does not count as one in quality.
    """
    if "real" in samples:
        raise ValueError('the set "real" is taken from the data: give the generated sets another name')
    features = DigitFeatures() if features is None else features
    test, train = digits.load("test"), digits.load("train")
    n = next((len(images) for images, _ in samples.values()), len(test[0]))
    for name, (images, labels) in samples.items():
        if len(images) != n or (labels is not None and labels.shape != (n,)):
            raise ValueError(
                f"every set needs {n} images, as the first has, and as many labels: {name!r} has {len(images)} images "
                f"and labels {None if labels is None else tuple(labels.shape)}"
            )
        if not images.isfinite().all():
            raise ValueError(f"images must be finite: {name!r} holds NaN or infinite values")
    if not 4 <= n <= len(test[0]):
        raise ValueError(f"a set needs 4 to {len(test[0])} images, the size of the test split, got {n}")

    reference = features.features(_subset(test, n, seed, _PICK_TEST)[0])
    metrics: dict[str, Any] = {"frechet": {}, "recall": {}, "precision": {}, "accuracy": {}, "n": n, "seed": seed}
    compared: dict[str, tuple[Tensor, Tensor | None]] = {"real": _subset(train, n, seed, _PICK_TRAIN), **samples}
    for name, (images, labels) in compared.items():
        found = features.features(images)
        metrics["frechet"][name] = frechet(reference, found)
        metrics["precision"][name], metrics["recall"][name] = precision_recall(reference, found)
        if labels is not None:
            right = features.predict(images) == labels.to(features.device)
            metrics["accuracy"][name] = right.double().mean().item()
    return metrics


def _subset(data: tuple[Tensor, Tensor], n: int, seed: int, substep: int) -> tuple[Tensor, Tensor]:
    drawn = ops.uniform((len(data[0]),), Noise(seed), stream=Stream.SHOWN, substep=substep)
    chosen = drawn.argsort(stable=True)[:n]
    return data[0][chosen], data[1][chosen]


def mixture_metrics(
    samples: Tensor,
    weights: Sequence[float] | Tensor,
    means: Sequence[Sequence[float]] | Tensor,
    std: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares samples with a mixture of round normal distributions.

    Args:
        samples: (n, D) float32, n at least 4.
        weights: (M,), positive; their sum is taken as 1.
        means: (M, D).
        std: of every mode, in every direction; above 0.
        seed: of the exact samples that the last three numbers compare with.

    Returns:
        "mass": list of M, the share of samples nearest to each mean;
        "due": list of M, the weights;
        "modes": how many modes are found: one is when at least a quarter of its weight lies nearest to its mean and
            within 3 std sqrt(D / 2) of it (3 std in two dimensions, where 98.9% of a mode lies);
        "total_variation": half the sum of |mass - due|;
        "frechet", "precision", "recall": against n exact samples, on the coordinates (k = 3);
        "n", "seed".

    Raises:
        ValueError: shapes that do not fit, a weight or std that is not positive, or samples that are not finite.
    """
    weights = torch.as_tensor(weights, dtype=torch.float64)
    means = torch.as_tensor(means, dtype=torch.float64)
    if weights.dim() != 1 or means.dim() != 2 or len(means) != len(weights):
        raise ValueError(f"weights (M,) and means (M, D) must fit, got {tuple(weights.shape)} and {tuple(means.shape)}")
    if samples.dim() != 2 or samples.shape[1] != means.shape[1] or len(samples) < 4:
        raise ValueError(f"samples must have shape (n, {means.shape[1]}) with n at least 4, got {tuple(samples.shape)}")
    if not bool((weights > 0).all()) or not std > 0:
        raise ValueError(f"weights and std must be positive, got {weights.tolist()} and {std}")
    if not samples.isfinite().all():
        raise ValueError("samples must be finite: they hold NaN or infinite values")
    samples = samples.detach().cpu().double()
    weights = weights / weights.sum()

    distance, nearest = _distances(samples, means).min(1)
    mass = torch.bincount(nearest, minlength=len(means)).double() / len(samples)
    close = distance <= 3 * std * math.sqrt(means.shape[1] / 2)
    close_mass = torch.bincount(nearest[close], minlength=len(means)).double() / len(samples)
    exact = _exact(weights, means, std, len(samples), seed)
    precision, recall = precision_recall(exact, samples)
    return {
        "mass": mass.tolist(),
        "due": weights.tolist(),
        "modes": int((close_mass >= weights / 4 - 1e-9).sum()),
        "total_variation": (mass - weights).abs().sum().item() / 2,
        "frechet": frechet(exact, samples),
        "precision": precision,
        "recall": recall,
        "n": len(samples),
        "seed": seed,
    }


def mixture_comparison(
    samples: Mapping[str, Tensor],
    weights: Sequence[float] | Tensor,
    means: Sequence[Sequence[float]] | Tensor,
    std: float,
    seed: int = 0,
) -> dict[str, Any]:
    """`mixture_metrics` of several sets, one n for all, turned round: metric -> name -> value, then "n" and "seed".

    "real" is added: exact samples, other ones than those that every set is compared with.

    Raises:
        ValueError: as `mixture_metrics`; no set, sets of unequal size, or a set called "real".
    """
    if "real" in samples:
        raise ValueError('the set "real" is drawn from the mixture: give the generated sets another name')
    sizes = {name: len(values) for name, values in samples.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"one or more sets of one size are needed, got {sizes}")
    n = next(iter(sizes.values()))
    exact_weights = torch.as_tensor(weights, dtype=torch.float64)
    real = _exact(
        exact_weights / exact_weights.sum(), torch.as_tensor(means, dtype=torch.float64), std, n, seed, first_sample=n
    )
    found = {
        name: mixture_metrics(values, weights, means, std, seed) for name, values in {"real": real, **samples}.items()
    }
    compared = [key for key in found["real"] if key not in ("n", "seed", "due")]
    metrics: dict[str, Any] = {key: {name: result[key] for name, result in found.items()} for key in compared}
    return {**metrics, "n": n, "seed": seed}


def _exact(weights: Tensor, means: Tensor, std: float, n: int, seed: int, first_sample: int = 0) -> Tensor:
    noise = Noise(seed, first_sample=first_sample)
    drawn = ops.uniform((n,), noise, stream=Stream.SHOWN, substep=_EXACT_MODE).double()
    mode = torch.searchsorted(weights.cumsum(0), drawn).clamp(max=len(weights) - 1)
    return (
        means[mode] + std * ops.normal((n, means.shape[1]), noise, stream=Stream.SHOWN, substep=_EXACT_NOISE).double()
    )
