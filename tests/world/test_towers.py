"""The dual encoder: learns, resumes exactly, and is an ordinary SigLIP folder."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, SiglipModel

from hicom.world.questions import corpus
from hicom.world.render import render
from hicom.world.scenes import COLORS, NOUNS, clip_seed, make_scene
from hicom.world.tokenizer import SPECIAL_TOKENS, TEXT_LENGTH, build_tokenizer
from hicom.world.towers import (
    BACKGROUND,
    GRID,
    NAMES,
    TowerConfig,
    Towers,
    evaluate,
    patch_labels,
    patch_places,
    preprocess,
    tokenize,
    train,
    training_batch,
)

CONFIG = TowerConfig(steps=6, batch=4, warmup=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    return train(CONFIG, folder, num_eval_clips=3), folder


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
    pixels = preprocess(render(make_scene(clip_seed(0, "val", 0)), num_frames=2)[0])
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
    assert set(run["metrics"]) >= {"naming", "pointing", "retrieval", "presence_auc", "num_patches"}


def test_resumed_training_equals_uninterrupted(trained, tmp_path):
    towers, folder = trained
    train(CONFIG, tmp_path, stop_after=3)
    assert not (tmp_path / "run.json").exists()
    with pytest.raises(ValueError, match="use the same settings, or another folder"):
        train(TowerConfig(steps=6, batch=5), tmp_path)
    resumed = train(CONFIG, tmp_path, num_eval_clips=3)
    for (name, a), b in zip(towers.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} differs after a resume"
    same = [json.loads((f / "run.json").read_text())["metrics"] for f in (folder, tmp_path)]
    assert same[0] == same[1]


SECOND = {"steps": 8, "batch": 4, "warmup": 2, "lr": 3e-3, "position_weight": 1.0, "position_start": 0.5}


def test_second_phase_puts_the_place_into_the_features(trained, tmp_path):
    """Its read-out gets better, the first phase's naming goes on, and it resumes as exactly as the first."""
    _, folder = trained
    config = TowerConfig(init=str(folder), **SECOND)
    train(config, tmp_path / "two", stop_after=3)
    resumed = train(config, tmp_path / "two", num_eval_clips=1)
    whole = train(config, tmp_path / "one", num_eval_clips=1)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name

    def error(towers):
        pixels = preprocess(render(make_scene(clip_seed(0, "val", 1)), num_frames=2)[0])
        with torch.no_grad():
            return torch.nn.functional.mse_loss(
                towers.position_head(towers.encode_images(pixels)[2]), patch_places().expand(2, -1, -1)
            ).item()

    assert error(whole) < 0.5 * error(train(config, tmp_path / "start", stop_after=1))


def test_second_phase_needs_a_first(tmp_path):
    with pytest.raises(ValueError, match=r"no run to go on from.*resume\.pt"):
        train(TowerConfig(init=str(tmp_path / "nowhere"), steps=2), tmp_path / "out")


def test_training_lowers_the_loss_and_trains_everything(trained):
    towers, _ = trained
    torch.manual_seed(CONFIG.seed)
    fresh = Towers(towers.model.config.text_config.vocab_size, 0)
    still = [n for (n, a), b in zip(towers.named_parameters(), fresh.parameters(), strict=True) if torch.equal(a, b)]
    assert not still, f"not trained: {still}"


def test_frames_depend_on_seed_and_step_only():
    a, b, c = training_batch(0, 5, 3), training_batch(0, 5, 3), training_batch(0, 6, 3)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not np.array_equal(a[0], c[0])


def test_patch_labels_name_what_fills_the_patch():
    for index in range(10):
        scene = make_scene(clip_seed(0, "val", index))
        _, masks = render(scene, num_frames=2)
        for time, mask in zip((0.0, 1.0), masks, strict=True):
            labels = patch_labels(mask, scene).reshape(GRID, GRID)
            for number, item in enumerate(scene.objects, 1):
                if item.visible(time):
                    x, y = (min(int(value * GRID), GRID - 1) for value in item.center(time))
                    cell = mask.reshape(GRID, 16, GRID, 16)[y, :, x]
                    if (cell == number).mean() > 0.5:
                        assert NAMES[labels[y, x]] == item.name
            empty = (mask == 0).reshape(GRID, 16, GRID, 16).all((1, 3))
            assert ((labels == BACKGROUND) == empty).all()


def test_untrained_encoder_measures_near_chance(tmp_path):
    tokenizer = build_tokenizer()
    torch.manual_seed(1)
    metrics = evaluate(Towers(len(tokenizer), 0), tokenizer, tmp_path, num_clips=10)
    assert metrics["naming"] < 0.15
    assert 0.2 < metrics["presence_auc"] < 0.8
