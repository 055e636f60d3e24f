"""Train a small LLaVA-OneVision on the sprite world, in two parts: what `attach_quality.py` attaches to.

    python benchmarks/llava_world.py --out runs/llava-mixed
    python benchmarks/llava_world.py --out runs/llava --init runs/llava-mixed --steps 900 --open-only

A model of the class of transformers, with its own 2x2 pooling, that has never seen a pooled window. The vision tower is
that of the embedded dual encoder and stays frozen, the language model starts as the embedded one that reads; projector,
newline and language model learn from questions: first also from those with options, then from open ones only.

All questions about a clip follow its visual tokens in one row and do not see each other (as in `hicom.world.reader`),
so that a step reads the visual tokens once for about eighteen questions. Needs the world (`hicom world make
runs/world`); the tower's features come from `--cache`, and are computed where they are not kept there.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerBase
from transformers.utils import logging

from hicom.data.features import FeatureStore, cache_features
from hicom.data.records import Sample, read_records
from hicom.model.assemble import read_language_model, read_towers
from hicom.model.hub import find_model
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.processing import CHAT_TEMPLATE, HIComProcessor
from hicom.world.loop import StepsConfig, train_steps
from hicom.world.reader import Batch

START = find_model("hicom-tiny-start")
NUM_FRAMES = 8
PLACEHOLDER = "<video>"


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(StepsConfig):
    """Everything that decides the trained weights; a sample is a clip with all its questions.

    Attributes:
        open_only: leave questions with options out.
    """

    steps: int = 800
    batch: int = 12
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.02
    open_only: bool = False


def new_model() -> tuple[LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerBase]:
    """Return the model before its training: trained tower and language model, a new projector between them."""
    tower, language = read_towers(START, torch.float32).vision, read_language_model(START, torch.float32)
    llm, tokenizer = language.model, language.tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlavaOnevisionConfig(
        vision_config=tower.config,
        text_config=llm.config,
        video_token_index=int(tokenizer.convert_tokens_to_ids(PLACEHOLDER)),
        image_token_index=int(tokenizer.convert_tokens_to_ids("<image>")),
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(llm.get_decoder().state_dict())
    for layer in model.model.multi_modal_projector.children():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()  # the class starts at a size that suits wide models
    model.generation_config.eos_token_id = llm.config.eos_token_id
    model.generation_config.pad_token_id = llm.config.pad_token_id
    model.model.vision_tower.requires_grad_(False)
    return model, tokenizer


def video_embeddings(model: LlavaOnevisionForConditionalGeneration, values: Tensor) -> Tensor:
    """Return the model's own visual tokens, `float[V, N, C]`, of kept features `float[V, T, h, w, D]`."""
    core = model.model
    pooled = core.apply_pooling(core.multi_modal_projector(values.flatten(0, 1).flatten(1, 2)))
    tokens = pooled.unflatten(0, values.shape[:2]).flatten(1, 2)
    return torch.cat([tokens, core.image_newline.expand(len(tokens), 1, -1)], 1)


def make_batch(tokenizer: PreTrainedTokenizerBase, clips: list[list[Sample]], num_visual: int) -> Batch:
    """Return one row a clip: the turn's beginning, `num_visual` placeholders, then every question with its answer."""
    video = int(tokenizer.convert_tokens_to_ids(PLACEHOLDER))
    rows = []
    for samples in clips:
        ids: list[int] = []
        positions: list[int] = []
        segments: list[int] = []
        answers: list[bool] = []
        for number, sample in enumerate(samples, 1):
            asked = tokenizer.apply_chat_template(
                [dict(message) for message in sample.messages], add_generation_prompt=True, tokenize=False
            )
            before, after = asked.split(PLACEHOLDER)
            question = tokenizer(after).input_ids
            answer = tokenizer(f"{sample.answer}<|im_end|>").input_ids
            if not ids:
                ids = tokenizer(before).input_ids + [video] * num_visual
                positions, prefix = list(range(len(ids))), len(ids)
                segments, answers = [0] * prefix, [False] * prefix
            length = len(question) + len(answer)
            ids += question + answer
            positions += range(prefix, prefix + length)
            segments += [number] * length
            answers += [False] * len(question) + [True] * len(answer)
        rows.append((ids, positions, segments, answers))
    padding = (int(tokenizer.pad_token_id), 0, -1, False)
    longest = max(len(ids) for ids, *_ in rows)
    columns = zip(*rows, strict=True)
    padded = (
        torch.tensor([row + [pad] * (longest - len(row)) for row in column])
        for column, pad in zip(columns, padding, strict=True)
    )
    return Batch(*padded)


def answer_logits(
    model: LlavaOnevisionForConditionalGeneration, batch: Batch, visual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what is predicted for every token of the answers.

    Returns:
        Logits `float[A, vocabulary]`, the tokens `int[A]`, and (row, segment) of each, `int[A, 2]`.
    """
    embeddings = model.get_input_embeddings()(batch.ids)
    places = (batch.ids == model.config.video_token_id)[..., None].expand_as(embeddings)
    hidden = model.model.language_model(
        inputs_embeds=embeddings.masked_scatter(places, visual),
        attention_mask=batch.mask(),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    wanted = batch.answers[:, 1:]
    rows = torch.arange(len(batch.ids))[:, None].expand_as(wanted)
    return (
        model.lm_head(hidden[:, :-1][wanted]),
        batch.ids[:, 1:][wanted],
        torch.stack([rows[wanted], batch.segments[:, 1:][wanted]], 1),
    )


def read_clips(world: Path, split: str, num_clips: int | None = None, *, open_only: bool = False) -> list[list[int]]:
    """Return for every clip the numbers of its records in `tune.jsonl`."""
    records = read_records(world / split / "tune.jsonl", world)
    numbers: dict[Path, list[int]] = collections.defaultdict(list)
    for number in range(len(records)):
        sample = records[number]
        if not open_only or sample.metadata["form"] == "open":
            numbers[sample.videos[0]].append(number)
    return list(numbers.values())[:num_clips]


@torch.inference_mode()
def evaluate(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    store: FeatureStore,
    world: Path,
    split: str,
    num_clips: int,
) -> dict[str, float]:
    """Return the share of right answers by family: every token of the answer is the likeliest after those before it."""
    records = read_records(world / split / "tune.jsonl", world)
    clips = read_clips(world, split, num_clips)
    right: dict[str, list[bool]] = collections.defaultdict(list)
    for first in range(0, len(clips), 12):
        asked = [[records[number] for number in numbers] for numbers in clips[first : first + 12]]
        visual = video_embeddings(model, features_of(store, asked))
        logits, answers, places = answer_logits(model, make_batch(tokenizer, asked, visual.shape[1]), visual)
        hits = logits.argmax(-1) == answers
        for row, samples in enumerate(asked):
            for number, sample in enumerate(samples, 1):
                chosen = (places == torch.tensor([row, number])).all(-1)
                right[str(sample.metadata["family"])].append(bool(hits[chosen].all()))
    return {family: round(sum(found) / len(found), 4) for family, found in sorted(right.items())}


def features_of(store: FeatureStore, clips: list[list[Sample]]) -> Tensor:
    """Return the kept features of every clip, `float[V, T, h, w, D]`."""
    videos = [samples[0].videos[0] for samples in clips]
    return store.read(videos, "values").float().unflatten(0, (len(videos), NUM_FRAMES))


def main(
    config: tyro.conf.OmitArgPrefixes[LlavaConfig],
    out: Path = Path("runs/llava"),
    world: Path = Path("runs/world"),
    cache: Path = Path("runs/features"),
    init: Path | None = None,
    threads: int = 1,
    stop_after: int | None = None,
) -> None:
    """Train, or go on with an interrupted training.

    Args:
        config: how to train.
        out: run folder; the model is saved in it.
        world: folder of the sprite world.
        cache: folder of the vision tower's features.
        init: folder of a model to go on from; None: the untrained one.
        threads: CPU threads of torch.
        stop_after: leave (resumably) after this many steps.
    """
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    torch.manual_seed(config.seed)
    model, tokenizer = new_model()
    if init is not None:
        model.load_state_dict(LlavaOnevisionForConditionalGeneration.from_pretrained(init).state_dict())
    records = read_records(world / "train" / "tune.jsonl", world)
    clips = read_clips(world, "train", open_only=config.open_only)
    donor = HIComForConditionalGeneration.from_pretrained(START, dtype=torch.float32)
    videos = [records[numbers[0]].videos[0] for numbers in clips]
    held_out = read_records(world / "test" / "tune.jsonl", world)
    videos += [held_out[numbers[0]].videos[0] for numbers in read_clips(world, "test", 200)]
    store = cache_features(donor, HIComProcessor.from_pretrained(START), videos, cache, num_frames=NUM_FRAMES)

    def loss_of_step(step: int) -> Tensor:
        # Every clip once before any comes again, in an order that the seed and the round decide.
        per_round = len(clips) // config.batch
        order = torch.randperm(
            len(clips), generator=torch.Generator().manual_seed(1000 * config.seed + step // per_round)
        )
        first = step % per_round * config.batch
        asked = [[records[i] for i in clips[clip]] for clip in order[first : first + config.batch].tolist()]
        visual = video_embeddings(model, features_of(store, asked))
        logits, answers, _ = answer_logits(model, make_batch(tokenizer, asked, visual.shape[1]), visual)
        return F.cross_entropy(logits, answers)

    train_steps(
        model,
        loss_of_step,
        config,
        out,
        name="small LLaVA-OneVision",
        model=model,
        tokenizer=tokenizer,
        measure=lambda: evaluate(model, tokenizer, store, world, "test", 200),
        use_muon=True,
        stop_after=stop_after,
    )


if __name__ == "__main__":
    tyro.cli(main)
