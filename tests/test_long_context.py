"""Trained on 32 frames, asked about 64 or 128: nothing is cut or changed without a word, and what changes is known."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from einops import repeat

import tiny
from hicom.inference import VideoChat
from hicom.model import ops
from hicom.model.compressor import HybridCompressor
from hicom.model.config import context_length
from hicom.model.generation import PromptError, PromptWarning
from media import read_numbers, write_video

QUESTION = "which object moves left ?"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "release": {"dialect": "release", "local_injection": "coarse"},
    "beyond": {"match_evidence": True, "motion_features": True, "num_pointers": 2},
}


def make_compressor(window: ops.Window = (4, 3, 3), num_global_tokens: int = 4, **options: Any) -> HybridCompressor:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"window": window, "num_global_tokens": num_global_tokens, **options}
    compressor = HybridCompressor(dim=16, out_dim=12, **fields)
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return compressor.eval()


def tokens_of(compressor: HybridCompressor, values: torch.Tensor, num_frames: list[int]) -> tuple[torch.Tensor, ...]:
    """Return the tokens of videos under one instruction."""
    instruction = torch.linspace(-1, 1, 16).to(values).expand(len(num_frames), -1)
    with torch.inference_mode():
        return compressor(values, None, num_frames, instruction).tokens


def split(compressor: HybridCompressor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return local and global tokens."""
    others = compressor.num_global_tokens + compressor.num_pointers
    return tokens[: len(tokens) - others], tokens[len(tokens) - others :][: compressor.num_global_tokens]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 s at 16 frames a second."""
    return write_video(tmp_path_factory.mktemp("media") / "clip.mp4", 256, fps=16, width=40, height=32)


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    model = tiny.model(num_pointers=2, motion_features=True)
    return VideoChat(model, tiny.processor(model.config, num_frames=32))


# What more frames change in the compressor.


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_start_of_a_longer_video_has_the_same_local_tokens(options: dict[str, Any]) -> None:
    """At the same times; motion looks two frames ahead, so that the window at the end may differ."""
    compressor = make_compressor(**options)
    video = torch.randn(128, 6, 6, 16)
    short, _ = split(compressor, *tokens_of(compressor, video[:32], [32]))
    for num_frames in (64, 128):
        longer, _ = split(compressor, *tokens_of(compressor, video[:num_frames], [num_frames]))
        assert len(longer) == len(short) * num_frames // 32
        same = len(short) - (4 if compressor.motion is not None else 0)
        torch.testing.assert_close(longer[:same], short[:same])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("num_frames", [64, 128])
def test_the_global_branch_sees_every_frame(options: dict[str, Any], num_frames: int) -> None:
    """The released code cuts videos to 32 frames without a word. In float64, so that one frame of 128 shows."""
    compressor = make_compressor(**options).double()
    video = torch.randn(num_frames, 6, 6, 16, dtype=torch.float64)
    _, before = split(compressor, *tokens_of(compressor, video, [num_frames]))
    for frame in (31, 32, num_frames // 2, num_frames - 1):
        changed = video.clone()
        changed[frame] += 3
        _, after = split(compressor, *tokens_of(compressor, changed, [num_frames]))
        assert ((after - before).abs().amax(1) > 1e-9).all(), f"a global token does not see frame {frame}"


def test_positions_go_on_where_training_ended() -> None:
    """Frames have absolute numbers: those of training keep theirs, and no two are alike."""
    table = ops.sinusoidal_table(128, 64)
    assert torch.equal(table[:32], ops.sinusoidal_table(32, 64))
    distance = torch.cdist(table, table) + torch.eye(128) * 100
    assert distance.min() > 0.5


def test_pointers_know_parts_of_the_video_and_no_frame_numbers() -> None:
    """Every frame four times is the same video to pointers, and another one to the global branch."""
    compressor = make_compressor(num_pointers=2)
    pointers = compressor.pointers
    assert pointers is not None
    assert pointers.injector is not None
    with torch.no_grad():
        for injector in pointers.injector:
            injector.time.weight.zero_()  # the square of the time is that of a frame's centre: nearly the same
            injector.time.bias.zero_()
    video = torch.randn(32, 6, 6, 16)
    (short,), (longer,) = (
        tokens_of(compressor, x, [len(x)]) for x in (video, repeat(video, "t h w d -> (t n) h w d", n=4))
    )
    torch.testing.assert_close(longer[-2:], short[-2:], atol=1e-4, rtol=1e-4)
    assert (longer[-6:-2] - short[-6:-2]).abs().max() > 1e-2


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunk", [32, 50])
def test_streaming_128_frames_equals_one_shot(options: dict[str, Any], chunk: int) -> None:
    compressor = make_compressor(**options)
    video = torch.randn(128, 6, 6, 16)
    (whole,) = tokens_of(compressor, video, [128])
    stream = compressor.stream(torch.linspace(-1, 1, 16)[None], num_frames=128)
    with torch.inference_mode():
        for part in video.split(chunk):
            stream.push(part)
        torch.testing.assert_close(stream.finish(), whole, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_videos_of_32_and_128_frames_in_one_batch(options: dict[str, Any]) -> None:
    compressor = make_compressor(**options)
    lengths = [32, 128, 64]
    videos = [torch.randn(n, 6, 6, 16) for n in lengths]
    batch = tokens_of(compressor, torch.cat(videos), lengths)
    for together, video in zip(batch, videos, strict=True):
        (alone,) = tokens_of(compressor, video, [len(video)])
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)


# What a user asks for is what happens.


@pytest.mark.parametrize("num_frames", [64, 128])
def test_no_limit_cuts_frames(chat: VideoChat, clip: Path, num_frames: int) -> None:
    video = chat.encode(clip, num_frames=num_frames)
    assert video.num_frames == num_frames
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = chat.ask(video, QUESTION, max_new_tokens=1)
    assert not [warning for warning in caught if issubclass(warning.category, PromptWarning)]
    # A grid of 5x5 under windows of 2x2x2, 3 global tokens and 2 pointers.
    assert answer.num_visual_tokens == num_frames // 2 * 9 + 5


@pytest.mark.parametrize(("fps", "num_frames"), [(2, 32), (4, 64), (8, 128)])
def test_frames_by_rate(chat: VideoChat, clip: Path, fps: int, num_frames: int) -> None:
    video = chat.encode(clip, fps=fps)
    assert video.num_frames == num_frames
    assert video.timestamps_s.tolist() == pytest.approx(np.arange(num_frames) / fps)
    seen = chat.processor.read_video(clip, fps=fps).frames
    assert read_numbers(seen) == list(range(0, 256, 16 // fps))


def test_max_frames_spreads_a_rate_that_is_too_high(chat: VideoChat, clip: Path) -> None:
    """A limit on frames by rate does not cut the end off."""
    video = chat.encode(clip, fps=8, max_frames=32)
    assert video.num_frames == 32
    assert video.timestamps_s[0] < 0.5
    assert video.timestamps_s[-1] > 15.5


@pytest.mark.parametrize("num_frames", [32, 64, 128])
@pytest.mark.parametrize("keep", [True, False])
def test_a_budget_holds_at_every_length(chat: VideoChat, clip: Path, num_frames: int, keep: bool) -> None:
    choice: dict[str, Any] = {} if keep else {"questions": [QUESTION], "max_visual_tokens": 100}
    video = chat.encode(clip, num_frames=num_frames, keep_features=keep, **choice)
    window = {"max_visual_tokens": 100} if keep else {"window": next(iter(video.tokens)).window}
    answer = chat.ask(video, QUESTION, max_new_tokens=1, **window)  # type: ignore[arg-type]
    assert 50 < answer.num_visual_tokens <= 100


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> VideoChat:
    """A model whose LLM was made for 320 tokens: enough for 64 frames, but not for 128."""
    model = tiny.model()
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 320)
    return VideoChat(model, tiny.processor(model.config, num_frames=32))


def test_a_prompt_longer_than_the_llm_was_made_for(narrow: VideoChat, clip: Path) -> None:
    """It is refused where questions are asked; `generate` answers it as other models do, with a warning."""
    video = narrow.encode(clip, num_frames=128)
    turns = [{"role": "user", "content": QUESTION}]
    for ask in (
        lambda: narrow.ask(video, QUESTION, max_new_tokens=1),
        lambda: narrow.ask_each([video, narrow.encode(clip, num_frames=4)], [QUESTION] * 2, max_new_tokens=1),
        lambda: list(narrow.stream(video, QUESTION, max_new_tokens=1)),
        lambda: narrow.reply(turns, [video], max_new_tokens=1),
        lambda: narrow.conversation(video).ask(QUESTION, max_new_tokens=1),
    ):
        with pytest.raises(PromptError, match=r"589 tokens, 579 of them visual.*320 .*fewer frames"):
            ask()
    with pytest.warns(PromptWarning, match=r"589 tokens.*320 .*fewer frames"):
        narrow.model.generate(input_ids=torch.full((1, 589), 7), max_new_tokens=1)


@pytest.mark.parametrize("words", [330, 100_000])
def test_too_long_a_text_is_refused_before_a_video_is_read(narrow: VideoChat, words: int) -> None:
    question = "which object " * words
    for ask in (
        lambda: narrow.ask("nothing.mp4", question),
        lambda: narrow.ask_each(["nothing.mp4"], [question]),
        lambda: next(iter(narrow.stream("nothing.mp4", question))),
        lambda: narrow.reply([{"role": "user", "content": question}], ["nothing.mp4"]),
        lambda: next(narrow.stream_reply([{"role": "user", "content": question}], ["nothing.mp4"])),
    ):
        start = time.process_time()
        with pytest.raises(PromptError, match="320"):
            ask()
        assert time.process_time() - start < 0.5
    history = [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(PromptError, match="the prompt has"):
        narrow.ask_each(["nothing.mp4"], [QUESTION], histories=[history])


def test_an_answer_ends_where_the_context_does(narrow: VideoChat, clip: Path) -> None:
    """One token is room enough, and the answer says that it is cut."""
    video = narrow.encode(clip, num_frames=8)
    length = narrow.ask(video, QUESTION, max_new_tokens=1).num_prompt_tokens
    config = narrow.model.config.text_config
    for room in (1, 3):
        config.max_position_embeddings = length + room
        answer = narrow.ask(video, QUESTION, max_new_tokens=50, min_new_tokens=room)
        assert (answer.num_new_tokens, answer.is_cut) == (room, True)
    config.max_position_embeddings = length
    with pytest.raises(PromptError, match=f"{length} tokens"):
        narrow.ask(video, QUESTION)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 320),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 1280),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 640),
        # Qwen's advice leaves max_position_embeddings as it is; DeepSeek's files name the longer length.
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 320}}, 1280),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 80}}, 320),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 1280),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 40}}, 320),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 40}}, 320),
        (
            {"rope_parameters": {"full": {"rope_type": "linear", "factor": 8.0}, "sliding": {"rope_type": "default"}}},
            2560,
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, 640),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": -1}, None),
    ],
)
def test_how_much_a_language_model_reads(fields: dict[str, Any], expected: int | None) -> None:
    config = SimpleNamespace(**{"max_position_embeddings": 320} | fields)
    assert context_length(config) == expected  # type: ignore[arg-type]


def test_models_without_a_limit_refuse_nothing(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", -1)
    chat = VideoChat(model, tiny.processor(model.config, num_frames=8))
    assert chat.ask(clip, "which object " * 300, max_new_tokens=1).num_prompt_tokens > 600


def test_a_prompt_that_fits_raises_no_alarm(narrow: VideoChat, clip: Path) -> None:
    """Neither alone nor padded on the left, nor under a budget."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)
        videos = [narrow.encode(clip, num_frames=n) for n in (32, 64)]
        assert narrow.ask_each(videos, [QUESTION] * 2, max_new_tokens=1)[1].num_prompt_tokens > 290
        narrow.ask(narrow.encode(clip, num_frames=128), QUESTION, max_visual_tokens=200, max_new_tokens=1)


def test_padding_is_no_part_of_a_prompt(narrow: VideoChat) -> None:
    ids = torch.full((2, 400), 7)
    mask = (torch.arange(400) >= 100).long().expand(2, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)
        narrow.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1)
    with pytest.warns(PromptWarning, match="400 tokens"):
        narrow.model.generate(input_ids=ids, max_new_tokens=1)
