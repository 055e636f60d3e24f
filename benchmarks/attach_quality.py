"""What `hicom.attach` is worth without training: `python benchmarks/attach_quality.py runs/llava`.

A small LLaVA-OneVision that was trained with its own 2x2 pooling (`llava_world.py`) answers open questions about
held-out clips of the sprite world: with its own tokens, with fewer frames, and with windows pooled plainly (mean) or by
the instruction, at equal numbers of tokens. Nothing is trained. The factor of the cosines and whether features are
pooled before or behind the projector are chosen on other clips than those reported.

An answer counts as right where greedy decoding gives it: every token of it is the likeliest one after those before it.
Features come from `--cache`; pooling is the library's own (`hicom.drop_in.pool_windows`), and some questions are also
asked from pixels through `attach` and `generate`, whose share of equal verdicts is in the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llava_world import NUM_FRAMES, START, answer_logits, make_batch, read_clips, video_embeddings
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerBase, SiglipConfig, SiglipModel
from transformers.utils import logging

import hicom
from hicom.data.features import FeatureStore, cache_features
from hicom.data.records import Sample, read_records
from hicom.drop_in import pool_windows
from hicom.eval.statistics import Estimate, clustered_mean
from hicom.model.assemble import read_language_model, read_towers
from hicom.model.dual_encoder import DualEncoder
from hicom.model.instruction import extract_instruction
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.ops import Window
from hicom.model.processing import HIComProcessor
from hicom.provenance import git_commit, hardware, short_commit
from hicom.tables import markdown

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "attach.md"
WINDOWS: tuple[Window, ...] = ((1, 2, 2), (2, 2, 2), (1, 4, 4), (4, 3, 3), (2, 4, 4), (4, 4, 4))
SCALES = (2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
SWEPT: tuple[Window, ...] = ((1, 2, 2), (2, 2, 2), (4, 3, 3), (4, 4, 4))
FRAMES = (4, 2, 1)
BATCH = 64


@dataclass(frozen=True)
class Way:
    """A way from the features of a clip to visual tokens.

    Attributes:
        name: in the tables.
        window: pooled windows; None: the model's own pooling.
        logit_scale: of the conditional pooling; 0: plain means.
        pool_projected: pool behind the projector.
        num_frames: frames that are shown, spread evenly, with the model's own pooling.
    """

    name: str
    window: Window | None = None
    logit_scale: float = 0.0
    pool_projected: bool = False
    num_frames: int = NUM_FRAMES


@dataclass(frozen=True)
class Asker:
    """All that answers questions."""

    model: LlavaOnevisionForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    encoder: DualEncoder
    store: FeatureStore

    def tokens(self, samples: Sequence[Sample], way: Way) -> Tensor:
        """Return visual tokens, `float[V, N, C]`, of one clip a question."""
        videos = [sample.videos[0] for sample in samples]
        values = self.store.read(videos, "values").float()
        if way.window is None:
            step = NUM_FRAMES // way.num_frames
            return video_embeddings(self.model, values.unflatten(0, (len(videos), NUM_FRAMES))[:, step // 2 :: step])
        core = self.model.model
        keys = query = None
        if way.logit_scale > 0:
            keys = self.store.read(videos, "keys").float()
            query = self.encoder.embed([instruction_of(sample) for sample in samples])
        if way.pool_projected:
            values = core.multi_modal_projector(values)
        pooled = pool_windows(values, [NUM_FRAMES] * len(videos), way.window, keys, query, way.logit_scale)
        tokens = pooled.unflatten(0, (len(videos), -1)).flatten(1, 3)
        tokens = tokens if way.pool_projected else core.multi_modal_projector(tokens)
        return torch.cat([tokens, core.image_newline.expand(len(tokens), 1, -1)], 1)

    @torch.inference_mode()
    def verdicts(self, samples: Sequence[Sample], way: Way) -> tuple[list[bool], int]:
        """Return which questions are answered right, and the number of visual tokens."""
        right, num_tokens = [], 0
        for first in range(0, len(samples), BATCH):
            asked = samples[first : first + BATCH]
            visual = self.tokens(asked, way)
            num_tokens = visual.shape[1]
            batch = make_batch(self.tokenizer, [[sample] for sample in asked], num_tokens)
            logits, answers, places = answer_logits(self.model, batch, visual)
            misses = torch.bincount(places[:, 0], logits.argmax(-1) != answers, minlength=len(asked))
            right += [count == 0 for count in misses.tolist()]
        return right, num_tokens


def instruction_of(sample: Sample) -> str:
    """Return what of a question steers the pooling."""
    return extract_instruction(sample.messages[-1]["content"])


def load(folder: Path, store: FeatureStore) -> Asker:
    """Return the trained model and the dual encoder that its tower is of."""
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder).eval()
    towers = read_towers(START, torch.float32)
    vision, text, tokenizer = towers.vision, towers.instruction, towers.tokenizer
    dual = SiglipModel(SiglipConfig(vision_config=vision.config.to_dict(), text_config=text.config.to_dict())).eval()
    dual.vision_model.load_state_dict(vision.state_dict())
    dual.text_model.load_state_dict(text.state_dict())
    words = read_language_model(START, torch.float32).tokenizer
    words.chat_template = HIComProcessor.from_pretrained(START).chat_template
    return Asker(model, words, DualEncoder(dual, tokenizer), store)


def agreement(asker: Asker, samples: Sequence[Sample], way: Way, verdicts: Sequence[bool]) -> float:
    """Return how often `attach` and `generate` from pixels give the verdicts that kept features gave."""
    assert way.window is not None
    pixels = HIComProcessor.from_pretrained(START)
    same = 0
    with hicom.attach(
        asker.model,
        asker.tokenizer,
        dual_encoder=asker.encoder.model,
        instruction_tokenizer=asker.encoder.tokenizer,
        window=way.window,
        logit_scale=way.logit_scale,
        pool_projected=way.pool_projected,
    ) as attachment:
        assert attachment.shares_tower
        for sample, is_right in zip(samples, verdicts, strict=True):
            messages = [dict(message) for message in sample.messages]
            text = asker.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            inputs = attachment.expand([asker.tokenizer(text).input_ids], NUM_FRAMES)
            frames = pixels.pixel_values(pixels.read_video(sample.videos[0], num_frames=NUM_FRAMES).frames)
            output = asker.model.generate(
                **inputs, pixel_values_videos=frames[None], max_new_tokens=24, do_sample=False
            )
            given = asker.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            wanted = asker.tokenizer.decode(asker.tokenizer(sample.answer).input_ids, skip_special_tokens=True)
            same += (given.strip() == wanted.strip()) == is_right
    return same / len(samples)


def concentration(asker: Asker, samples: Sequence[Sample], window: Window, scale: float) -> float:
    """Return the mean over windows of the number of patches that equal weights of the same entropy would have."""
    videos = [sample.videos[0] for sample in samples]
    keys = asker.store.read(videos, "keys").float()
    query = asker.encoder.embed([instruction_of(sample) for sample in samples])
    # `pool_windows` does not return its weights. These windows all divide the axes, or leave a rest out.
    cosines = torch.nn.functional.cosine_similarity(
        keys.unflatten(0, (len(videos), NUM_FRAMES)), query[:, None, None, None], dim=-1
    )
    t, h, w = window
    cut = cosines.unfold(1, t, t).unfold(2, h, h).unfold(3, w, w).flatten(4)
    weights = (cut * scale).softmax(-1)
    return float((-(weights * weights.log()).sum(-1)).exp().mean())


def estimate(
    samples: Sequence[Sample], values: Sequence[float], family: str | None = None, *, least: float = 0.0
) -> Estimate:
    """Return the mean over families, or that of one family, with its interval over clips; values are `least` to 1."""
    chosen = [i for i, sample in enumerate(samples) if family in (None, sample.metadata["family"])]
    return clustered_mean(
        [float(values[i]) for i in chosen],
        [samples[i].videos[0] for i in chosen],
        [str(samples[i].metadata["family"]) for i in chosen],
        bounds=(least, 1.0),
    )


def read_samples(world: Path, first: int, last: int) -> list[Sample]:
    """Return the open questions about clips `first` to `last` of the test split that have a chance."""
    records = read_records(world / "test" / "tune.jsonl", world)
    clips = read_clips(world, "test", last, open_only=True)[first:]
    samples = [records[number] for numbers in clips for number in numbers]
    return [sample for sample in samples if sample.metadata["chance"] is not None]


def percent(x: Mapping[str, Any], *, sign: bool = False) -> str:
    """Return a mean with its interval in percent."""
    form = "+.1f" if sign else ".1f"
    return f"{100 * x['mean']:{form}} ({100 * x['low']:{form}} to {100 * x['high']:{form}})"


def report(results: Mapping[str, Any], *, whole: bool = True) -> str:
    """Return the results as Markdown; not `whole`: the first table, for the page."""
    ways = results["ways"]
    main = [
        [
            each["name"],
            str(each["tokens"]),
            percent(each["mean"]),
            *(percent(each[name], sign=True) if name in each else "" for name in ("minus_plain", "minus_own")),
        ]
        for each in ways
    ]
    families = list(ways[0]["families"])
    shown = [each for each in ways if each["name"] in results["detailed"]]
    by_family = [
        [family, str(ways[0]["families"][family]["n"]), *(percent(each["families"][family]) for each in shown)]
        for family in families
    ]
    sweep = results["sweep"]
    columns = [f"{tuple(window)}" for window in sweep["windows"]]
    swept = [
        [
            "behind" if row["pool_projected"] else "before",
            f"{row['logit_scale']:g}" if row["logit_scale"] else "0 (mean)",
            *(f"{100 * x:.1f}" for x in row["accuracy"]),
        ]
        for row in sweep["rows"]
    ]
    patches = [
        [f"{row['logit_scale']:g}", *(f"{x:.1f}" for x in row["patches"])] for row in results["concentration"]["rows"]
    ]
    settings = results["chosen"]
    first = [
        f"Mean over {len(families)} families of the accuracy in percent, with its 95 % interval over clips, and "
        f"the paired differences to plain means of the same windows and to the model's own tokens of as many "
        f"frames as make the same number. {results['questions']} open questions about "
        f"{results['clips']} clips; conditional: factor {settings['logit_scale']:g}, pooled "
        f"{'behind' if settings['pool_projected'] else 'before'} the projector.",
        markdown(["visual tokens", "N", "accuracy", "conditional - mean", "conditional - own"], main),
    ]
    more = [
        "By family",
        markdown(["family", "n", *(each["name"] for each in shown)], by_family),
        f"The choice: other {sweep['clips']} clips, {sweep['questions']} questions; rows are where and by which "
        "factor, columns windows.",
        markdown(["projector", "factor", *columns], swept),
        "How many patches of a window count (the exponential of the weights' entropy)",
        markdown(["factor", *columns], patches),
    ]
    last = [
        f"{results['date']}, commit {short_commit(results['commit'])}, {results['hardware']['machine']}, "
        f"{results['hardware']['threads']} CPU threads. Through `attach` and `generate` from pixels: "
        f"{100 * results['agreement']['share']:.0f} % of {results['agreement']['n']} verdicts are the same.",
    ]
    return "\n\n".join([*first, *(more if whole else []), *last])


def write_page(page: Path, text: str) -> None:
    """Write the results into the page between its markers."""
    start, end = "<!-- results -->", "<!-- /results -->"
    head, _, rest = page.read_text("utf-8").partition(start)
    page.write_text(f"{head}{start}\n\n{text}\n\n{end}{rest.partition(end)[2]}", "utf-8")


def measure(asker: Asker, samples: Sequence[Sample], ways: Sequence[Way]) -> list[dict[str, Any]]:
    """Return accuracy by family of every way; conditional ones follow the plain one that they are compared with."""
    families = sorted({str(sample.metadata["family"]) for sample in samples})
    rows: list[dict[str, Any]] = []
    plain: list[bool] = []
    own: dict[int, list[bool]] = {}
    for way in ways:
        right, num_tokens = asker.verdicts(samples, way)
        row: dict[str, Any] = dataclasses.asdict(way) | {
            "tokens": num_tokens,
            "mean": estimate(samples, right).as_json(),
            "families": {family: estimate(samples, right, family).as_json() for family in families},
        }
        if way.logit_scale > 0:
            gain = [float(a) - float(b) for a, b in zip(right, plain, strict=True)]
            row["minus_plain"] = estimate(samples, gain, least=-1.0).as_json()
            row["minus_plain_families"] = {
                family: estimate(samples, gain, family, least=-1.0).as_json() for family in families
            }
            if num_tokens in own:
                gain = [float(a) - float(b) for a, b in zip(right, own[num_tokens], strict=True)]
                row["minus_own"] = estimate(samples, gain, least=-1.0).as_json()
        elif way.window is None:
            own[num_tokens] = right
        else:
            plain = right
        print(row["name"], num_tokens, percent(row["mean"]), row.get("minus_plain", {}).get("mean", ""), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Choose on some clips, measure on others; write `attach.json`, its tables beside it, and these into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--world", type=Path, default=Path("runs/world"))
    parser.add_argument("--cache", type=Path, default=Path("runs/features"))
    parser.add_argument("--num-clips", type=int, default=500, help="clips that are reported")
    parser.add_argument("--num-other-clips", type=int, default=100, help="the next clips, on which settings are chosen")
    parser.add_argument("--num-generated", type=int, default=100, help="questions that are also asked from pixels")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "attach.json")
    args = parser.parse_args()
    logging.disable_progress_bar()

    samples = read_samples(args.world, 0, args.num_clips)
    others = read_samples(args.world, args.num_clips, args.num_clips + args.num_other_clips)
    donor = HIComForConditionalGeneration.from_pretrained(START, dtype=torch.float32)
    videos = [sample.videos[0] for sample in [*samples, *others]]
    store = cache_features(donor, HIComProcessor.from_pretrained(START), videos, args.cache, num_frames=NUM_FRAMES)
    asker = load(args.model, store)

    sweep = []
    for pool_projected in (False, True):
        for scale in (0.0, *SCALES):
            ways = [Way("", window, scale, pool_projected) for window in SWEPT]
            accuracy = [estimate(others, asker.verdicts(others, way)[0]).mean for way in ways]
            sweep.append({"pool_projected": pool_projected, "logit_scale": scale, "accuracy": accuracy})
            print(sweep[-1], flush=True)
    best = max((row for row in sweep if row["logit_scale"]), key=lambda row: sum(row["accuracy"]))
    chosen = {name: best[name] for name in ("pool_projected", "logit_scale")}

    ways = [Way("own, 8 frames")]
    ways += [Way(f"own, {n} frame{'s' * (n > 1)}", num_frames=n) for n in FRAMES]
    for window in WINDOWS:
        ways.append(Way(f"mean {window}", window, pool_projected=chosen["pool_projected"]))
        ways.append(Way(f"conditional {window}", window, **chosen))
    rows = measure(asker, samples, ways)
    checked = samples[:: max(1, len(samples) // args.num_generated)][: args.num_generated]
    way = Way("conditional", (4, 3, 3), **chosen)
    results = {
        "model": json.loads((args.model / "run.json").read_text("utf-8")),
        "clips": args.num_clips,
        "questions": len(samples),
        "chosen": chosen,
        "detailed": ["own, 8 frames", "own, 1 frame", "mean (4, 3, 3)", "conditional (4, 3, 3)"],
        "ways": rows,
        "sweep": {"clips": args.num_other_clips, "questions": len(others), "windows": SWEPT, "rows": sweep},
        "concentration": {
            "rows": [
                {"logit_scale": scale, "patches": [concentration(asker, others[:200], w, scale) for w in SWEPT]}
                for scale in SCALES
            ]
        },
        "agreement": {"n": len(checked), "share": agreement(asker, checked, way, asker.verdicts(checked, way)[0])},
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "hardware": hardware(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    args.out.with_suffix(".md").write_text(report(results) + "\n", "utf-8")
    print(report(results))
    if args.out == parser.get_default("out"):
        write_page(PAGE, report(results, whole=False))


if __name__ == "__main__":
    main()
