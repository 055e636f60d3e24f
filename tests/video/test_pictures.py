"""Pictures: whole, upright, and a clear error where they are broken."""

import io
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features

import hicom.video.pictures
from hicom.video import VideoError, VideoWarning, probe, read_frames
from media import number_frame, read_numbers

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
COLORS = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8)


def four(height: int = 128, width: int = 192) -> Image.Image:
    """Return a picture of four colours."""
    return Image.fromarray(COLORS.repeat(height // 2, 0).repeat(width // 2, 1))


def assert_four(frame: NDArray[np.uint8]) -> None:
    height, width = frame.shape[:2]
    corners = frame[np.ix_([height // 4, 3 * height // 4], [width // 4, 3 * width // 4])]
    assert np.abs(corners.astype(int) - COLORS).max() < 40, corners


# AVIF and HEIC, which may be stored in tiles


def box(kind: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def full_box(kind: bytes, flags: int, *content: bytes) -> bytes:
    return box(kind, struct.pack(">I", flags), *content)


def find(data: bytes, kind: bytes) -> bytes:
    """Return the first box of a kind, with its header."""
    start = data.index(kind) - 4
    return data[start : start + int.from_bytes(data[start : start + 4], "big")]


def avif_grid(picture: Image.Image, turns: int = 0) -> bytes:
    """Return an AVIF of 2 x 2 tiles (ISO/IEC 23008-12, 6.6.2.3), turned by quarters counterclockwise."""
    width, height = picture.width // 2, picture.height // 2
    tiles, shared = [], b""
    for y in (0, height):
        for x in (0, width):
            file = io.BytesIO()
            picture.crop((x, y, x + width, y + height)).save(file, "AVIF", quality=95)
            data = file.getvalue()
            shared = find(data, b"av1C") + find(data, b"pixi")
            tiles.append(find(data, b"mdat")[8:])
    grid = struct.pack(">BBBBHH", 0, 0, 1, 1, picture.width, picture.height)
    items = [grid, *tiles]

    def meta(offset: int) -> bytes:
        places = b""
        for number, item in enumerate(items):
            places += struct.pack(">HHHII", number + 1, 0, 1, offset, len(item))
            offset += len(item)
        sizes = [full_box(b"ispe", 0, struct.pack(">II", *size)) for size in (picture.size, (width, height))]
        properties = box(b"ipco", *sizes, shared, box(b"irot", bytes([turns])))
        links = struct.pack(">I", 5) + struct.pack(">HBBB", 1, 2, 1, 0x85)
        links += b"".join(struct.pack(">HBBBB", number, 3, 2, 0x83, 4) for number in range(2, 6))
        entries = [
            full_box(b"infe", 0x2000000, struct.pack(">HH4s", number + 1, 0, kind), b"\0")
            for number, kind in enumerate([b"grid", *[b"av01"] * 4])
        ]
        return full_box(
            b"meta",
            0,
            full_box(b"hdlr", 0, bytes(4), b"pict", bytes(13)),
            full_box(b"pitm", 0, struct.pack(">H", 1)),
            full_box(b"iloc", 0, struct.pack(">HH", 0x4400, 5), places),
            full_box(b"iinf", 0, struct.pack(">H", 5), *entries),
            full_box(b"iref", 0, box(b"dimg", struct.pack(">HHHHHH", 1, 4, 2, 3, 4, 5))),
            box(b"iprp", properties, full_box(b"ipma", 0, links)),
        )

    head = box(b"ftyp", b"avif", bytes(4), b"avifmif1miaf")
    start = len(head) + len(meta(0)) + 8
    return head + meta(start) + box(b"mdat", *items)


def heic(picture: Image.Image, orientation: int = 1, **options: Any) -> bytes:
    """Return a HEIC; its orientation is told twice, as phones do: as the file's own, and in Exif."""
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    made = pillow_heif.from_pillow(picture)
    exif = Image.Exif()
    exif[0x112] = orientation
    made[0].info["exif"] = exif.tobytes()
    made.save(file, quality=95, **options)
    return file.getvalue()


@needs_avif
@pytest.mark.parametrize("turns", [0, 1])
def test_an_avif_of_tiles_is_whole(tmp_path: Path, turns: int) -> None:
    path = tmp_path / "grid.avif"
    path.write_bytes(avif_grid(four(), turns))
    for source in (path, path.read_bytes(), [path], [str(path), str(path)]):
        frame = read_frames(source, num_frames=1).frames[0]
        assert frame.shape == ((192, 128, 3) if turns else (128, 192, 3))
        assert_four(np.rot90(frame, -turns))
    info = probe(path)
    assert (info.width, info.height) == ((128, 192) if turns else (192, 128))
    assert read_frames(path, size=96).frames.shape[1:] == ((96, 64, 3) if turns else (64, 96, 3))


@needs_avif
def test_an_avif_of_tiles_that_only_ffmpeg_reads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.avif"
    path.write_bytes(avif_grid(four()))
    plain = io.BytesIO()
    four().save(plain, "AVIF", quality=95)
    monkeypatch.setattr(Image, "OPEN", {key: value for key, value in Image.OPEN.items() if key != "AVIF"})
    with pytest.raises(
        VideoError, match="grid.avif: the picture is stored in tiles, .* Pillow 11.3 or newer reads AVIF"
    ):
        read_frames(path)
    with pytest.raises(VideoError, match="it is AVIF, which Pillow 11.3 or newer reads"):
        read_frames([path])
    assert_four(read_frames(plain.getvalue()).frames[0])


def test_a_heic_of_tiles_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "photo.heic"
    path.write_bytes(heic(four(256, 384), tile_size=128))
    for source in (path, path.read_bytes(), [path], tmp_path):
        assert_four(read_frames(source).frames[0])
    assert (probe(path).width, probe(path).height) == (384, 256)


def test_heic_stands_upright_and_on_white() -> None:
    turned = heic(four(), 6)
    assert turned.count(b"irot") == turned.count(b"Exif") - 1 == 1
    assert_four(np.rot90(read_frames(turned).frames[0]))
    clear = four().convert("RGBA")
    clear.putalpha(0)
    assert read_frames(heic(clear)).frames.min() > 250


def test_a_heic_of_tiles_without_the_extra_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.heic"
    path.write_bytes(heic(four(256, 384), tile_size=128))
    plain = heic(four())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(VideoError, match=r"photo.heic: the picture is stored in tiles, .* pip install 'hicom\[heif\]'"):
        read_frames(path)
    with pytest.raises(VideoError, match=r"it is HEIC; pip install 'hicom\[heif\]'"):
        read_frames(tmp_path)
    assert_four(read_frames(plain).frames[0])


def test_reading_heic_changes_nothing_for_others() -> None:
    data = heic(four())
    code = "import io, sys, hicom; from PIL import Image; data = sys.stdin.buffer.read(); hicom.read_frames(data)\n"
    code += "try: Image.open(io.BytesIO(data))\nexcept Image.UnidentifiedImageError: print('unknown')"
    assert subprocess.run([sys.executable, "-c", code], input=data, capture_output=True).stdout.split() == [b"unknown"]


@needs_avif
@pytest.mark.parametrize("has_alpha", [False, True])
def test_an_animated_avif_keeps_its_times(tmp_path: Path, has_alpha: bool) -> None:
    pictures = [Image.fromarray(number_frame(number)) for number in range(4)]
    if has_alpha:
        for picture in pictures:
            picture.putalpha(Image.fromarray(np.repeat([[0, 255]], [16, 80], 1).repeat(64, 0).astype(np.uint8)))
    path = tmp_path / "clip.avif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[100, 200, 300, 400], quality=95)
    clip = read_frames(path)
    assert np.allclose(clip.timestamps_s, [0, 0.1, 0.3, 0.6])
    assert clip.info.duration_s == pytest.approx(1.0)
    assert (clip.frames[:, :, :12].min() > 250) == has_alpha
    clip.frames[:, :, :24] = 225  # the first block is white
    clip.frames[:, 16:, :24] = number_frame(0)[16:, :24]
    assert read_numbers(clip.frames[:, :16]) is not None


# Frames that are files


@pytest.mark.parametrize("suffix", ["gif", "avif", "tga", "jp2", "pbm", "heic", "JPE"])
def test_a_folder_of_any_kind_of_picture(tmp_path: Path, suffix: str) -> None:
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    for number in range(3):
        picture = Image.fromarray(number_frame(number))
        path = tmp_path / f"frame{number}.{suffix}"
        if suffix == "heic":
            path.write_bytes(heic(picture))
        else:
            (picture.convert("L").point(lambda value: value > 128, "1") if suffix == "pbm" else picture).save(path)
    assert read_numbers(read_frames(tmp_path).frames) == [0, 1, 2]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_a_clip_is_no_frame_of_a_folder(tmp_path: Path, suffix: str) -> None:
    pictures = [Image.fromarray(number_frame(number)) for number in range(3)]
    pictures[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=pictures[1:])
    with pytest.raises(VideoError, match=rf"a\.{suffix}, holds 3 frames; give it alone, as a video"):
        read_frames(tmp_path)


# Broken files


def encoded(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    pictures = [Image.fromarray(number_frame(number)) for number in range(3)]
    more = {"save_all": True, "append_images": pictures[1:]} if options.pop("animated", False) else {}
    pictures[0].save(file, kind, **more, **options)
    return file.getvalue()


KINDS: dict[str, Callable[[], bytes]] = {
    "png": lambda: encoded("PNG"),
    "apng": lambda: encoded("PNG", animated=True),
    "gif": lambda: encoded("GIF", animated=True),
    "webp": lambda: encoded("WEBP"),
    "animated webp": lambda: encoded("WEBP", animated=True),
    "bmp": lambda: encoded("BMP"),
    "tiff": lambda: encoded("TIFF", compression="tiff_lzw"),
    "ppm": lambda: encoded("PPM"),
    "jpeg": lambda: encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
    "avif": lambda: encoded("AVIF"),
    "animated avif": lambda: encoded("AVIF", animated=True),
}


def mutants(data: bytes, rng: np.random.Generator, count: int) -> list[bytes]:
    """Return copies with bytes changed (headers more often), cut, or doubled."""
    found = []
    for number in range(count):
        changed = bytearray(data)
        reach = len(data) if number % 2 else min(len(data), 120)
        for place in rng.integers(0, reach, rng.integers(1, 6)):
            changed[place] = rng.integers(0, 256)
        if number % 5 == 3:
            del changed[int(rng.integers(1, len(data))) :]
        if number % 5 == 4:
            first, last = sorted(int(each) for each in rng.integers(0, len(data), 2))
            changed[first:first] = changed[first:last]
        found.append(bytes(changed))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_broken_pictures_are_told(tmp_path: Path, kind: str) -> None:
    if "avif" in kind and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    rng = np.random.default_rng(28)
    path = tmp_path / "frame.png"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in mutants(KINDS[kind](), rng, 40):
            path.write_bytes(data)
            for source in (data, [path]):
                try:
                    read_frames(source, num_frames=2, size=32)
                except VideoError as error:
                    assert "\n" not in str(error)
                    assert str(path) in str(error) or "video of" in str(error)


def test_a_cut_apng_is_told() -> None:
    data = encoded("PNG", animated=True)
    start = data.index(b"acTL")
    broken = data[: start - 4] + struct.pack(">I", 2) + b"acTL" + b"\0\0" + bytes(4) + data[start + 16 :]
    with pytest.raises(VideoError, match="video of .* bytes: cannot be read: "):
        read_frames(broken)


# Memory


@pytest.mark.slow
def test_a_huge_picture_is_decoded_once(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    Image.new("RGB", (12000, 12000), "red").save(path, compress_level=1)
    code = (
        "import resource, sys, warnings; warnings.simplefilter('ignore'); from hicom.video import read_frames\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert read_frames(sys.argv[1], size=384).frames.shape == (1, 384, 384, 3)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    # Pillow holds 4 bytes a pixel, 576 MB; three more copies were made of it.
    assert int(done.stdout) < 700_000


def test_no_warning_where_a_picture_is_plain(tmp_path: Path) -> None:
    Image.fromarray(number_frame(3)).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error", VideoWarning)
        assert read_numbers(read_frames(tmp_path / "a.png").frames) == [3]
    assert hicom.video.pictures.heif_kind(io.BytesIO(b"")) == ("", False)
