"""Metrics of many images by a detector: streaming over batches and ranks, and all metrics together.

Each rank takes a share of the samples by global index, so that the set of images depends neither
on the number of ranks nor on the batch size. Sums are added over the ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from emd_fast import distributed
from emd_fast.metrics.clip import ClipScore
from emd_fast.metrics.detector import Detector, DetectorError
from emd_fast.metrics.distance import Moments, RunningMoments, frechet_of_moments
from emd_fast.metrics.images import ImageFiles, size
from emd_fast.metrics.inception import InceptionScore
from emd_fast.metrics.neighbours import precision_recall
from emd_fast.metrics.reference import Reference
from emd_fast.metrics.reference import load as load_reference

COMPARABLE = 50_000  # images behind the Fréchet distances of the literature
_SPLITS = 10

Images = Callable[[int, int], Tensor]  # (first, n) -> images (n, 1 or 3, H, W) uint8, by global index


@dataclass
class Evaluator:
    """What metrics are computed with, read from the files of an `EvaluationConfig`.

    Args:
        detector: computes the features.
        reference: statistics of real images, for the Fréchet distance.
        compare_with: real images, for precision and recall.
        clip: CLIP score of images with prompts.
    """

    detector: Detector | None = None
    reference: Reference | None = None
    compare_with: ImageFiles | None = None
    clip: ClipScore | None = None

    @classmethod
    def read(
        cls,
        detector: str | Path = "",
        reference: str | Path = "",
        compare_with: str | Path = "",
        clip: str | Path = "",
        device: torch.device | str = "cpu",
        *,
        named: bool = True,
    ) -> Evaluator:
        """Opens the files that are given; an empty name stands for none.

        Args:
            named: whether the user names the detector, as for `Detector`.

        Raises:
            CodeRefused, DetectorError, BadReference, ValueError, ModuleNotFoundError: a file of another kind.
        """
        return cls(
            Detector(detector, device, named=named) if detector else None,
            load_reference(reference) if reference else None,
            ImageFiles(compare_with) if compare_with else None,
            ClipScore(clip, device) if clip else None,
        )

    def __bool__(self) -> bool:
        return self.detector is not None or self.clip is not None

    def check(self) -> None:
        """Checks the reference's feature width against the detector's output for two black images.

        Raises:
            BadReference: the widths differ.
        """
        if self.detector is None or self.reference is None:
            return
        with contextlib.suppress(DetectorError):  # the detector may need another image size, not known yet
            black = torch.zeros(2, *(self.reference.shape or (3, 64, 64)), dtype=torch.uint8)
            self.reference.of_width(self.detector.features(black).shape[1])

    def check_images(self, shape: tuple[int, ...], n: int) -> None:
        """Checks that n images (C, H, W) can be compared with those of the files.

        Raises:
            BadReference, ValueError: another size, or another number of images to compare with.
        """
        _check_count(self, n)
        if self.detector is not None:
            _check_sizes(self, shape, self.detector.sha256)

    def hashes(self) -> dict[str, str]:
        """Returns the sha256 of the files that the Fréchet distance depends on."""
        files = {"detector": self.detector, "reference": self.reference}
        return {name: file.sha256 for name, file in files.items() if file is not None}


def frechet(evaluator: Evaluator, images: Images, n: int, batch: int) -> float:
    """Computes the Fréchet distance alone. All ranks call it, and get the main rank's value.

    Raises:
        ValueError: no detector or no reference; also as for `evaluate`.
    """
    if evaluator.detector is None or evaluator.reference is None:
        raise ValueError("a Fréchet distance needs a detector and a reference")
    return evaluate(Evaluator(evaluator.detector, evaluator.reference), images, n, batch)["frechet"]


def evaluate(
    evaluator: Evaluator,
    images: Images,
    n: int,
    batch: int,
    prompts: Callable[[int, int], Sequence[str]] | None = None,
) -> dict[str, float]:
    """Computes all metrics of n images that the evaluator has files for.

    All ranks call it, and get the same values.

    Args:
        images: (first, n) -> images by global index.
        n: number of images.
        batch: images per call of `images`.
        prompts: (first, n) -> prompts of the images, for the CLIP score.

    Returns:
        "frechet" with a reference; "inception_score" and "inception_score_std" with a detector
        that has classes and n of 10 or more; "precision" and "recall" (k = 3) with images to
        compare with; "clip_score" with prompts and a CLIP model.

    Raises:
        ValueError: images of another size than the reference's, if its file records one;
            `compare_with` holds another number of images than n; fewer than two images per rank;
            features that are not finite.
    """
    if n < 2 * distributed.world_size():
        raise ValueError(f"an evaluation needs at least 2 images a rank, got {n} for {distributed.world_size()}")
    detector, real = evaluator.detector, evaluator.compare_with
    _check_count(evaluator, n)
    running = RunningMoments()
    inception = InceptionScore(n, _SPLITS) if detector is not None and detector.has_classes and n >= _SPLITS else None
    clip_sum = torch.zeros((), dtype=torch.float64)
    kept: list[Tensor] = []
    failure: ValueError | None = None
    try:
        for first, x in _share(images, n, batch):
            if detector is not None:
                if not running.n:
                    _check_sizes(evaluator, tuple(x.shape[1:]), detector.sha256)
                features = detector.features(x)
                running.add(features)
                if inception is not None:
                    inception.add(detector.probabilities(x), first)
                if real is not None:
                    kept.append(features.float().cpu())
            if evaluator.clip is not None and prompts is not None:
                clip_sum += evaluator.clip(x, prompts(first, len(x))).sum()
    except ValueError as error:
        failure = error
    distributed.raise_together(failure)

    found: dict[str, float] = {}
    if evaluator.clip is not None and prompts is not None:
        if distributed.world_size() > 1:
            dist.all_reduce(clip_sum)
        found["clip_score"] = clip_sum.item() / n
    if detector is None:
        return found
    generated = running.moments()
    if evaluator.reference is not None:
        moments = evaluator.reference.of_width(len(generated.mean))
        found["frechet"] = distributed.on_main(lambda: frechet_of_moments(generated, moments))
    if inception is not None:
        found["inception_score"], found["inception_score_std"] = inception.value()
    if real is not None:
        real_features = [detector.features(x).float().cpu() for _, x in _share(real, n, batch)]
        real_all = _all_gather_rows(torch.cat(real_features), n).to(detector.device)
        generated_all = _all_gather_rows(torch.cat(kept), n).to(detector.device)
        found["precision"], found["recall"] = distributed.on_main(lambda: precision_recall(real_all, generated_all))
    return found


def moments_of(detector: Detector, images: Images, n: int, batch: int) -> Moments:
    """Computes the moments of the features of n images. All ranks call it."""
    running = RunningMoments()
    for _, x in _share(images, n, batch):
        running.add(detector.features(x))
    return running.moments()


def _share(images: Images, n: int, batch: int) -> Iterator[tuple[int, Tensor]]:
    """Yields this rank's share of n images in batches: (global index of the first, images).

    Every rank calls `images` equally often, because a call may be a collective of sharded networks.
    """
    start, end = distributed.share(n)
    largest = -(-n // distributed.world_size())
    for first in range(start, start + largest, batch):
        size = min(batch, end - first)
        if size > 0:
            yield first, images(first, size)
        else:  # of a share that is smaller by one
            images(start, 1)


def _check_count(evaluator: Evaluator, n: int) -> None:
    real = evaluator.compare_with
    if real is not None and len(real) != n:
        raise ValueError(
            f"precision and recall compare sets of one size: {real.path} has {len(real)} images, {n} are generated"
        )


def _check_sizes(evaluator: Evaluator, shape: tuple[int, ...], detector: str) -> None:
    real = evaluator.compare_with
    if evaluator.reference is not None:
        evaluator.reference.check(shape, detector)
    if real is not None and real.shape[1:] != shape[1:]:
        raise ValueError(
            f"{real.path} has images of {size(real.shape)}, these are of {size(shape)}; nothing is resized here"
        )


def _all_gather_rows(rows: Tensor, n: int) -> Tensor:
    """Gathers the n rows of all ranks on every rank, in the order of the global index."""
    ranks = distributed.world_size()
    if ranks == 1:
        return rows
    padded = rows.new_zeros(-(-n // ranks), rows.shape[1])
    padded[: len(rows)] = rows
    every = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(every, padded)
    sizes = [(rank + 1) * n // ranks - rank * n // ranks for rank in range(ranks)]
    return torch.cat([part[:size] for part, size in zip(every, sizes, strict=True)])


def provenance(evaluator: Evaluator, n: int, seed: int | None = None) -> dict[str, Any]:
    """Returns what the metrics depend on: sample count, seed, and files with their sha256."""
    found: dict[str, Any] = {"n": n} | ({} if seed is None else {"seed": seed})
    for name in ("detector", "reference", "compare_with"):
        file = getattr(evaluator, name)
        if file is not None:
            found[name] = {"file": str(file.path), "sha256": file.sha256}
    if evaluator.reference is not None and n < COMPARABLE:
        found["warning"] = (
            f"n = {n:,} is below {COMPARABLE:,}: compare this Fréchet distance only with others of the same n"
        )
    return found
