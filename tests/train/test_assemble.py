"""Models put together of parts: whose towers, whose language model, which compressor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hicom.model.modeling import HIComForConditionalGeneration
from hicom.train import Parts, run
from hicom.train.assemble import assemble
from toy_training import make_config, make_folder

OPTIONS = {"match_evidence": True, "motion_features": True, "num_pointers": 2, "num_word_pointers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    return run(make_config(folder, out=str(folder / "first"), steps=2))


def parts_of(folder: Path, **changes: object) -> Parts:
    parts = make_config(folder).parts
    assert parts is not None
    return dataclasses.replace(parts, **changes)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def test_language_model_and_towers_of_a_trained_model_are_taken(folder: Path, trained: Path) -> None:
    donor = HIComForConditionalGeneration.from_pretrained(trained)
    model, processor = assemble(parts_of(folder, towers=str(trained), language_model=str(trained), config=OPTIONS))
    assert same(model.model.language_model, donor.model.language_model)
    assert same(model.lm_head, donor.lm_head)
    assert same(model.model.vision_tower, donor.model.vision_tower)
    assert same(model.model.instruction_encoder, donor.model.instruction_encoder)
    assert not same(model.model.compressor.local.readout, donor.model.compressor.local.readout)
    assert model.config.num_pointers == processor.num_pointers == 2
    new, _ = assemble(parts_of(folder))
    assert not same(new.model.language_model, donor.model.language_model)


@pytest.mark.parametrize(
    "config",
    [
        OPTIONS,
        {"local_injection": "none", "global_injection": "none"},
        {"compressor": "spatial_pool", "window": None},
        {"compressor": "qformer", "compressor_options": {"num_queries": 2}, "window": None},
        {"compressor": "no_compression", "window": None},
    ],
    ids=["options", "unconditional", "spatial_pool", "qformer", "no_compression"],
)
def test_any_compressor_trains_and_is_saved(
    folder: Path, trained: Path, tmp_path: Path, config: dict[str, object]
) -> None:
    every = make_config(folder).stage
    every = dataclasses.replace(every, trainable=((r"model\.(compressor|language_model)\..*", 1e-3),))
    parts = parts_of(folder, language_model=str(trained), config=config)
    model = run(make_config(folder, out=str(tmp_path), steps=1, parts=parts, stage=every))
    loaded = HIComForConditionalGeneration.from_pretrained(model)
    for name, value in config.items():
        assert getattr(loaded.config, name) == value


def test_an_embedded_model_gives_its_towers() -> None:
    model, processor = assemble(Parts(towers="hicom-tiny", language_model="hicom-tiny"))
    assert model.config.image_size == 64
    assert processor.instruction_inputs(["Which way does the dog move?"])[0].shape[0] == 1


@pytest.mark.parametrize("name", ["towers", "language_model"])
def test_a_missing_part_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=str(tmp_path / "nothing")):
        assemble(parts_of(folder, **{name: str(tmp_path / "nothing")}))
