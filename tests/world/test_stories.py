import hashlib
import json

import pytest

from hicom.world.questions import LETTERS, NOUNS, plural
from hicom.world.stories import write_stories


def test_stories_are_the_same_on_every_machine_and_hold_the_answers(tmp_path):
    for name in ("a", "b"):
        write_stories(tmp_path / f"{name}.jsonl", num_scenes=40)
    text = (tmp_path / "a.jsonl").read_bytes()
    assert text == (tmp_path / "b.jsonl").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "e2bd85c2950c2de6eec8e9ba65164f3e616dbc78e2a2e3235f42bf6232e7cf6c"
    families = set()
    for line in text.decode().splitlines():
        record = json.loads(line)
        story, question = record["conversations"][0]["value"].split("\n", 1)
        answer = record["conversations"][1]["value"]
        told = [part.split() for part in story.split(", ")]
        families.add(record["family"])
        if "(A)" in question:
            assert answer in LETTERS
            continue
        if record["family"] == "presence":
            asked = next(noun for noun in NOUNS if f" {noun}" in question)
            assert (answer == "yes") == any(asked in words for words in told), line
        elif record["family"] == "count":
            copies = next((noun for noun in NOUNS if f" {plural(noun)}" in question), None)
            number = len(told) if copies is None else sum(copies in words for words in told)
            assert answer == ("one", "two", "three", "four")[number - 1], line
    assert {"presence", "colour", "position", "direction", "count", "which"} <= families


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("hicom.world.stories.story", fail)
    with pytest.raises(KeyboardInterrupt):
        write_stories(tmp_path / "stories.jsonl", num_scenes=2)
    assert not (tmp_path / "stories.jsonl").exists()
