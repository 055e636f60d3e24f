"""Pictures of very many pixels, and frames that come as files in memory."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hicom
from bombs import png
from hicom import probe, read_frames
from hicom.square import Square
from hicom.video import VideoError, large

SIZES = [50, Square(50, None), Square(50, (1, 2, 3))]


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def scene(mode: str) -> Image.Image:
    """Return a picture of 600x400 with soft shapes."""
    y, x = np.mgrid[0:400, 0:600] / 400
    rgb = np.stack([x / 1.5, y, (np.sin(7 * x) + 1) / 2], -1)
    picture = Image.fromarray((255 * rgb).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((65535 * y).astype(np.uint16))
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray((255 * (x > 0.7)).astype(np.uint8)))
        return picture.convert(mode)
    if mode == "P transparent":
        palette = picture.quantize(64)
        palette.info["transparency"] = 3
        return palette
    return picture.convert(mode)


@pytest.mark.parametrize("size", SIZES, ids=["side", "squeezed", "padded"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "P transparent", "RGB", "RGBA", "LA", "I;16", "CMYK"])
def test_a_large_picture_looks_like_a_small_one(mode: str, size: int | Square, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(scene(mode), "TIFF" if mode == "CMYK" else "PNG")
    expected = read_frames(data, size=size)
    for large_from in (600 * 400 - 1, 1000):
        monkeypatch.setattr(large, "LARGE", large_from)
        found = read_frames(data, size=size)
        assert found.frames.shape == expected.frames.shape
        assert found.info == expected.info
        difference = np.abs(found.frames.astype(int) - expected.frames)
        assert difference.mean() < (8 if mode == "1" else 2)  # dots that are on or off are averaged otherwise


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_picture_stands_upright(orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene("RGB"), "JPEG", exif=exif, quality=95)
    expected = read_frames(data, size=50)
    monkeypatch.setattr(large, "LARGE", 1000)
    found = read_frames(data, size=50)
    assert found.info == expected.info
    assert np.abs(found.frames.astype(int) - expected.frames).mean() < 3


def test_a_large_picture_is_whole_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = scene("RGB")
    monkeypatch.setattr(large, "LARGE", 1000)
    np.testing.assert_array_equal(read_frames(picture).frames[0], picture)
    assert probe(picture).width == 600
    np.testing.assert_array_equal(read_frames(picture, size=600).frames[0], picture)


def test_a_broken_large_picture_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(scene("RGB"))
    monkeypatch.setattr(large, "LARGE", 1000)
    with pytest.raises(VideoError, match="cannot be decoded"):
        probe(data[: len(data) // 2])


def test_frames_as_files_in_memory() -> None:
    pictures = [scene("RGB").rotate(turn) for turn in (0, 90, 180)]
    found, expected = read_frames([encoded(each) for each in pictures]), read_frames(pictures)
    np.testing.assert_array_equal(found.frames, expected.frames)
    np.testing.assert_array_equal(found.timestamps_s, expected.timestamps_s)
    assert found.info.codec == "png"
    with pytest.raises(VideoError, match="frame 1 cannot be read: it is no picture"):
        read_frames([encoded(pictures[0]), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])


GROWTH = """
import sys, warnings; warnings.simplefilter("ignore")
from bombs import peak_mb, png
from hicom import read_frames
read_frames([png(8, 8)], size=384)
before = peak_mb()
source = png(12_000, 12_000) if sys.argv[1] == "picture" else [png(3072, 3072)] * 12
print(read_frames(source, size=384).frames.shape, peak_mb() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory")
@pytest.mark.parametrize(("source", "most_mb"), [("picture", 400), ("frames", 250)])
def test_memory_of_blank_pictures(source: str, most_mb: int) -> None:
    """12,000 x 12,000 pixels took 2.1 GB."""
    paths = [str(Path(hicom.__file__).parents[1]), str(Path(__file__).parents[1])]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}{GROWTH}", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < most_mb


def test_the_bomb_is_one() -> None:
    assert len(png(12_000, 12_000)) < 20_000
