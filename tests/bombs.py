"""Files of strangers: small ones that have a great deal, the memory that they take, and texts that name other files."""

import struct
import zlib
from pathlib import Path

# Of a file or port {0}.
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{0}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile '{0}'\n"
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {0} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S" '
    'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp2t">'
    '<Representation id="1" bandwidth="1"><BaseURL>{0}</BaseURL></Representation></AdaptationSet></Period></MPD>'
)


def png(width: int, height: int) -> bytes:
    """Return a blank picture of one bit a pixel, of a thousandth of a byte each."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def peak_mb() -> float:
    """Return the most memory that this process has had so far."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def table(video: bytes, samples: int) -> bytes:
    """Return an mp4 of one track that says that it has so many samples, of a byte each."""
    data = bytearray(video)
    struct.pack_into(">II", data, data.index(b"stsz") + 8, 1, samples)
    struct.pack_into(">I", data, data.index(b"stts") + 12, samples)
    struct.pack_into(">I", data, data.index(b"stsc") + 16, samples)
    return bytes(data)
