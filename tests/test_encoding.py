"""Encoding in chunks: the same features and answers as at once, memory that does not grow, live input, the cache."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from hicom import VideoChat
from hicom.data.cache import CacheWarning, FeatureCache
from hicom.encoding import EncodedVideo, check_memory, feature_bytes, free_memory
from hicom.video import VideoError, read_frames
from media import big_buck_bunny, write_video

QUESTIONS = ["which object moves left ?", "is there a dog in the video ?", "how many red ?"]
FORMS: dict[str, dict[str, Any]] = {
    "direct, coarse": {},
    "coarse, fine": {"local_injection": "coarse", "global_injection": "fine"},
    "local only": {"num_global_tokens": 0},
    "global only": {"window": None},
    "unconditional": {"local_injection": "none", "global_injection": "none"},
    "beyond": {"match_evidence": True, "motion_features": True, "num_pointers": 2, "num_word_pointers": 1},
    "release": {"dialect": "release", "local_injection": "coarse"},
}


def make_chat(cache: Any = None, **kwargs: Any) -> VideoChat:
    model = tiny.model(**kwargs)
    return VideoChat(model, tiny.processor(model.config, num_frames=6), cache=cache)


def frames(number: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 24, 20, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    write_video(path, 60, width=40, height=32)
    return path


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hicom.encoding.FRAMES_PER_PASS", 4)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_kept_gives_the_same_tokens(form: str, clip: Path) -> None:
    chat = make_chat(**FORMS[form])
    window = None if form == "global only" else (3, 2, 2)
    whole = chat.encode(clip, num_frames=13)
    part = chat.encode(clip, num_frames=13, keep_features=False, questions=QUESTIONS, window=window)
    assert part.features is None
    assert part.num_patches == whole.num_patches
    texts = QUESTIONS if chat.model.config.is_conditional else QUESTIONS[:1]
    with torch.inference_mode():
        rows = chat._visual_tokens([[whole]] * len(texts), texts, window)
    assert len(part.tokens) == len(texts)
    for tokens, (expected,) in zip(part.tokens.values(), rows, strict=True):
        torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=2e-5)
    assert chat.ask(part, QUESTIONS, window=window, max_new_tokens=4) == chat.ask(
        whole, QUESTIONS, window=window, max_new_tokens=4
    )
    torch.testing.assert_close(part.summary, whole.summary)


def test_nothing_kept_answers_only_what_was_asked_for(clip: Path) -> None:
    chat = make_chat()
    video = chat.encode(clip, keep_features=False, questions=QUESTIONS[:1])
    assert chat.ask(video, QUESTIONS[0], max_new_tokens=2)
    for text, options in ((QUESTIONS[1], {}), (QUESTIONS[0], {"window": (1, 1, 1)})):
        with pytest.raises(
            ValueError, match=r"features were not kept.*'which object moves left \?' \(window \(2, 2, 2\)\)"
        ):
            chat.ask(video, text, max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="needs the questions"):
        chat.encode(clip, keep_features=False)
    with pytest.raises(ValueError, match="keep_features=False only"):
        chat.encode(clip, questions=QUESTIONS)
    with pytest.raises(ValueError, match="chosen when asking"):
        chat.encode(clip, window=(1, 1, 1))
    with pytest.raises(ValueError, match="both choose the window"):
        chat.encode(clip, keep_features=False, questions=QUESTIONS, window=(1, 1, 1), max_visual_tokens=90)
    pooling = make_chat(compressor="space_time_pool", compressor_options={"window": [3, 5, 5]})
    with pytest.raises(ValueError, match="this model has space_time_pool"):
        pooling.encode(clip, keep_features=False, questions=QUESTIONS)


def test_a_budget_picks_the_window_for_the_length(clip: Path) -> None:
    chat = make_chat()
    for num_frames, budget in ((6, 40), (30, 40), (60, 40)):
        video = chat.encode(
            clip, num_frames=num_frames, keep_features=False, questions=QUESTIONS[:1], max_visual_tokens=budget
        )
        ((steering, tokens),) = video.tokens.items()
        assert len(tokens) <= budget
        kept = chat.encode(clip, num_frames=num_frames)
        assert chat.ask(kept, QUESTIONS[0], max_visual_tokens=budget, max_new_tokens=2) == chat.ask(
            video, QUESTIONS[0], window=steering.window, max_new_tokens=2
        )


def test_features_are_those_of_frames_read_at_once(clip: Path) -> None:
    chat = make_chat()
    for choice in ({"num_frames": 11}, {"fps": 7.0}, {"timestamps_s": [1.0, 0.2, 0.2, 1.5, 0.0]}, {"num_frames": 4}):
        video = chat.encode(clip, **choice)  # type: ignore[arg-type]
        read = read_frames(clip, size=20, **choice)  # type: ignore[arg-type]
        assert video.timestamps_s.tolist() == read.timestamps_s.tolist()
        with torch.inference_mode():
            expected = chat.model.encode_frames(chat.processor.pixel_values(read.frames))
        torch.testing.assert_close(video.kept_features.values, expected.values)
        torch.testing.assert_close(video.kept_features.keys, expected.keys)


def test_damaged_frames_start_it_anew(tmp_path: Path, clip: Path) -> None:
    """Damage shows while chunks are on their way; the result is that of reading at once."""
    data = bytearray(clip.read_bytes())
    start = len(data) // 2
    data[start : start + 300] = bytes(300)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    chat = make_chat()
    with pytest.warns(UserWarning, match="frames decode; using those"):
        read = read_frames(broken, size=20, num_frames=12)
    with pytest.warns(UserWarning, match="frames decode; using those"):
        video = chat.encode(broken, num_frames=12)
    assert video.timestamps_s.tolist() == read.timestamps_s.tolist()
    with torch.inference_mode():
        expected = chat.model.encode_frames(chat.processor.pixel_values(read.frames)).values
    torch.testing.assert_close(video.kept_features.values, expected)
    assert video.info.damage


def test_decoding_and_encoding_overlap(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the vision tower is at the first chunk, the second one is read; the timings add up to the whole."""
    chat = make_chat()
    prepare, encode = chat.processor.pixel_values, chat.model.encode_frames
    prepared: list[int] = []
    second = threading.Event()

    def noted(frames: np.ndarray) -> torch.Tensor:
        prepared.append(threading.get_ident())
        if len(prepared) == 2:
            second.set()
        return prepare(frames)

    def waiting(pixels: torch.Tensor) -> Any:
        assert second.wait(10), "nothing is read while the vision tower is at work"
        return encode(pixels)

    monkeypatch.setattr(chat.processor, "pixel_values", noted)
    monkeypatch.setattr(chat.model, "encode_frames", waiting)
    start = time.perf_counter()
    video = chat.encode(clip, num_frames=40)
    assert sum(video.timings.values()) == pytest.approx(time.perf_counter() - start, abs=0.2)
    assert len(prepared) == 10
    assert threading.get_ident() not in prepared


def test_an_error_while_encoding_leaves_no_thread(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = make_chat()
    before = threading.active_count()

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(chat.model, "encode_frames", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        chat.encode(clip, num_frames=40)
    assert threading.active_count() == before
    with pytest.raises(VideoError, match="no such file"):
        chat.encode("nowhere.mp4")


# Live


@pytest.mark.parametrize("keep", [True, False])
def test_a_live_video_can_be_asked_at_any_moment(keep: bool) -> None:
    chat = make_chat()
    options = {} if keep else {"keep_features": False, "questions": QUESTIONS}
    live = chat.live(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no frame has arrived"):
        chat.ask(live, QUESTIONS[0])
    moving, seen = frames(11), 0
    for step in (1, 3, 5, 2):
        live.push(moving[seen : seen + step])
        seen += step
        expected = chat.ask(chat.encode(moving[:seen], num_frames=seen), QUESTIONS, max_new_tokens=4)
        assert chat.ask(live, QUESTIONS, max_new_tokens=4) == expected
    assert live.video.timestamps_s.tolist() == [float(i) for i in range(11)]
    assert (live.video.features is None) == (not keep)


def test_a_snapshot_stays_as_it_was() -> None:
    chat = make_chat()
    live = chat.live()
    live.push(frames(3))
    early = live.video
    values = early.kept_features.values.clone()
    live.push(frames(9, seed=1))
    assert early.num_frames == 3
    assert torch.equal(early.kept_features.values, values)
    assert live.video.num_frames == 12


def test_times_of_live_frames() -> None:
    live = make_chat().live(fps=2.0, name="camera 1")
    live.push(frames(2), timestamps_s=[3.0, 3.1])
    live.push(frames(1))
    assert live.video.timestamps_s.tolist() == pytest.approx([3.0, 3.1, 3.6])
    with pytest.raises(ValueError, match="camera 1: timestamps_s must grow"):
        live.push(frames(1), timestamps_s=[3.6])
    with pytest.raises(ValueError, match="2 timestamps_s for 1 frames"):
        live.push(frames(1), timestamps_s=[5.0, 6.0])
    with pytest.raises(ValueError, match=r"push frames as uint8"):
        live.push(np.zeros((2, 8, 8), np.uint8))
    assert live.num_frames == 3
    pointing = make_chat(num_pointers=2)
    with pytest.raises(ValueError, match="pass num_frames"):
        pointing.live(keep_features=False, questions=QUESTIONS)


@pytest.mark.slow
def test_a_whole_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes at one frame a second: in chunks, with nothing kept and live, it is the same film."""
    film = big_buck_bunny(tmp_path)
    if film is None:
        pytest.skip("the film cannot be fetched")
    monkeypatch.undo()  # chunks of the usual size
    chat = VideoChat.from_pretrained("hicom-tiny", device="cpu")
    question, budget = "What happens?", 200
    video = chat.encode(film, fps=1)
    assert video.num_frames == 597
    np.testing.assert_allclose(np.diff(video.timestamps_s), 1, atol=0.05)
    part = chat.encode(film, fps=1, keep_features=False, questions=[question], max_visual_tokens=budget)
    ((steering, tokens),) = part.tokens.items()
    assert 100 < len(tokens) <= budget
    with torch.inference_mode():
        ((expected,),) = chat._visual_tokens([[video]], [question], steering.window)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
    assert chat.ask(part, question, window=steering.window) == chat.ask(video, question, max_visual_tokens=budget)
    read = read_frames(film, size=chat.processor.image_size, fps=1, end_s=100)
    live = chat.live()
    for first in range(0, len(read.frames), 7):
        live.push(read.frames[first : first + 7], read.timestamps_s[first : first + 7].tolist())
    torch.testing.assert_close(live.video.kept_features.values, video.kept_features.values[: live.num_frames])


# On disk


def test_a_second_encoding_comes_from_the_cache(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = make_chat(tmp_path / "cache")
    first = chat.encode(clip, num_frames=9)
    other = tmp_path / "same.mp4"
    other.write_bytes(clip.read_bytes())
    again = make_chat(FeatureCache(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(again.model, "encode_frames", None)
        second = again.encode(other, num_frames=9)
    assert torch.equal(second.kept_features.values, first.kept_features.values)
    assert torch.equal(second.kept_features.keys, first.kept_features.keys)  # type: ignore[arg-type]
    assert second.timestamps_s.tolist() == first.timestamps_s.tolist()
    assert (second.info.name, second.info.fps, second.info.streams) == (str(other), first.info.fps, first.info.streams)
    assert "cache" in second.timings
    assert chat.ask(first, QUESTIONS, max_new_tokens=4) == again.ask(second, QUESTIONS, max_new_tokens=4)


def test_the_cache_knows_what_features_depend_on(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def count() -> int:
        return len(list(folder.glob("*.safetensors")))

    make_chat(folder).encode(clip)
    variants: list[tuple[VideoChat, dict[str, Any]]] = [
        (make_chat(folder), {"num_frames": 7}),
        (make_chat(folder), {"end_s": 1.0}),
        (make_chat(folder), {"timestamps_s": np.array([0.0, 0.5])}),
        (make_chat(folder, seed=1), {}),
        (make_chat(folder, vision_feature_layer=-1), {}),
        (make_chat(folder, local_injection="none", global_injection="none"), {}),
    ]
    double = make_chat(folder)
    double.model.double()
    variants.append((double, {}))
    for number, (chat, choice) in enumerate(variants, 2):
        chat.encode(clip, **choice)
        assert count() == number, choice
    make_chat(folder).encode(clip)
    make_chat(folder).encode(frames())  # arrays are not kept
    make_chat(folder).encode(clip, keep_features=False, questions=QUESTIONS)
    assert count() == len(variants) + 1


def test_a_damaged_entry_is_made_anew(clip: Path, tmp_path: Path) -> None:
    chat = make_chat(tmp_path / "cache")
    first = chat.encode(clip)
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.warns(CacheWarning, match="damaged"):
        second = chat.encode(clip)
    assert torch.equal(second.kept_features.values, first.kept_features.values)
    assert "cache" in chat.encode(clip).timings


# Motion features, which no instruction changes


def test_motion_is_worked_out_once_a_video(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = make_chat(motion_features=True)
    motion = chat.model.model.compressor.motion
    torch.nn.init.normal_(motion.outer.weight)
    videos = [chat.encode(clip, num_frames=number) for number in (5, 3)]
    expected = [chat.ask(chat.encode(clip, num_frames=5), QUESTIONS[0], max_new_tokens=4)]
    expected += chat.ask(chat.encode(clip, num_frames=5), QUESTIONS[1:], max_new_tokens=4)
    counts: list[list[int]] = []
    forward = motion.forward
    monkeypatch.setattr(motion, "forward", lambda *inputs: (counts.append(inputs[2]), forward(*inputs))[1])
    found = [chat.ask(videos[0], QUESTIONS[0], max_new_tokens=4)]
    found += chat.ask(videos[0], QUESTIONS[1:], max_new_tokens=4)
    assert found == expected
    chat.ask_each([videos[0], videos[1]], QUESTIONS[:2], max_new_tokens=1)
    assert counts == [[5], [3]]
    chat.attention(videos[0], QUESTIONS[0])
    assert len(counts) == 2
    # What a file keeps, and what is asked with other weights, is without it.
    assert videos[0].features is not None
    assert not videos[0].features.has_motion


def test_changed_weights_see_their_own_motion(clip: Path) -> None:
    chat = make_chat(motion_features=True)
    motion = chat.model.model.compressor.motion
    torch.nn.init.normal_(motion.outer.weight)
    video = chat.encode(clip)
    before = video.features_for(chat.model)
    with torch.no_grad():
        motion.outer.bias.add_(1.0)
    after = video.features_for(chat.model)
    torch.testing.assert_close(after.values, before.values + 1.0)
    other = make_chat(motion_features=True).model
    for parameter in other.model.compressor.motion.outer.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(video.features_for(other).values, video.kept_features.values), "adds nothing"
    assert video.features_for(make_chat().model) is video.kept_features


# Memory


def test_too_many_frames_are_refused_before_work_starts(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = make_chat()
    per_frame = feature_bytes(chat.model)
    assert per_frame == 25 * (32 + 32) * 4
    video = chat.encode(clip, num_frames=3)
    assert sum(x.nbytes for x in (video.kept_features.values, video.kept_features.keys)) == 3 * per_frame  # type: ignore[union-attr]
    monkeypatch.setattr("hicom.encoding.free_memory", lambda _: 10 * per_frame)
    monkeypatch.setattr(chat.model, "encode_frames", None)
    with pytest.raises(
        ValueError, match=r"features of 20 frames need 0.0 GB.*at most 8 frames \(--num-frames 8\).*low-memory"
    ):
        chat.encode(clip, num_frames=20)
    monkeypatch.undo()
    assert chat.encode(clip, num_frames=8).num_frames == 8
    assert feature_bytes(make_chat(motion_features=True).model) == 2 * per_frame


def test_free_memory_is_measured() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or 10**7 < free < 10**14
    check_memory("clip", 10, 1000, torch.device("cpu"))


def test_features_are_held_once(clip: Path) -> None:
    """No second copy: the tensor that is grown chunk by chunk is as long as the video from the start."""
    video: EncodedVideo = make_chat().encode(clip, num_frames=50)
    storage = video.kept_features.values.untyped_storage()
    assert storage.nbytes() == video.kept_features.values.nbytes
