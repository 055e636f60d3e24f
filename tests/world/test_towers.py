"""The dual encoder: learns, resumes exactly, and is an ordinary SigLIP folder."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, SiglipModel

from hicom.world.questions import corpus, fill
from hicom.world.render import Renderer, bundled_sprites, render
from hicom.world.scenes import COLORS, MARK_COLORS, NOUNS, WorldConfig, clip_seed, make_scene
from hicom.world.templates import PREDICATES, TEMPLATES
from hicom.world.tokenizer import SPECIAL_TOKENS, TEXT_LENGTH, build_tokenizer
from hicom.world.towers import (
    ASKED,
    BACKGROUND,
    GRID,
    IGNORE,
    MARK_PHRASES,
    NAMES,
    Batch,
    TowerConfig,
    Towers,
    asked_text,
    dot_text,
    evaluate,
    instruction_text,
    loss_of,
    main,
    mark_labels,
    name_index,
    neighbour_patches,
    open_text,
    pair_text,
    patch_labels,
    patch_places,
    preprocess,
    side_by_side,
    tokenize,
    train,
    training_batch,
)

CONFIG = TowerConfig(steps=6, batch=4, warmup=2)
SHORT = WorldConfig(fps=4.5)  # 9 frames


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    return train(CONFIG, folder, num_eval_clips=12), folder


def test_tokenizer_knows_the_world_and_survives_the_rest():
    tokenizer = build_tokenizer()
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    for word in (*NOUNS, *COLORS):
        assert len(tokenizer(f" {word}").input_ids) == len(tokenizer(word).input_ids) == 1, word
    assert tokenizer("Which WAY?").input_ids == tokenizer("which way?").input_ids
    text = "xylophone-über 42 \n 猫"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert max(len(tokenizer(text).input_ids) for text in corpus()) <= TEXT_LENGTH


def test_folder_is_an_ordinary_siglip(trained):
    towers, folder = trained
    model, tokenizer = SiglipModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.text_config.vocab_size
    pixels = preprocess(render(make_scene(clip_seed(0, "val", 0)), SHORT)[0][:2])
    ids = tokenize(tokenizer, ["which way does the dog move?", "dog"])
    with torch.no_grad():
        keys, images, features = towers.encode_images(pixels)
        found = model(input_ids=ids, pixel_values=pixels)
        # The features that the position loss reads are those that the model compresses.
        hidden = model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(features, hidden)
        state = model.vision_model(pixel_values=pixels).last_hidden_state
        head = model.vision_model.head
        raw = state + head.mlp(head.layernorm(state))
        torch.testing.assert_close(found.text_embeds, towers.encode_text(ids))
        torch.testing.assert_close(found.image_embeds, images)
        torch.testing.assert_close(torch.nn.functional.normalize(raw, dim=-1), keys)
    run = json.loads((folder / "run.json").read_text())
    assert run["config"]["seed"] == 0
    assert set(run["metrics"]) >= {"naming", "pointing", "retrieval", "marks", "presence_auc", "num_patches"}


def test_resumed_training_equals_uninterrupted(trained, tmp_path):
    towers, folder = trained
    train(CONFIG, tmp_path, stop_after=3)
    assert not (tmp_path / "run.json").exists()
    with pytest.raises(ValueError, match="use the same settings, or another folder"):
        train(TowerConfig(steps=6, batch=5), tmp_path)
    with pytest.raises(SystemExit, match=r"error: .*use the same settings, or another folder"):
        main(TowerConfig(steps=6, batch=5), tmp_path, threads=torch.get_num_threads())
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        TowerConfig(steps=0)
    resumed = train(CONFIG, tmp_path, num_eval_clips=12)
    for (name, a), b in zip(towers.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} differs after a resume"
    same = [json.loads((f / "run.json").read_text())["metrics"] for f in (folder, tmp_path)]
    assert same[0] == same[1]


def test_the_position_loss_puts_the_place_into_the_features():
    """With a weight that leaves little else to learn, the read-out gets better."""
    config = TowerConfig(batch=4, position_weight=40.0)
    tokenizer = build_tokenizer()
    towers = Towers(len(tokenizer), 0)
    pixels = preprocess(render(make_scene(clip_seed(0, "val", 1)), SHORT)[0][:2])

    def error():
        with torch.no_grad():
            places = towers.position_head(towers.encode_images(pixels)[2])
            return torch.nn.functional.mse_loss(places, patch_places().expand(2, -1, -1)).item()

    before = error()
    optimizer = torch.optim.AdamW(towers.parameters(), lr=3e-3)
    for step in range(45):
        optimizer.zero_grad()
        loss_of(towers, tokenizer, config, step).backward()
        optimizer.step()
    assert error() < 0.5 * before


def test_the_loss_puts_what_is_asked_into_texts_and_dots_into_patches():
    """On the frames of one step texts about dots point at dots; after some steps texts tell what they ask."""
    config = TowerConfig(batch=4, asked_weight=20.0)
    tokenizer = build_tokenizer()
    torch.manual_seed(3)
    towers = Towers(len(tokenizer), 0)
    batch, rng = training_batch(0, 0, 4), np.random.Generator(np.random.PCG64(3))
    dots = np.argwhere((batch.marks >= 0) & (batch.labels >= 0))
    nouns = [NAMES[batch.labels[frame, patch]].split()[-1] for frame, patch in dots]
    questions, kinds = zip(*(asked_text(rng) for _ in range(200)), strict=True)

    def shares():
        with torch.no_grad():
            found = towers.encode_text(tokenize(tokenizer, questions)) @ towers.asked_head.weight.T
            texts = towers.encode_text(tokenize(tokenizer, [dot_text(noun, rng) for noun in nouns]))
            keys = towers.encode_images(preprocess(batch.frames))[0][dots[:, 0]]
        best = torch.einsum("npd,nd->np", keys, texts).argmax(1)
        right = [int(place) == patch for place, (_, patch) in zip(best, dots, strict=True)]
        return (found.argmax(1) == torch.tensor(kinds)).float().mean().item(), float(np.mean(right))

    def learn(steps):
        for step in steps:
            optimizer.zero_grad()
            loss_of(towers, tokenizer, config, step).backward()
            optimizer.step()

    assert max(shares()) < 0.12, "chance is 1/33 and 1/64"
    optimizer = torch.optim.AdamW(towers.parameters(), lr=2e-3)
    learn([0] * 30)
    assert shares()[1] > 0.6
    # The 32 texts of one step are too few to learn all wordings from.
    learn(range(1, 21))
    assert shares()[0] > 0.15


def test_the_loss_points_from_a_thing_to_the_one_next_to_it():
    """On the frames of one step, texts that name one object point at another one."""
    config = TowerConfig(batch=4, image_weight=0.0, position_weight=0.0, asked_weight=0.0)
    tokenizer = build_tokenizer()
    towers = Towers(len(tokenizer), 0)
    batch = training_batch(0, 0, 4)
    assert len(batch.neighbours) >= 4

    def share():
        """Of a text's softmax, on the neighbour; over all wordings, most of which one step does not hold."""
        found = []
        with torch.no_grad():
            keys = towers.encode_images(preprocess(batch.frames))[0]
            for frame, noun, other in batch.neighbours.tolist():
                texts = [fill(template, NOUNS[noun]) for template in TEMPLATES["neighbour"]]
                logits = towers.dense_scale.exp() * towers.encode_text(tokenize(tokenizer, texts)) @ keys[frame].T
                wanted = [label >= 0 and NAMES[label].split()[-1] == NOUNS[other] for label in batch.labels[frame]]
                found.append(logits.softmax(1)[:, wanted].sum(1).mean())
        return float(np.mean(found))

    before = share()
    optimizer = torch.optim.AdamW(towers.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(towers, tokenizer, config, 0).backward()
        optimizer.step()
    # All else in the loss raises it by 0.22 and 0.24 (two seeds), since texts learn to point at objects.
    assert share() > before + 0.3


def test_a_text_about_a_neighbour_is_to_point_at_the_neighbour_alone():
    batch = training_batch(0, 0, 8)
    noun = torch.tensor([NOUNS.index(name.split()[-1]) for name in NAMES])
    wanted = neighbour_patches(torch.from_numpy(batch.labels), noun, torch.from_numpy(batch.neighbours))
    assert wanted.any(1).float().mean() > 0.8
    for row, (frame, _, other) in zip(wanted, batch.neighbours.tolist(), strict=True):
        filled = [label >= 0 and NAMES[label].split()[-1] == NOUNS[other] for label in batch.labels[frame]]
        assert row.tolist() == filled


def test_what_is_next_to_a_thing_is_told_where_there_is_one_answer():
    pairs = 0
    for index in range(60):
        scene = make_scene(clip_seed(0, "val", index))
        found = side_by_side(scene, 0.5)
        # What grows or shrinks is side by side when it is large.
        if scene.kind == "pair" and scene.objects[0].growth == 1:
            first, second = scene.objects[:2]
            assert found == [(first, second), (second, first)]
            pairs += 1
    assert pairs > 5


def test_training_lowers_the_loss_and_trains_everything(trained):
    towers, _ = trained
    torch.manual_seed(CONFIG.seed)
    fresh = Towers(towers.model.config.text_config.vocab_size, 0)
    still = [n for (n, a), b in zip(towers.named_parameters(), fresh.parameters(), strict=True) if torch.equal(a, b)]
    assert not still, f"not trained: {still}"


def test_frames_depend_on_seed_and_step_only():
    a, b, c, d = (training_batch(*key, 3) for key in ((0, 5), (0, 5), (0, 6), (1, 5)))
    assert isinstance(a, Batch)
    for field in ("frames", "labels", "marks", "present", "neighbours"):
        assert np.array_equal(getattr(a, field), getattr(b, field)), field
    assert not np.array_equal(a.frames, c.frames)
    assert not np.array_equal(a.frames, d.frames)


def test_batches_agree_with_themselves():
    batch = training_batch(0, 1, 24)
    assert batch.frames.shape == (24, 128, 128, 3)
    assert batch.labels.shape == batch.marks.shape == (24, GRID * GRID)
    assert batch.present.shape == (24, len(NAMES))
    for labels, present in zip(batch.labels, batch.present, strict=True):
        named = set(labels[labels >= 0].tolist())
        assert named
        assert present[list(named)].all(), "what fills a patch is present"
        shown = {NAMES[i] for i in np.flatnonzero(present)}
        assert all(name.split()[-1] in shown for name in shown), "a red circle is a circle"
    assert len(batch.neighbours) > 10
    for frame, noun, other in batch.neighbours:
        assert batch.present[frame, [noun, other]].all(), "neighbours are seen"
        assert noun != other
    assert set(np.unique(batch.marks)) == {IGNORE, *range(len(MARK_COLORS))}
    # A dot is on an object, and much smaller.
    assert (batch.labels[batch.marks >= 0] != BACKGROUND).all()
    assert (batch.marks >= 0).sum() < (batch.labels >= 0).sum()


def test_patch_labels_name_what_fills_the_patch():
    for index in range(10):
        scene = make_scene(clip_seed(0, "val", index))
        renderer = Renderer(scene)
        for time in (0.0, 0.6, 1.0):
            mask = renderer.labels(time)
            labels = patch_labels(mask, scene).reshape(GRID, GRID)
            cells = mask.reshape(GRID, 16, GRID, 16)
            for row in range(GRID):
                for column in range(GRID):
                    share = [(cells[row, :, column] == i + 1).mean() for i in range(len(scene.objects))]
                    best = int(np.argmax(share))
                    if share[best] >= 0.3:
                        assert NAMES[labels[row, column]] == scene.objects[best].name
                    else:
                        assert labels[row, column] == (IGNORE if share[best] > 0 else BACKGROUND)


def test_mark_labels_are_at_the_dots():
    extents, found = bundled_sprites().extents, 0
    for index in range(30):
        scene = make_scene(clip_seed(0, "val", index))
        renderer = Renderer(scene)
        for time in (0.2, 0.9):
            frame, mask = renderer.frame(time)
            labels = mark_labels(mask, scene, extents, time).reshape(GRID, GRID)
            for row, column in np.argwhere(labels >= 0).tolist():
                cell = frame[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].reshape(-1, 3).astype(int)
                paint = COLORS[MARK_COLORS[labels[row, column]]]
                assert (np.abs(cell - paint).max(-1) < 6).any(), "its colour is seen in the patch"
                found += 1
            seen = [item for item in scene.objects if item.mark and item.visible(time)]
            assert (labels >= 0).sum() <= len(seen)
    assert found > 20


def test_texts_are_about_what_they_say():
    rng = np.random.Generator(np.random.PCG64(0))
    tokenizer = build_tokenizer()
    for text, kind in (asked_text(rng) for _ in range(100)):
        wordings = TEMPLATES.get(ASKED[kind], TEMPLATES["which"])
        said = [word for part in wordings for word in part.rstrip("?.").split() if "{" not in word]
        assert set(text.rstrip("?.").split()) & set(said), text
        if ASKED[kind] in PREDICATES:
            assert any(words in text for words in PREDICATES[ASKED[kind]]), text
    assert all("dot" in text and "umbrella" in text for text in (dot_text("umbrella", rng) for _ in range(20)))
    texts = [instruction_text("umbrella", rng) for _ in range(60)]
    assert all("umbrella" in text for text in texts)
    assert len(set(texts)) > 30
    pairs = [pair_text("dog", "cat", rng) for _ in range(40)]
    assert all("dog" in text and "cat" in text for text in pairs)
    opened = [open_text(rng) for _ in range(60)]
    assert not any(f" {noun} " in f" {text.rstrip('?.')} " for text in opened for noun in NOUNS)
    assert any(text[-1] not in "?." for text in opened), "with and without punctuation"
    texts += pairs + opened + [phrase.format(c="yellow") for phrase in MARK_PHRASES]
    ids = tokenize(tokenizer, texts)
    assert ids.shape == (len(texts), TEXT_LENGTH)
    assert not any("{" in text for text in texts)


def test_names_are_in_order():
    for index in range(20):
        for item in make_scene(clip_seed(0, "val", index)).objects:
            assert NAMES[name_index(item)] == item.name


def test_untrained_encoder_measures_near_chance(tmp_path):
    tokenizer = build_tokenizer()
    torch.manual_seed(1)
    metrics = evaluate(Towers(len(tokenizer), 0), tokenizer, tmp_path, num_clips=10)
    assert metrics["naming"] < 0.15
    assert 0.2 < metrics["presence_auc"] < 0.8
