"""Scenes are a function of the seed, splits share nothing that they promise not to, nothing is hidden or outside."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from hicom.world import render
from hicom.world.dataset import FILES, TRAINING_FILES, World, masks, records, truth
from hicom.world.scenes import (
    BACKGROUNDS,
    DIRECTIONS,
    EMOJI,
    HELD_OUT_BACKGROUNDS,
    HELD_OUT_MOTIONS,
    KINDS,
    MAX_OBJECTS,
    SHAPE_SHARE,
    SHAPES,
    SPLITS,
    WAYS,
    WorldConfig,
    clip_seed,
    frame_times,
    is_held_out,
    make_scene,
    split_config,
)

# Change only when the world changes on purpose: then put the new values here and note it in the changelog.
TRUTH_SHA256 = "441bc84d931edfcbdb5564b0e4806c060d0cfc3fbe405f441b338fa80ee92447"
RECORDS_SHA256 = "9e3ecfd05200e7125b86dea5e5a06e8a04ed50bbc016c3f37bc6df52b799d820"
TRAINING_RECORDS_SHA256 = "07e7fb55f852db1521fd8e0ab74a8bd97ef411a72cb93de12272d9dfe10da9dd"
MASKS_SHA256 = "cd20f06c84a2bf4cc973d88378ee2108b7730f18cb14b45959d3d1dfed96dfb2"

WORLD = World()


def digest(rows):
    text = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


CLIPS = [(split, index) for split in SPLITS for index in range(8)]


def truth_digest():
    return digest(truth(WORLD, *clip) for clip in CLIPS)


def records_digest(files=tuple(file for file in FILES if file not in TRAINING_FILES)):
    return digest(row for clip in CLIPS for file in files for row in records(WORLD, *clip, file))


def scenes(split, count, config=None):
    config = split_config(config or WorldConfig(), split)
    return [make_scene(clip_seed(0, split, index), config) for index in range(count)]


def test_ground_truth_and_questions_are_the_same_on_every_machine():
    assert truth_digest() == TRUTH_SHA256
    assert records_digest() == RECORDS_SHA256
    assert records_digest(TRAINING_FILES) == TRAINING_RECORDS_SHA256


def test_ground_truth_is_the_same_in_a_fresh_process():
    code = "import test_scenes as t; print(t.truth_digest(), t.records_digest(), t.records_digest(t.TRAINING_FILES))"
    folder = str(Path(__file__).parent)
    command, env = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": folder, "PYTHONHASHSEED": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert result.stdout.split() == [TRUTH_SHA256, RECORDS_SHA256, TRAINING_RECORDS_SHA256]


def test_masks_are_the_same_everywhere_and_need_no_resampling(monkeypatch):
    def fail(*_):
        raise AssertionError("the masks must not depend on how Pillow resamples")

    monkeypatch.setattr(render, "_resized", fail)
    clips = [(split, index) for split in SPLITS for index in range(2)]
    found = digest(masks(WORLD, *clip) for clip in clips)
    assert found == digest(masks(WORLD, *clip) for clip in clips)
    assert found == MASKS_SHA256


def test_other_seeds_give_other_scenes():
    assert make_scene(clip_seed(0, "test", 1)) == make_scene(clip_seed(0, "test", 1))
    assert make_scene(clip_seed(0, "test", 1)).objects != make_scene(clip_seed(1, "test", 1)).objects


def test_splits_are_disjoint():
    found = {split: {scene.objects for scene in scenes(split, 100)} for split in SPLITS}
    assert all(len(objects) == 100 for objects in found.values())
    for a, b in itertools.combinations(SPLITS, 2):
        assert not found[a] & found[b], f"{a} and {b} share scenes"
    seeds = [clip_seed(0, split, index) for split in SPLITS for index in range(200)]
    assert len(set(seeds)) == len(seeds)


def held_out_pairs(scene, nouns=EMOJI):
    pairs = itertools.combinations(sorted({item.noun for item in scene.objects}), 2)
    return [pair for pair in pairs if is_held_out(*pair, nouns)]


def test_held_out_pairs_are_seen_in_their_split_alone():
    for split in ("train", "val", "test", "test_scenes"):
        assert not any(held_out_pairs(scene) for scene in scenes(split, 250)), split
    assert all(held_out_pairs(scene) for scene in scenes("test_pairs", 250))
    names = (*EMOJI, *SHAPES)
    share = sum(is_held_out(a, b, EMOJI) for a, b in itertools.combinations(names, 2)) / (len(names) ** 2 / 2)
    assert share == pytest.approx(0.1, abs=0.01)
    assert all(is_held_out(a, b, EMOJI) == is_held_out(b, a, EMOJI) for a, b in itertools.pairwise(EMOJI))


def test_few_sprites_have_held_out_pairs_too():
    """Among eight sprites and five shapes one noun is in no such pair; a clip must not wait for its partner."""
    config = WorldConfig(nouns=EMOJI[:8])
    for scene in scenes("test_pairs", 200, config):
        assert held_out_pairs(scene, config.nouns)
    assert not any(held_out_pairs(scene, config.nouns) for scene in scenes("train", 200, config))


def test_new_backgrounds_and_motions_are_seen_in_their_split_alone():
    moving = set(DIRECTIONS)
    for split in SPLITS:
        found = scenes(split, 150)
        grounds = {scene.background.kind for scene in found}
        motions = {item.motion for scene in found for item in scene.objects if item.way in moving}
        if split == "test_scenes":
            assert grounds == set(HELD_OUT_BACKGROUNDS)
            assert motions == set(HELD_OUT_MOTIONS)
        else:
            assert grounds == set(BACKGROUNDS)
            assert motions == {"linear", "curved"}
    assert not set(BACKGROUNDS) & set(HELD_OUT_BACKGROUNDS)


@pytest.mark.parametrize(
    "config", [WorldConfig(), WorldConfig(width=192, height=108), WorldConfig(width=90, height=160)]
)
def test_objects_stay_apart_and_inside(config):
    for split in ("train", "test_scenes", "test_pairs"):
        for scene in scenes(split, 60, config):
            assert 1 <= len(scene.objects) <= MAX_OBJECTS + 2
            for item in scene.objects:
                assert item.visible(item.enter)
                assert 0 <= item.enter < item.leave <= 1
                (ax, ay), (bx, by) = item.center(item.enter), item.center(item.leave)
                if item.way in DIRECTIONS:
                    step = DIRECTIONS[item.way]
                    assert (bx - ax) * step[0] + (by - ay) * step[1] > 0.05
                    assert abs((bx - ax) * step[1]) + abs((by - ay) * step[0]) < 1e-6, (
                        "it moves along one axis over all"
                    )
                elif item.way == "still":
                    assert (ax, ay) == (bx, by)
                # All of an object is seen at some time; those that come in or go out cross the edge.
                half = 0.5 * item.size * min(1, item.growth)
                moments = [item.enter + (item.leave - item.enter) * i / 8 for i in range(9)]
                assert any(
                    all(half - 1e-9 <= v <= wide - half + 1e-9 for v, wide in zip(place, scene.extent, strict=True))
                    for place in map(item.center, moments)
                ), item
            for a, b in itertools.combinations(scene.objects, 2):
                for moment in (0.0, 0.5, 1.0):
                    if a.visible(moment) and b.visible(moment):
                        (ax, ay), (bx, by) = a.center(moment), b.center(moment)
                        least = 0.41 * (a.side_length(moment) + b.side_length(moment))
                        assert (ax - bx) ** 2 + (ay - by) ** 2 >= least**2, "questions ask about these moments"


def test_what_happens_is_varied():
    found = scenes("train", 800)
    assert {scene.kind for scene in found} == set(KINDS)
    items = [item for scene in found for item in scene.objects]
    assert any(item.leave < 1 for item in items)
    assert any(item.enter > 0 for item in items)
    assert {item.growth for item in items} == {0.6, 1.0, 1.7}
    assert {item.motion for item in items} == {"still", "linear", "curved", "bouncing"}
    assert any(any(not 0 <= v <= 1 for point in item.path for v in point) for item in items), "over the edge"
    assert any(scene.background.pan != (0.0, 0.0) for scene in found)
    crossing = [
        any(
            a.visible(t)
            and b.visible(t)
            and sum((p - q) ** 2 for p, q in zip(a.center(t), b.center(t), strict=True)) < 0.02
            for a, b in itertools.combinations(scene.objects, 2)
            for t in frame_times(16)
        )
        for scene in found[:300]
    ]
    assert 0.01 < sum(crossing) / len(crossing) < 0.3, "some objects hide others"


def test_counts_ways_and_colours_are_balanced():
    found = scenes("train", 1500)
    plain = Counter(len(scene.objects) for scene in found if scene.kind == "plain")
    many = Counter(scene.counts()[scene.objects[0].noun] for scene in found if scene.kind == "group")
    items = [item for scene in found for item in scene.objects if not item.is_brief]
    ways = Counter(item.way for item in items if item.noun)
    shapes = Counter(item.color for scene in found for item in scene.objects if item.color)
    marks = Counter(item.mark for scene in found for item in scene.objects if item.mark)
    for counted in (plain, many, Counter({w: ways[w] for w in WAYS}), shapes, marks):
        expected = sum(counted.values()) / len(counted)
        # Pairs share one way, so numbers of ways scatter a little more.
        assert all(abs(number - expected) < 5.5 * expected**0.5 for number in counted.values()), counted
    share = sum(shapes.values()) / sum(len(scene.objects) for scene in found)
    assert share == pytest.approx(SHAPE_SHARE, abs=0.03)


@pytest.mark.parametrize("duration_s", [16.0, 120.0])
def test_long_clips_show_different_things_in_every_episode(duration_s):
    config = WorldConfig(duration_s=duration_s)
    for index in range(20):
        scene = make_scene(clip_seed(0, "test_long", index), config)
        total = config.num_episodes
        assert scene.kind == "long"
        unique = scene.named()
        assert len(unique) >= MAX_OBJECTS, "some nouns are seen once"
        for item in scene.objects:
            episode = int(item.enter * total)
            assert episode / total < item.enter < item.leave < (episode + 1) / total
        for a, b in itertools.combinations(scene.objects, 2):
            if int(a.enter * total) == int(b.enter * total):
                assert a.noun != b.noun
        assert len({item.noun for item in scene.objects}) < len(EMOJI) + len(SHAPES), "some nouns never come"


def test_half_an_hour_is_made_in_seconds():
    world = World(config=WorldConfig(duration_s=1800.0, fps=1.0))
    begin = time.monotonic()
    facts = truth(world, "test_long", 0)
    assert time.monotonic() - begin < 10
    assert facts["num_frames"] == 1800
    assert len(facts["objects"]) > 300
    for item in facts["objects"]:
        assert any(item["boxes"])
        assert len(item["boxes"]) <= 5, "an episode takes four seconds"
        assert item["first_frame"] + len(item["boxes"]) <= 1800
    assert [event["frame"] for event in facts["events"]] == sorted(event["frame"] for event in facts["events"])
    assert split_config(world.config, "test_long").duration_s == 1800, "no clip is longer than half an hour"


def test_events_agree_with_the_boxes():
    for split in SPLITS:
        for index in range(30):
            facts = truth(WORLD, split, index)
            events = {(event["object"], event["event"]): event["frame"] for event in facts["events"]}
            assert len(events) == len(facts["events"])
            for number, item in enumerate(facts["objects"]):
                seen = [item["first_frame"] + i for i, box in enumerate(item["boxes"]) if box]
                assert seen, "an object that is never seen"
                assert events.get((number, "appears"), 0) == seen[0]
                assert events.get((number, "disappears"), facts["num_frames"]) == seen[-1] + 1
                assert all(0 <= value <= 1 for box in item["boxes"] if box for value in box)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fps": 0}, "fps=0 must be above 0"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"fps": 500}, "at most 120"),
        ({"duration_s": 0}, "duration_s=0 must be above 0"),
        ({"duration_s": -2}, "duration_s=-2"),
        ({"duration_s": 1801}, "30 minutes"),
        ({"duration_s": 2, "fps": 1}, "2 s at 1 frames per second are 2 frames; 9 needed"),
        ({"duration_s": 1800, "fps": 0.25}, "900 needed"),
        ({"width": 0}, "width=0 must be an even number of pixels"),
        ({"height": 33}, "height=33 must be an even number"),
        ({"backgrounds": ("lava",)}, "must be some of plain, gradient"),
        ({"motions": ()}, "must be some of still, linear"),
        ({"nouns": ("dog",)}, "1 nouns are too few"),
        ({"nouns": ("dog",) * 10}, "repeat"),
        ({"nouns": (*EMOJI, "circle")}, "circle are names of shapes"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        WorldConfig(**values)


def test_unknown_splits_are_named():
    for call in (lambda: clip_seed(0, "dev", 0), lambda: split_config(WorldConfig(), "dev")):
        with pytest.raises(ValueError, match="unknown split 'dev': choose one of train, val"):
            call()
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        frame_times(0)


def test_sprites_are_many():
    assert len(set(EMOJI)) == len(EMOJI) >= 100
    assert not set(EMOJI) & set(SHAPES)
