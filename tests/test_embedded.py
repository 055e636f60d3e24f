"""The model inside the package answers questions about clips that it has never seen."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

import hicom
from hicom import VideoChat
from hicom.world.questions import Asker
from hicom.world.render import render, write_video
from hicom.world.scenes import EMOJI, WorldConfig, clip_seed, generator, make_scene

# The training world is seed 0; the demo clip is of seed 1 (benchmarks/embed.py).
SEED, NUM_CLIPS = 2, 80
# The model was trained on an earlier world: some of today's sprites, clips without dots and episodes, and six families
# (docs/hicom-tiny.md). These are asked about clips that it could have seen.
NOUNS = (*EMOJI[:16], "apple", "banana", "strawberry", "pineapple", "carrot", "mushroom", "pizza", "burger", "cactus")
FAMILIES = ("presence", "colour", "count")
DEMO = Path(hicom.__file__).parent / "assets" / "demo.mp4"


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    return VideoChat.from_pretrained("hicom-tiny")


def test_it_is_right_about_unseen_clips_far_more_often_than_chance(chat: VideoChat, tmp_path: Path) -> None:
    right: dict[str, list[bool]] = collections.defaultdict(list)
    chance: dict[str, list[float]] = collections.defaultdict(list)
    for index in range(NUM_CLIPS):
        scene = make_scene(clip_seed(SEED, "test", index), WorldConfig(nouns=NOUNS))
        if scene.kind != "plain":
            continue
        write_video(tmp_path / "clip.mp4", render(scene)[0])
        asker = Asker(scene, generator(SEED, index), nouns=NOUNS)
        asked = [question for question in asker.questions() if question.family in FAMILIES]
        answers = chat.ask(tmp_path / "clip.mp4", [question.text for question in asked], max_new_tokens=8)
        for question, answer in zip(asked, answers, strict=True):
            right[question.family].append(answer.lower() == question.answer.lower())
            chance[question.family].append(question.chance or 0.0)
    assert set(right) == set(FAMILIES)
    for family in right:
        accuracy, expected = (sum(x[family]) / len(x[family]) for x in (right, chance))
        # Three standard errors above guessing.
        margin = 3 * (expected * (1 - expected) / len(right[family])) ** 0.5
        assert accuracy > expected + margin, f"{family}: {accuracy:.2f} of {len(right[family])}, chance {expected:.2f}"


def test_it_answers_the_demo_clip(chat: VideoChat) -> None:
    """A red cross moves left, a bus right, a penguin down."""
    video = chat.encode(DEMO)
    assert chat.ask(video, "What color is the cross?") == "red"
    assert chat.ask(video, "How many objects appear in the video?") == "three"


def test_one_set_of_weights_serves_several_budgets(chat: VideoChat) -> None:
    video = chat.encode(DEMO)
    assert video.num_patches == 512
    few, more = (chat.ask(video, "What color is the cross?", max_visual_tokens=budget) for budget in (16, 24))
    assert (few.num_visual_tokens, more.num_visual_tokens) == (16, 24)
    assert few == more == "red"
