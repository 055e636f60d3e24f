"""A model knows what it was trained on, and says so when a video is unlike that."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hicom.data.domain import fit_domain, load_domain, summarize
from hicom.train import run
from toy_training import make_config, make_folder


def clip(seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(3, 4, 4, 6, generator=generator) + shift


def test_summary_is_mean_and_deviation_over_patches() -> None:
    values = clip(0)
    flat = values.flatten(1, 2)
    expected = torch.stack([torch.cat([flat[t].mean(0), flat[t].std(0)]) for t in range(3)])
    torch.testing.assert_close(summarize(values), expected)


def test_like_videos_are_like_and_others_are_not() -> None:
    domain = fit_domain((clip(i) for i in range(200)), "noise")
    assert sum(domain.is_like(summarize(clip(1000 + i))) for i in range(100)) >= 97
    assert not any(domain.is_like(summarize(clip(2000 + i, scale=3.0))) for i in range(20))
    assert not any(domain.is_like(summarize(clip(3000 + i, shift=3.0))) for i in range(20))


def test_frames_that_are_unlike_each_other_do_not_make_a_video_alike() -> None:
    """A film with cuts: the mean of frames that all lie far away may lie in the middle."""
    domain = fit_domain((clip(i) for i in range(200)), "noise")
    near, far = torch.cat([clip(5), clip(6)]), torch.cat([clip(7, shift=4.0), clip(8, shift=-4.0)])
    for number in (1, 2, 3, 4, 6):
        assert domain.is_like(summarize(near[:number]))
        assert not domain.is_like(summarize(torch.cat([far[:number], far[-number:]])))


def test_it_is_kept_with_the_model(tmp_path: Path) -> None:
    assert load_domain(tmp_path) is None
    domain = fit_domain((clip(i) for i in range(20)), "noise, naturally")
    domain.save(tmp_path)
    loaded = load_domain(tmp_path)
    assert loaded is not None
    assert loaded.description == domain.description
    assert loaded.limit == pytest.approx(domain.limit)
    assert loaded.distance(summarize(clip(5))) == pytest.approx(domain.distance(summarize(clip(5))))


def test_one_video_is_no_domain() -> None:
    with pytest.raises(ValueError, match="fewer than 2"):
        fit_domain([clip(0)], "noise")


def test_training_writes_it_where_the_run_says_what_the_videos_are(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data")
    for name, about in (("told", "short noise"), ("untold", None)):
        config = make_config(folder, out=str(tmp_path / name), steps=1)
        model = run(dataclasses.replace(config, data=dataclasses.replace(config.data, about=about)))
        found = load_domain(model)
        assert (found is None) == (about is None)
        if found is not None:
            assert found.description == "short noise"
