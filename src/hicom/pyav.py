"""What differs between the versions of PyAV, 15 to 19, in one place: what follows means the same with all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import av
import av.stream
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

_VERSION = int(av.__version__.split(".")[0])
TELLS_STATE = _VERSION >= 16  # whether the side data of packets can be seen
# What a packet may bring for all that follow it: colours, or a new header, which changes the size or how to decode.
_STATE: tuple[Any, ...] = ("palette", "new_extradata", "param_change")

# What FFmpeg may take a file for: the formats that hold all of their pictures themselves. Whoever makes a file also
# chooses its format, and some formats are lists of other files and addresses, which FFmpeg would open with the rights
# of this process: hls, dash, imf, concat, image2 (whole folders, by a pattern in a name), mlv (its neighbours), vobsub,
# sdp, rtp, rtsp and sap (they listen on the network), lavfi, avisynth and vapoursynth (programs), and all devices. So a
# format that is new in FFmpeg is not read until somebody has looked at it and put it here. Neither are SVG, text shown
# as pictures, subtitles, and formats without a header, which would read anything. One name of several is enough: mov is
# mp4, too; its references to other files are off unless they are asked for.
_CONTAINERS = """
    mov matroska avi asf asf_o flv live_flv kux mpeg mpegts mpegvideo m4v ogg rm ivr nut mxf gxf lxf wtv dv swf nsv nuv
    pva ty pmp mtv dhav mpjpeg cine r3d lmlm4 xmv vividas vivo
"""
_BARE_STREAMS = """
    h261 h263 h264 hevc vvc evc av1 obu ivf mjpeg mjpeg_2000 ingenient dirac vc1 vc1test cavsvideo avs2 avs3 dnxhd apv
    ipu yuv4mpegpipe smjpeg
"""
_PICTURES = """
    gif apng ico jpegxl_anim fits filmstrip alias_pix brender_pix bmp_pipe cri_pipe dds_pipe dpx_pipe exr_pipe
    gem_pipe gif_pipe hdr_pipe j2k_pipe jpeg_pipe jpegls_pipe jpegxl_pipe jpegxs_pipe pam_pipe pbm_pipe pcx_pipe
    pfm_pipe pgm_pipe pgmyuv_pipe pgx_pipe phm_pipe photocd_pipe pictor_pipe png_pipe ppm_pipe psd_pipe qdraw_pipe
    qoi_pipe sgi_pipe sunrast_pipe tiff_pipe vbn_pipe webp_pipe xbm_pipe xpm_pipe xwd_pipe
"""
_GAMES = """
    4xm anm avs bethsoftvid bfi bink bmv c93 cdg cdxl dsicin dxa ea ea_cdata film_cpk flic frm gdv hnm idcin iff ifv
    ipmovie iv8 jv luodat mgsts mm moflex msnwctcp mv mvi mxg paf pp_bnk psxstr redspark rl2 roq rpl sga siff
    simbiosis_imx smk smush thp tiertexseq tmv txd usm vmd wc3movie wsvqa yop
"""
_SOUND = "mp3 aac ac3 eac3 dts flac wav w64 aiff ape amr amrnb amrwb au caf mpc mpc8 tta tak wv dsf oma voc xwma"
"""For their covers' sake, and to say that there is no video in them."""
FORMATS = ",".join(f"{_CONTAINERS} {_BARE_STREAMS} {_PICTURES} {_GAMES} {_SOUND}".split())


def open_input(file: Path | IO[bytes], options: Mapping[str, str] | None = None) -> InputContainer:
    """Open a file to read: that one alone, whatever is in it. Metadata that is no UTF-8 is no error.

    Args:
        file: a path, or a file that is open.
        options: of the demuxer.

    Raises:
        av.error.ArgumentError: among others: its format is not one of `FORMATS`.
    """
    how: dict[str, Any] = {"metadata_errors": "replace"} if _VERSION < 19 else {}  # 19 never fails on it
    # Should a format in the list refer to other files after all, it opens nothing on the network, and for an open file
    # nothing at all. The prefix keeps names such as `http:a` a file's.
    is_path = isinstance(file, Path)
    allowed = {"format_whitelist": FORMATS, "protocol_whitelist": "file" if is_path else "pipe"}
    source = f"file:{file}" if is_path else file
    # Not `options`, which go to the streams as well: before 18, PyAV frees more of those than it has made where streams
    # turn up late (ts, mpg, flv, swf), and the process dies.
    return av.open(source, mode="r", container_options={**(options or {}), **allowed}, **how)


def read_only(container: InputContainer, stream: VideoStream) -> None:
    """Let FFmpeg pass over the packets of all other streams, where PyAV can ask for that; it is faster."""
    if _VERSION >= 18:
        for other in container.streams:
            if other is not stream:
                other.discard = av.stream.Discard.all


def scale(frame: VideoFrame, width: int, height: int, reformatter: VideoReformatter) -> VideoFrame:
    """Return a frame as RGB of another size, in this thread alone where PyAV can start others."""
    how: dict[str, Any] = {"threads": 1} if _VERSION >= 17 else {}
    return reformatter.reformat(frame, width, height, "rgb24", interpolation=Interpolation.BICUBIC, **how)


def count_indexed(stream: VideoStream) -> int | None:
    """Return how many packets a file's index holds, without those that an edit list cuts away; None: PyAV hides it."""
    return len(stream.index_entries) if _VERSION >= 17 else None


def index_entries(stream: VideoStream) -> list[tuple[int, int, int, int]]:
    """Return decoding time, position, size and flags of every packet in a file's index; none where PyAV hides them."""
    if _VERSION < 17:
        return []
    return [(entry.timestamp, entry.pos, entry.size, entry.flags) for entry in stream.index_entries]


def decoder_state(packet: av.Packet[VideoStream]) -> dict[str, Any]:
    """Return what a packet changes in a decoder for the packets after it, by kind; empty where PyAV hides it."""
    if not TELLS_STATE:
        return {}
    # Most packets have none: this is faster than asking for each kind.
    kinds: list[Any] = [each.data_type for each in packet.iter_sidedata()]
    return {kind: packet.get_sidedata(kind) for kind in kinds if kind in _STATE}


def bring_state(packet: av.Packet[VideoStream], state: Any) -> None:
    """Let a packet bring what `decoder_state` returned for another one, so that the decoder has it for this one."""
    packet.set_sidedata(state)
