"""Teach the text tower to name several things at once: `python -m hicom.world.text_tower --towers runs/frames`.

Beside the frames that the dual encoder learns from, texts that name two objects are rare, and the embedding of "does
the dog come before the key?" is near the dog's and the key's, but nearer to a third object's in three of four cases:
what such an instruction steers looks at the wrong things. Words alone can teach that, so it takes minutes: the
embedding of two names becomes the middle of both, the token of every name that name's, those of other words nobody's
(so that pointers find names, see `hicom.model.options.main_words`), and all other texts stay where they are. The vision
tower stays as it is, and so do features that were kept.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hicom.model.assemble import read_towers
from hicom.model.options import main_words
from hicom.world.loop import StepsConfig, as_command, train_steps
from hicom.world.questions import fill
from hicom.world.scenes import MARK_COLORS, NOUNS, generator
from hicom.world.templates import COMPARING, HELD_OUT_TEMPLATES, TEMPLATES
from hicom.world.towers import (
    ASKED,
    MARK_PHRASES,
    NAMES,
    PAIR_TEMPLATES,
    Towers,
    asked_text,
    dot_text,
    evaluate,
    instruction_text,
    neighbour_text,
    open_text,
    tokenize,
    vary,
)

_TRAIN_STREAM, _HELD_OUT_STREAM = 2000, 2001  # second numbers of the seeds of texts
TWO_NAMES = (*PAIR_TEMPLATES, *COMPARING["first_of"], *COMPARING["last_of"])
UNSEEN_TWO_NAMES = (*HELD_OUT_TEMPLATES["before"], *HELD_OUT_TEMPLATES["after"])
TEMPERATURE = 20.0
"""Of the softmax over nouns, so that two close ones are told apart."""


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig(StepsConfig):
    """Everything that decides the trained weights; a sample is a text that names two objects, and one that does not.

    Attributes:
        nearest_weight: weight of both names being the nearest ones; the angle to their middle has weight 1.
        token_weight: weight of the angle between the token of a name and the name.
        silent_weight: weight of other tokens being near names: the sum of squares of their positive cosines.
        keep_weight: weight of the angle between the embedding of any other text and what it was.
    """

    steps: int = 1000
    batch: int = 160
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.05
    nearest_weight: float = 0.2
    token_weight: float = 1.0
    silent_weight: float = 0.1
    keep_weight: float = 3.0


def two_names(
    rng: Generator, number: int, templates: tuple[str, ...] = TWO_NAMES
) -> tuple[list[str], NDArray[np.int64]]:
    """Return texts that name two objects, and their nouns int[N, 2], as indices of `NOUNS`."""
    pairs = np.stack([rng.choice(len(NOUNS), 2, replace=False) for _ in range(number)])
    texts = [
        vary(fill(templates[rng.integers(len(templates))], NOUNS[first], NOUNS[second]), rng) for first, second in pairs
    ]
    return texts, pairs


def other_text(rng: Generator) -> str:
    """Return a random instruction or phrase of any other kind."""
    kind = rng.integers(6)
    if kind == 0:
        return instruction_text(NAMES[rng.integers(len(NAMES))], rng)
    if kind == 1:
        return open_text(rng)
    if kind == 2:
        color = MARK_COLORS[rng.integers(len(MARK_COLORS))]
        return MARK_PHRASES[rng.integers(len(MARK_PHRASES))].format(c=color)
    if kind < 5:
        noun = NOUNS[rng.integers(len(NOUNS))]
        return dot_text(noun, rng) if kind == 3 else neighbour_text(noun, rng)
    while True:
        text, asked = asked_text(rng)
        if ASKED[asked] not in ("before", "after"):
            return text


class Lesson:
    """What one text tower learns from itself.

    Args:
        towers: a trained dual encoder.
        tokenizer: its tokenizer.

    Attributes:
        names: float[len(NOUNS), D], unit embeddings of the nouns: the mean over the questions for their presence.
        noun_of: int[V], the noun that a token is, as an index of `NOUNS`, or -1.
    """

    def __init__(self, towers: Towers, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.text_model = towers.model.text_model
        self.teacher = copy.deepcopy(self.text_model).eval().requires_grad_(False)
        self.noun_of = torch.full((len(tokenizer),), -1)
        for number, noun in enumerate(NOUNS):
            for text in (noun, f" {noun}"):
                ids = tokenizer(text).input_ids
                if len(ids) == 1:
                    self.noun_of[ids[0]] = number
        asked = [fill(template, noun) for noun in NOUNS for template in TEMPLATES["presence"]]
        with torch.no_grad():
            embedding = self.embed(self.teacher, asked)[0].view(len(NOUNS), -1, self.teacher.config.projection_size)
        self.names = F.normalize(embedding.mean(1), dim=-1)

    def embed(self, text_model: PreTrainedModel, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit embeddings of texts `float[N, D]` and their tokens `float[N, L, D]`, and the ids `int[N, L]`."""
        ids = tokenize(self.tokenizer, texts)
        output = text_model(input_ids=ids.to(text_model.device))
        head: torch.nn.Module = text_model.head
        tokens = head(output.last_hidden_state)
        return F.normalize(output.pooler_output, dim=-1), F.normalize(tokens, dim=-1), ids

    def loss(self, step: int, config: TextTowerConfig) -> Tensor:
        """Return the loss of one step."""
        rng = generator(config.seed, _TRAIN_STREAM, step)
        both, pairs = two_names(rng, config.batch)
        others = [other_text(rng) for _ in range(config.batch)]
        embedding, tokens, ids = self.embed(self.text_model, both + others)
        noun = self.noun_of[ids]
        two, rest = embedding.split(config.batch)
        first, second = torch.from_numpy(pairs).T
        middle = F.normalize(self.names[first] + self.names[second], dim=-1)
        likely = (two @ self.names.T * TEMPERATURE).log_softmax(-1)
        nearest = -torch.stack([likely.gather(1, each[:, None]) for each in (first, second)]).mean()
        with torch.no_grad():
            before = self.embed(self.teacher, others)[0]
        named = noun >= 0
        return (
            angle(two, middle)
            + config.nearest_weight * nearest
            + config.token_weight * angle(tokens[named], self.names[noun[named]])
            + config.silent_weight * (tokens[~named] @ self.names.T).clamp(min=0).square().sum(-1).mean()
            + config.keep_weight * angle(rest, before)
        )

    @torch.inference_mode()
    def measure(self, number: int = 500, seed: int = 0) -> dict[str, float]:
        """Measure on texts that were not trained on.

        Returns:
            `two_names`: share of texts that name two objects whose two nearest nouns are these; `two_names_unseen`: the
            same in wordings that training never uses; `main_words`: share of the latter whose two main words
            (`main_words`) are the names in their order; `name_tokens`: share of tokens of names that are nearest to
            it; `kept`: mean cosine between other texts and what they were.
        """
        found: dict[str, float] = {}
        rng = generator(seed, _HELD_OUT_STREAM)
        for name, templates in (("two_names", TWO_NAMES), ("two_names_unseen", UNSEEN_TWO_NAMES)):
            texts, pairs = two_names(rng, number, templates)
            embedding, tokens, ids = self.embed(self.text_model, texts)
            nearest = (embedding @ self.names.T).topk(2).indices.sort(1).values
            found[name] = (nearest == torch.from_numpy(pairs).sort(1).values).all(1).float().mean().item()
        words = main_words(embedding, tokens, ids != self.tokenizer.pad_token_id, 2) @ self.names.T
        found["main_words"] = (words.argmax(-1) == torch.from_numpy(pairs)).all(1).float().mean().item()
        noun = self.noun_of[ids]
        named = noun >= 0
        found["name_tokens"] = ((tokens[named] @ self.names.T).argmax(-1) == noun[named]).float().mean().item()
        others = [other_text(rng) for _ in range(number)]
        found["kept"] = 1 - angle(self.embed(self.text_model, others)[0], self.embed(self.teacher, others)[0]).item()
        return {name: round(value, 4) for name, value in found.items()}


def angle(one: Tensor, other: Tensor) -> Tensor:
    """Return 1 minus the mean cosine of unit vectors."""
    return 1 - (one * other).sum(-1).mean()


def load(name: str | Path) -> tuple[Towers, PreTrainedTokenizerBase]:
    """Return a trained dual encoder of the sprite world, without the read-outs that only its training needs.

    Raises:
        ValueError: there is none, or it is another one.
    """
    found = read_towers(name, torch.float32)
    assert found.vision is not None
    assert found.instruction is not None
    assert found.tokenizer is not None
    towers = Towers(len(found.tokenizer), int(found.tokenizer.pad_token_id))
    halves = ((towers.model.vision_model, found.vision), (towers.model.text_model, found.instruction))
    for half, trained in halves:
        try:
            half.load_state_dict(trained.state_dict())
        except RuntimeError:
            raise ValueError(
                f"{name} is no dual encoder of the sprite world; make one with python -m hicom.world.towers"
            ) from None
    return towers, found.tokenizer


def train(
    config: TextTowerConfig, towers: str | Path, out: Path, *, stop_after: int | None = None, num_eval_clips: int = 200
) -> Towers:
    """Train, or continue an interrupted training, and save a `SiglipModel` folder with its tokenizer and `run.json`.

    Args:
        config: what to train.
        towers: the dual encoder to go on from: a folder of `hicom.world.towers`, or a HICom model that has it.
        out: folder of the model.
        stop_after: leave (resumably) after this many steps.
        num_eval_clips: validation clips that the finished encoder is measured on.

    Raises:
        ValueError: `out` holds a run of another configuration, or `towers` is no dual encoder of the sprite world.
    """
    trained, tokenizer = load(towers)
    lesson = Lesson(trained, tokenizer)

    def measure() -> dict[str, float]:
        found = evaluate(trained, tokenizer, out, num_eval_clips, config.seed, with_readouts=False)
        return found | lesson.measure(seed=config.seed)

    train_steps(
        trained.model.text_model,
        lambda step: lesson.loss(step, config),
        config,
        out,
        name="text tower",
        model=trained.model,
        tokenizer=tokenizer,
        measure=measure,
        stop_after=stop_after,
    )
    return trained


def main(
    config: tyro.conf.OmitArgPrefixes[TextTowerConfig],
    towers: str = "runs/frames",
    out: Path = Path("runs/towers"),
    threads: int = 1,
) -> None:
    """Teach the text tower of the sprite world to name several things at once.

    Args:
        config: what to train.
        towers: the dual encoder to go on from.
        out: folder for the model.
        threads: CPU threads of torch.
    """
    as_command(lambda: train(config, towers, out), threads)


if __name__ == "__main__":
    tyro.cli(main)
