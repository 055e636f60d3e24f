"""The standard arguments of transformers' processors: taken with their meaning, or refused by name."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import ProcessorMixin
from transformers.processing_utils import AudioKwargs, ImagesKwargs, TextKwargs, VideosKwargs

import tiny
from hicom.model.dual_encoder import InstructionWarning
from hicom.model.processing import HIComProcessor

USER = [{"role": "user", "content": "what is red ?"}]
TURNS = [*USER, {"role": "assistant", "content": "a dog"}]
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}{{ m.role + ' ' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %} no{% endif %}"
)


@pytest.fixture(scope="module")
def processor() -> HIComProcessor:
    return tiny.processor(tiny.config())


def frames(number: int, height: int = 20, width: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, height, width, 3), dtype=np.uint8)


def test_signatures_are_those_of_transformers() -> None:
    own, theirs = (inspect.signature(each.__call__).parameters for each in (HIComProcessor, ProcessorMixin))
    positional = [name for name in theirs if name != "kwargs"]
    assert list(own)[: len(positional)] == positional
    own, theirs = (inspect.signature(each.apply_chat_template).parameters for each in (HIComProcessor, ProcessorMixin))
    assert [name for name in theirs if name in own] == [name for name in theirs]
    assert [name for name in own if name in theirs] == [name for name in theirs]
    for name, parameter in theirs.items():
        assert own[name].default == parameter.default or name == "return_tensors", name


@pytest.mark.parametrize("group", [TextKwargs, ImagesKwargs, VideosKwargs, AudioKwargs])
@pytest.mark.parametrize("value", [None, False])
def test_every_argument_is_known_and_none_asks_for_nothing(processor: HIComProcessor, group: Any, value: Any) -> None:
    name = {TextKwargs: "text", ImagesKwargs: "images", VideosKwargs: "videos", AudioKwargs: "audio"}[group]
    expected = processor(text="what ?", return_tensors="pt")["input_ids"]
    for argument in get_type_hints(group):
        if argument == "return_tensors" or (value is False and argument not in NEUTRAL_FALSE):
            continue
        for given in ({argument: value}, {f"{name}_kwargs": {argument: value}}):
            found = processor(text="what ?", return_tensors="pt", **given)
            assert torch.equal(found["input_ids"], expected), argument


NEUTRAL_FALSE = {
    "add_special_tokens",
    "padding",
    "truncation",
    "is_split_into_words",
    "return_token_type_ids",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_offsets_mapping",
    "return_length",
    "verbose",
    "return_mm_token_type_ids",
    "return_text_replacement_offsets",
    "sanitize_control_tokens",
    "do_center_crop",
    "return_metadata",
    "disable_grouping",
}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"do_resize": False}, "do_resize=False cannot be: frames are made RGB"),
        ({"image_mean": [0.1, 0.2, 0.3]}, "image_mean"),
        ({"size": {"height": 99, "width": 99}}, "takes 20x20"),
        ({"max_pixels": 100}, "max_pixels=100 cannot be"),
        ({"min_pixels": 10**6}, "min_pixels=1000000 cannot be"),
        ({"return_offsets_mapping": True}, "return_offsets_mapping=True cannot be"),
        ({"return_token_type_ids": True}, "no token types"),
        ({"sanitize_control_tokens": True}, "sanitize_control_tokens"),
        ({"text_pair": "what"}, "text_pair='what' cannot be"),
        ({"data_format": "channels_last"}, "channels first"),
        ({"videos_kwargs": {"rescale_factor": 2.0}}, "rescale_factor"),
        ({"padding": "always"}, "padding='always': give True, False or one of longest"),
        ({"padding_side": "top"}, "give 'left' or 'right'"),
        ({"return_tensors": "tf"}, "return_tensors='tf'"),
        ({"max_length": 3}, "max_length=3 needs truncation=True or padding='max_length'"),
        ({"max_length": -3, "truncation": True}, "positive"),
        ({"padding": True, "pad_to_multiple_of": -8}, "pad_to_multiple_of=-8"),
        ({"size": []}, "size=.* takes 20x20"),
        ({"device": "nope"}, "device='nope'"),
        ({"compression": "none"}, "compression='none': give one of conditional"),
        ({"answer_starts": [0, 0]}, "2 answer_starts for 1 prompts"),
        ({"assistant_spans": []}, "0 assistant_spans for 1 prompts"),
        ({"instruction": 3}, "instruction=.*3.*: give text"),
        ({"instruction": ["what", "red"]}, "2 instructions for 1 prompts"),
        ({"padding": "max_length"}, "needs max_length"),
        ({"audio": [1.0]}, "hear nothing"),
        ({"num_frame": 3}, "'num_frame'; did you mean 'num_frames'"),
        ({"instructions": "what"}, "did you mean 'instruction'"),
        ({"videos_kwargs": {"num_frame": 3}}, "videos_kwargs: .*did you mean 'num_frames'"),
        ({"text_kwargs": {"num_frames": 3}}, "text_kwargs: .*'num_frames'"),
        ({"text_kwargs": 3}, "must be a dictionary"),
        ({"padding": True, "text_kwargs": {"padding": False}}, "padding is given twice"),
        ({"nframes": 3, "num_frames": 4}, "two names of one argument"),
    ],
)
def test_what_cannot_be_is_refused_by_name(processor: HIComProcessor, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        processor(text="what ?", **given)


def test_values_that_change_nothing_are_taken(processor: HIComProcessor) -> None:
    video = frames(4)
    plain = processor(text="<video> what ?", videos=[video], return_tensors="pt")
    same = processor(
        text="<video> what ?",
        videos=[video],
        return_tensors="pt",
        audio=[],
        do_resize=True,
        do_rescale=True,
        rescale_factor=1 / 255,
        image_mean=0.5,
        image_std=(0.5, 0.5, 0.5),
        size={"height": 20, "width": 20},
        max_pixels=20 * 20,
        load_audio_from_video=True,
        images_kwargs={"do_normalize": True},
        common_kwargs={"device": "cpu"},
    )
    assert plain.keys() == same.keys()
    assert all(torch.equal(plain[name], same[name]) for name in plain)


def test_total_pixels_bounds_the_frames(processor: HIComProcessor) -> None:
    enough = {"text": "<video> what ?", "videos": [frames(4)], "total_pixels": 4 * 400}
    assert len(processor(**enough)["pixel_values_videos"]) == 4
    with pytest.raises(ValueError, match=r"total_pixels=1599 is less than 4 frames .* choose at most 3"):
        processor(**{**enough, "total_pixels": 1599})


def test_tensors_as_asked(processor: HIComProcessor) -> None:
    given: dict[str, Any] = {"text": ["<video> what ?", "what ?"], "videos": [frames(2)]}
    lists = processor(**given)
    assert [len(row) for row in lists["input_ids"]] == [processor.token_count(2) + 2, 2]
    assert isinstance(lists["input_ids"][0], list)
    assert lists["attention_mask"][1] == [1, 1]
    assert isinstance(lists["pixel_values_videos"], torch.Tensor)
    with pytest.raises(ValueError, match="pass padding=True"):
        processor(**given, return_tensors="pt")
    arrays = processor(**given, padding=True, return_tensors="np")
    tensors = processor(**given, padding="longest", return_tensors="pt")
    assert all(isinstance(x, np.ndarray) for x in arrays.values())
    assert all(np.array_equal(arrays[name], tensors[name].numpy()) for name in tensors)


def test_padding_and_sides(processor: HIComProcessor) -> None:
    texts = ["what is red ?", "what ?"]
    left = processor(text=texts, padding=True)["attention_mask"]
    right = processor(text=texts, padding=True, padding_side="right")["attention_mask"]
    assert (left, right) == ([[1, 1, 1, 1], [0, 0, 1, 1]], [[1, 1, 1, 1], [1, 1, 0, 0]])
    assert [len(row) for row in processor(text=texts, padding="max_length", max_length=7)["input_ids"]] == [7, 7]
    assert [len(row) for row in processor(text=texts, padding=True, pad_to_multiple_of=8)["input_ids"]] == [8, 8]
    for padding in (False, None, "do_not_pad"):
        assert [len(row) for row in processor(text=texts, padding=padding)["input_ids"]] == [4, 2]
    assert "attention_mask" not in processor(text=texts, return_attention_mask=False)


def test_side_is_the_tokenizers_and_left_at_first() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "right"  # as the files of most LLMs have it
    processor = HIComProcessor.from_config(tiny.config(), tokenizer, tiny.tokenizer())
    assert processor(text=["what is red ?", "what ?"], padding=True)["attention_mask"][1] == [0, 0, 1, 1]
    processor.tokenizer.padding_side = "right"
    assert processor(text=["what is red ?", "what ?"], padding=True)["attention_mask"][1] == [1, 1, 0, 0]


def test_labels_are_padded_on_the_side_of_their_tokens(processor: HIComProcessor) -> None:
    long = [{"role": "user", "content": "what is red and blue ?"}, TURNS[1]]
    given = {"tokenize": True, "return_dict": True, "return_labels": True, "padding_side": "right", **tiny.TENSORS}
    inputs = processor.apply_chat_template([TURNS, long], **given)
    labelled = inputs["labels"] != -100
    assert torch.equal(inputs["labels"][labelled], inputs["input_ids"][labelled])
    assert not labelled[inputs["attention_mask"] == 0].any()
    assert inputs["attention_mask"][0].tolist() == sorted(inputs["attention_mask"][0].tolist(), reverse=True)


def test_truncation(processor: HIComProcessor) -> None:
    ids = processor(text="what is red and blue ?")["input_ids"][0]
    assert processor(text="what is red and blue ?", truncation=True, max_length=3)["input_ids"][0] == ids[:3]
    for truncation in (False, "do_not_truncate", None):
        given = {"truncation": truncation, "max_length": None}
        assert processor(text="what is red and blue ?", **given)["input_ids"][0] == ids
    with pytest.raises(ValueError, match="max_length=3 cuts off visual tokens: prompt 0"):
        processor(text="<video> what ?", videos=[frames(2)], truncation=True, max_length=3)
    with pytest.raises(ValueError, match="truncation='only_second'"):
        processor(text="what ?", truncation="only_second")


def test_special_tokens_and_types_of_tokens() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)]
    )
    processor = HIComProcessor.from_config(tiny.config(), tokenizer, tiny.tokenizer())
    plain = processor(text="<video> what ?", videos=[frames(2)], return_mm_token_type_ids=True)
    assert processor(text="<video> what ?", videos=[frames(2)], add_special_tokens=True)["input_ids"][0] == [
        2,
        *plain["input_ids"][0],
    ]
    count = processor.token_count(2)
    assert plain["mm_token_type_ids"][0] == [2] * count + [0, 0]


def test_frames_of_a_call(processor: HIComProcessor) -> None:
    video = frames(10)

    def counts(**kwargs: Any) -> list[int]:
        return processor(text="<video> what ?", videos=[video], **kwargs)["video_num_frames"].tolist()

    assert counts() == [4]
    assert counts(num_frames=3) == counts(nframes=3) == counts(videos_kwargs={"num_frames": 3}) == [3]
    assert counts(do_sample_frames=False) == [10]
    assert counts(do_sample_frames=False, max_frames=6) == [6]
    assert counts(fps=5, source_fps=10) == [5]
    assert counts(video_metadata=[{"fps": 10, "total_num_frames": 10}], fps=5) == [5]
    assert counts(start_s=0.5, source_fps=10, do_sample_frames=False) == [5]
    assert counts(max_frames=7) == [7]
    indices = list(range(0, 100, 10))
    assert counts(video_metadata={"fps": 10, "frames_indices": indices, "total_num_frames": 100}) == [10]
    for wrong, words in (
        ({"do_sample_frames": False, "num_frames": 3}, "do_sample_frames=False takes all frames, but num_frames"),
        ({"fps": [5]}, r"fps=\[5\]: give one number"),
        ({"num_frames": "many"}, "num_frames='many'"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"video_metadata": [{"fps": 10}, None]}, "describes 2 videos, but 1 are given"),
        ({"video_metadata": {"fps": 10, "total_num_frames": 100}}, "tells of 100 frames, but 10 are given"),
        ({"video_metadata": {"fps": 10, "frames_indices": [1]}}, "1 frames_indices, but 10 frames"),
        ({"video_metadata": {"fps": 10, "frames_indices": indices}, "num_frames": 3}, "num_frames chooses frames"),
        ({"video_metadata": {"frames_indices": indices}}, "no fps"),
    ):
        with pytest.raises(ValueError, match=words):
            counts(**wrong)


def test_metadata_is_returned(processor: HIComProcessor) -> None:
    found = processor(text="<video> what ?", videos=[frames(10)], source_fps=10, return_metadata=True)
    (metadata,) = found["video_metadata"]
    assert (metadata.total_num_frames, metadata.fps, metadata.height) == (10, 10, 20)
    assert len(metadata.frames_indices) == 4
    assert metadata.timestamps == [index / 10 for index in metadata.frames_indices]


def test_defaults_of_a_processor_go_behind_what_is_given() -> None:
    class Padded(HIComProcessor):
        text_kwargs = {"padding": True, "return_tensors": "pt"}  # noqa: RUF012

    processor = Padded.from_config(tiny.config(), tiny.tokenizer(), tiny.tokenizer())
    assert processor(text=["what is red ?", "what ?"])["input_ids"].shape == (2, 4)
    assert processor(text=["what ?"], return_tensors=None)["input_ids"] == [[6 + 3, 6 + tiny.WORDS.index("?")]]


def test_order_is_that_of_transformers(processor: HIComProcessor) -> None:
    picture = frames(1)[0]
    by_name = processor(text="<image> what ?", images=[picture], return_tensors="pt")
    by_place = processor([picture], "<image> what ?", return_tensors="pt")
    assert torch.equal(by_name["input_ids"], by_place["input_ids"])
    for wrong in (("what is red ?",), (["what is red ?"],), ("<image> what ?", [picture])):
        with pytest.raises(ValueError, match=r"the order of arguments is \(images, text, videos\)"):
            processor(*wrong)
    with pytest.raises(ValueError, match="text is list; give a string or a list of strings"):
        processor(text=[["what", "?"]])


def test_media_without_text_are_pixels_alone(processor: HIComProcessor) -> None:
    found = processor(images=[frames(1)[0]], videos=[frames(3)])
    assert set(found) == {"pixel_values", "pixel_values_videos", "video_num_frames"}
    with pytest.raises(ValueError, match="nothing to process"):
        processor()


# Chat templates


def test_ids_alone_without_return_dict(processor: HIComProcessor) -> None:
    whole = processor.apply_chat_template(TURNS, tokenize=True, return_dict=True)
    assert processor.apply_chat_template(TURNS, tokenize=True) == whole["input_ids"]
    assert "attention_mask" in whole


def test_arguments_of_the_call_come_inside_or_beside(processor: HIComProcessor) -> None:
    turn = [{"role": "user", "content": [{"type": "video", "video": frames(10)}, {"type": "text", "text": "what ?"}]}]
    given: dict[str, Any] = {"tokenize": True, "return_dict": True}
    beside = processor.apply_chat_template(turn, num_frames=3, **given)
    inside = processor.apply_chat_template(turn, processor_kwargs={"videos_kwargs": {"num_frames": 3}}, **given)
    assert beside["video_num_frames"].tolist() == inside["video_num_frames"].tolist() == [3]
    with pytest.raises(ValueError, match="num_frames is given twice"):
        processor.apply_chat_template(turn, num_frames=3, processor_kwargs={"num_frames": 3}, **given)
    with pytest.raises(ValueError, match=r"did you mean 'num_frames'.*neither does the chat template"):
        processor.apply_chat_template(turn, num_framez=3, **given)
    with pytest.raises(ValueError, match="did you mean 'num_frames'"):
        processor.apply_chat_template(turn, processor_kwargs={"num_framez": 3}, **given)
    with pytest.raises(ValueError, match="processor_kwargs must be a dictionary"):
        processor.apply_chat_template(turn, processor_kwargs=[3], **given)
    with pytest.raises(ValueError, match="the conversation holds videos, and videos is given beside it"):
        processor.apply_chat_template(turn, videos=[frames(2)], **given)
    with pytest.raises(ValueError, match="and video_num_frames is given beside it"):
        processor.apply_chat_template(turn, video_num_frames=[2], **given)


@pytest.mark.parametrize("tokenize", [False, True])
def test_what_a_template_does_not_write_is_refused(processor: HIComProcessor, tokenize: bool) -> None:
    tool = {"type": "function", "function": {"name": "left", "parameters": {}}}
    called = [*USER, {"role": "assistant", "content": None, "tool_calls": [tool]}]
    for name, value in (
        ("tools", [tool]),
        ("documents", [{"title": "a", "text": "b"}]),
        ("enable_thinking", True),
        ("reasoning_effort", "high"),
    ):
        with pytest.raises(ValueError, match=f"does not write '{name}'"):
            processor.apply_chat_template(USER, tokenize=tokenize, **{name: value})
        processor.apply_chat_template(USER, tokenize=tokenize, **{name: None})
    processor.apply_chat_template(USER, tokenize=tokenize, tools=[], enable_thinking=False)
    with pytest.raises(ValueError, match="tool_calls, which this chat template does not write"):
        processor.apply_chat_template(called, tokenize=tokenize)
    with pytest.raises(ValueError, match="neither does the chat template"):
        processor.apply_chat_template(USER, tokenize=tokenize, enable_thinkin=True)
    with pytest.raises(ValueError, match="return_assistant_tokens_mask needs tokenize=True and a chat template"):
        processor.apply_chat_template(TURNS, tokenize=tokenize, return_assistant_tokens_mask=True)


def test_templates_are_given_what_they_write(processor: HIComProcessor) -> None:
    tool = {"type": "function", "function": {"name": "left", "parameters": {}}}
    called = [*USER, {"role": "assistant", "content": None, "tool_calls": [tool]}, {"role": "tool", "content": "yes"}]
    text = processor.apply_chat_template(called, chat_template=THINKING, tools=[tool], enable_thinking=False)
    assert text == "left user what is red ?assistant lefttool yes no"
    assert processor.apply_chat_template(USER, chat_template=THINKING) == "user what is red ?"


@pytest.mark.parametrize("tokenize", [False, True])
def test_final_message_is_continued(processor: HIComProcessor, tokenize: bool) -> None:
    found = processor.apply_chat_template(TURNS, tokenize=tokenize, continue_final_message=True)
    text = processor.tokenizer.decode(found[0]) if tokenize else found
    words = re.findall(r"<\|?\w+\|?>|\w+|\?", text)
    assert " ".join(words) == "<|im_start|> user what is red ? <|im_end|> <|im_start|> assistant a dog"
    for other in ("add_generation_prompt", "return_assistant_tokens_mask"):
        given = {"chat_template": GENERATION, "tokenize": True, "continue_final_message": True, other: True}
        with pytest.raises(ValueError, match=f"continue_final_message and {other}"):
            processor.apply_chat_template(TURNS, **given)


def test_text_does_not_hold_what_is_asked_of_media(processor: HIComProcessor) -> None:
    for given in ({"num_frames": 3}, {"window": (1, 1, 1)}, {"return_labels": True}, {"instruction": "what"}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} has no effect with tokenize=False"):
            processor.apply_chat_template(USER, **given)
    text = processor.apply_chat_template(USER)
    assert processor.apply_chat_template(USER, padding=True, return_tensors="pt", return_dict=True) == text
    with pytest.raises(ValueError, match="size"):
        processor.apply_chat_template(USER, size=99)


def test_masks_cover_the_answers(processor: HIComProcessor) -> None:
    turns = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what moves left ?"}]},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "is there a cat ?"},
        {"role": "assistant", "content": "no"},
    ]
    found = processor.apply_chat_template(
        [turns, turns[:2]],
        chat_template=GENERATION,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        video_num_frames=[3, 2],
        **tiny.TENSORS,
    )
    marked = [row[mask == 1] for row, mask in zip(found["input_ids"], found["assistant_masks"], strict=True)]
    texts = [processor.tokenizer.decode(row) for row in marked]
    assert [text.split() for text in texts] == [
        ["a", "dog", "<|im_end|>", "no", "<|im_end|>"],
        ["a", "dog", "<|im_end|>"],
    ]
    assert found["assistant_masks"].shape == found["input_ids"].shape


def test_one_step_and_two_are_the_same(processor: HIComProcessor) -> None:
    video = {"type": "video", "video": frames(9), "num_frames": 3}
    image = {"type": "image", "image": frames(1)[0]}
    turns = [
        {"role": "user", "content": [video, {"type": "text", "text": "what moves left ?"}]},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": [image, {"type": "text", "text": "is it red ?"}]},
    ]
    one = processor.apply_chat_template(
        turns, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    two = processor(text=text, videos=[video], images=[frames(1)[0]], return_tensors="pt")
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_a_cut_instruction_warns_once_and_in_our_words(
    processor: HIComProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    text = "<|im_start|>user\n<video><video>" + "dog " * 20 + "<|im_end|>"
    processor.instruction_tokenizer.model_max_length = 12
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processor(text=text, videos=[frames(2), frames(2)])
    assert [each.category for each in caught] == [InstructionWarning]
    assert "indexing errors" not in caplog.text
