"""Contact sheets and videos that show boxes where the ground truth has them."""

import av
import numpy as np
import pytest
from PIL import Image

from hicom.world.dataset import World, ask, truth
from hicom.world.preview import (
    BOX_COLORS,
    NUM_FRAMES,
    SMALL,
    boxed_frames,
    draw_row,
    fit,
    font,
    save_preview,
    shown_frames,
)
from hicom.world.scenes import SPLITS, WorldConfig, split_config

WORLD = World()


def test_boxes_are_drawn_where_they_are():
    facts = truth(WORLD, "test", 1)
    frames = list(boxed_frames(WORLD, "test", 1, WORLD.config))
    assert len(frames) == 16
    for number in (0, 8, 15):
        frame = frames[number]
        assert frame.shape == (512, 512, 3)
        for i, item in enumerate(facts["objects"]):
            age = number - item["first_frame"]
            found = item["boxes"][age] if 0 <= age < len(item["boxes"]) else None
            if found:
                x0, y0, x1, y1 = (round(v * 512) for v in found)
                edges = [frame[y1 - 1, x0:x1], frame[y0:y1, x0], frame[y0:y1, x1 - 1]]
                shares = [(edge == BOX_COLORS[i]).all(-1).mean() for edge in edges]
                assert max(shares) > 0.95, "names may hide parts of a box, never all"


@pytest.mark.parametrize("split", SPLITS)
def test_a_sheet_has_a_row_for_every_clip(tmp_path, split):
    path = tmp_path / "sheet.png"
    config = split_config(WORLD.config, split)
    save_preview(path, WORLD, split, index=3, num_clips=2)
    rows = [draw_row(WORLD, split, i, config) for i in (3, 4)]
    with Image.open(path) as sheet:
        assert sheet.size == (rows[0].width, sum(row.height for row in rows))
        assert np.array_equal(np.asarray(sheet)[: rows[0].height], np.asarray(rows[0]))
    assert [each.name for each in tmp_path.iterdir()] == ["sheet.png"]


def test_every_question_has_a_line():
    few = min(range(20), key=lambda i: len(ask(WORLD, "test", i, "tune")))
    many = max(range(20), key=lambda i: len(ask(WORLD, "test", i, "tune")))
    assert draw_row(WORLD, "test", few, WORLD.config).height < draw_row(WORLD, "test", many, WORLD.config).height


@pytest.mark.parametrize(
    "config",
    [WorldConfig(width=320, height=64), WorldConfig(width=64, height=320), WorldConfig(fps=29.97, duration_s=30)],
)
def test_all_shapes_and_lengths_fit(config):
    row = draw_row(World(config=config), "test", 0, config)
    assert row.height < 700
    assert (np.asarray(row)[:, :10] == 255).all() or (np.asarray(row)[1:, :10] == 255).all(), "the margin is empty"
    shown = shown_frames(config)
    assert len(shown) == NUM_FRAMES
    assert shown[-1] < config.num_frames


def test_long_texts_are_cut():
    assert fit("short", 200) == "short"
    cut = fit("a long question " * 20, 200)
    assert cut.endswith("...")
    assert font(SMALL).getlength(cut) <= 200


def test_a_clip_is_a_video(tmp_path):
    path = tmp_path / "clip.mp4"
    save_preview(path, World(config=WorldConfig(width=96, height=64, fps=12)), "test_pairs", 2)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (576, 384, 12)
        assert sum(1 for _ in container.decode(stream)) == 24


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("a.gif", {}, "suffix '.gif' is none of .png and .mp4"),
        ("nowhere/a.png", {}, "there is no folder"),
        ("a.png", {"num_clips": 0}, "num_clips=0 must be from 1 to 100"),
        ("a.png", {"index": -1}, "index=-1 must not be negative"),
        ("a.png", {"split": "dev"}, "unknown split 'dev'"),
    ],
)
def test_wrong_input_is_named(tmp_path, name, values, message):
    with pytest.raises(ValueError, match=message):
        save_preview(tmp_path / name, WORLD, **values)
    assert not list(tmp_path.iterdir())
