"""From a decoded frame to pixels as they are shown: upright, with square pixels, in RGB, on white.

Decoders give pictures as they are stored. The rules here hold for every source, pictures included:

- Transparency: what is transparent lies on white, as Pillow's `alpha_composite` does it.
- Aspect: where a video's pixels are not square, its width is scaled so that they are.
- Orientation: the display matrix of the file is applied, once.
- High dynamic range (PQ, HLG) is not tone-mapped: such videos look pale, and `VideoInfo.notes` says so. The matrix of
  videos that name none is taken as BT.601, as FFmpeg does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import av.error
import numpy as np
from av.codec.context import ThreadType
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from .. import pyav
from ..square import Square
from .types import Pixels, VideoError

_MOST_ASPECT = 4  # of the width to the height of a pixel, or the other way round; no format in use comes near it
_HDR = {16: "PQ", 18: "HLG"}  # AVColorTransferCharacteristic
_USUAL_MATRICES = frozenset({0, 1, 2, 3, 4, 5, 6, 7, 9})  # AVColorSpace; FFmpeg's scaler converts these
# Pictures whose files tell a resolution for printing, which FFmpeg takes for the shape of pixels.
_PICTURE_CODECS = frozenset({"apng", "gif", "png"})


def on_white(image: Image.Image) -> Image.Image:
    """Return a picture without transparency, on white, in mode RGB; one without transparency as it is."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    result = Image.new("RGB", image.size)
    rows = max(1, 2**22 // max(1, image.width))  # a band at a time: a whole one would need three more copies
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        result.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), (0, top))
    return result


def fit(width: int, height: int, size: int | Square | None) -> tuple[int, int]:
    """Return the width and height of a frame after scaling: its longer side has at most `size` pixels."""
    scale = 1.0 if size is None or isinstance(size, Square) else min(1.0, size / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def squared(frame: Pixels, size: int | Square | None) -> Pixels:
    """Return a frame as a square, where one is asked for."""
    return size.make(frame) if isinstance(size, Square) else frame


def alpha_decoder(stream: VideoStream, num_threads: int) -> VideoCodecContext | None:
    """Return a decoder that gives the transparency of VP8 and VP9 in WebM too; None: the usual one gives all there is.

    Transparency is a second picture beside each packet, which FFmpeg's own decoders pass over and libvpx decodes.
    """
    if not _has_alpha_beside(stream):
        return None
    try:
        context = av.CodecContext.create("libvpx" if _codec(stream) == "vp8" else "libvpx-vp9", "r")
    except (ValueError, av.error.FFmpegError):  # this FFmpeg is built without it: `Display.of` says so
        return None
    assert isinstance(context, VideoCodecContext)
    context.thread_type, context.thread_count = ThreadType.AUTO, num_threads
    return context


def _has_alpha_beside(stream: VideoStream) -> bool:
    is_marked = any(key.lower() == "alpha_mode" and value.strip() == "1" for key, value in stream.metadata.items())
    return is_marked and _codec(stream) in ("vp8", "vp9")


def _is_tiled(stream: VideoStream) -> bool:
    """Return whether a stream is a tile, or a thumbnail beside tiles, of a picture (AVIF, HEIC)."""
    tile = getattr(Disposition, "dependent", Disposition(0))
    return bool(stream.disposition & tile) or (
        stream.frames == 1 and any(each.disposition & tile for each in stream.container.streams.video)
    )


def _codec(stream: VideoStream) -> str:
    return str(stream.codec_context.codec.canonical_name)


@dataclass(frozen=True, kw_only=True)
class Display:
    """How the frames of a stream are shown.

    Attributes:
        name: the video, for messages.
        width: of the upright picture with square pixels.
        height: likewise.
        is_turned: the axes are swapped, before flips.
        flip_x: the picture is mirrored left to right.
        flip_y: the picture is turned upside down.
        alpha: pixel formats whose transparency counts.
        notes: what is not as the file wants it.
    """

    name: str
    width: int
    height: int
    is_turned: bool = False
    flip_x: bool = False
    flip_y: bool = False
    uses_alpha: bool = True
    uses_palette_alpha: bool = False
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, container_format: str, stream: VideoStream, frame: VideoFrame) -> Display:
        """Return how a stream is shown, by its first frame.

        Raises:
            VideoError: its colours cannot be converted, or it is a piece of a picture.
        """
        if _is_tiled(stream):
            text = "the picture is stored in tiles, and FFmpeg reads one alone; Pillow 11.3 or newer reads AVIF, and "
            raise VideoError(f"{name}: {text}pip install 'hicom[heif]' HEIC; or convert it to PNG or JPEG")
        codec, notes = _codec(stream), []
        _check_matrix(name, frame)
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        if codec in _PICTURE_CODECS:
            aspect = Fraction(1)
        elif not 1 / Fraction(_MOST_ASPECT) <= aspect <= _MOST_ASPECT:
            notes.append(f"its pixels claim to be {aspect.numerator}:{aspect.denominator}; shown as square")
            aspect = Fraction(1)
        if hdr := _HDR.get(int(stream.codec_context.color_trc)):
            notes.append(f"high dynamic range ({hdr}) is not tone-mapped: colours are pale")
        if _has_alpha_beside(stream) and not _has_alpha(frame):
            notes.append("its transparency is not decoded, as this FFmpeg is built without libvpx: shown opaque")
        width, height = max(1, round(frame.width * aspect)), frame.height
        is_turned, flip_x, flip_y = _orientation(frame)
        return cls(
            name=name,
            width=height if is_turned else width,
            height=width if is_turned else height,
            is_turned=is_turned,
            flip_x=flip_x,
            flip_y=flip_y,
            # The fourth byte of a pixel means nothing in uncompressed AVI.
            uses_alpha=not (codec == "rawvideo" and container_format == "avi"),
            uses_palette_alpha=codec in _PICTURE_CODECS,
            notes=tuple(notes),
        )

    @property
    def is_mirrored(self) -> bool:
        """Whether the stored picture is mirrored, left to right, before it is turned by `rotation`."""
        return (self.flip_x == self.flip_y) if self.is_turned else (self.flip_x != self.flip_y)

    @property
    def rotation(self) -> int:
        """Degrees counterclockwise that the stored picture is turned by to stand upright."""
        if self.is_turned:
            return -90 if self.flip_x else 90
        return 180 if self.flip_y else 0

    def pixels(self, frame: VideoFrame, size: int | Square | None, reformatter: VideoReformatter) -> Pixels:
        """Return a decoded frame as uint8[H, W, 3], as it is shown, scaled to `size`."""
        width, height = fit(self.width, self.height, size)
        if self.is_turned:
            width, height = height, width
        try:
            if self._is_transparent(frame):
                # White comes in before scaling, lest hidden colours run into what is seen.
                frame = VideoFrame.from_ndarray(_blended(frame, reformatter), format="rgb24")
            pixels = np.asarray(pyav.scale(frame, width, height, reformatter).to_ndarray(), np.uint8)
        except (av.error.FFmpegError, OSError, MemoryError) as error:
            raise VideoError(f"{self.name}: a frame cannot be converted to RGB: {error}") from error
        if self.is_turned:
            pixels = pixels.transpose(1, 0, 2)
        return squared(pixels[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1], size)

    def _is_transparent(self, frame: VideoFrame) -> bool:
        return self.uses_alpha and (_has_alpha(frame) or (self.uses_palette_alpha and frame.format.has_palette))


def frame_pixels(frame: VideoFrame, name: str, size: int | Square | None) -> Pixels:
    """Return a single frame that a caller has decoded, as uint8[H, W, 3], as `Display` shows it.

    A frame alone tells its orientation, but not the shape of its pixels.
    """
    _check_matrix(name, frame)
    is_turned, flip_x, flip_y = _orientation(frame)
    width, height = (frame.height, frame.width) if is_turned else (frame.width, frame.height)
    display = Display(name=name, width=width, height=height, is_turned=is_turned, flip_x=flip_x, flip_y=flip_y)
    return display.pixels(frame, size, VideoReformatter())


def _blended(frame: VideoFrame, reformatter: VideoReformatter) -> NDArray[np.uint8]:
    rgba = reformatter.reformat(frame, frame.width, frame.height, "rgba").to_ndarray()
    return np.asarray(on_white(Image.fromarray(np.asarray(rgba, np.uint8), "RGBA")))


def _has_alpha(frame: VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components)


def _check_matrix(name: str, frame: VideoFrame) -> None:
    """Raise VideoError where FFmpeg's scaler does not know the matrix of a frame's colours; old ones take another."""
    if int(frame.colorspace) in _USUAL_MATRICES or frame.format.is_rgb:
        return
    kind = f"{frame.format.name} with matrix {int(frame.colorspace)} of ITU-T H.273"
    raise VideoError(f"{name}: its colours, {kind}, cannot be converted to RGB; convert it to BT.709")


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Return whether to swap the axes and then to flip x and y, so that the picture stands upright."""
    try:
        side_data: Mapping[Any, Any] = frame.side_data
    except ValueError:  # PyAV does not know a kind of data beside it, such as Exif; the angle alone can be had
        turns = round(frame.rotation / 90) % 4
        return turns % 2 == 1, turns in (2, 3), turns in (1, 2)
    if "DISPLAYMATRIX" not in side_data:
        return False, False, False
    # 16.16 fixed point: x' = a x + c y, y' = b x + d y. Angles between right ones go to the nearest.
    a, b, _, c, d = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), np.int32)[:5]
    return (False, bool(a < 0), bool(d < 0)) if abs(a) >= abs(b) else (True, bool(c < 0), bool(b < 0))
