"""Media as callers give them: parts of messages, arrays, tensors, URLs, nested lists."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai.types.chat import ChatCompletionMessage
from PIL import Image

import tiny
from hicom.fetch import FetchLimits
from hicom.model.processing import HIComProcessor
from hicom.video import VideoError, read_frames, sources, write_video

QUESTION = {"type": "text", "text": "what moves left ?"}


@pytest.fixture(scope="module")
def processor() -> HIComProcessor:
    return tiny.processor(tiny.config())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten frames at five a second, each a little brighter than the one before."""
    path = tmp_path_factory.mktemp("media") / "a clip.mp4"
    write_video(path, [np.full((32, 48, 3), 20 * i, np.uint8) for i in range(10)], fps=5)
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "picture.png"
    Image.fromarray(frames(1)[0]).save(path)
    return path


def frames(number: int, height: int = 20, width: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


def pixels(processor: HIComProcessor, *parts: Any, **kwargs: Any) -> dict[str, Any]:
    """Return what the processor makes of a user's message."""
    turn = [{"role": "user", "content": [*parts, QUESTION]}]
    return dict(processor.apply_chat_template(turn, tokenize=True, return_dict=True, **tiny.TENSORS, **kwargs))


# Options of one video


def test_options_of_a_part_count(processor: HIComProcessor, clip: Path) -> None:
    def shown(**options: Any) -> list[int]:
        """Return about which frames are shown."""
        found = pixels(processor, {"type": "video", "video": clip, **options})["pixel_values_videos"]
        return [round((float(each.mean()) / 2 + 0.5) * 255 / 20) for each in found[:, :, 8:12]]

    every = {"do_sample_frames": False}
    assert shown(**every) == list(range(10))
    for start, end in (("video_start", "video_end"), ("start_s", "end_s")):
        assert shown(**every, **{start: 1.0, end: 1.6}) == [5, 6, 7]
    assert shown(num_frames=2) == shown(nframes=2) == shown(num_frames=2, max_pixels=400)
    assert len(shown(num_frames=2)) == 2
    assert shown(fps=2.5) == [0, 2, 4, 6, 8]
    assert len(shown(fps=5, max_frames=4)) == 4
    assert shown(timestamps_s=[0.4, 1.2]) == [2, 6]
    assert len(shown()) == 4, "the processor's own number"


def test_each_video_has_its_own_options(processor: HIComProcessor, clip: Path) -> None:
    one, other = ({"type": "video", "video": clip, "num_frames": number} for number in (3, 5))
    plain = {"type": "video", "video": clip}
    assert pixels(processor, one, other, plain)["video_num_frames"].tolist() == [3, 5, 4]
    assert pixels(processor, one, plain, num_frames=2)["video_num_frames"].tolist() == [3, 2]
    by_rate = {"type": "video", "video": clip, "fps": 5}
    assert pixels(processor, by_rate, num_frames=2)["video_num_frames"].tolist() == [10]
    assert pixels(processor, by_rate, max_frames=6)["video_num_frames"].tolist() == [6]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "video", "video": 0, "video_begin": 1.0}, "unknown key 'video_begin'; did you mean 'video_"),
        ({"type": "video", "video": 0, "pfs": 1.0}, "unknown key 'pfs'; did you mean 'fps'"),
        ({"type": "image", "image": 0, "fps": 1.0}, "unknown key 'fps'"),
        ({"type": "text", "text": "what", "fps": 1.0}, "unknown key 'fps'"),
        ({"type": "video", "video": 0, "max_pixels": 100}, "max_pixels=100 cannot be: every frame has the 20x20 = 400"),
        ({"type": "video", "video": 0, "min_pixels": 500}, "min_pixels=500"),
        ({"type": "video", "video": 0, "resized_height": 40}, "resized_height=40"),
        ({"type": "image", "image": 0, "max_pixels": 100}, "type='image': max_pixels=100"),
        ({"type": "video", "video": 0, "path": 0}, "has 2 sources: video, path; give one of them"),
        ({"type": "video", "fps": 1.0}, "has fps, but no video; put its source beside them"),
        ({"type": "video", "video": 0, "nframes": 1, "num_frames": 2}, "two names of one option"),
        ({"type": "video_url", "video_url": {"uri": "a"}}, "unknown key 'uri'; did you mean 'url'"),
        ({"type": "video_url", "video_url": {}}, "needs a 'url'"),
        ({"type": "text"}, "needs 'text', a string"),
        ({"type": "audio", "audio": 0}, "type='audio'"),
        ({"kind": "video"}, "type=None"),
        (7, "a message part is a int"),
        ({"type": "video", "base64": "not base64"}, "not base64"),
        ({"type": "video", "video": np.zeros((2, 9, 9, 3), np.uint8), "start_s": 3.0, "end_s": 2.0}, "not before"),
    ],
)
def test_parts_that_cannot_be_are_refused_by_name(processor: HIComProcessor, part: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pixels(processor, part)


def test_what_a_part_has_not_is_not_there(processor: HIComProcessor, clip: Path) -> None:
    """Rows of data sets have every key in every part."""
    part = {"type": "video", "video": clip, "image": None, "fps": None, "path": None, "text": None}
    found = pixels(processor, part)
    assert found["video_num_frames"].tolist() == [4]


# Forms of sources


def test_forms_of_a_video_are_the_same_frames(processor: HIComProcessor, clip: Path) -> None:
    video = frames(4)
    tensor = torch.from_numpy(video)
    first = tensor.permute(0, 3, 1, 2)
    expected = pixels(processor, {"type": "video", "video": video})
    pictures = [Image.fromarray(each) for each in video]
    for form in (
        {"video": tensor},
        {"video": first},
        {"video": first.numpy()},
        {"video": first.float()},
        {"video": first.float() / 255, "do_rescale": False},
        {"video": first, "input_data_format": "channels_first"},
        {"video": list(video)},
        {"video": list(first)},
        {"frames": pictures},
        {"frames": list(video)},
        {"video": read_frames(video, size=20)},
    ):
        found = pixels(processor, {"type": "video", **form})
        assert all(torch.equal(found[name], expected[name]) for name in expected), form.keys()


def test_layouts_that_shapes_do_not_tell(processor: HIComProcessor) -> None:
    video = frames(2, 3, 3)
    last = pixels(processor, {"type": "video", "video": video})["pixel_values_videos"]
    first = pixels(processor, {"type": "video", "video": video, "input_data_format": "channels_first"})
    assert not torch.equal(first["pixel_values_videos"], last)
    turned = pixels(processor, {"type": "video", "video": np.moveaxis(video, 1, -1)})["pixel_values_videos"]
    assert torch.equal(first["pixel_values_videos"], turned)


@pytest.mark.parametrize(
    ("video", "options", "words"),
    [
        (torch.rand(2, 3, 9, 9), {}, "where 1 is white, pass do_rescale=False"),
        (torch.rand(2, 3, 9, 9) * 300, {}, "must be from 0 to 255"),
        (torch.rand(2, 3, 9, 9) - 0.5, {"do_rescale": False}, "must be from 0 to 1"),
        (torch.full((2, 3, 9, 9), float("nan")), {}, "nan"),
        (torch.zeros(2, 3, 9, 9, dtype=torch.uint8), {"do_rescale": False}, "do_rescale=False is for frames from 0"),
        ([Image.new("RGB", (9, 9))], {"do_rescale": False}, "do_rescale=False is for arrays and tensors"),
        ("clip.mp4", {"do_rescale": False}, "leave it out for files"),
        (torch.zeros(2, 3, 9, 9, dtype=torch.int64), {}, "frames must be uint8"),
        (torch.zeros(2, 1, 9, 9, dtype=torch.uint8), {}, "frames must be uint8"),
        (torch.zeros(2, 3, 9, 9, dtype=torch.uint8), {"input_data_format": "last"}, "channels_first"),
    ],
)
def test_numbers_that_are_no_pixels_are_refused(
    processor: HIComProcessor, video: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        pixels(processor, {"type": "video", "video": video, **options})


def test_lists_of_videos(processor: HIComProcessor, clip: Path, picture: Path) -> None:
    one, other = frames(2), frames(3, seed=1)

    def counts(text: Any, videos: Any) -> list[int]:
        found = processor(text=text, videos=videos)
        return found["video_num_frames"].tolist() if "video_num_frames" in found else []

    two = "<video><video> what ?"
    assert counts("<video> what ?", one) == counts("<video> what ?", [one]) == counts("<video> what ?", [[one]]) == [2]
    assert counts(two, [one, other]) == counts(two, [[one, other]]) == counts(two, [[[one, other]]]) == [2, 3]
    assert counts(["<video> what ?"] * 2, [[one], [other]]) == [2, 3]
    assert counts(two, np.stack([one, one])) == counts(two, torch.from_numpy(np.stack([one, one]))) == [2, 2]
    assert (
        counts("<video> what ?", list(one)) == counts("<video> what ?", [Image.fromarray(each) for each in one]) == [2]
    )
    assert counts(two, [list(one), [Image.fromarray(each) for each in other]]) == [2, 3]
    assert counts(two, [str(clip), clip]) == counts(two, [[str(clip)], [clip]]) == [4, 4]
    assert counts("<video> what ?", [[str(picture), picture]]) == [2], "paths of pictures in a list are frames"
    assert counts(two, [picture, str(picture)]) == [1, 1], "as before"
    assert counts(two, [{"video": clip, "num_frames": 2}, clip]) == [2, 4]
    assert counts("what ?", []) == counts("what ?", [[]]) == counts(["what ?"] * 2, [[], []]) == []
    with pytest.raises(ValueError, match=r"\[1, 2\] video placeholders, but their lists have \[2, 1\] videos"):
        counts(["<video> what ?", "<video><video> what ?"], [[one, other], [one]])
    with pytest.raises(ValueError, match="no video with a source"):
        counts("<video> what ?", [{"type": "text", "text": "what"}])


def test_lists_of_images(processor: HIComProcessor, picture: Path) -> None:
    one = frames(1)[0]

    def count(text: Any, images: Any) -> int:
        return len(processor(text=text, images=images).get("pixel_values", ()))

    two = "<image><image> what ?"
    tensor = torch.from_numpy(one).permute(2, 0, 1)
    forms = (one, Image.fromarray(one), tensor, picture, str(picture), picture.read_bytes(), {"image": one})
    expected = processor(text="<image> what ?", images=one)["pixel_values"]
    for form in forms:
        assert torch.equal(processor(text="<image> what ?", images=form)["pixel_values"], expected)
    assert count(two, [one, tensor]) == count(two, [[one, tensor]]) == count(two, np.stack([one, one])) == 2
    assert count(two, [np.stack([one, one])]) == 2
    assert count(["<image> what ?", two], [[one], [one, one]]) == 3
    assert count("what ?", []) == count("what ?", [[]]) == count("what ?", [None]) == 0
    assert count(["<image> what ?", "what ?"], [[one], None]) == 1, "as TRL passes prompts without images"
    with pytest.raises(ValueError, match=r"\[0, 1\] image placeholders, but their lists have \[1, 0\]"):
        count(["what ?", "<image> what ?"], [[one], None])
    with pytest.raises(ValueError, match="2 image placeholders, but 1 images"):
        count(two, [one])


def test_forms_of_parts_that_others_write(processor: HIComProcessor, clip: Path, picture: Path) -> None:
    video, image = ({"type": kind, kind: path} for kind, path in (("video", clip), ("image", picture)))
    expected = pixels(processor, video, image)
    text = base64.b64encode(clip.read_bytes()).decode()
    still = base64.b64encode(picture.read_bytes()).decode()
    for one, other in (
        ({"type": "video", "path": str(clip)}, {"type": "image", "path": str(picture)}),
        ({"type": "video", "url": clip.as_uri()}, {"type": "image", "url": picture.as_uri()}),
        ({"type": "video", "base64": text}, {"type": "image", "base64": still}),
        ({"type": "video", "video": clip.as_uri()}, {"type": "image", "image": picture.as_uri()}),
        (
            {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{text}"}},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{still}", "detail": "high"}},
        ),
        ({"type": "video_url", "video_url": clip.as_uri()}, {"type": "input_image", "image_url": picture.as_uri()}),
        ({"video": clip}, {"image": picture}),
    ):
        found = pixels(processor, one, other)
        assert all(torch.equal(found[name], expected[name]) for name in expected), (one.keys(), other.keys())


def test_frames_in_a_data_url(processor: HIComProcessor) -> None:
    def encoded(frame: np.ndarray) -> str:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    video = frames(3)
    url = "data:video/jpeg;base64," + ",".join(encoded(frame) for frame in video)
    found = pixels(processor, {"type": "video", "url": url})["pixel_values_videos"]
    assert torch.equal(found, pixels(processor, {"type": "video", "video": video})["pixel_values_videos"])


def test_messages_of_every_role(processor: HIComProcessor) -> None:
    turns = [
        {"role": "system", "content": ["describe", "the video"]},
        {"role": "user", "content": "is there a dog ?", "name": None},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "yes"},
    ]
    assert processor.apply_chat_template(turns) == (
        "<|im_start|>system\ndescribe\nthe video<|im_end|>\n<|im_start|>user\nis there a dog ?<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>tool\nyes<|im_end|>\n"
    )
    answer = ChatCompletionMessage(role="assistant", content="a dog")
    as_dictionary = {"role": "assistant", "content": "a dog"}
    assert processor.apply_chat_template([answer]) == processor.apply_chat_template([as_dictionary])
    for wrong, words in (
        ([{"content": "what"}], "with 'role' and 'content'"),
        (["what"], "with 'role' and 'content'"),
        ([{"role": "user", "content": 7}], "content is a int"),
    ):
        with pytest.raises(ValueError, match=words):
            processor.apply_chat_template(wrong)


def test_placeholders_that_say_again_what_parts_say(processor: HIComProcessor) -> None:
    video, image = {"type": "video", "video": frames(2)}, {"type": "image", "image": frames(1)[0]}

    def text(*parts: Any) -> str:
        return str(processor.apply_chat_template([{"role": "user", "content": list(parts)}]))

    assert text(video, {"type": "text", "text": "<video>\nwhat ?"}) == text(video, {"type": "text", "text": "what ?"})
    assert text(image, video, "<image> <video>\nwhat ?") == text(image, video, "what ?")
    assert text(video, "what <video> ?").count("<video>") == 2
    with pytest.raises(ValueError, match="2 video placeholders, but 1 videos are given; a literal <video> in a text"):
        pixels(processor, video, "what <video> ?")
    with pytest.raises(ValueError, match="3 video placeholders, but 1 videos are given"):
        pixels(processor, video, "<video><video> what ?")


# URLs


class Site(BaseHTTPRequestHandler):
    """Serves a clip, slow and endless answers, and errors."""

    content = b""

    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/clip.mp4?x=1")
            self.end_headers()
            return
        self.send_response(200)
        length = len(self.content) + (7 if self.path == "/short" else 0)
        if self.path not in ("/endless", "/slow"):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.path in ("/endless", "/slow"):
            try:
                for _ in range(100):
                    self.wfile.write(bytes(1000))
                    self.wfile.flush()
                    time.sleep(0.05 if self.path == "/slow" else 0)
            except OSError:
                pass
            return
        self.wfile.write(self.content)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site(clip: Path) -> Iterator[str]:
    Site.content = clip.read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls_are_fetched(processor: HIComProcessor, site: str, clip: Path) -> None:
    expected = pixels(processor, {"type": "video", "video": clip})["pixel_values_videos"]
    for url in (f"{site}/clip.mp4", f"{site}/moved"):
        found = pixels(processor, {"type": "video", "url": url})["pixel_values_videos"]
        assert torch.equal(found, expected)
        assert torch.equal(processor(text="<video> what ?", videos=url)["pixel_values_videos"], expected)


def test_what_cannot_be_fetched_is_told(
    processor: HIComProcessor, site: str, monkeypatch: pytest.MonkeyPatch, clip: Path
) -> None:
    monkeypatch.setattr(sources, "FETCH_LIMITS", FetchLimits(max_bytes=50_000, timeout_s=1.0, allow_private=True))
    for url, words in (
        (f"{site}/missing", "/missing: the media's host answered with status 404; check the URL"),
        (f"{site}/endless", "more than 50,000 bytes"),
        (f"{site}/slow", "took more than 1 s"),
        (f"{site}/short", "ended .* bytes early"),
        ("http://127.0.0.1:1/clip.mp4", "could not be fetched"),
        ("http://", "the media must|URL is malformed|must be http"),
        ("ftp://example.org/clip.mp4", "no way to read ftp://"),
        ("file://elsewhere/clip.mp4", "on another host"),
        ("data:video/mp4,abc", "must be base64"),
        ("file:///no/such/clip.mp4", "no such file"),
    ):
        with pytest.raises(VideoError, match=words):
            pixels(processor, {"type": "video", "url": url})
