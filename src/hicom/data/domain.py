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
SHRINKAGE = 0.1
"""Share of the mean variance that is added to every direction: few videos do not know the rare ones."""
QUANTILE = 0.99
"""A video is unlike the others beyond the distance that this share of them stays below."""


def summarize(values: Tensor) -> Tensor:
    """Return mean and deviation over the patches of every frame, averaged over frames: `float[2D]`.

    Args:
        values: `float[T, H, W, D]`, patch features of one video.
    """
    patches = values.float().flatten(1, 2)
    return torch.cat([patches.mean(1), patches.std(1)], -1).mean(0)


@dataclass(frozen=True)
class Domain:
    """What a model was trained on.

    Attributes:
        description: in words that finish "this model was trained on ...".
        mean: `float[2D]` of the training videos' summaries.
        precision: `float[2D, 2D]`, inverse of their covariance.
        limit: distance beyond which a video is unlike them.
    """

    description: str
    mean: Tensor
    precision: Tensor
    limit: float

    def distance(self, summary: Tensor) -> float:
        """Return the Mahalanobis distance of a video from the training videos, given its summary, `float[2D]`."""
        offset = summary.cpu() - self.mean
        return float((offset @ self.precision @ offset).clamp(min=0).sqrt())

    def is_like(self, summary: Tensor) -> bool:
        """Whether a video looks like the training videos, given its summary, `float[2D]`."""
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
    summaries = torch.stack([summarize(values) for values in videos])
    if len(summaries) < 2:
        raise ValueError("the domain of fewer than 2 videos is not defined")
    mean = summaries.mean(0)
    covariance = torch.cov(summaries.T)
    covariance = covariance + SHRINKAGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    found = Domain(description, mean, torch.linalg.inv(covariance).contiguous(), 0.0)
    offsets = summaries - mean
    distances = torch.einsum("nd,de,ne->n", offsets, found.precision, offsets).clamp(min=0).sqrt()
    return Domain(description, mean, found.precision, float(torch.quantile(distances, QUANTILE)))


def load_domain(folder: Path) -> Domain | None:
    """Return the domain in a model's folder; None where there is none."""
    path = folder / FILE
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        description = (file.metadata() or {}).get("description", "")
        mean, precision, limit = (file.get_tensor(name) for name in ("mean", "precision", "limit"))
    return Domain(description, mean, precision, float(limit))
