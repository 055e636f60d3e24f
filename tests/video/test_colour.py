"""From decoded frames to pixels: transparency lies on white, pixels are square, mirrors and brightness are told."""

import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import hicom.video.colour
from hicom.video import VideoWarning, probe, read_frames
from media import number_frame, read_numbers, turn, write_video

# Where each stands: hidden, half seen, opaque; its colour is red everywhere.
HIDDEN, HALF, OPAQUE = (8, 8), (40, 8), (24, 60)
ALPHA = {
    "apng": ("apng", "rgba"),
    "png.mov": ("png", "rgba"),
    "qtrle.mov": ("qtrle", "argb"),
    "prores.mov": ("prores_ks", "yuva444p10le"),
    "ffv1.mkv": ("ffv1", "bgra"),
    "vp9.webm": ("libvpx-vp9", "yuva420p"),
    "utvideo.avi": ("utvideo", "gbrap"),
}


def ghost() -> NDArray[np.uint8]:
    """Return uint8[48, 64, 4]: red, of which the left half is hidden above and half seen below."""
    picture = np.zeros((48, 64, 4), np.uint8)
    picture[..., 0] = picture[..., 3] = 255
    picture[:24, :32, 3], picture[24:, :32, 3] = 0, 128
    return picture


def write_alpha(path: Path, codec: str, pix_fmt: str, num_frames: int = 6) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        if path.suffix == ".webm":
            stream.metadata["alpha_mode"] = "1"
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(ghost(), format="rgba").reformat(format=pix_fmt)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def assert_on_white(frame: NDArray[np.uint8]) -> None:
    for (y, x), color in {HIDDEN: (255, 255, 255), HALF: (255, 127, 127), OPAQUE: (255, 0, 0)}.items():
        assert np.abs(frame[y, x].astype(int) - color).max() <= 4, (y, x, frame[y, x])


@pytest.mark.parametrize("name", ALPHA)
def test_transparency_lies_on_white_in_videos(tmp_path: Path, name: str) -> None:
    path = write_alpha(tmp_path / (name if "." in name else f"clip.{name}"), *ALPHA[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = read_frames(path)
        assert len(clip.frames) == 6
        assert_on_white(clip.frames[0])
        assert_on_white(clip.frames[5])
        small = read_frames(path, size=32, timestamps_s=[0.3]).frames[0]
    # It is the picture on white that is scaled, so that hidden red does not run into the white.
    scaled = Image.fromarray(clip.frames[3]).resize((32, 24), Image.Resampling.BICUBIC)
    assert np.abs(small.astype(int) - np.asarray(scaled)).max() <= 16


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "tiff"])
def test_transparency_lies_on_white_in_pictures(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"still.{suffix}"
    image = Image.fromarray(ghost(), "RGBA")
    if suffix == "gif":  # knows hidden or not
        image.putalpha(image.getchannel("A").point(lambda value: 255 * (value > 0)))
    image.save(path, **({"lossless": True} if suffix == "webp" else {}))
    frame = read_frames(path).frames[0]
    assert frame[HIDDEN].tolist() == [255, 255, 255]
    assert frame[OPAQUE].tolist() == [255, 0, 0]
    if suffix != "gif":
        assert frame[HALF].tolist() == [255, 127, 127]


def test_large_pictures_lie_on_white_in_bands_as_whole() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (700, 9000, 4), np.uint8), "RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.array_equal(np.asarray(hicom.video.colour.on_white(image)), np.asarray(whole))


def test_the_fourth_byte_of_uncompressed_avi_is_no_transparency(tmp_path: Path) -> None:
    path = write_alpha(tmp_path / "clip.avi", "rawvideo", "bgra")
    assert read_frames(path).frames[0][HIDDEN].tolist() == [255, 0, 0]


def test_a_build_without_libvpx_says_that_transparency_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_alpha(tmp_path / "clip.webm", "libvpx-vp9", "yuva420p")
    monkeypatch.setattr(hicom.video.colour, "alpha_decoder", lambda *_: None)
    monkeypatch.setattr("hicom.video.decode.alpha_decoder", lambda *_: None)
    with pytest.warns(VideoWarning, match="clip.webm: its transparency is not decoded, as this FFmpeg"):
        read_frames(path, num_frames=1)
    assert "transparency is not decoded" in probe(path).describe()


@pytest.mark.parametrize(
    ("codec", "suffix"), [("libx264", "mp4"), ("libx264", "mkv"), ("mpeg2video", "mpg"), ("mpeg4", "avi")]
)
def test_pixels_are_shown_square(tmp_path: Path, codec: str, suffix: str) -> None:
    path = write_aspect(tmp_path / f"clip.{suffix}", codec, Fraction(64, 45), 720, 576)
    clip = read_frames(path, num_frames=3)
    assert (clip.info.width, clip.info.height) == (1024, 576)
    assert clip.frames.shape == (3, 576, 1024, 3)
    assert read_numbers(clip.frames) == read_numbers(read_frames(path, timestamps_s=clip.timestamps_s, size=96).frames)
    assert read_frames(path, num_frames=1, size=512).frames.shape == (1, 288, 512, 3)
    assert not clip.info.notes


def write_aspect(path: Path, codec: str, aspect: Fraction, width: int, height: int) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(number_frame(number, width, height), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_narrow_pixels_make_a_narrow_picture(tmp_path: Path) -> None:
    path = write_aspect(tmp_path / "clip.mp4", "libx264", Fraction(8, 9), 720, 480)
    assert read_frames(path, num_frames=1).frames.shape == (1, 480, 640, 3)


def test_turned_videos_have_square_pixels_too(tmp_path: Path) -> None:
    path = write_aspect(tmp_path / "clip.mp4", "libx264", Fraction(2, 1), 96, 64)
    turn(path, 90, False)
    info = probe(path)
    assert (info.width, info.height, info.rotation) == (64, 192, 90)
    assert read_frames(path, num_frames=1).frames.shape == (1, 192, 64, 3)


@pytest.mark.parametrize("aspect", [Fraction(100, 3), Fraction(1, 9), Fraction(5, 1)])
def test_absurd_shapes_of_pixels_are_not_followed(tmp_path: Path, aspect: Fraction) -> None:
    path = write_aspect(tmp_path / "clip.mp4", "libx264", aspect, 96, 64)
    told = rf"its pixels claim to be {aspect.numerator}:{aspect.denominator}; shown as square"
    with pytest.warns(VideoWarning, match=told):
        clip = read_frames(path, num_frames=1)
    assert clip.frames.shape == (1, 64, 96, 3)


def test_a_resolution_for_printing_is_no_shape_of_pixels(tmp_path: Path) -> None:
    pictures = [Image.fromarray(number_frame(number)) for number in range(3)]
    pictures[0].save(tmp_path / "a.png", save_all=True, append_images=pictures[1:], dpi=(300, 150))
    assert read_frames(tmp_path / "a.png").frames.shape == (3, 64, 96, 3)


@pytest.mark.parametrize(
    ("rotation", "hflip", "told"),
    [
        (0, True, "mirrored"),
        (180, True, "mirrored, turned by 180 degrees"),
        (180, False, "turned by 180 degrees"),
        (90, True, "mirrored, turned by"),
        (-90, False, "turned by -90 degrees"),
    ],
)
def test_mirrors_are_called_mirrors(tmp_path: Path, rotation: int, hflip: bool, told: str) -> None:
    path = write_video(tmp_path / "clip.mp4", 3, rotation=rotation, hflip=hflip)
    clip = read_frames(path)
    assert read_numbers(clip.frames) == [0, 1, 2]
    assert clip.info.is_mirrored == hflip
    assert told in clip.info.describe()
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    turned = np.rot90(stored[:, ::-1] if clip.info.is_mirrored else stored, clip.info.rotation // 90)
    assert read_numbers([turned]) == [0]


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_told(tmp_path: Path, transfer: int, name: str) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx265", rate=25, options={"x265-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p10le"
        stream.codec_context.color_trc, stream.codec_context.color_primaries = transfer, 9
        stream.codec_context.colorspace = 9
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(number_frame(number), format="rgb24").reformat(format="yuv420p10le")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.warns(VideoWarning, match=rf"clip.mp4: high dynamic range \({name}\) is not tone-mapped"):
        assert read_numbers(read_frames(path).frames) == [0, 1, 2]
    assert name in probe(path).describe()


def test_data_beside_a_frame_that_pyav_does_not_know_is_no_error(tmp_path: Path) -> None:
    # FFmpeg 8 gives frames their Exif, a kind of data that PyAV 18 has no name for.
    exif = Image.Exif()
    exif[0x10F] = "camera"
    with av.open(str(tmp_path / "clip.avi"), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for number in range(3):
            picture = tmp_path / "picture.jpg"
            Image.fromarray(number_frame(number)).save(picture, exif=exif, quality=95)
            packet = av.Packet(picture.read_bytes())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 10)
            container.mux(packet)
    assert read_numbers(read_frames(tmp_path / "clip.avi").frames) == [0, 1, 2]
