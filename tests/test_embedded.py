"""The model inside the package answers questions about clips that it has never seen."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest

import hicom
import media
from hicom import VideoChat
from hicom.video import write_video
from hicom.world.questions import FAMILIES, Asker
from hicom.world.render import render
from hicom.world.scenes import clip_seed, generator, make_scene

# The training world is seed 0; the demo clip is of seed 1 (benchmarks/embed.py).
SEED, NUM_CLIPS = 2, 100
DEMO = Path(hicom.__file__).parent / "assets" / "demo.mp4"


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    return VideoChat.from_pretrained("hicom-tiny")


def test_it_is_right_about_unseen_clips_far_more_often_than_chance(chat: VideoChat, tmp_path: Path) -> None:
    right: dict[str, list[bool]] = collections.defaultdict(list)
    chance: dict[str, list[float]] = collections.defaultdict(list)
    for index in range(NUM_CLIPS):
        scene = make_scene(clip_seed(SEED, "test", index))
        write_video(tmp_path / "clip.mp4", render(scene)[0])
        asked = [question for question in Asker(scene, generator(SEED, index)).questions() if question.chance]
        answers = chat.ask(tmp_path / "clip.mp4", [question.text for question in asked], max_new_tokens=16)
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
    video = chat.encode(DEMO)
    assert chat.ask(video, "What color is the circle?") == "red"
    assert chat.ask(video, "Which object moves down?") == "hedgehog"


def test_one_set_of_weights_serves_several_budgets(chat: VideoChat) -> None:
    video = chat.encode(DEMO)
    assert video.num_patches == 512
    few, more = (chat.ask(video, "What color is the circle?", max_visual_tokens=budget) for budget in (16, 24))
    assert (few.num_visual_tokens, more.num_visual_tokens) == (16, 24)
    assert few == more == "red"


def test_it_says_so_when_a_video_is_unlike_its_world(chat: VideoChat, tmp_path: Path) -> None:
    """However many frames it looks at."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 128, 128, 3), dtype=np.uint8)
    write_video(tmp_path / "noise.mp4", noise)
    film = np.concatenate([noise[:8], media.number_frame(5, 128, 128)[None].repeat(8, 0)])
    for num_frames in (1, 2, 4, 8, 16):
        for unlike in (tmp_path / "noise.mp4", film):
            assert "sprites" in (chat.caution(chat.encode(unlike, num_frames=num_frames)) or ""), num_frames
        assert chat.caution(chat.encode(DEMO, num_frames=num_frames)) is None, num_frames
    assert "sprites" in (chat.caution(chat.encode(film, keep_features=False, questions=["Who?"])) or "")
