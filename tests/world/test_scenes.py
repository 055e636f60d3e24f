"""Scenes are a function of the seed, splits share nothing, nothing is hidden or outside."""

import hashlib
import itertools
import json
from collections import Counter

import pytest

from hicom.world.dataset import truth
from hicom.world.render import sprite_extents
from hicom.world.scenes import (
    DIRECTIONS,
    MAX_OBJECTS,
    SPLITS,
    clip_seed,
    frame_times,
    ground_truth,
    make_scene,
)

# Changes only when the world changes on purpose: then put the new value here and note it in the changelog.
GROUND_TRUTH_SHA256 = "ac0aff2fcdbc91e398418b66e37b631095df43cd8403913a9a70f58f5faa765a"


def test_ground_truth_is_the_same_on_every_machine():
    rows = [truth(0, split, index) for split in SPLITS for index in range(20)]
    text = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
    assert hashlib.sha256(text.encode()).hexdigest() == GROUND_TRUTH_SHA256


def test_other_seeds_give_other_scenes():
    assert make_scene(clip_seed(0, "test", 1)) == make_scene(clip_seed(0, "test", 1))
    assert make_scene(clip_seed(0, "test", 1)).objects != make_scene(clip_seed(1, "test", 1)).objects


def test_splits_are_disjoint():
    scenes = {split: {make_scene(clip_seed(0, split, i)).objects for i in range(300)} for split in SPLITS}
    assert all(len(objects) == 300 for objects in scenes.values())
    for a, b in itertools.combinations(SPLITS, 2):
        assert not scenes[a] & scenes[b], f"{a} and {b} share scenes"


def test_objects_stay_inside_apart_and_visible():
    for index in range(300):
        scene = make_scene(clip_seed(3, "train", index))
        facts = ground_truth(scene, sprite_extents())["objects"]
        assert 1 <= len(facts) <= MAX_OBJECTS
        assert len({item["noun"] for item in facts}) == len(facts), "questions name objects by their noun"
        for item in facts:
            boxes = [box for box in item["boxes"] if box]
            assert len(boxes) >= 8
            assert all(min(box) >= 0 and max(box) <= 1 for box in boxes)
            dx, dy = boxes[-1][0] - boxes[0][0], boxes[-1][1] - boxes[0][1]
            moved = tuple(0 if abs(step) < 0.1 else int(step / abs(step)) for step in (dx, dy))
            assert moved == DIRECTIONS[item["direction"]]
        for a, b in itertools.combinations(scene.objects, 2):
            for time in (0.0, 0.25, 0.5, 0.75, 1.0):
                if a.visible(time) and b.visible(time):
                    (ax, ay), (bx, by) = a.center(time), b.center(time)
                    assert (ax - bx) ** 2 + (ay - by) ** 2 >= (0.4 * (a.size + b.size)) ** 2


def test_counts_and_directions_are_balanced():
    scenes = [make_scene(clip_seed(5, "train", index)) for index in range(1500)]
    counts = Counter(len(scene.objects) for scene in scenes)
    directions = Counter(item.direction for scene in scenes for item in scene.objects)
    assert max(counts.values()) < 0.29 * len(scenes)
    assert max(directions.values()) < 0.22 * sum(directions.values())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        clip_seed(0, "dev", 0)
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        frame_times(0)
