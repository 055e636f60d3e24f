"""The text tower's own lesson: it learns from words alone, keeps what it knew, and leaves the vision tower as it is."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import SiglipConfig, SiglipModel

from hicom.model.assemble import read_towers
from hicom.world.questions import NOUNS
from hicom.world.scenes import generator
from hicom.world.text_tower import UNSEEN_TWO_NAMES, Lesson, TextTowerConfig, load, main, other_text, train, two_names

# What the ablations start from: a dual encoder that never had this lesson.
START = Path(__file__).parents[2] / "benchmarks" / "ablations_start"
CONFIG = TextTowerConfig(steps=4, batch=8, warmup=2)


def named(text):
    """The nouns of a text, in order."""
    return [word for word in re.findall(r"[a-z]+", text.lower()) if word in NOUNS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    return train(CONFIG, START, folder, num_eval_clips=12), folder


def test_texts_name_what_they_are_said_to_name():
    for templates in ((), (UNSEEN_TWO_NAMES,)):
        texts, pairs = two_names(generator(0, 1), 60, *templates)
        for text, pair in zip(texts, pairs.tolist(), strict=True):
            assert named(text) == [NOUNS[number] for number in pair], text
            assert len(set(pair)) == 2
    rng = generator(0, 2)
    others = [other_text(rng) for _ in range(200)]
    assert max(len(set(named(text))) for text in others) == 1
    assert sum(not named(text) for text in others) > 20, "texts that name nothing are kept too"


def test_every_noun_is_found_at_its_token():
    towers, tokenizer = load(START)
    lesson = Lesson(towers, tokenizer)
    for number, noun in enumerate(NOUNS):
        _, _, ids = lesson.embed(lesson.text_model, [f"is the {noun} there?", noun])
        found = lesson.noun_of[ids]
        assert (found == number).sum(1).tolist() == [1, 1]
        assert set(found.flatten().tolist()) == {number, -1}


def test_it_learns_to_name_two_and_keeps_the_rest():
    torch.manual_seed(0)
    towers, tokenizer = load(START)
    lesson = Lesson(towers, tokenizer)
    before = lesson.measure(200)
    assert before["kept"] == pytest.approx(1, abs=1e-5)
    config = TextTowerConfig(batch=64)
    optimizer = torch.optim.AdamW(towers.model.text_model.parameters(), lr=1e-3)
    for step in range(40):
        optimizer.zero_grad()
        lesson.loss(step, config).backward()
        optimizer.step()
    after = lesson.measure(200)
    print(before, after)
    for name in ("two_names", "two_names_unseen"):
        assert before[name] < 0.4
        assert after[name] > before[name] + 0.2, (name, before, after)
    assert after["name_tokens"] > 0.9 > before["name_tokens"]
    assert after["kept"] > 0.97


def test_the_vision_tower_stays_as_it_is(trained):
    towers, folder = trained
    start = read_towers(START, torch.float32)
    saved = SiglipModel.from_pretrained(folder)
    for (name, a), b in zip(start.vision.state_dict().items(), saved.vision_model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    changed = [
        not torch.equal(a, b)
        for a, b in zip(start.instruction.state_dict().values(), saved.text_model.state_dict().values(), strict=True)
    ]
    assert any(changed)
    assert all(
        torch.equal(a, b) for a, b in zip(towers.model.state_dict().values(), saved.state_dict().values(), strict=True)
    )
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    assert {"naming", "pointing", "two_names", "two_names_unseen", "name_tokens", "kept"} <= set(metrics)
    assert not {"asked", "place_error"} & set(metrics), "nothing here was trained to read these out"


def test_another_dual_encoder_is_refused(tmp_path):
    other = SiglipConfig(vision_config={"num_hidden_layers": 1}, text_config={"num_hidden_layers": 1})
    SiglipModel(other).save_pretrained(tmp_path)
    load(START)[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no dual encoder of the sprite world; make one with"):
        load(tmp_path)
    for folder, message in (
        (tmp_path, "no dual encoder of the sprite world"),
        (tmp_path / "none", "there is no model"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            main(CONFIG, str(folder), tmp_path / "out", threads=torch.get_num_threads())


def test_it_resumes_exactly_and_refuses_another_run(trained, tmp_path):
    towers, _ = trained
    train(CONFIG, START, tmp_path, stop_after=2)
    with pytest.raises(ValueError, match="use the same settings, or another folder"):
        train(TextTowerConfig(steps=4, batch=9, warmup=2), START, tmp_path)
    resumed = train(CONFIG, START, tmp_path, num_eval_clips=12)
    for a, b in zip(towers.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
