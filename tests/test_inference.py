"""VideoChat: encode once, ask many; every way of asking gives the same answer."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MaxLengthCriteria

import tiny
from hicom import VideoChat, inference
from hicom.encoding import EncodedVideo
from hicom.inference import Answer, _default_precision, writers
from hicom.model.dual_encoder import InstructionWarning

QUESTIONS = ["which object moves left ?", "is there a dog in the video ?", "how many red ?"]


def frames(number: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 24, 20, 3), dtype=np.uint8)


def make_chat(seed: int = 0, **kwargs) -> VideoChat:
    model = tiny.model(seed=seed, **kwargs)
    return VideoChat(model, tiny.processor(model.config, num_frames=6))


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    return make_chat()


@pytest.fixture(scope="module")
def video(chat: VideoChat) -> EncodedVideo:
    return chat.encode(frames())


def test_many_questions_in_one_batch_equal_one_by_one(chat: VideoChat, video: EncodedVideo) -> None:
    together = chat.ask(video, QUESTIONS, max_new_tokens=6)
    alone = [chat.ask(video, question, max_new_tokens=6) for question in QUESTIONS]
    assert together == alone
    assert len(set(alone)) > 1, "all answers are the same, so this test shows nothing"


def test_streamed_pieces_make_the_answer(chat: VideoChat, video: EncodedVideo) -> None:
    pieces = list(chat.stream(video, QUESTIONS[0], max_new_tokens=12))
    assert len(pieces) > 1
    assert "".join(pieces) == chat.ask(video, QUESTIONS[0], max_new_tokens=12)


def test_threads_of_streams_are_kept(chat: VideoChat, video: EncodedVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that end after matrix products hang others that are at them (MKL)."""
    used: list[threading.Thread] = []
    generate = chat.model.generate
    monkeypatch.setattr(chat.model, "generate", lambda **x: (used.append(threading.current_thread()), generate(**x))[1])
    for _ in range(3):
        list(chat.stream(video, QUESTIONS[0], max_new_tokens=2))
    assert len(used) == 3
    assert threading.current_thread() not in used
    assert all(thread.is_alive() for thread in used)


def test_a_forked_process_has_writers_of_its_own() -> None:
    assert writers().submit(os.getpid).result() == os.getpid()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as processes:
        child, thread = processes.submit(_pids).result(timeout=30)
    assert child == thread != os.getpid()


def _pids() -> tuple[int, int]:
    """Return the pid of this process, and that of its writer."""
    return os.getpid(), writers().submit(os.getpid).result(timeout=10)


def test_a_closed_stream_stops_generating(
    chat: VideoChat, video: EncodedVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    generate = chat.model.generate
    monkeypatch.setattr(chat.model, "generate", lambda **x: lengths.append(generate(**x).shape[1]))
    stream = chat.stream(video, QUESTIONS[0], min_new_tokens=400, max_new_tokens=400)
    next(stream)
    assert not lengths
    stream.close()
    assert len(lengths) == 1, "it generates on"
    assert lengths[0] < 400


def test_own_stopping_criteria_stop_a_stream(chat: VideoChat, video: EncodedVideo) -> None:
    short = "".join(chat.stream(video, QUESTIONS[0], max_new_tokens=12, stopping_criteria=[MaxLengthCriteria(3)]))
    assert short == chat.ask(video, QUESTIONS[0], max_new_tokens=12, stopping_criteria=[MaxLengthCriteria(3)])
    assert short != chat.ask(video, QUESTIONS[0], max_new_tokens=12)


def test_encoder_runs_once_for_many_questions(chat: VideoChat) -> None:
    calls = []
    hook = chat.model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    video = chat.encode(frames())
    chat.ask(video, QUESTIONS, max_new_tokens=2)
    list(chat.stream(video, QUESTIONS[0], max_new_tokens=2))
    hook.remove()
    assert calls == [1]


def test_answer_equals_plain_generate(chat: VideoChat, video: EncodedVideo) -> None:
    """The library's own path and `generate` with a processor's inputs are the same path."""
    message = {
        "role": "user",
        "content": [{"type": "video", "video": frames()}, {"type": "text", "text": QUESTIONS[0]}],
    }
    inputs = chat.processor.apply_chat_template(
        [message], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = chat.model.generate(**inputs, max_new_tokens=6)
    new = ids[0, inputs["input_ids"].shape[1] :]
    text = chat.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert chat.ask(video, QUESTIONS[0], max_new_tokens=6) == text


def test_answer_knows_what_it_cost(chat: VideoChat, video: EncodedVideo) -> None:
    answer = chat.ask(video, QUESTIONS[0], max_new_tokens=2)
    assert isinstance(answer, Answer)
    assert answer.num_visual_tokens == 3 * 3 * 3 + 3
    assert answer.num_uncompressed_tokens == 6 * 25
    assert set(answer.timings) == {"decode", "vision encoder", "compressor", "LLM"}
    assert answer.instruction == QUESTIONS[0]


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({}, [2, 2, 2]),
        ({"window": None}, None),
        ({"compressor": "space_time_pool", "compressor_options": {"window": [3, 5, 5]}}, [3, 5, 5]),
        ({"compressor": "unconditional_global"}, None),
        ({"compressor": "qformer"}, None),
    ],
)
def test_answer_names_the_window_of_its_compressor(options: dict[str, Any], window: list[int] | None) -> None:
    answer = make_chat(**options).ask(frames(), QUESTIONS[0], max_new_tokens=1)
    assert (None if answer.window is None else list(answer.window)) == window


def test_budget_picks_the_window(chat: VideoChat, video: EncodedVideo) -> None:
    for budget in (4, 10, 30, 90):
        answer = chat.ask(video, QUESTIONS[0], max_visual_tokens=budget, max_new_tokens=1)
        assert answer.num_visual_tokens <= budget
    assert chat.ask(video, QUESTIONS[0], window=(1, 1, 1), max_new_tokens=1).num_visual_tokens == 6 * 25 + 3
    with pytest.raises(ValueError, match="max_visual_tokens=3"):
        chat.ask(video, QUESTIONS[0], max_visual_tokens=3)


def test_window_larger_than_the_clip_makes_one_group(chat: VideoChat) -> None:
    answer = chat.ask(chat.encode(frames(2)), QUESTIONS[0], window=(64, 9, 9), max_new_tokens=1)
    assert answer.num_visual_tokens == 1 + 3


def test_conversation_compresses_anew_for_every_question(chat: VideoChat, video: EncodedVideo) -> None:
    conversation = chat.conversation(video)
    first = conversation.ask(QUESTIONS[0], max_new_tokens=4)
    assert first == chat.ask(video, QUESTIONS[0], max_new_tokens=4)
    second = conversation.ask(QUESTIONS[1], max_new_tokens=4)
    assert second.instruction == QUESTIONS[1]
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2
    # The same turns through the processor, with the second question as the instruction.
    turns = [
        {"role": "user", "content": [{"type": "video", "video": frames()}, {"type": "text", "text": QUESTIONS[0]}]},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    inputs = chat.processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = chat.model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert chat.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == second


def test_streamed_turn_joins_the_conversation(chat: VideoChat, video: EncodedVideo) -> None:
    conversation = chat.conversation(video)
    text = "".join(conversation.stream(QUESTIONS[0], max_new_tokens=4))
    assert conversation.messages == [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": text},
    ]


def test_failed_question_leaves_no_trace(chat: VideoChat, video: EncodedVideo) -> None:
    conversation = chat.conversation(video)
    with pytest.raises(ValueError, match="question is empty"):
        conversation.ask("  ")
    assert conversation.messages == []


@pytest.mark.parametrize("copied", [1, 2**25])
def test_questions_about_their_own_videos_in_one_batch(
    chat: VideoChat, video: EncodedVideo, copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "MAX_COPIED", copied)
    other = chat.encode(frames(4, seed=1))
    videos = [video, other, video, other, [video, other], video]
    questions = [*QUESTIONS[:2], *QUESTIONS[:2], QUESTIONS[0], QUESTIONS[0]]
    instructions = [None, None, "what is red ?", None, None, None]
    answers = chat.ask_each(videos, questions, instructions=instructions, max_new_tokens=4)
    for answer, source, question, instruction in zip(answers, videos, questions, instructions, strict=True):
        alone = chat.ask(source, question, instruction=instruction, max_new_tokens=4)
        assert answer == alone
        assert answer.instruction == alone.instruction
        assert answer.num_visual_tokens == alone.num_visual_tokens
        assert answer.num_uncompressed_tokens == alone.num_uncompressed_tokens


def test_questions_and_videos_must_pair(chat: VideoChat, video: EncodedVideo) -> None:
    with pytest.raises(ValueError, match="2 videos, 1 questions and 1 instructions"):
        chat.ask_each([video, video], QUESTIONS[:1])


def test_questions_after_their_own_turns_in_one_batch(chat: VideoChat, video: EncodedVideo) -> None:
    other = chat.encode(frames(4, seed=1))
    system = {"role": "system", "content": "describe the video"}
    turns = [{"role": "user", "content": QUESTIONS[1]}, {"role": "assistant", "content": "a red circle"}]
    histories = [[], turns, [system], [system, *turns]]
    videos = [video, other, other, video]
    questions = [QUESTIONS[0]] * 4
    answers = chat.ask_each(videos, questions, histories=histories, max_new_tokens=6)
    lengths = set()
    for answer, source, question, history in zip(answers, videos, questions, histories, strict=True):
        alone = chat.reply([*history, {"role": "user", "content": question}], [source], max_new_tokens=6)
        assert answer == alone
        assert answer.instruction == question
        assert answer.num_prompt_tokens == alone.num_prompt_tokens
        lengths.add(answer.num_prompt_tokens - answer.num_visual_tokens)
    assert len(lengths) == 4
    assert answers[0] == chat.ask(video, QUESTIONS[0], max_new_tokens=6)


def test_histories_must_fit_the_questions(chat: VideoChat, video: EncodedVideo) -> None:
    with pytest.raises(ValueError, match="1 histories for 2 questions"):
        chat.ask_each([video, video], QUESTIONS[:2], histories=[[]])
    with pytest.raises(ValueError, match="the question is empty"):
        chat.ask_each([video], [" "], histories=[[{"role": "user", "content": QUESTIONS[0]}]])


def test_several_videos_in_one_prompt(chat: VideoChat, video: EncodedVideo) -> None:
    other = chat.encode(frames(4, seed=1))
    answer = chat.ask([video, other], QUESTIONS[0], max_new_tokens=2)
    assert answer.num_visual_tokens == (27 + 3) + (18 + 3)
    assert answer.num_uncompressed_tokens == 10 * 25


def test_replies_are_those_of_a_conversation(chat: VideoChat, video: EncodedVideo) -> None:
    talk = chat.conversation(video)
    first = talk.ask(QUESTIONS[0], max_new_tokens=3)
    second = talk.ask(QUESTIONS[1], max_new_tokens=3)
    messages = [
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    assert chat.reply(messages[:1], [video], max_new_tokens=3) == first
    assert chat.reply(messages, [video], max_new_tokens=3) == second
    system = [{"role": "system", "content": "answer yes"}, *messages]
    answer = chat.reply(system, [video], max_new_tokens=3)
    assert answer.num_prompt_tokens > second.num_prompt_tokens
    assert answer.num_visual_tokens == second.num_visual_tokens
    pieces = chat.stream_reply(messages, [video], max_new_tokens=3)
    texts = []
    while True:
        try:
            texts.append(next(pieces))
        except StopIteration as stop:
            whole = stop.value
            break
    assert "".join(texts) == whole.text == second.text
    assert (whole.num_prompt_tokens, whole.num_new_tokens) == (second.num_prompt_tokens, second.num_new_tokens)


def test_replies_without_a_video(chat: VideoChat, video: EncodedVideo) -> None:
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    answer = chat.reply(messages, max_new_tokens=3)
    assert answer.num_visual_tokens == 0
    ids = chat.processor.apply_chat_template(messages, tokenize=True, return_tensors="pt", add_generation_prompt=True)
    assert answer.num_prompt_tokens == ids.shape[-1]
    expected = chat.model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)[0, ids.shape[-1] :]
    assert answer.text == chat.processor.tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert "".join(chat.stream_reply(messages, max_new_tokens=3)) == answer.text


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "a"}]])
def test_replies_need_a_user_turn(messages: list[dict[str, str]], chat: VideoChat) -> None:
    with pytest.raises(ValueError, match="the last message must be of the user"):
        chat.reply(messages)


def test_answers_count_their_tokens(chat: VideoChat, video: EncodedVideo) -> None:
    cut = chat.ask(video, QUESTIONS[0], max_new_tokens=2)
    assert (cut.num_new_tokens, cut.is_cut) == (2, True)
    end = chat.processor.tokenizer.eos_token_id
    ended = chat.ask(
        video,
        [QUESTIONS[0], "what ?"],
        max_new_tokens=5,
        suppress_tokens=[n for n in range(tiny.VOCABULARY) if n != end],
    )
    assert all((each.num_new_tokens, each.is_cut, each.text) == (1, False, "") for each in ended)
    assert ended[0].num_prompt_tokens > ended[1].num_prompt_tokens > ended[0].num_visual_tokens


def test_error_in_the_generation_thread_reaches_the_caller(chat: VideoChat, video: EncodedVideo) -> None:
    with pytest.raises(ValueError, match="temperature"):
        list(chat.stream(video, QUESTIONS[0], do_sample=True, temperature=-1.0))


def test_options_of_loading_that_a_released_checkpoint_says_itself_are_refused() -> None:
    """What may be said, such as `device_map`, is tested in `model/test_official.py`."""
    folder = Path(__file__).parent / "golden" / "direct_coarse"
    with pytest.raises(ValueError, match="a checkpoint of the official release says its own config, subfolder"):
        VideoChat.from_pretrained(folder, config=None, subfolder="x", device_map="cpu")


@pytest.mark.parametrize("question", ["What <video>?", "What?\n<video>", "<video> What <image>?"])
def test_placeholders_in_a_question_are_named(chat: VideoChat, video: EncodedVideo, question: str) -> None:
    with pytest.raises(ValueError, match="stands for a video or picture wherever it is written"):
        chat.ask(video, question)
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "he"}]
    with pytest.raises(ValueError, match="stands for a video or picture wherever it is written"):
        chat.reply([*turns, {"role": "user", "content": question}], [video])


def test_a_placeholder_in_front_as_datasets_write_it_is_no_fault(chat: VideoChat, video: EncodedVideo) -> None:
    expected = chat.ask(video, QUESTIONS[0], max_new_tokens=6)
    found = chat.ask(video, f"<video>\n{QUESTIONS[0]}", max_new_tokens=6)
    assert (found, found.num_prompt_tokens) == (expected, expected.num_prompt_tokens)


@pytest.mark.parametrize("question", ["", "   ", "\n", "<video>", "<video>\n"])
def test_empty_question(chat: VideoChat, video: EncodedVideo, question: str) -> None:
    with pytest.raises(ValueError, match="question is empty"):
        chat.ask(video, question)


def test_long_question_is_cut_for_the_compressor_only(chat: VideoChat, video: EncodedVideo) -> None:
    long = " ".join(["which object moves left"] * 8)
    with pytest.warns(InstructionWarning, match="32 tokens, the instruction encoder takes 12"):
        answer = chat.ask(video, long, max_new_tokens=1)
    assert answer.num_visual_tokens == 30


def test_window_and_budget_exclude_each_other(chat: VideoChat, video: EncodedVideo) -> None:
    with pytest.raises(ValueError, match="both choose the window"):
        chat.ask(video, QUESTIONS[0], window=(2, 2, 2), max_visual_tokens=20)


@pytest.mark.parametrize(
    "options", [{"num_frames": 0}, {"num_frames": -3}, {"fps": 0.0}, {"start_s": 5.0, "end_s": 1.0}]
)
def test_impossible_frame_choices(chat: VideoChat, options: dict) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the message is video.py's, tested there
        chat.encode(frames(), **options)


def test_attention_maps_cover_the_video(chat: VideoChat, video: EncodedVideo) -> None:
    output = chat.attention(video, QUESTIONS[0])
    assert output.local_attention[0].shape == (3, 3, 3, 2, 2, 2)
    torch.testing.assert_close(output.local_attention[0].sum((3, 4, 5)), torch.ones(3, 3, 3))
    assert output.global_attention[0].shape == (1, 3, 6, 5, 5)


def test_encoding_in_passes_changes_nothing(chat: VideoChat, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = chat.encode(frames())
    monkeypatch.setattr("hicom.encoding.FRAMES_PER_PASS", 4)
    parts = chat.encode(frames())
    torch.testing.assert_close(parts.features.values, whole.features.values)
    torch.testing.assert_close(parts.features.keys, whole.features.keys)


class TestLoading:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        chat = make_chat()
        chat.model.save_pretrained(tmp_path / "model")
        chat.processor.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_saved_model_answers_the_same(self, folder: Path, chat: VideoChat, video: EncodedVideo) -> None:
        loaded = VideoChat.from_pretrained(folder)
        assert loaded.ask(loaded.encode(frames()), QUESTIONS, max_new_tokens=5) == chat.ask(
            video, QUESTIONS, max_new_tokens=5
        )

    def test_half_precision_weights_compute_in_float32_on_a_cpu(self, folder: Path) -> None:
        chat = VideoChat.from_pretrained(folder, device="cpu")
        chat.model.half().save_pretrained(folder)
        assert VideoChat.from_pretrained(folder, device="cpu").model.dtype == torch.float32
        assert VideoChat.from_pretrained(folder, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        "name", ["config.json", "model.safetensors", "processor_config.json", "tokenizer_config.json", "tokenizer.json"]
    )
    def test_missing_file_is_named(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            VideoChat.from_pretrained(folder)

    def test_unknown_model(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no such model folder"):
            VideoChat.from_pretrained(tmp_path / "nowhere")

    def test_pickles_are_refused(self, folder: Path) -> None:
        shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="pickles"):
            VideoChat.from_pretrained(folder)

    def test_unknown_precision(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="dtype='float23'"):
            VideoChat.from_pretrained(folder, dtype="float23")


@pytest.mark.parametrize(
    ("stored", "device", "expected"),
    [
        ({"dtype": "float32"}, "cuda", torch.bfloat16),
        ({"torch_dtype": "float32"}, "cuda:1", torch.bfloat16),
        ({"dtype": "float32"}, None, torch.bfloat16),  # a device map, on a machine with a GPU
        ({"dtype": "bfloat16"}, "cuda", None),
        ({"dtype": "float16"}, "cuda", None),
        ({"dtype": "float32"}, "cpu", torch.float32),
        ({"dtype": "bfloat16"}, "cpu", torch.float32),
    ],
)
def test_the_precision_that_a_model_computes_in(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: dict[str, str],
    device: str | None,
    expected: torch.dtype | None,
) -> None:
    """Weights that are stored in 32 bit, as trained on a CPU, do not take 34 GB of a GPU for 7B unless asked to."""
    (tmp_path / "config.json").write_text(json.dumps(stored))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _default_precision(tmp_path, device) == expected


def test_a_precision_that_is_given_is_kept(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model")
    for dtype in ("float32", torch.bfloat16):
        chat = VideoChat.from_pretrained(folder, dtype=dtype)
        assert str(chat.model.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    assert VideoChat.from_pretrained(folder).model.dtype == torch.float32
