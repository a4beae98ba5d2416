"""What a detector says of many images: the streaming over batches and ranks, and the numbers together.

Each rank takes its share of the samples by their global index, so that the set of images depends neither on the number
of ranks nor on the batches; sums are added up over the ranks.
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
from emd_fast.metrics.distance import Moments, Sums, frechet_of_moments
from emd_fast.metrics.images import ImageFiles, size
from emd_fast.metrics.inception import InceptionScore
from emd_fast.metrics.neighbours import precision_recall
from emd_fast.metrics.reference import Reference
from emd_fast.metrics.reference import load as load_reference

COMPARABLE = 50_000  # images, of which the distances in the literature are
_SPLITS = 10

Images = Callable[[int, int], Tensor]  # (first, n) -> images (n, 1 or 3, H, W) uint8, by their global index


@dataclass
class Judges:
    """Who judges, read from the files of an `EvaluationConfig`.

    Args:
        detector: makes the features. reference: statistics of real images.
        compare_with: real images, for precision and recall. clip: for images with prompts.
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
    ) -> Judges:
        """Those whose file is given.

        Raises:
            DetectorError, BadReference, ValueError, ModuleNotFoundError: a file that is something else.
        """
        return cls(
            Detector(detector, device) if detector else None,
            load_reference(reference) if reference else None,
            ImageFiles(compare_with) if compare_with else None,
            ClipScore(clip, device) if clip else None,
        )

    def __bool__(self) -> bool:
        return any(judge is not None for judge in (self.detector, self.clip))

    def check(self) -> None:
        """Whether the reference is of features of the detector's width, as far as black images tell beforehand.

        Raises:
            BadReference: it is not.
        """
        if self.detector is None or self.reference is None:
            return
        with contextlib.suppress(DetectorError):  # a detector may want another size, which only the images will show
            black = torch.zeros(2, *(self.reference.shape or (3, 64, 64)), dtype=torch.uint8)
            self.reference.of_width(self.detector.features(black).shape[1])

    def hashes(self) -> dict[str, str]:
        """The sha256 of the files that a distance depends on."""
        files = {"detector": self.detector, "reference": self.reference}
        return {name: file.sha256 for name, file in files.items() if file is not None}


def frechet(judges: Judges, images: Images, n: int, batch: int) -> float:
    """The Fréchet distance alone; all ranks call it, and the main one tells all of them.

    Raises:
        ValueError: no detector or no reference; what `judge` raises.
    """
    if judges.detector is None or judges.reference is None:
        raise ValueError("a Fréchet distance needs a detector and a reference")
    return judge(Judges(judges.detector, judges.reference), images, n, batch)["frechet"]


def judge(
    judges: Judges, images: Images, n: int, batch: int, prompts: Callable[[int, int], Sequence[str]] | None = None
) -> dict[str, float]:
    """All the numbers that the judges give of n images; all ranks call it, and get the same.

    Args:
        images: by global index. batch: how many at a time.
        prompts: of the images, for the CLIP score.

    Returns:
        "frechet" with a reference; "inception_score" and "inception_score_std" with a detector that has classes;
        "precision" and "recall" (k = 3) with images to compare with; "clip_score".

    Raises:
        ValueError: images of another size than the reference's, as far as it says; another number of images to compare
            with than n; fewer than two images a rank; features that are not finite.
    """
    if n < 2 * distributed.world_size():
        raise ValueError(f"an evaluation needs at least 2 images a rank, got {n} for {distributed.world_size()}")
    detector, real = judges.detector, judges.compare_with
    if real is not None and len(real) != n:
        raise ValueError(
            f"precision and recall compare sets of one size: {real.path} has {len(real)} images, {n} are generated"
        )
    sums = Sums()
    score = InceptionScore(n, _SPLITS) if detector is not None and detector.has_classes and n >= _SPLITS else None
    fits = torch.zeros((), dtype=torch.float64)
    kept: list[Tensor] = []
    failure: ValueError | None = None
    try:
        for first, x in _mine(images, n, batch):
            if detector is not None:
                if not sums.n:
                    _check_sizes(judges, tuple(x.shape[1:]), detector.sha256)
                features = detector.features(x)
                sums.add(features)
                if score is not None:
                    score.add(detector.probabilities(x), first)
                if real is not None:
                    kept.append(features.float().cpu())
            if judges.clip is not None and prompts is not None:
                fits += judges.clip(x, prompts(first, len(x))).sum()
    except ValueError as error:
        failure = error
    distributed.raise_together(failure)

    found: dict[str, float] = {}
    if judges.clip is not None and prompts is not None:
        if distributed.world_size() > 1:
            dist.all_reduce(fits)
        found["clip_score"] = fits.item() / n
    if detector is None:
        return found
    generated = sums.moments()
    if judges.reference is not None:
        moments = judges.reference.of_width(len(generated.mean))
        found["frechet"] = distributed.on_main(lambda: frechet_of_moments(generated, moments))
    if score is not None:
        found["inception_score"], found["inception_score_std"] = score.value()
    if real is not None:
        theirs = [detector.features(x).float().cpu() for _, x in _mine(real, n, batch)]
        both = _whole(torch.cat(theirs), n).to(detector.device), _whole(torch.cat(kept), n).to(detector.device)
        found["precision"], found["recall"] = distributed.on_main(lambda: precision_recall(*both))
    return found


def moments_of(detector: Detector, images: Images, n: int, batch: int) -> Moments:
    """The moments of the features of n images; all ranks call it."""
    sums = Sums()
    for _, x in _mine(images, n, batch):
        sums.add(detector.features(x))
    return sums.moments()


def _mine(images: Images, n: int, batch: int) -> Iterator[tuple[int, Tensor]]:
    """This rank's share of n images in batches, each with the global index of its first."""
    start, end = distributed.share(n)
    for first in range(start, end, batch):
        yield first, images(first, min(batch, end - first))


def _check_sizes(judges: Judges, shape: tuple[int, ...], detector: str) -> None:
    real = judges.compare_with
    if judges.reference is not None:
        judges.reference.check(shape, detector)
    if real is not None and real.shape[1:] != shape[1:]:
        raise ValueError(
            f"{real.path} has images of {size(real.shape)}, these are of {size(shape)}; nothing is resized here"
        )


def _whole(rows: Tensor, n: int) -> Tensor:
    """The rows of all ranks, by global index, on each of them."""
    ranks = distributed.world_size()
    if ranks == 1:
        return rows
    padded = rows.new_zeros(-(-n // ranks), rows.shape[1])
    padded[: len(rows)] = rows
    every = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(every, padded)
    sizes = [(rank + 1) * n // ranks - rank * n // ranks for rank in range(ranks)]
    return torch.cat([part[:size] for part, size in zip(every, sizes, strict=True)])


def facts(judges: Judges, n: int, seed: int | None = None) -> dict[str, Any]:
    """What has to be said beside the numbers of `judge`: how many samples, of which seed, and by which files."""
    said: dict[str, Any] = {"n": n} | ({} if seed is None else {"seed": seed})
    for name in ("detector", "reference", "compare_with"):
        file = getattr(judges, name)
        if file is not None:
            said[name] = {"file": str(file.path), "sha256": file.sha256}
    if judges.reference is not None and n < COMPARABLE:
        said["warning"] = (
            f"n = {n:,} is below {COMPARABLE:,}: this Fréchet distance compares with no other figure but of the same n"
        )
    return said
