"""The language model that reads: what it is asked, that questions stay apart, exact resumption."""

import dataclasses
import hashlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hicom.model.assemble import read_language_model
from hicom.model.processing import CHAT_TEMPLATE
from hicom.world.questions import LETTERS, NOUNS, plural
from hicom.world.reader import ReaderConfig, evaluate, loss_of, make_batch, new_reader, read, story_and_questions, train

CONFIG = ReaderConfig(steps=6, batch=2, warmup=2, hidden_size=32, intermediate_size=64, num_layers=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    return train(CONFIG, folder, num_eval_scenes=4), folder


def test_stories_are_the_same_on_every_machine_and_hold_the_answers():
    told = [story_and_questions(0, index, choice_share=0.25) for index in range(40)]
    assert told == [story_and_questions(0, index, choice_share=0.25) for index in range(40)]
    text = json.dumps([(story, [(q.text, q.answer) for q in questions]) for story, questions in told])
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "6e93bac5d1bdab0e33c7b4c15bcaa7197fc56afc2603c92f03004fdb9aa968ea"
    )
    families = set()
    for story, questions in told:
        parts = [part.split() for part in story.split(", ")]
        for question in questions:
            families.add(question.family)
            if question.form != "open":
                assert question.answer in LETTERS
            elif question.family == "presence":
                asked = next(noun for noun in NOUNS if f" {noun}" in question.text)
                assert (question.answer == "yes") == any(asked in words for words in parts), question
            elif question.family == "count":
                copies = next((noun for noun in NOUNS if f" {plural(noun)}" in question.text), None)
                number = len(parts) if copies is None else sum(copies in words for words in parts)
                assert question.answer == ("one", "two", "three", "four")[number - 1], question
    assert {"presence", "colour", "position", "direction", "count", "which", "order", "neighbour"} <= families


def test_questions_of_a_row_are_asked_as_if_alone():
    """The same tokens and logits as one conversation for every question, made by the chat template."""
    model, tokenizer = new_reader(CONFIG)
    told = [story_and_questions(0, index, choice_share=0.5) for index in (3, 4)]
    batch = make_batch(tokenizer, told)
    assert (batch.segments == -1).any(), "rows of different lengths"
    with torch.no_grad():
        logits = model.lm_head(read(model, batch))
        for row, (story, questions) in enumerate(told):
            for number, question in enumerate(questions, 1):
                turns = [{"role": "user", "content": f"{story}\n{question.text}"}]
                turns.append({"role": "assistant", "content": question.answer})
                text = tokenizer.apply_chat_template(turns, chat_template=CHAT_TEMPLATE, tokenize=False)
                ids = tokenizer(text.rstrip("\n")).input_ids
                mine = (batch.segments[row] == 0) | (batch.segments[row] == number)
                assert batch.ids[row][mine].tolist() == ids
                alone = model(torch.tensor([ids])).logits[0]
                torch.testing.assert_close(logits[row][mine], alone, atol=1e-4, rtol=1e-4)
                answer = batch.ids[row][batch.answers[row] & (batch.segments[row] == number)]
                assert tokenizer.decode(answer) == f"{question.answer.lower()}<|im_end|>"


def test_the_loss_is_that_of_the_text_that_follows():
    """Story, question and answer, none of them predicted from another question."""
    model, tokenizer = new_reader(CONFIG)
    story, questions = story_and_questions(0, 3)
    questions = questions[:3]
    found = loss_of(model, make_batch(tokenizer, [(story, questions)]), 0.5)
    answers, texts = [], []
    with torch.no_grad():
        for number, question in enumerate(questions):
            batch = make_batch(tokenizer, [(story, [question])])
            errors = torch.nn.functional.cross_entropy(
                model(batch.ids).logits[0, :-1], batch.ids[0, 1:], reduction="none"
            )
            answer, is_story = batch.answers[0, 1:], batch.segments[0, 1:] == 0
            answers.append(errors[answer])
            # The story counts once. A question's first token follows the story in one place only: it is left out.
            first = torch.zeros_like(answer)
            first[int(is_story.sum())] = True
            texts.append(errors[~answer & ~first & ~(is_story & (number > 0))])
    expected = torch.cat(answers).mean() + 0.5 * torch.cat(texts).mean()
    torch.testing.assert_close(found, expected)


def test_resumed_training_equals_uninterrupted(trained, tmp_path):
    model, folder = trained
    train(CONFIG, tmp_path, stop_after=3)
    assert not (tmp_path / "run.json").exists()
    with pytest.raises(ValueError, match="use the same settings, or another folder"):
        train(dataclasses.replace(CONFIG, batch=3), tmp_path)
    resumed = train(CONFIG, tmp_path, num_eval_scenes=4)
    for (name, a), b in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} differs after a resume"
    runs = [json.loads((f / "run.json").read_text()) for f in (folder, tmp_path)]
    assert runs[0]["metrics"] == runs[1]["metrics"]
    assert runs[0]["config"]["steps"] == 6


def test_training_lowers_the_loss_of_unseen_stories(tmp_path):
    config = dataclasses.replace(CONFIG, steps=40, batch=3, lr=5e-3, warmup=5)
    fresh, tokenizer = new_reader(config)
    model = train(config, tmp_path, num_eval_scenes=4)
    unseen = make_batch(tokenizer, [story_and_questions(0, 10**6 + index) for index in range(8)])
    with torch.no_grad():
        before, after = (loss_of(each, unseen, 0.0).item() for each in (fresh, model))
    assert after < 0.7 * before
    assert evaluate(fresh, tokenizer, 8)["presence"] < 0.2


def test_folder_is_an_ordinary_language_model(trained):
    model, folder = trained
    loaded, language = AutoModelForCausalLM.from_pretrained(folder), read_language_model(folder)
    tokenizer, taken = language.tokenizer, language.model
    ids = torch.tensor([tokenizer("Which object moves LEFT?").input_ids])
    assert ids.tolist() == [tokenizer("which object moves left?").input_ids], "its own normaliser"
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected)
        torch.testing.assert_close(taken(ids).logits, expected)
    assert {language.video_token, language.image_token} <= tokenizer.get_vocab().keys()
