"""Pixels and frames as released weights had them in training: against Pillow itself, and the release's own rule."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import media
import official
import tiny
from hicom import cli
from hicom.data.features import feature_key
from hicom.encoding import cache_key
from hicom.inference import VideoChat
from hicom.look import look
from hicom.model.convert import convert_official, open_official
from hicom.model.processing import HIComProcessor
from hicom.video import read_frames, uniform_indices

DEMO = Path(cli.__file__).parent / "assets" / "demo.mp4"
SIZE = 20


def processor(**fields: object) -> HIComProcessor:
    return tiny.processor(tiny.config(), **fields)


def as_pillow(frame: np.ndarray, size: int, color: tuple[int, int, int] | None) -> np.ndarray:
    """Return a frame as the release makes it: pasted into a square, then resized, all by Pillow."""
    image = Image.fromarray(frame)
    width, height = image.size
    if color is not None and width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), color)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def levels(pixels: torch.Tensor) -> np.ndarray:
    """Return normalised pixels as levels from 0 to 255, `[T, H, W, 3]`."""
    return ((pixels * 0.5 + 0.5) * 255).permute(0, 2, 3, 1).numpy()


CLIPS = {
    "wide": {"width": 160, "height": 64},
    "tall": {"width": 64, "height": 150},
    "square": {"width": 96, "height": 96},
    "turned": {"width": 96, "height": 64, "rotation": 90},
    "vp9": {"width": 130, "height": 62, "codec": "libvpx-vp9", "format": "webm"},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clips")
    made = {
        name: media.write_video(folder / name, 12, format="mp4", **(fields))
        for name, fields in CLIPS.items()
        if name != "vp9"
    }
    made["vp9"] = media.write_video(folder / "vp9.webm", 12, **{k: v for k, v in CLIPS["vp9"].items()})
    made["demo"] = DEMO
    (folder / "folder").mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        shape = (40 + 8 * number, 90, 3)  # the pictures of a folder may differ in size: squares do not
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / "folder" / f"{number}.png")
    made["folder"] = folder / "folder"
    return made


def whole_frames(source: Path, num_frames: int) -> list[np.ndarray]:
    if source.is_dir():
        files = sorted(source.iterdir())
        return [np.asarray(Image.open(files[i]).convert("RGB")) for i in uniform_indices(len(files), num_frames)]
    return [*read_frames(source, num_frames=num_frames).frames]


@pytest.mark.parametrize("name", [*CLIPS, "demo", "folder"])
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_exact_pixels_are_pillows(clips: dict[str, Path], name: str, aspect: str) -> None:
    """From the file to what the tower takes: within one level of 255 (and not of a scaled copy)."""
    exact = processor(pixels="exact", image_aspect_ratio=aspect)
    found = exact.read_video(clips[name], num_frames=4)
    assert found.frames.shape[1:] == (SIZE, SIZE, 3)
    color = (127, 127, 127) if aspect == "pad" else None
    expected = np.stack([as_pillow(frame, SIZE, color) for frame in whole_frames(clips[name], 4)])
    pixels = levels(exact.pixel_values(found.frames))
    assert np.abs(pixels - expected).max() <= 1
    chunks = np.concatenate([*exact.open_video(clips[name], num_frames=4).chunks(3)])
    np.testing.assert_array_equal(chunks, found.frames)


def test_frames_that_are_there_become_the_same_pixels(clips: dict[str, Path]) -> None:
    """An array, `VideoFrames` and frames pushed live meet the same Pillow as a file."""
    exact = processor(pixels="exact")
    read = read_frames(clips["wide"], num_frames=4)
    of_file = exact.pixel_values(exact.read_video(clips["wide"], num_frames=4).frames)
    torch.testing.assert_close(exact.pixel_values(read.frames), of_file, rtol=0, atol=0)
    torch.testing.assert_close(exact.pixel_values(exact.read_video(read).frames), of_file, rtol=0, atol=0)
    model = tiny.model()
    chat = VideoChat(model, exact)
    live = chat.live(num_frames=4)
    live.push(read.frames)
    encoded = chat.encode(clips["wide"], num_frames=4)
    torch.testing.assert_close(live.video.kept_features.values, encoded.kept_features.values)
    in_prompt = exact(text="<video>\nwhat ?", videos=[clips["wide"]], num_frames=4)["pixel_values_videos"]
    torch.testing.assert_close(in_prompt, of_file, rtol=0, atol=0)


def test_exact_and_fast_are_not_the_same() -> None:
    """A padded wide frame has rows that the decoder's rounding moves: the option must make a difference."""
    frames = np.random.default_rng(0).integers(0, 255, (1, 34, 160, 3), dtype=np.uint8)
    fast, exact = processor(pixels="fast"), processor(pixels="exact")
    difference = fast.pixel_values(fast.read_video(frames).frames) - exact.pixel_values(exact.read_video(frames).frames)
    assert difference.abs().max() * 127.5 > 2


def test_squeezed_frames_have_no_padding() -> None:
    """The release's stage 1: a wide white frame stays white to its edges."""
    white = np.full((1, 10, 40, 3), 255, dtype=np.uint8)
    assert processor(image_aspect_ratio="square").pixel_values(white).min() == 1.0
    assert processor(image_aspect_ratio="pad").pixel_values(white).min() < 0.1


def test_whole_frames_are_never_all_in_memory(tmp_path: Path) -> None:
    clip = media.write_video(tmp_path / "clip.mp4", 48, width=640, height=360)
    exact = processor(pixels="exact")
    whole = 640 * 360 * 3
    tracemalloc.start()
    try:
        assert len(exact.read_video(clip, num_frames=40).frames) == 40
        assert sum(len(chunk) for chunk in exact.open_video(clip, num_frames=40).chunks(32)) == 40
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * whole  # of 40


def test_processor_keeps_its_ways(tmp_path: Path) -> None:
    ways = {"pixels": "exact", "image_aspect_ratio": "square", "short_videos": "repeat"}
    processor(**ways).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert ways.items() <= saved.items()
    again = HIComProcessor.from_pretrained(tmp_path)
    assert ways.items() <= vars(again).items()
    default = processor()
    assert (default.pixels, default.image_aspect_ratio, default.short_videos) == ("fast", "pad", "once")


def test_another_process_is_told_how_to_read() -> None:
    """What `hicom serve` hands to vLLM's video loader."""
    assert processor().reading_options == {"size": SIZE}
    padded = processor(pixels="exact", short_videos="repeat").reading_options
    assert padded == {"size": SIZE, "is_square": True, "color": (127, 127, 127), "repeat": True}
    squeezed = processor(image_aspect_ratio="square").reading_options
    assert squeezed == {"size": SIZE, "is_square": True, "color": None}


@pytest.mark.parametrize(("name", "value"), [("pixels", "slow"), ("image_aspect_ratio", "anyres"), ("short_videos", 3)])
def test_ways_that_do_not_exist(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}: give one of"):
        processor(**{name: value})


def test_what_is_kept_on_disk_depends_on_the_ways(clips: dict[str, Path]) -> None:
    model = tiny.model()
    for name, value in (("pixels", "exact"), ("image_aspect_ratio", "square"), ("short_videos", "repeat")):
        plain, other = processor(), processor(**{name: value})
        assert cache_key(model, plain, clips["wide"], {}) != cache_key(model, other, clips["wide"], {})
        assert feature_key(model, plain, 4) != feature_key(model, other, 4)


# Clips with fewer frames than asked


def of_the_release(total: int, num_frames: int) -> list[int]:
    """Return the frames that the release's `frame_sample` chooses, by its formula."""
    middles = (np.arange(num_frames) + 0.5) * (float(total - 1) / num_frames)
    return [int(i) for i in np.round(middles + 1e-6)]


@pytest.mark.parametrize("total", [1, 2, 3, 8, 20, 31, 32, 33, 100, 1001])
@pytest.mark.parametrize("num_frames", [1, 7, 8, 32])
def test_indices_are_the_releases(total: int, num_frames: int) -> None:
    assert uniform_indices(total, num_frames, repeat=True) == of_the_release(total, num_frames)
    if total > num_frames:
        assert uniform_indices(total, num_frames) == of_the_release(total, num_frames)


def test_short_clip_is_filled_up(tmp_path: Path) -> None:
    clip = media.write_video(tmp_path / "clip.mp4", 5, fps=10)
    read = read_frames(clip, num_frames=8, repeat=True)
    assert media.read_numbers(read.frames) == of_the_release(5, 8) == [0, 1, 1, 2, 2, 3, 3, 4]
    np.testing.assert_allclose(read.timestamps_s, np.array(of_the_release(5, 8)) / 10)
    part = read_frames(clip, num_frames=4, start_s=0.2, end_s=0.4, repeat=True)
    assert media.read_numbers(part.frames) == [2 + i for i in of_the_release(2, 4)]
    assert media.read_numbers(read_frames(clip, num_frames=8).frames) == [0, 1, 2, 3, 4]
    assert len(read_frames(clip, num_frames=6, snap="keyframe", repeat=True).frames) == 6
    assert len(read_frames(clip, fps=10, repeat=True).frames) == len(read_frames(clip, repeat=True).frames) == 5
    picture = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    assert len(read_frames(picture, num_frames=8, repeat=True).frames) == 1  # a picture is no short film


def test_short_clip_in_a_model_that_fills_up(tmp_path: Path) -> None:
    """Every way in gives as many visual tokens as a long clip: from the file, in a prompt, for a picture of maps."""
    clip = media.write_video(tmp_path / "clip.mp4", 3)
    chat = VideoChat(tiny.model(), processor(short_videos="repeat", num_frames=6))
    encoded = chat.encode(clip)
    assert encoded.num_frames == len(encoded.timestamps_s) == 6
    assert list(encoded.timestamps_s) == sorted(encoded.timestamps_s)
    inputs = chat.processor(text="<video>\nwhat ?", videos=[clip])
    assert inputs["video_num_frames"].tolist() == [6]
    assert chat.encode(clip, num_frames=2).num_frames == 2
    assert look(chat, clip, "what ?", max_new_tokens=2).frames.shape[0] == 6
    assert VideoChat(chat.model, processor(num_frames=6)).encode(clip).num_frames == 3


# Official checkpoints


@pytest.mark.parametrize(("written", "meant"), [("pad", "pad"), ("square", "square"), (None, "square")])
def test_official_checkpoint_has_the_pixels_of_its_training(tmp_path: Path, written: str | None, meant: str) -> None:
    folder = official.save(tmp_path / "release", image_aspect_ratio=written)
    official.save_tower(tmp_path / official.TOWER)
    convert_official(folder, tmp_path / "converted")
    frames = np.full((3, 20, 60, 3), 255, dtype=np.uint8)
    for place in (folder, tmp_path / "converted"):
        chat = VideoChat.from_pretrained(place)
        ways = chat.processor
        assert (ways.pixels, ways.image_aspect_ratio, ways.short_videos) == ("exact", meant, "repeat")
        encoded = chat.encode(frames)
        assert encoded.num_frames == 8  # three frames, filled up to the eight of its training
        assert (ways.pixel_values(frames).min() == 1.0) == (meant == "square")


@pytest.mark.parametrize("value", ["anyres", "anyres_max_9", "highres", "crop_split"])
def test_tiles_are_refused(tmp_path: Path, value: str) -> None:
    folder = official.save(tmp_path / "release", image_aspect_ratio=value)
    with pytest.raises(ValueError, match=f"image_aspect_ratio='{value}' .tiles of images. is not supported"):
        open_official(folder)
