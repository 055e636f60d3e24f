"""Pixels agree with the ground truth at every size; the bundled atlas is complete and small."""

import numpy as np
import pytest

from hicom.world.render import render, render_frame, sprite_extents
from hicom.world.scenes import COLORS, NOUNS, SPRITES, Scene, SceneObject, clip_seed, ground_truth, make_scene


@pytest.mark.parametrize("size", [64, 128, 200])
def test_boxes_match_pixels(size):
    for index in range(12):
        scene = make_scene(clip_seed(0, "test", index))
        frames, labels = render(scene, size, num_frames=5)
        assert frames.shape == (5, size, size, 3)
        assert frames.dtype == np.uint8
        for number, item in enumerate(ground_truth(scene, sprite_extents(), 5)["objects"], 1):
            for box, mask in zip(item["boxes"], labels == number, strict=True):
                assert (box is not None) == mask.any()
                if box is not None:
                    rows, columns = np.nonzero(mask)
                    drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                    inner = [drawn[0] >= box[0] * size - 2, drawn[1] >= box[1] * size - 2]
                    inner += [drawn[2] <= box[2] * size + 2, drawn[3] <= box[3] * size + 2]
                    assert all(inner), f"{item['name']} is drawn outside its box: {drawn} against {box} x {size}"
                    # An antialiased point (a crown, a ray) can fade below half opacity, no more than that.
                    seen = (drawn[2] - drawn[0]) * (drawn[3] - drawn[1]) / size**2
                    assert seen > 0.7 * (box[2] - box[0]) * (box[3] - box[1]), f"{item['name']} fills too little"


def test_sizes_show_the_same_scene():
    for index in range(5):
        scene = make_scene(clip_seed(0, "val", index))
        small, large = render(scene, 64, 3)[0], render(scene, 256, 3)[0]
        reduced = large.reshape(3, 64, 4, 64, 4, 3).mean((2, 4))
        assert np.abs(reduced - small).mean() < 8


@pytest.mark.parametrize("noun", NOUNS)
def test_every_noun_is_drawn(noun):
    color = "red" if noun in NOUNS[-5:] else None
    item = SceneObject(noun, color, "still", 0.5, (0.5, 0.5), (0.5, 0.5), 0.0, 1.0)
    frame, labels = render_frame(Scene((0,), (item,), 7), 0.5, 64)
    assert (labels == 1).mean() > 0.05
    if color:
        assert np.abs(frame[labels == 1].mean(0) - COLORS[color]).max() < 12


def test_rendering_is_repeatable():
    scene = make_scene(clip_seed(0, "train", 3))
    assert all((a == b).all() for a, b in zip(render(scene), render(scene), strict=True))


def test_assets_are_small_and_licensed():
    assert sum(path.stat().st_size for path in SPRITES.iterdir()) < 500_000
    assert "SIL OPEN FONT LICENSE Version 1.1" in (SPRITES / "OFL.txt").read_text()
