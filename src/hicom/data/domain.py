"""What a model was trained on: enough statistics of its training videos to tell when another one is unlike them.

A small model answers any question about any video, with confidence. So that nobody takes its word about a film, it
carries a description of its training videos and a measure of how far a video's frames are from theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import writing

FILE = "domain.safetensors"
SHRINKAGE = 0.003
"""Share of the mean variance that is added to every direction: few videos do not know the rare ones."""
QUANTILE = 0.99
"""A video is unlike the others beyond the distance that this share of their frames stays below."""
FRAMES_PER_VIDEO = 8
"""Of a training video that count, evenly spread; those of one video are much alike."""


def summarize(values: Tensor) -> Tensor:
    """Return mean and deviation over the patches of every frame: `float[T, 2D]`.

    Args:
        values: `float[T, H, W, D]`, patch features of one video.
    """
    patches = values.float().flatten(1, 2)
    return torch.cat([patches.mean(1), patches.std(1)], -1)


@dataclass(frozen=True)
class Domain:
    """What a model was trained on.

    It is made of frames, and a video is as far away as the frame in the middle of its own. A mean over frames would not
    do: the more of a film with many cuts are taken, the more their mean looks like anything.

    Attributes:
        description: in words that finish "this model was trained on ...".
        mean: `float[2D]` of the training videos' frames, summarized.
        precision: `float[2D, 2D]`, inverse of their covariance.
        limit: distance beyond which a frame is unlike them.
    """

    description: str
    mean: Tensor
    precision: Tensor
    limit: float

    def distance(self, summary: Tensor) -> float:
        """Return how far a video is from the training videos: the median of its frames' Mahalanobis distances.

        Args:
            summary: `float[T, 2D]`, of its frames.
        """
        return float(_distances(summary.cpu() - self.mean, self.precision).quantile(0.5))

    def is_like(self, summary: Tensor) -> bool:
        """Whether a video looks like the training videos, given its frames' summaries, `float[T, 2D]`."""
        return self.distance(summary) <= self.limit

    def save(self, folder: Path) -> None:
        """Write `domain.safetensors` into a model's folder."""
        tensors = {"mean": self.mean, "precision": self.precision, "limit": torch.tensor(self.limit)}
        with writing(folder / FILE) as part:
            save_file(tensors, part, metadata={"description": self.description})


def fit_domain(videos: Iterable[Tensor], description: str) -> Domain:
    """Return the domain of training videos, `float[T, H, W, D]` each.

    Raises:
        ValueError: there are fewer than two videos.
    """
    some = [_spread(summarize(values), FRAMES_PER_VIDEO) for values in videos]
    if len(some) < 2:
        raise ValueError("the domain of fewer than 2 videos is not defined")
    summaries = torch.cat(some)
    mean = summaries.mean(0)
    covariance = torch.cov(summaries.T)
    covariance = covariance + SHRINKAGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    precision = torch.linalg.inv(covariance).contiguous()
    distances = _distances(summaries - mean, precision)
    return Domain(description, mean, precision, float(torch.quantile(distances, QUANTILE)))


def _distances(offsets: Tensor, precision: Tensor) -> Tensor:
    """Return the Mahalanobis distances `float[N]` of offsets from the mean, `float[N, 2D]`."""
    return torch.einsum("nd,de,ne->n", offsets, precision, offsets).clamp(min=0).sqrt()


def _spread(rows: Tensor, most: int) -> Tensor:
    """Return at most so many rows, evenly spread."""
    if len(rows) <= most:
        return rows
    return rows[(torch.arange(most) * 2 + 1) * len(rows) // (2 * most)]


def load_domain(folder: Path) -> Domain | None:
    """Return the domain in a model's folder; None where there is none."""
    path = folder / FILE
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        description = (file.metadata() or {}).get("description", "")
        mean, precision, limit = (file.get_tensor(name) for name in ("mean", "precision", "limit"))
    return Domain(description, mean, precision, float(limit))
