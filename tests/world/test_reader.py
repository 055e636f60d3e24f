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
from hicom.world.reader import (
    ReaderConfig,
    evaluate,
    lesson,
    look_back,
    look_for_same,
    loss_of,
    main,
    make_batch,
    new_reader,
    read,
    story_and_questions,
    train,
)

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


def test_lessons_ask_more_of_what_is_rare():
    """The same on every machine; forms in the numbers asked for; comparisons several times; no question twice."""
    told = [lesson(0, index, CONFIG) for index in range(40)]
    assert told == [lesson(0, index, CONFIG) for index in range(40)]
    assert told != [lesson(1, index, CONFIG) for index in range(40)]
    befores = []
    for text, questions in told:
        forms = [question.form for question in questions]
        assert [forms.count(form) for form in ("choice", "stated", "drill")] == [3, 1, 2]
        asked = [question.text for question in questions if question.form == "open"][:-1]
        assert len(set(asked)) == len(asked), text
        befores.append(sum(question.family == "before" for question in questions if question.form == "open"))
    assert max(befores) == 7
    assert befores.count(0) > 20, "only where things come one after the other"


def test_drills_ask_for_letters_alone():
    _, tokenizer = new_reader(CONFIG)
    for index in range(20):
        _, questions = lesson(0, index, CONFIG)
        for drill in (question for question in questions if question.form == "drill"):
            letters = {line.partition(") ")[2]: line[1] for line in drill.text.split("\n")}
            options, said = drill.answer.split("\n")[::2], drill.answer.split("\n")[1::2]
            assert sorted(options) == sorted(letters)
            assert said == [letters[option] for option in options]
            batch = make_batch(tokenizer, [("", [drill])])
            found = tokenizer.convert_ids_to_tokens(batch.ids[batch.answers])
            assert found == [letter.lower() for letter in said]


@pytest.fixture
def attentive():
    """A model of the usual sizes and random words; returns its attention maps, `float[layers, heads, L, L]`."""
    config = ReaderConfig(seed=3)
    model, tokenizer = new_reader(config)
    model.set_attn_implementation("eager")
    ids = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(0))[:60][None]

    def attend(ids: torch.Tensor = ids) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack(model.model(ids, output_attentions=True).attentions)[:, 0]

    return model, ids, attend


def test_first_heads_look_back(attentive):
    model, _, attend = attentive
    maps = attend()[0]
    for head in range(2):
        assert maps[head].diagonal(-(head + 1))[8:].min() > 0.5, head
    look_back(model.model.layers[0].self_attn, 1, 5)
    assert attend()[0, 1].diagonal(-5)[8:].min() > 0.5


def test_last_heads_find_a_word_again(attentive):
    model, ids, attend = attentive
    for place in (20, 40, 58):
        again = ids.clone()
        again[0, place] = ids[0, 7]
        before, after = attend()[0, -1, place], attend(again)[0, -1, place]
        assert after.argmax() == 7, place
        assert after[7] > 0.3 > 10 * before[7]
        assert after[7] > 3 * after[place], "itself"
    look_for_same(model.model.layers[0].self_attn, 2)
    assert attend(again)[0, 2, 58].argmax() == 7


def test_heads_may_start_at_random():
    random, _ = new_reader(dataclasses.replace(CONFIG, start_heads=False))
    assert not any(p.any() for name, p in random.named_parameters() if name.endswith("k_proj.bias"))


def test_a_word_starts_as_one_with_and_without_a_space():
    model, tokenizer = new_reader(CONFIG)
    embedding = model.get_input_embeddings().weight
    (plain,), (spaced,) = (tokenizer(text).input_ids for text in ("dog", " dog"))
    assert plain != spaced
    assert torch.equal(embedding[plain], embedding[spaced])
    assert not torch.equal(embedding[plain], embedding[tokenizer("cat").input_ids[0]])


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
    with pytest.raises(SystemExit, match=r"error: .*use the same settings, or another folder"):
        main(dataclasses.replace(CONFIG, batch=3), tmp_path, threads=torch.get_num_threads())
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        ReaderConfig(steps=0)
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
