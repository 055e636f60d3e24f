"""Train the small dual encoder on rendered frames: `python -m hicom.world.towers --out runs/frames`.

The result is a standard `SiglipModel` folder. Image-text pairs alone teach a small encoder little in this time, so a
dense loss does most of the work: every patch must be named by the text. A patch is compared through the same map that
the model's compressor uses for its keys (the pooling head's MLP applied to single patches), and the text side reads
whole instructions ("which way does the dog move?"), so an instruction's embedding points at what it asks about: at the
object that it names, at both where it names two, at all objects where it names none.

Naming a patch needs no notion of where it is, and features without one cannot answer "where". So one more loss reads
every patch's place out of its features. Naming also needs nothing of an instruction but its nouns, and a compressor
that is told only these cannot look at what is asked of them. So texts must tell what they ask, a text about the dot on
an object must point at the dot rather than at the rest of the object, and one about what is next to an object at that
other thing, which it does not name. Texts that name two objects are rare here: `text_tower` teaches them afterwards.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, SiglipConfig, SiglipModel

from hicom.video import read_frames, write_video
from hicom.world.loop import StepsConfig, as_command, train_steps
from hicom.world.questions import fill
from hicom.world.render import Pixels, Renderer, bundled_sprites, mark_center, render
from hicom.world.scenes import (
    COLORS,
    EMOJI,
    MARK_COLORS,
    NOUNS,
    SHAPES,
    Scene,
    SceneObject,
    clip_seed,
    generator,
    make_scene,
    make_snapshot,
)
from hicom.world.templates import HELD_OUT_TEMPLATES, NAMING, PHRASES, PREDICATES, TEMPLATES
from hicom.world.tokenizer import TEXT_LENGTH, build_tokenizer

IMAGE_SIZE = 64
PATCH = 8
GRID = IMAGE_SIZE // PATCH
WIDTH = 128
RENDER_SIZE = 128
MAX_OBJECTS = 10  # more than in clips: more patches to learn from in each frame
BACKGROUND, IGNORE = -1, -2

# Texts come in this order: sprites, shapes without a colour, shapes with one, dots.
NAMES = (*NOUNS, *(f"{color} {shape}" for shape in SHAPES for color in COLORS))
NUM_NOUNS = len(NOUNS)
LEAF = [*range(len(EMOJI)), *range(NUM_NOUNS, len(NAMES))]  # every object is exactly one of these
MARK_PHRASES = ("{c} dot", "a {c} dot", "the {c} dot", "an object with a {c} dot", "the dot is {c}")
NAMING_TEMPLATES = tuple(text for key in NAMING for text in TEMPLATES[key])
PAIR_TEMPLATES = (*TEMPLATES["before"], *TEMPLATES["after"], "the {x} and the {y}")
OPEN_KEYS = ("count", "which", "first", "last", "needle_what", "caption", "list", "moving", "sequence", "together")
ASKED = (*(key for key in TEMPLATES if key != "which"), *PREDICATES)
"""What a text asks: its templates' name, and what moves how if it asks which object does."""
NUM_PAIRS, NUM_OPEN = 16, 8  # texts of a step that name two objects, or none
NUM_DOTS, NUM_ASKED = 32, 32  # texts of a step about a dot in one of its frames, and texts about anything
NUM_NEIGHBOURS = 64  # texts of a step about what is next to an object in one of its frames
BESIDE, APART = 0.62, 0.75
"""Distance of centres over the sum of sizes: up to the first, two objects are side by side; beyond the second, not."""
ASKED_SCALE = 10.0  # a fixed temperature: a free one would let the loss vanish with what is asked a trace in the text
_TRAIN_STREAM = 1000  # third number of the seed of training frames; clips of the splits use small ones


@dataclass(frozen=True, kw_only=True)
class TowerConfig(StepsConfig):
    """Everything that decides the trained weights; a sample is a frame.

    Attributes:
        image_weight: weight of the sigmoid image-text loss; the dense loss has weight 1.
        position_weight: weight of the position loss.
        asked_weight: weight of telling what a text asks.
    """

    steps: int = 5000
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.05
    image_weight: float = 0.1
    position_weight: float = 0.5
    asked_weight: float = 0.2


class Towers(nn.Module):
    """A `SiglipModel`, and for training a scale and bias of the dense loss and read-outs of places and wordings."""

    def __init__(self, vocab_size: int, pad_token_id: int) -> None:
        super().__init__()
        width = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 256}
        vision = {**width, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": PATCH}
        text = {
            **width,
            "num_hidden_layers": 2,
            "vocab_size": vocab_size,
            "max_position_embeddings": TEXT_LENGTH,
            "projection_size": WIDTH,
            "pad_token_id": pad_token_id,
            "bos_token_id": None,
            "eos_token_id": 1,
        }
        self.model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
        self.dense_scale = nn.Parameter(torch.tensor(2.5))
        self.dense_bias = nn.Parameter(torch.tensor(-6.0))
        self.position_head = nn.Linear(WIDTH, 2)
        self.asked_head = nn.Linear(WIDTH, len(ASKED), bias=False)
        with (
            torch.no_grad()
        ):  # a linear code of the place, half as large as the features, for the position loss to find
            directions = torch.linalg.qr(torch.randn(WIDTH, 2))[0].T
            code = 0.5 * (patch_places() @ directions) * WIDTH**0.5
            self.model.vision_model.embeddings.position_embedding.weight.add_(code)

    @property
    def device(self) -> torch.device:
        """Where it computes; inputs are brought there."""
        return self.dense_scale.device

    def encode_text(self, ids: Tensor) -> Tensor:
        """Unit text embeddings float[N, D] of token ids int[N, L]."""
        return F.normalize(self.model.text_model(input_ids=ids.to(self.device)).pooler_output, dim=-1)

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode float[B, 3, S, S].

        Returns:
            Unit keys float[B, H*W, D] of all patches, unit image embeddings float[B, D], and the last layer's raw
            features float[B, H*W, D], which the model compresses.
        """
        output = self.model.vision_model(pixel_values=pixels.to(self.device), output_hidden_states=True)
        x, head = output.last_hidden_state, self.model.vision_model.head
        keys = x + head.mlp(head.layernorm(x))
        return F.normalize(keys, dim=-1), F.normalize(output.pooler_output, dim=-1), output.hidden_states[-1]


def patch_places() -> Tensor:
    """Return (row, column) of every patch from -1 to 1, float[H*W, 2]."""
    rows, columns = torch.meshgrid(torch.arange(GRID).float(), torch.arange(GRID).float(), indexing="ij")
    return torch.stack([rows.flatten(), columns.flatten()], -1) / ((GRID - 1) / 2) - 1


def preprocess(frames: Pixels) -> Tensor:
    """Frames uint8[B, H, W, 3] to float[B, 3, 64, 64] in [-1, 1]: antialiased bicubic, as the processor does."""
    pixels = rearrange(torch.from_numpy(frames), "b h w c -> b c h w").float() / 255
    size = (IMAGE_SIZE, IMAGE_SIZE)
    pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    return pixels.clamp(0, 1) * 2 - 1


def name_index(item: SceneObject) -> int:
    """Index of an object's full name in `NAMES`."""
    return NAMES.index(item.name)


def patch_labels(labels: NDArray[np.integer], scene: Scene) -> NDArray[np.int64]:
    """Name of the object that fills each patch: int[H*W], or BACKGROUND, or IGNORE where it fills only a corner."""
    cells = rearrange(labels, "(gh ph) (gw pw) -> (gh gw) (ph pw)", gh=GRID, gw=GRID)
    counts = np.stack([(cells == i + 1).sum(1) for i in range(len(scene.objects))], 1)
    names = np.array([name_index(item) for item in scene.objects])[counts.argmax(1)]
    best = counts.max(1)
    return np.where(best >= 0.3 * cells.shape[1], names, np.where(best > 0, IGNORE, BACKGROUND)).astype(np.int64)


def mark_labels(
    labels: NDArray[np.integer], scene: Scene, extents: Mapping[str, tuple[float, float]], time: float = 0.0
) -> NDArray[np.int64]:
    """Colour of the dot whose centre is seen in each patch, as an index of `MARK_COLORS`: int[H*W], or IGNORE."""
    found = np.full(GRID * GRID, IGNORE)
    for number, item in enumerate(scene.objects):
        if item.mark and item.visible(time):
            x, y = mark_center(item, time, extents[item.noun])
            row, column = int(y * labels.shape[0]), int(x * labels.shape[1])
            if 0 <= row < labels.shape[0] and 0 <= column < labels.shape[1] and labels[row, column] == number + 1:
                patch = int(y * GRID) * GRID + int(x * GRID)
                found[patch] = MARK_COLORS.index(item.mark)
    return found


def side_by_side(scene: Scene, time: float = 0.0) -> list[tuple[SceneObject, SceneObject]]:
    """Objects and the one object that is next to them at `time`; those with none, or with several, are left out."""
    seen = [item for item in scene.objects if item.visible(time)]
    found = []
    for item in seen:
        (x, y), length = item.center(time), item.side_length(time)
        near = []
        for other in seen:
            if other is not item:
                (u, v), size = other.center(time), other.side_length(time)
                near.append((((x - u) ** 2 + (y - v) ** 2) ** 0.5 / (length + size), other))
        near.sort(key=lambda pair: pair[0])
        if near and near[0][0] <= BESIDE and all(distance >= APART for distance, _ in near[1:]):
            found.append((item, near[0][1]))
    return found


def _degrade(frame: Pixels, rng: Generator) -> Pixels:
    """Losses like those of a video codec, on two frames of three (JPEG has the same block and chroma losses)."""
    if rng.random() < 1 / 3:
        return frame
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "jpeg", quality=int(rng.integers(35, 96)))
    return np.asarray(Image.open(buffer))


@dataclass(frozen=True)
class Batch:
    """The frames of one step.

    Attributes:
        frames: uint8[B, 128, 128, 3].
        labels: int[B, H*W], see `patch_labels`.
        marks: int[B, H*W], see `mark_labels`.
        present: float[B, len(NAMES)], 1 for names of what is seen.
        neighbours: int[N, 3]: a frame, and the nouns (of `NOUNS`) of an object in it and of the one next to it.
    """

    frames: Pixels
    labels: NDArray[np.int64]
    marks: NDArray[np.int64]
    present: NDArray[np.float32]
    neighbours: NDArray[np.int64]


def training_batch(seed: int, step: int, size: int) -> Batch:
    """The frames of one step, a function of (seed, step) alone."""
    frames, labels, marks, present = [], [], [], np.zeros((size, len(NAMES)), np.float32)
    neighbours = []
    for index in range(size):
        rng = generator(seed, _TRAIN_STREAM, step, index)
        scene = make_snapshot(rng, MAX_OBJECTS)
        renderer = Renderer(scene, None, RENDER_SIZE, RENDER_SIZE)
        frame, mask = renderer.frame(0.0)
        frames.append(_degrade(frame, rng))
        labels.append(patch_labels(mask, scene))
        marks.append(mark_labels(mask, scene, renderer.extents))
        for seen in set(np.unique(mask).tolist()) - {0}:
            item = scene.objects[seen - 1]
            present[index, [name_index(item), NAMES.index(item.noun)]] = 1
        for item, other in side_by_side(scene):
            neighbours.append((index, NOUNS.index(item.noun), NOUNS.index(other.noun)))
    beside = np.array(neighbours, np.int64).reshape(-1, 3)
    return Batch(np.stack(frames), np.stack(labels), np.stack(marks), present, beside)


def vary(text: str, rng: Generator) -> str:
    """The text, three times of ten without its punctuation."""
    return text.rstrip("?.") if rng.random() < 0.3 else text


def instruction_text(name: str, rng: Generator) -> str:
    """A random instruction or phrase about `name`, with or without its punctuation."""
    templates = PHRASES if rng.random() < 0.35 else NAMING_TEMPLATES
    return vary(fill(templates[rng.integers(len(templates))], name), rng)


def pair_text(first: str, second: str, rng: Generator) -> str:
    """A random instruction that names two nouns."""
    return vary(fill(PAIR_TEMPLATES[rng.integers(len(PAIR_TEMPLATES))], first, second), rng)


def open_text(rng: Generator) -> str:
    """A random instruction that names nothing."""
    templates = TEMPLATES[OPEN_KEYS[rng.integers(len(OPEN_KEYS))]]
    said = [word for words in PREDICATES.values() for word in words]
    return vary(fill(templates[rng.integers(len(templates))], predicate=said[rng.integers(len(said))]), rng)


def dot_text(noun: str, rng: Generator) -> str:
    """A random instruction about the dot on a noun."""
    templates = TEMPLATES["detail"]
    return vary(fill(templates[rng.integers(len(templates))], noun), rng)


def neighbour_text(noun: str, rng: Generator) -> str:
    """A random instruction about what is next to a noun."""
    templates = TEMPLATES["neighbour"]
    return vary(fill(templates[rng.integers(len(templates))], noun), rng)


def asked_text(rng: Generator) -> tuple[str, int]:
    """A random instruction about anything, and the index in `ASKED` of what it asks."""
    asked = int(rng.integers(len(ASKED)))
    said = PREDICATES.get(ASKED[asked], ("moves",))
    templates = TEMPLATES["which" if ASKED[asked] in PREDICATES else ASKED[asked]]
    first, second = rng.choice(NUM_NOUNS, 2, replace=False)
    text = fill(
        templates[rng.integers(len(templates))], NOUNS[first], NOUNS[second], predicate=said[rng.integers(len(said))]
    )
    return vary(text, rng), asked


def neighbour_patches(labels: Tensor, noun: Tensor, neighbours: Tensor) -> Tensor:
    """Return `bool[N, H*W]`: the patches that the neighbour fills, which a text about it must point at.

    Args:
        labels: int[B, H*W], see `patch_labels`.
        noun: int[len(NAMES)], the noun of every name.
        neighbours: int[N, 3], see `Batch`.
    """
    frame, _, other = neighbours.T
    return (noun[labels[frame].clamp(min=0)] == other[:, None]) & (labels[frame] >= 0)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Token ids int[N, 24], padded to the full length because SigLIP pools the last position."""
    batch = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    return torch.as_tensor(batch["input_ids"])


@torch.no_grad()
def whiten_stem(towers: Towers, seed: int) -> None:
    """Start the patch embedding as the whitened principal components of real patches.

    Neighbouring pixels are almost equal, so with a random start fine detail is a small signal that is learnt late.
    """
    frames = training_batch(seed, 2**31, 256).frames
    patches = rearrange(preprocess(frames), "b c (gh ph) (gw pw) -> (b gh gw) (c ph pw)", ph=PATCH, pw=PATCH)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    values, vectors = values[-WIDTH:], vectors[:, -WIDTH:]
    weight = (vectors / (values + 0.05).sqrt()).T  # the constant keeps codec noise from being blown up
    stem = towers.model.vision_model.embeddings.patch_embedding
    stem.weight.copy_(rearrange(weight, "d (c ph pw) -> d c ph pw", ph=PATCH, pw=PATCH))
    stem.bias.copy_(-weight @ mean)


def loss_of(towers: Towers, tokenizer: PreTrainedTokenizerBase, config: TowerConfig, step: int) -> Tensor:
    """Loss of one step.

    Dense: each patch's name (cross-entropy among names and among nouns) and dot (cross-entropy), whether a text is
    about it (sigmoid; texts that name one, two or no objects), and which patches of its frame have the dot, or the
    neighbour, that a text is about (cross-entropy). Besides: the sigmoid image-text loss, the position loss, what a
    text asks (cross-entropy).
    """
    batch = training_batch(config.seed, step, config.batch)
    rng = generator(config.seed, _TRAIN_STREAM, step)
    pairs = rng.integers(NUM_NOUNS, size=(NUM_PAIRS, 2))
    for row in range(NUM_PAIRS):  # mostly what is seen together
        seen = np.flatnonzero(batch.present[rng.integers(config.batch), :NUM_NOUNS])
        if len(seen) > 1 and rng.random() < 0.75:
            pairs[row] = rng.permutation(seen)[:2]
    texts = [instruction_text(name, rng) for name in NAMES]
    texts += [MARK_PHRASES[rng.integers(len(MARK_PHRASES))].format(c=color) for color in MARK_COLORS]
    texts += [pair_text(NOUNS[x], NOUNS[y], rng) for x, y in pairs]
    texts += [open_text(rng) for _ in range(NUM_OPEN)]
    dots = rng.permutation(np.argwhere((batch.marks >= 0) & (batch.labels >= 0)))[:NUM_DOTS]
    texts += [dot_text(NAMES[batch.labels[frame, patch]].split()[-1], rng) for frame, patch in dots]
    beside = rng.permutation(batch.neighbours)[:NUM_NEIGHBOURS]
    texts += [neighbour_text(NOUNS[noun], rng) for _, noun, _ in beside]
    questions, kinds = zip(*(asked_text(rng) for _ in range(NUM_ASKED)), strict=True)
    texts += questions
    sizes = [len(NAMES), len(MARK_COLORS), NUM_PAIRS, NUM_OPEN, len(dots), len(beside), NUM_ASKED]
    text, mark_text, pair, opened, dot_texts, beside_texts, question = towers.encode_text(
        tokenize(tokenizer, texts)
    ).split(sizes)
    keys, images, features = towers.encode_images(preprocess(batch.frames))
    arrays = (batch.labels, batch.marks, batch.present, pairs)
    labels, marks, present, asked = (torch.from_numpy(array).to(towers.device) for array in arrays)

    scale, bias = towers.model.logit_scale.exp(), towers.model.logit_bias
    image_loss = F.binary_cross_entropy_with_logits(images @ text.T * scale + bias, present, reduction="sum")

    leaf = torch.full((len(NAMES),), -1, device=towers.device)
    leaf[LEAF] = torch.arange(len(LEAF), device=towers.device)
    noun = torch.tensor([NOUNS.index(name.split()[-1]) for name in NAMES], device=towers.device)
    dense = towers.dense_scale.exp()
    known = labels != IGNORE
    key, label = keys[known], labels[known]
    logits = key @ text.T * dense
    filled = label >= 0
    by_leaf = F.cross_entropy(logits[filled][:, LEAF], leaf[label[filled]])
    by_noun = F.cross_entropy(logits[filled][:, :NUM_NOUNS], noun[label[filled]])
    marked = marks >= 0
    by_mark = F.cross_entropy(keys[marked] @ mark_text.T * dense, marks[marked]) if bool(marked.any()) else 0.0
    which = noun[label.clamp(min=0)][:, None]
    one = F.one_hot(which[:, 0], NUM_NOUNS) * filled[:, None]
    first, second = asked.T
    two = (which == first) | (which == second)
    target = torch.cat([one, two & filled[:, None], filled[:, None].expand(-1, NUM_OPEN)], 1).float()
    about = torch.cat([logits[:, :NUM_NOUNS], key @ torch.cat([pair, opened]).T * dense], 1) + towers.dense_bias
    errors = F.binary_cross_entropy_with_logits(about, target, reduction="none")
    filled_count = filled.sum().clamp(min=1)
    absent = errors[:, : NUM_NOUNS + NUM_PAIRS].sum() / filled_count
    objects = errors[:, NUM_NOUNS + NUM_PAIRS :].mean()
    frame, patch = torch.from_numpy(dots).to(towers.device).T
    # Frames repeat, and `keys[frame]` sums their gradients in an order of its own at every run.
    dot_keys = keys.index_select(0, frame)
    by_dot = F.cross_entropy(torch.einsum("npd,nd->np", dot_keys, dot_texts) * dense, patch) if len(dots) else 0.0
    asked_about = torch.from_numpy(beside).to(towers.device)
    wanted = neighbour_patches(labels, noun, asked_about)
    beside_keys = keys.index_select(0, asked_about[:, 0])
    share = (torch.einsum("npd,nd->np", beside_keys, beside_texts) * dense).log_softmax(1)
    # What is next to it may be hidden, or fill no patch.
    shown = wanted.any(1)
    by_neighbour = -share.masked_fill(~wanted, -torch.inf)[shown].logsumexp(1).mean() if bool(shown.any()) else 0.0
    prototypes = F.normalize(towers.asked_head.weight, dim=-1)
    by_kind = F.cross_entropy(question @ prototypes.T * ASKED_SCALE, torch.tensor(kinds, device=towers.device))
    places = patch_places().to(towers.device).expand(len(features), -1, -1)
    position = F.mse_loss(towers.position_head(features), places)
    return (
        by_leaf
        + by_noun
        + 0.5 * (by_mark + by_dot + by_neighbour)
        + 0.1 * absent
        + 0.5 * objects
        + config.image_weight * image_loss / config.batch
        + config.position_weight * position
        + config.asked_weight * by_kind
    )


def decoded_clip(scene: Scene, folder: Path) -> tuple[Pixels, NDArray[np.uint16]]:
    """A scene written as H.264 and read back: uint8[T, H, W, 3] frames, uint16[T, H, W] labels."""
    frames, labels = render(scene)
    path = folder / "clip.mp4"
    write_video(path, frames)
    return read_frames(path).frames, labels


@torch.no_grad()
def evaluate(
    towers: Towers,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    num_clips: int = 200,
    seed: int = 0,
    *,
    with_readouts: bool = True,
) -> dict[str, float]:
    """Measure on frames of validation clips, decoded from real H.264.

    Args:
        towers: the dual encoder.
        tokenizer: its tokenizer.
        folder: where clips are written.
        num_clips: validation clips.
        seed: of the clips.
        with_readouts: whether its read-outs of places and wordings are trained too: `asked` and `place_error`.

    Returns:
        `naming`: share of filled patches whose nearest of the 80 full names is right (`num_patches` of them);
        `pointing`: share of visible objects whose instruction's best patch touches the object (`num_objects`);
        `retrieval`: share of single-object frames whose image embedding is nearest to the right noun (`num_single`);
        `marks`: share of dots whose patch is nearest to the right colour of dot (`num_marks`);
        `dot_pointing`: share of dots whose instruction's best patch in the frame is the dot's;
        `neighbour_pointing`: share of instructions about what is next to an object whose best patch touches that
        (`num_neighbours`);
        `asked`: share of held-out wordings that are nearest to what they ask (`num_asked`);
        `presence_auc`: probability that a present noun's best patch scores higher than an absent noun's;
        `place_error`: mean distance of the read-out place from the true one, in patches.
    """
    towers.eval()
    folder.mkdir(parents=True, exist_ok=True)
    rng = generator(seed, 77)
    names = towers.encode_text(tokenize(tokenizer, list(NAMES))).cpu()
    dots = towers.encode_text(tokenize(tokenizer, [MARK_PHRASES[1].format(c=color) for color in MARK_COLORS])).cpu()
    extents = bundled_sprites().extents
    naming, pointing, retrieval, marks, dot_pointing, neighbours = [], [], [], [], [], []
    positive, negative, errors = [], [], []
    for index in range(num_clips):
        scene = make_scene(clip_seed(seed, "val", index))
        frames, masks = decoded_clip(scene, folder)
        chosen = [1, 6, 11, 15]
        keys, images, features = towers.encode_images(preprocess(frames[chosen]))
        places = towers.position_head(features).cpu()
        errors.append((places - patch_places()).norm(dim=-1).mean().item() * (GRID - 1) / 2)
        for number, mask, key, image in zip(chosen, masks[chosen], keys.cpu(), images.cpu(), strict=True):
            labels = torch.from_numpy(patch_labels(mask, scene))
            filled = labels >= 0
            if not filled.any():
                continue
            nearest = torch.tensor(LEAF)[(key[filled] @ names[LEAF].T).argmax(1)]
            naming += (nearest == labels[filled]).tolist()
            moment = number / (len(frames) - 1)
            for place, colour in enumerate(mark_labels(mask, scene, extents, moment)):
                if colour >= 0:
                    marks.append(int((key[place] @ dots.T).argmax()) == colour)
                    if labels[place] >= 0:
                        text = tokenize(tokenizer, [dot_text(NAMES[labels[place]].split()[-1], rng)])
                        dot_pointing.append(int((key @ towers.encode_text(text).cpu()[0]).argmax()) == place)
            touched = rearrange(mask, "(gh ph) (gw pw) -> (gh gw) (ph pw)", gh=GRID, gw=GRID)
            seen = [i for i in range(len(scene.objects)) if (mask == i + 1).any()]
            if not seen:
                continue
            if len(seen) == 1:
                best = int((image @ names[:NUM_NOUNS].T).argmax())
                retrieval.append(NOUNS[best] == scene.objects[seen[0]].noun)
            for item, other in side_by_side(scene, moment) if scene.kind == "pair" else ():
                text = tokenize(tokenizer, [neighbour_text(item.noun, rng)])
                best = int((key @ towers.encode_text(text).cpu()[0]).argmax())
                neighbours.append(bool((touched[best] == scene.objects.index(other) + 1).any()))
            absent = [noun for noun in NOUNS if noun not in {item.noun for item in scene.objects}]
            sought = [scene.objects[i].noun for i in seen] + [absent[rng.integers(len(absent))] for _ in seen]
            texts = [fill(NAMING_TEMPLATES[rng.integers(len(NAMING_TEMPLATES))], noun) for noun in sought]
            score = towers.encode_text(tokenize(tokenizer, texts)).cpu() @ key.T
            for row, i in zip(score, seen, strict=False):
                same = [j + 1 for j, item in enumerate(scene.objects) if item.noun == scene.objects[i].noun]
                pointing.append(bool(np.isin(touched[int(row.argmax())], same).any()))
            positive += score[: len(seen)].amax(1).tolist()
            negative += score[len(seen) :].amax(1).tolist()
    readouts: dict[str, float] = {}
    if with_readouts:
        wordings = [
            (fill(text, NOUNS[rng.integers(NUM_NOUNS)], NOUNS[rng.integers(NUM_NOUNS)]), ASKED.index(key))
            for key, held_out in HELD_OUT_TEMPLATES.items()
            if key in ASKED
            for text in held_out
            for _ in range(5)
        ]
        kinds = towers.encode_text(tokenize(tokenizer, [text for text, _ in wordings])).cpu()
        asked = (kinds @ F.normalize(towers.asked_head.weight, dim=-1).cpu().T).argmax(1).tolist()
        told = [kind == right for kind, (_, right) in zip(asked, wordings, strict=True)]
        readouts = {"asked": float(np.mean(told)), "num_asked": len(told), "place_error": float(np.mean(errors))}
    towers.train()
    wins = np.array(positive)[:, None] > np.array(negative)[None]
    return {
        "naming": float(np.mean(naming)),
        "num_patches": len(naming),
        "pointing": float(np.mean(pointing)),
        "num_objects": len(pointing),
        "retrieval": float(np.mean(retrieval)),
        "num_single": len(retrieval),
        "marks": float(np.mean(marks)),
        "num_marks": len(marks),
        "dot_pointing": float(np.mean(dot_pointing)),
        "neighbour_pointing": float(np.mean(neighbours)),
        "num_neighbours": len(neighbours),
        "presence_auc": float(wins.mean()),
        **readouts,
    }


def train(
    config: TowerConfig,
    out: Path,
    *,
    stop_after: int | None = None,
    num_eval_clips: int = 200,
    device: str | None = None,
) -> Towers:
    """Train, or continue an interrupted training, and save a `SiglipModel` folder with its tokenizer and `run.json`.

    Args:
        config: what to train.
        out: folder of the model; also holds what an interrupted training goes on from.
        stop_after: leave (resumably) after this many steps.
        num_eval_clips: validation clips that the finished encoder is measured on.
        device: where to compute; None: a GPU if there is one.

    Raises:
        ValueError: `out` holds a run of another configuration.
    """
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer()
    towers = Towers(len(tokenizer), tokenizer.convert_tokens_to_ids("<pad>"))
    whiten_stem(towers, config.seed)
    towers.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    train_steps(
        towers,
        lambda step: loss_of(towers, tokenizer, config, step),
        config,
        out,
        name="dual encoder",
        model=towers.model,
        tokenizer=tokenizer,
        measure=lambda: evaluate(towers, tokenizer, out, num_eval_clips, config.seed),
        stop_after=stop_after,
    )
    return towers


def main(config: tyro.conf.OmitArgPrefixes[TowerConfig], out: Path = Path("runs/frames"), threads: int = 1) -> None:
    """Train the dual encoder of the sprite world.

    Args:
        config: what to train.
        out: folder for the model.
        threads: CPU threads of torch.
    """
    as_command(lambda: train(config, out), threads)


if __name__ == "__main__":
    tyro.cli(main)
