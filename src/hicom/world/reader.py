"""Teach a small language model to read: `python -m hicom.world.reader --out runs/reader`.

The paper starts from a language model that reads; this is its stand-in. A random Qwen2 is trained on scenes told in
words: a line says of every object its name and where it starts, how it moves and where it ends. Many questions about
the line follow, each as it would follow the visual tokens. They share the line but do not see each other, so a step
costs little more than reading the lines once, and every question is answered as if it had been asked alone.

Two things make it learn in minutes what it would else learn late or never. Some heads start as what reading needs:
they look back at what stands just before, or for the word that they are at (`start_heads`). And drills give a lesson
many answers that only such looking finds: one list of options, each asked for its letter.

The result is a `Qwen2ForCausalLM` folder with its tokenizer, as any other language model.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from numpy.random import Generator
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from hicom.model.processing import CHAT_TEMPLATE
from hicom.model.small_llm import add_chat_tokens, small_llm_config
from hicom.world.loop import StepsConfig, as_command, train_steps
from hicom.world.questions import Asker, Question, article, side
from hicom.world.scenes import Scene, SceneObject, WorldConfig, clip_seed, generator, make_scene
from hicom.world.tokenizer import build_tokenizer

# Seeds of the scenes and questions, far from those of the clips.
_SCENES, _QUESTIONS, _HELD_OUT = 1000, 7, 10**9
ROUNDS = 2
"""A measured scene is asked about twice, with other words and other objects."""
FURTHER = {"before": 6, "order": 2, "neighbour": 3, "needle": 2, "presence": 2}
"""Further questions of a lesson, by family: of families that few scenes have, and those that compare words."""
ROPE_THETA = 1e6
"""Leaves most of a head's width slow enough to find a word again, however much lies between."""
SPACE = "Ġ"  # as byte-level BPE writes it
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"


@dataclass(frozen=True, kw_only=True)
class ReaderConfig(StepsConfig):
    """Everything that decides the trained weights; a sample is a story with its questions.

    Attributes:
        num_choices: questions of a lesson that list options.
        num_stated: such questions that ask nothing but state the answer.
        num_drills: lists of options whose letters are asked for, one after the other.
        text_weight: weight of predicting story and question; answers have weight 1.
        hidden_size: width of the language model.
        intermediate_size: width inside its MLPs.
        num_layers: its layers.
        num_heads: its attention heads.
        start_heads: whether some heads start as what reading needs (`start_heads`); else all are random.
    """

    steps: int = 3000
    batch: int = 6
    lr: float = 4e-3
    warmup: int = 100
    weight_decay: float = 0.02
    num_choices: int = 3
    num_stated: int = 1
    num_drills: int = 2
    text_weight: float = 0.1
    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    start_heads: bool = True


def tell(scene: Scene, item: SceneObject) -> str:
    """Return `[colour] name, start, way, middle, end`, and what else is true of it."""
    words = [item.name]
    for time in (item.enter, (item.enter + item.leave) / 2, item.leave):
        words.append(side(scene, item, time) or "middle")
        if time == item.enter:
            words.append("brief" if item.is_brief else item.way)
    if item.growth != 1:
        words.append("grows" if item.growth > 1 else "shrinks")
    if item.mark:
        words.append(f"{item.mark} dot")
    if item.enter > 0:
        words.append("late")
    if item.leave < 1:
        words.append("early")
    if scene.kind == "pair" and item in scene.objects[:2]:
        words.append(f"beside {article(scene.objects[1 - scene.objects.index(item)].noun)}")
    return " ".join(words)


def story(scene: Scene) -> str:
    """Return all that is told of a scene, in the order in which it appears, then from left to right."""
    ordered = sorted(scene.objects, key=lambda item: (item.enter, item.path[0][0] + item.path[2][0]))
    return ", ".join(tell(scene, item) for item in ordered)


def story_and_questions(
    seed: int, index: int, *, choice_share: float = 0.0, config: WorldConfig | None = None
) -> tuple[str, list[Question]]:
    """Return a scene in words, none of them a clip's, and questions about it: a function of (seed, index) alone.

    Args:
        seed: of everything.
        index: number of the scene.
        choice_share: share of the questions with options; half of them state the answer in place of the question.
        config: the world's.
    """
    scene, rng, asker = _new_asker(seed, index, config)
    asked = [question for _ in range(ROUNDS) for question in asker.questions()]
    for place, question in enumerate(asked):
        if rng.random() < choice_share:
            choice = asker.as_choice(question)
            asked[place] = as_stated(question, choice) if rng.random() < 0.5 else choice
    return story(scene), [*asked, asker.pick([*asker.descriptions(), *asker.captions()])]


def lesson(seed: int, index: int, config: ReaderConfig) -> tuple[str, list[Question]]:
    """Return a scene in words and all that a step of training asks about it: a function of its arguments alone.

    Args:
        seed: of everything.
        index: number of the scene.
        config: how much is asked in which form.
    """
    scene, rng, asker = _new_asker(seed, index)
    usual = asker.questions()
    further = [getattr(asker, family)() for family, number in FURTHER.items() for _ in range(number)]
    # The same question twice teaches nothing new.
    asked = list(dict.fromkeys(question for question in [*usual, *further] if question))
    listed = (asker.pick(usual) for _ in range(config.num_choices + config.num_stated + config.num_drills))
    for number, question in enumerate(listed):
        choice = asker.as_choice(question)
        if number < config.num_choices:
            asked.append(choice)
        elif number < config.num_choices + config.num_stated:
            asked.append(as_stated(question, choice))
        else:
            asked.append(as_drill(choice, rng))
    return story(scene), [*asked, asker.pick([*asker.descriptions(), *asker.captions()])]


def as_stated(question: Question, choice: Question) -> Question:
    """Return a question with options that has the answer to `question` in place of its words."""
    return dataclasses.replace(choice, text=choice.text.replace(question.text, question.answer, 1), form="stated")


def as_drill(choice: Question, rng: Generator) -> Question:
    """Return the options of a question alone; the answer names each, in any order, with its letter."""
    lines = choice.text.split("\n")[1:-1]
    ordered = [lines[place] for place in rng.permutation(len(lines))]
    answer = "\n".join(f"{line.partition(') ')[2]}\n{line[1]}" for line in ordered)
    return dataclasses.replace(choice, text="\n".join(lines), answer=answer, form="drill")


def _new_asker(seed: int, index: int, config: WorldConfig | None = None) -> tuple[Scene, Generator, Asker]:
    config = config or WorldConfig()
    scene = make_scene(clip_seed(_SCENES + seed, "train", index), config)
    rng = generator(_QUESTIONS + seed, index)
    return scene, rng, Asker(scene, rng, nouns=config.nouns)


@dataclass(frozen=True)
class Batch:
    """Stories with their questions, one row a story.

    Attributes:
        ids: int[B, L].
        positions: int[B, L]; those of every question go on from the story's end.
        segments: int[B, L]: 0 in the story, 1, 2, ... in its questions, -1 on padding.
        answers: bool[B, L]: what is answered, its end included; of drills the letters.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    answers: Tensor

    def mask(self) -> Tensor:
        """Return `float[B, 1, L, L]`: 0 where a token may look, at the story and at its own question up to itself."""
        key, query = self.segments[:, None], self.segments[:, :, None]
        length = self.ids.shape[1]
        past = torch.ones(length, length, dtype=torch.bool).tril()
        # Padding looks at itself: a row of nothing but -inf has no softmax.
        allowed = past & ((key == 0) | (key == query)) & ((key >= 0) | torch.eye(length, dtype=torch.bool))
        return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)[:, None]


def make_batch(tokenizer: PreTrainedTokenizerBase, told: Sequence[tuple[str, Sequence[Question]]]) -> Batch:
    """Return stories and questions as tensors."""
    rows = []
    for text, questions in told:
        prompt = tokenizer(f"{USER}{text}\n").input_ids
        ids, positions = list(prompt), list(range(len(prompt)))
        segments, answers = [0] * len(prompt), [False] * len(prompt)
        for number, question in enumerate(questions, 1):
            asked = tokenizer(f"{question.text}{END}\n{ASSISTANT}").input_ids
            answer = tokenizer(f"{question.answer}{END}").input_ids
            # Of a drill only letters are answers: which option comes next nobody can know.
            is_answer = [question.form != "drill"] * len(answer)
            if question.form == "drill":
                for line in range(1, question.answer.count("\n") + 1, 2):
                    before = question.answer.split("\n")[:line]
                    is_answer[len(tokenizer("\n".join(before) + "\n").input_ids)] = True
            length = len(asked) + len(answer)
            ids += asked + answer
            positions += range(len(prompt), len(prompt) + length)
            segments += [number] * length
            answers += [False] * len(asked) + is_answer
        rows.append((ids, positions, segments, answers))
    padding = (int(tokenizer.pad_token_id), 0, -1, False)
    longest = max(len(ids) for ids, *_ in rows)
    columns = zip(*rows, strict=True)
    padded = (
        torch.tensor([row + [pad] * (longest - len(row)) for row in column])
        for column, pad in zip(columns, padding, strict=True)
    )
    return Batch(*padded)


def read(model: Qwen2ForCausalLM, batch: Batch) -> Tensor:
    """Return the last hidden state, `float[B, L, C]`."""
    output = model.model(
        input_ids=batch.ids.to(model.device),
        attention_mask=batch.mask().to(model.device),
        position_ids=batch.positions.to(model.device),
        use_cache=False,
    )
    return torch.as_tensor(output.last_hidden_state)


def loss_of(model: Qwen2ForCausalLM, batch: Batch, text_weight: float) -> Tensor:
    """Return the mean cross-entropy of the answers, and of all other text at a lower weight."""
    hidden = read(model, batch)
    # A question's first token has the story before it, not the question that stands before it in the row.
    follows = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] >= 0)
    logits = model.lm_head(hidden[:, :-1][follows])
    errors = F.cross_entropy(logits, batch.ids[:, 1:][follows].to(model.device), reduction="none")
    is_answer = batch.answers[:, 1:][follows].to(model.device)
    return errors[is_answer].mean() + text_weight * errors[~is_answer].mean()


@torch.inference_mode()
def evaluate(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, num_scenes: int = 300, seed: int = 0
) -> dict[str, float]:
    """Return the share of right answers about unseen stories.

    By family, open and with options (`which, choice`); `stated` where the options follow the answer itself. An
    answer is right where every one of its tokens is the likeliest one after those before it.
    """
    right: dict[str, list[bool]] = collections.defaultdict(list)
    for index in range(0, num_scenes, 32):
        numbers = range(index, min(index + 32, num_scenes))
        told = [story_and_questions(seed, _HELD_OUT + i, choice_share=0.5) for i in numbers]
        batch = make_batch(tokenizer, told)
        logits = model.lm_head(read(model, batch))
        hits = logits[:, :-1].argmax(-1).cpu() == batch.ids[:, 1:]
        for row, (_, questions) in enumerate(told):
            for number, question in enumerate(questions, 1):
                answer = (batch.segments[row, 1:] == number) & batch.answers[row, 1:]
                name = {"open": question.family, "choice": f"{question.family}, choice", "stated": "stated"}
                right[name[question.form]].append(bool(hits[row][answer].all()))
    return {name: round(sum(found) / len(found), 4) for name, found in sorted(right.items())}


def new_reader(config: ReaderConfig) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    """Return an untrained language model and its tokenizer."""
    tokenizer = build_tokenizer()
    add_chat_tokens(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(config.seed)
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    llm = small_llm_config(
        tokenizer, **sizes, num_layers=config.num_layers, num_heads=config.num_heads, rope_theta=ROPE_THETA
    )
    model = Qwen2ForCausalLM(llm)
    start_words(model, tokenizer)
    if config.start_heads:
        start_heads(model)
    return model, tokenizer


@torch.no_grad()
def start_words(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Start the two tokens of every word, with and without a space before it, as one."""
    embedding, vocabulary = model.get_input_embeddings().weight, tokenizer.get_vocab()
    for word, number in vocabulary.items():
        spaced = vocabulary.get(f"{SPACE}{word}")
        if spaced is not None:
            embedding[spaced] = embedding[number]


def start_heads(model: Qwen2ForCausalLM) -> None:
    """Start some heads as what reading needs, which random ones take thousands of steps to become.

    The first two heads of the first layer look one and two tokens back; the last head of every layer looks at earlier
    tokens that hold the same. Together they can find a word again and see what stands before it (Olsson et al. 2022,
    *In-context Learning and Induction Heads*). Everything trains on from there.
    """
    attentions = [layer.self_attn for layer in model.model.layers]
    for head in range(2):
        look_back(attentions[0], head, head + 1)
    for attention in attentions:
        look_for_same(attention, model.config.num_attention_heads - 1)


@torch.no_grad()
def look_back(attention: Qwen2Attention, head: int, distance: int, strength: float = 5.0) -> None:
    """Let a head look at the token `distance` before, whatever it is.

    Biases of queries and keys are turned by their positions alone, so their product is a function of the distance.
    Those of the query are turned beforehand such that it peaks at `distance`.

    Args:
        attention: with biases.
        head: its number.
        distance: in tokens.
        strength: of the biases.
    """
    rows, turn = _head(attention, head)
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[rows] *= 0.1
    attention.k_proj.bias[rows] = strength * torch.cat([torch.ones_like(turn), torch.zeros_like(turn)])
    attention.q_proj.bias[rows] = strength * torch.cat([(turn * distance).cos(), -(turn * distance).sin()])


@torch.no_grad()
def look_for_same(attention: Qwen2Attention, head: int, strength: float = 6.0, distaste: float = 2.0) -> None:
    """Let a head look at earlier tokens whose hidden states are like that of its own.

    Queries and keys are the same random projection, in the slow pairs of the rotary embedding, where the distance
    hardly counts. In the fast ones biases speak against what is at no distance: the token itself.

    Args:
        attention: with biases.
        head: its number.
        strength: logit of two equal tokens.
        distaste: by how much less for the token itself.
    """
    rows, turn = _head(attention, head)
    slow, fast, dim = turn < 0.01, turn > 0.1, 2 * len(turn)
    kept, width = torch.cat([slow, slow]), attention.q_proj.in_features
    weight = torch.zeros(dim, width)
    weight[kept] = torch.randn(int(kept.sum()), width) * (strength * dim**0.5 / (width * kept.sum())) ** 0.5
    bias = torch.cat([fast, torch.zeros_like(fast)]) * (distaste * dim**0.5 / fast.sum()) ** 0.5
    for projection, sign in ((attention.q_proj, -1), (attention.k_proj, 1)):
        projection.weight[rows] = weight
        projection.bias[rows] = sign * bias


def _head(attention: Qwen2Attention, head: int) -> tuple[slice, Tensor]:
    """Return the rows of a head, and by how much each of its pairs turns from one position to the next."""
    dim = attention.head_dim
    return slice(head * dim, (head + 1) * dim), ROPE_THETA ** (-torch.arange(dim // 2) / (dim // 2))


def train(
    config: ReaderConfig,
    out: Path,
    *,
    stop_after: int | None = None,
    num_eval_scenes: int = 300,
    device: str | None = None,
) -> Qwen2ForCausalLM:
    """Train, or continue an interrupted training, and save a `Qwen2ForCausalLM` folder with tokenizer and `run.json`.

    Args:
        config: what to train.
        out: folder of the model.
        stop_after: leave (resumably) after this many steps.
        num_eval_scenes: unseen scenes that the finished model is asked about.
        device: where to compute; None: a GPU if there is one.

    Raises:
        ValueError: `out` holds a run of another configuration.
    """
    model, tokenizer = new_reader(config)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def loss_of_step(step: int) -> Tensor:
        numbers = range(step * config.batch, (step + 1) * config.batch)
        told = [lesson(config.seed, i, config) for i in numbers]
        return loss_of(model, make_batch(tokenizer, told), config.text_weight)

    train_steps(
        model,
        loss_of_step,
        config,
        out,
        name="language model",
        model=model,
        tokenizer=tokenizer,
        measure=lambda: evaluate(model, tokenizer, num_eval_scenes, config.seed),
        use_muon=True,
        stop_after=stop_after,
    )
    return model


def main(config: tyro.conf.OmitArgPrefixes[ReaderConfig], out: Path = Path("runs/reader"), threads: int = 1) -> None:
    """Teach a small language model to read scenes of the sprite world.

    Args:
        config: what to train.
        out: folder for the model.
        threads: CPU threads of torch.
    """
    as_command(lambda: train(config, out), threads)


if __name__ == "__main__":
    tyro.cli(main)
