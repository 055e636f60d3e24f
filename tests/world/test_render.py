"""Pixels agree with the ground truth at every size; sprites are complete; files are real H.264."""

import dataclasses
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from hicom.video import probe, write_video
from hicom.world.dataset import World, ask, make_world, masks, sprites_of, truth
from hicom.world.render import (
    TILE,
    Renderer,
    background,
    bundled_sprites,
    iter_frames,
    load_sprites,
    mark_center,
    render,
    run_lengths,
)
from hicom.world.scenes import (
    BACKGROUNDS,
    COLORS,
    EMOJI,
    HELD_OUT_BACKGROUNDS,
    NOUNS,
    SHAPES,
    SPLITS,
    SPRITES,
    Background,
    Scene,
    SceneObject,
    WorldConfig,
    box,
    generator,
)

STILL = SceneObject("dog", None, None, "still", "still", 0.5, 1.0, ((0.5, 0.5),) * 3, 0.0, 1.0)
PLAIN = Background("plain", 7)


def scene_of(*items, extent=(1.0, 1.0), ground=PLAIN):
    return Scene((0,), "plain", extent, items, ground)


def moved(item, x, y, **changes):
    return dataclasses.replace(item, path=((x, y),) * 3, **changes)


def bounds(mask):
    """[x0, y0, x1, y1] in pixels of what is True."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def alone(scene, number):
    """The same scene without what may hide its object `number`."""
    return dataclasses.replace(scene, objects=(scene.objects[number],))


# Boxes and masks


@pytest.mark.parametrize(("width", "height"), [(128, 128), (64, 64), (200, 112), (90, 160)])
def test_boxes_are_the_extent_of_what_is_drawn(width, height):
    """Of every object alone, so that nothing hides it; at all sizes, with pans, growth, cut at the edges."""
    config = WorldConfig(width=width, height=height)
    world, checked, cut = World(config=config), 0, 0
    for split in ("test", "test_scenes", "test_long"):
        for index in range(8):
            facts = truth(world, split, index)
            scene = world.scene(split, index)
            for number, item in enumerate(facts["objects"]):
                renderer = Renderer(alone(scene, number), None, width, height)
                for age in range(0, len(item["boxes"]), 3):
                    found = item["boxes"][age]
                    mask = renderer.labels((item["first_frame"] + age) / (facts["num_frames"] - 1)) == 1
                    if found is None or min(found[2] - found[0], found[3] - found[1]) * max(width, height) < 4:
                        continue  # outside, or hardly inside
                    expected = np.array(found) * [width, height, width, height]
                    drawn, is_cut = bounds(mask), min(found) == 0 or max(found) == 1
                    if not is_cut and item["mark"] is None:
                        assert np.abs(drawn - expected).max() <= 3, (item["name"], drawn, expected)
                    elif item["mark"] is None:  # the box is that of the whole object, cut; its point may be outside
                        assert (drawn - expected)[:2].min() >= -2.5
                        assert (drawn - expected)[2:].max() <= 2.5
                    elif not is_cut:  # a dot may stand out
                        assert (drawn - expected)[:2].max() <= 2.5
                        assert (drawn - expected)[2:].min() >= -2.5
                    checked += 1
                    cut += is_cut
    assert checked > 150
    assert cut > 5


def test_the_object_on_top_hides_the_one_below():
    below, above = STILL, moved(dataclasses.replace(STILL, noun="square", color="red"), 0.6, 0.5, size=0.3)
    frame, labels = Renderer(scene_of(below, above)).frame(0.5)
    area = (slice(50, 78), slice(64, 90))
    assert (labels[area] == 2).all()
    assert np.abs(frame[area].reshape(-1, 3) - np.array(COLORS["red"])).max() < 3
    swapped = Renderer(scene_of(above, below)).labels(0.5)
    assert (swapped[labels == 2] == 2).mean() > 0.5, "the dog is above now"
    for number in (0, 1):
        shown = Renderer(alone(scene_of(below, above), number)).labels(0.5) == 1
        assert ((labels == number + 1) <= shown).all(), "nothing is seen where it is not"


@pytest.mark.parametrize(("x", "y"), [(0.0, 0.5), (1.0, 0.5), (0.5, 0.0), (0.5, 1.0), (0.0, 0.0)])
def test_what_crosses_the_edge_is_cut(x, y):
    item = moved(STILL, x, y, noun="square", color="blue", size=0.4)
    scene = scene_of(item)
    labels = Renderer(scene, None, 100, 100).labels(0.0)
    expected = np.array(box(scene, item, 0.0, (1.0, 1.0))) * 100
    assert np.abs(bounds(labels == 1) - expected).max() <= 1
    assert (labels == 1).sum() == pytest.approx((expected[2] - expected[0]) * (expected[3] - expected[1]), rel=0.1)


def test_what_is_outside_has_no_box():
    item = moved(STILL, 1.4, 0.5)
    assert box(scene_of(item), item, 0.0, (1.0, 1.0)) is None
    assert not Renderer(scene_of(item)).labels(0.0).any()
    late = dataclasses.replace(STILL, enter=0.5)
    assert box(scene_of(late), late, 0.4, (1.0, 1.0)) is None
    assert not Renderer(scene_of(late)).labels(0.4).any()


def test_growth_is_seen():
    item = dataclasses.replace(STILL, noun="circle", color="green", size=0.3, growth=1.7)
    renderer = Renderer(scene_of(item))
    small, large = (renderer.labels(time).astype(bool).sum() for time in (0.0, 1.0))
    assert large / small == pytest.approx(1.7**2, rel=0.05)


def test_the_ground_pans_and_objects_do_not():
    ground = Background("blobs", 3, (0.2, -0.1))
    labels = [Renderer(scene_of(STILL, ground=ground), None, 100, 100).labels(time) for time in (0.0, 1.0)]
    assert (labels[0] == labels[1]).all()
    first, last = (Renderer(scene_of(ground=ground), None, 100, 100).frame(time)[0] for time in (0.0, 1.0))
    # The view moves 20 pixels to the right and 10 up.
    assert np.array_equal(first[:90, 20:], last[10:, :80])
    assert not np.array_equal(first, last)


def test_dots_are_seen_where_they_are_said_to_be():
    extents = bundled_sprites().extents
    for noun in ("dog", "candle", "rainbow", "triangle"):
        for mark in ("red", "yellow", "green", "blue", "white"):
            color = "black" if noun in SHAPES else None
            item = moved(STILL, 0.45, 0.4, noun=noun, color=color, mark=mark)
            frame, labels = Renderer(scene_of(item)).frame(0.0)
            x, y = mark_center(item, 0.0, extents[noun])
            row, column = int(y * 128), int(x * 128)
            assert np.abs(frame[row - 1 : row + 2, column - 1 : column + 2] - np.array(COLORS[mark])).max() < 4
            assert labels[row, column] == 1
            plain = Renderer(scene_of(dataclasses.replace(item, mark=None))).frame(0.0)[0]
            assert (plain[row, column] != frame[row, column]).any()


@pytest.mark.parametrize("split", SPLITS)
def test_masks_are_the_labels_of_the_frames(split):
    world = World(config=WorldConfig(width=96, height=64))
    for index in range(2):
        found = masks(world, split, index)
        _, labels = render(world.scene(split, index), dataclasses.replace(
            world.config, duration_s=16.0 if split == "test_long" else 2.0,
            **({"backgrounds": HELD_OUT_BACKGROUNDS} if split == "test_scenes" else {})))  # fmt: skip
        height, width = found["size"]
        assert len(found["frames"]) == len(labels)
        for row, label in zip(found["frames"], labels, strict=True):
            again = np.zeros_like(label)
            for number, lengths in row.items():
                values = np.repeat(np.arange(len(lengths)) % 2, lengths)
                again[values.reshape(width, height).T == 1] = int(number) + 1
            assert np.array_equal(again, label)


def test_run_lengths_by_hand():
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert run_lengths(mask) == [2, 1, 1, 2], "column after column"
    assert run_lengths(~mask) == [0, 2, 1, 1, 2]
    assert run_lengths(np.zeros((2, 2), bool)) == [4]
    rng = generator(0)
    for _ in range(20):
        mask = rng.random((7, 5)) < 0.5
        lengths = run_lengths(mask)
        assert sum(lengths) == 35
        assert np.array_equal(np.repeat(np.arange(len(lengths)) % 2, lengths).reshape(5, 7).T, mask)


# Pictures


def test_sizes_show_the_same_scene():
    for index in range(4):
        scene = World().scene("val", index)
        small, large = (Renderer(scene, None, side, side).frame(0.4)[0] for side in (64, 256))
        assert np.abs(large.reshape(64, 4, 64, 4, 3).mean((1, 3)) - small).mean() < 8


@pytest.mark.parametrize("noun", NOUNS)
def test_every_noun_is_drawn(noun):
    color = "red" if noun in SHAPES else None
    frame, labels = Renderer(scene_of(dataclasses.replace(STILL, noun=noun, color=color)), None, 64, 64).frame(0.5)
    assert (labels == 1).mean() > 0.04
    empty = Renderer(scene_of(), None, 64, 64).frame(0.5)[0]
    assert (np.abs(frame.astype(int) - empty)[labels == 1].max(-1) > 10).mean() > 0.5
    if color:
        assert np.abs(frame[labels == 1].mean(0) - COLORS[color]).max() < 15


def test_nouns_look_different():
    sprites = bundled_sprites()
    small = [np.asarray(sprites.pictures[noun].convert("RGBa").resize((16, 16)), float).ravel() for noun in EMOJI]
    for i, picture in enumerate(small):
        for other in small[i + 1 :]:
            assert np.abs(picture - other).mean() > 5


@pytest.mark.parametrize("kind", [*BACKGROUNDS, *HELD_OUT_BACKGROUNDS])
def test_backgrounds_differ_by_seed_and_repeat(kind):
    grounds = [background(kind, generator(seed), 40, 30) for seed in (1, 1, 2)]
    assert grounds[0].shape == (30, 40, 3)
    assert grounds[0].min() >= 0
    assert grounds[0].max() <= 1
    assert np.array_equal(grounds[0], grounds[1])
    assert not np.array_equal(grounds[0], grounds[2])
    with pytest.raises(ValueError, match="unknown background 'lava'"):
        background("lava", generator(1), 8, 8)


def test_rendering_is_repeatable():
    scene = World().scene("train", 3)
    assert all((a == b).all() for a, b in zip(render(scene), render(scene), strict=True))


def test_assets_are_small_and_licensed():
    assert sum(path.stat().st_size for path in SPRITES.iterdir()) < 1_000_000
    assert "SIL OPEN FONT LICENSE Version 1.1" in (SPRITES / "OFL.txt").read_text()
    assert set(bundled_sprites().pictures) == set(NOUNS)
    assert all(max(picture.size) == TILE for picture in bundled_sprites().pictures.values())


# Files


@pytest.mark.parametrize(
    ("width", "height", "fps", "duration_s"),
    [(128, 128, 8.0, 2.0), (96, 64, 29.97, 2.0), (64, 112, 23.976, 5.0), (64, 64, 4.5, 2.0), (32, 32, 2.0, 60.0)],
)
def test_files_have_the_right_size_rate_and_length(tmp_path, width, height, fps, duration_s):
    config = WorldConfig(width=width, height=height, fps=fps, duration_s=duration_s)
    scene = World(config=config).scene("test", 0)
    path = tmp_path / "clip.mp4"
    write_video(path, iter_frames(scene, config), fps)
    assert [each.name for each in tmp_path.iterdir()] == ["clip.mp4"]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (width, height)
        assert abs(stream.average_rate - Fraction(fps)) < 0.001
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert len(frames) == config.num_frames == round(duration_s * fps)
    assert probe(path).duration_s == pytest.approx(duration_s, abs=1 / fps)
    drawn = np.stack(list(iter_frames(scene, config)))
    assert np.abs(frames.astype(int) - drawn).mean() < 8


# Sprites of the user's own


@pytest.fixture
def folder(tmp_path):
    """Ten named pictures: squares of different colours, wide, high and with a transparent rim."""
    path = tmp_path / "sprites"
    path.mkdir()
    for i in range(10):
        picture = Image.new("RGBA", (90 + 10 * i, 120), (0, 0, 0, 0))
        picture.paste((25 * i, 255 - 25 * i, 128, 255), (10, 20, 80 + 10 * i, 100))
        name = "fire_truck.png" if i == 0 else f"Thing-{'abcdefghij'[i]}.{'webp' if i == 1 else 'png'}"
        picture.save(path / name, **({"lossless": True} if i == 1 else {}))
    (path / "notes.txt").write_text("not a picture")
    return path


def test_a_folder_of_pictures_becomes_a_world(folder):
    sprites = load_sprites(folder)
    assert sprites.nouns == ("thing b", "thing c", "thing d", "thing e", "thing f", "thing g", "thing h", "thing i",
                             "thing j", "fire truck")  # fmt: skip
    assert sprites.extents["fire truck"] == (pytest.approx(70 / 80, abs=0.03), 1.0), "its rim is cut off"
    world = make_world(seed=3, sprites=folder)
    assert world.config.nouns == sprites.nouns
    nouns, families = set(), set()
    for split in SPLITS:
        for index in range(20):
            facts = truth(world, split, index)
            nouns |= {item["noun"] for item in facts["objects"]}
            for question in ask(world, split, index, "choice"):
                families.add(question.family)
                assert "dog" not in question.text
    assert nouns == {*sprites.nouns, *SHAPES}
    assert len(families) == 12
    scene = scene_of(dataclasses.replace(STILL, noun="fire truck"))
    frame, labels = Renderer(scene, sprites_of(world.sprites)).frame(0.0)
    assert np.abs(frame[labels == 1].mean(0) - [0, 255, 128]).max() < 6


def test_unusable_pictures_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        load_sprites(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty holds 0 usable images .* at least 8 needed"):
        make_world(sprites=empty)

    def refused(name, match):
        with pytest.raises(ValueError, match=match):
            load_sprites(folder)
        (folder / name).unlink()
        load_sprites(folder)

    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(folder / "ghost.png")
    refused("ghost.png", r"ghost\.png is no usable sprite image \(it is transparent all over\)")
    (folder / "broken.png").write_bytes((folder / "fire_truck.png").read_bytes()[:60])
    refused("broken.png", r"broken\.png is no usable sprite image")
    (folder / "text.jpg").write_text("hello")
    refused("text.jpg", r"text\.jpg is no usable sprite image")
    Image.new("RGB", (40, 40)).save(folder / "fire-truck.jpg")
    refused("fire-truck.jpg", "'fire truck' a second time; rename it")
    Image.new("RGB", (40, 40)).save(folder / "circle.png")
    refused("circle.png", "'circle' a second time")
    for path in list(folder.glob("*.png"))[:3]:
        path.unlink()
    with pytest.raises(ValueError, match="holds 7 usable images"):
        load_sprites(folder)
