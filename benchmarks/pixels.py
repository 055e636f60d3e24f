"""What do exact pixels cost, and what do they change? `python benchmarks/pixels.py VIDEO...`.

Every clip is read with `pixels="fast"` and `pixels="exact"`, in turn, in one run: how long it takes, how far the levels
are from those of the release (whole frames, padded and resized by Pillow; its decoder, decord, is asked where it is
there: `pip install decord`), and how far visual tokens and logits move: of the embedded model, which was trained on
fast pixels, and of small random models in the layout of the release (`tests/golden`), which were computed by its code.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from hicom.inference import VideoChat
from hicom.model.convert import load_official
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.processing import HIComProcessor
from hicom.provenance import git_commit, hardware, short_commit
from hicom.video import probe, read_frames, uniform_indices

ROOT = Path(__file__).parents[1]
WAYS = ("fast", "exact")
SIZE, NUM_FRAMES = 384, 32
DIGITS = {"bias": 2, "mean": 2, "p99": 0, "max": 0}
QUESTION = "What happens in the video?"


def in_way(processor: HIComProcessor, way: str, size: int) -> HIComProcessor:
    """Return a processor that makes pixels one way, in one size."""
    fields = {"pixels": way, "image_size": size, "grid_size": processor.grid_size, "num_frames": NUM_FRAMES}
    return HIComProcessor(
        processor.tokenizer,
        processor.instruction_tokenizer,
        **fields,
        video_token=processor.video_token,
        image_token=processor.image_token,
    )


def pixels_of(processor: HIComProcessor, clip: Path, num_frames: int) -> Tensor:
    """Return what the vision tower takes of a clip, `float[T, 3, S, S]`."""
    return processor.pixel_values(processor.read_video(clip, num_frames=num_frames).frames)


def whole_frames(clip: Path) -> tuple[str, list[np.ndarray]]:
    """Return who decoded, and the whole frames that the release would take."""
    if find_spec("decord") is None:
        return "hicom", [*read_frames(clip, num_frames=NUM_FRAMES).frames]
    import decord

    reader = decord.VideoReader(str(clip), ctx=decord.cpu(0), num_threads=1)
    return "decord", [*reader.get_batch(uniform_indices(len(reader), NUM_FRAMES)).asnumpy()]


def of_the_release(frames: list[np.ndarray]) -> np.ndarray:
    """Return frames as the release pads and resizes them, `uint8[T, S, S, 3]`."""
    squares = []
    for frame in frames:
        image = Image.fromarray(frame)
        side = max(image.size)
        square = Image.new("RGB", (side, side), (127, 127, 127))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        squares.append(np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return np.stack(squares)


def reading(clip: Path, ways: dict[str, HIComProcessor], num_repeats: int) -> dict[str, Any]:
    """Time both ways on one clip, in turn, and compare their levels with the release's."""
    decoder, frames = whole_frames(clip)
    expected = of_the_release(frames)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    levels = {}
    for repeat in range(num_repeats):
        for way in WAYS[:: 1 if repeat % 2 == 0 else -1]:
            start = time.perf_counter()
            pixels = pixels_of(ways[way], clip, NUM_FRAMES)
            seconds[way].append(time.perf_counter() - start)
            off = ((pixels.permute(0, 2, 3, 1).numpy() * 0.5 + 0.5) * 255 - expected).round()
            levels[way] = {
                "bias": float(off.mean()),
                "mean": float(np.abs(off).mean()),
                "p99": float(np.percentile(np.abs(off), 99)),
                "max": float(np.abs(off).max()),
            }
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "video": probe(clip).describe().replace(str(clip), clip.name),
        "decoder": decoder,
        "seconds": seconds,
        "median_s": medians,
        "exact_over_fast": medians["exact"] / medians["fast"],
        "levels": levels,
    }


def change(fast: Tensor, exact: Tensor) -> float:
    """Return how long the difference is, as a part of the length of the whole."""
    return float((exact - fast).norm() / exact.norm())


def effect(tokens: dict[str, Tensor], logits: dict[str, Tensor]) -> dict[str, Any]:
    """Return how far tokens `[N, C]` and the logits of the first answer token `[vocabulary]` move."""
    logs = {way: logits[way].float().log_softmax(-1) for way in WAYS}
    return {
        "tokens_change": change(tokens["fast"].float(), tokens["exact"].float()),
        "logits_max": float((logits["exact"] - logits["fast"]).abs().max()),
        "logits_std": float(logits["exact"].std()),
        "kl": float((logs["exact"].exp() * (logs["exact"] - logs["fast"])).sum()),
        "same_first_token": bool(logits["fast"].argmax() == logits["exact"].argmax()),
    }


@torch.inference_mode()
def embedded_effect(chat: VideoChat, clip: Path) -> dict[str, Any]:
    """Return what the ways change in the embedded model's answer to one question."""
    tokens, logits, answers = {}, {}, {}
    for way in WAYS:
        chat.processor.pixels = way
        video = chat.encode(clip)
        prompt = chat._prompt([[{"role": "user", "content": QUESTION}]], [[video]], [None], None, None)
        output = chat.model(inputs_embeds=prompt.inputs_embeds, attention_mask=prompt.attention_mask)
        logits[way] = output.logits[0, -1]
        tokens[way] = chat.attention(video, QUESTION).tokens[0]
        answers[way] = str(chat.ask(video, QUESTION, max_new_tokens=32))
    return effect(tokens, logits) | {"same_answer": answers["fast"] == answers["exact"]}


@torch.inference_mode()
def golden_effect(
    folder: Path, model: HIComForConditionalGeneration, clip: Path, ways: dict[str, HIComProcessor]
) -> dict[str, Any]:
    """Return what the ways change in a small random model in the layout of the release."""
    golden = load_file(folder / "golden.safetensors")
    embed, tokens, logits = model.get_input_embeddings(), {}, {}
    for way in WAYS:
        found = model.get_video_features(
            pixel_values_videos=pixels_of(ways[way], clip, 8),
            video_num_frames=torch.tensor([8]),
            instruction_input_ids=golden["instruction_ids"][None],
        )
        tokens[way] = found.pooler_output[0]
        prompt = torch.cat([embed(golden["prefix_ids"]), tokens[way], embed(golden["suffix_ids"])])[None]
        logits[way] = model(inputs_embeds=prompt).logits[0, -1]
    return effect(tokens, logits)


def measure(clips: list[Path], num_repeats: int) -> dict[str, Any]:
    """Measure all clips."""
    chat = VideoChat.from_pretrained("hicom-tiny", device="cpu")
    ways = {way: in_way(chat.processor, way, SIZE) for way in WAYS}
    cases = sorted((ROOT / "tests" / "golden").glob("*/video_t8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = {case: load_official(case.parent, torch.float32).eval() for case in cases}
    small = {way: in_way(chat.processor, way, 98) for way in WAYS}
    results = []
    for clip in clips:
        found = reading(clip, ways, num_repeats)
        found["hicom-tiny"] = embedded_effect(chat, clip)
        found["golden"] = {case.parent.name: golden_effect(case, model, clip, small) for case, model in models.items()}
        results.append(found)
        print(clip.name, f"{found['exact_over_fast']:.2f}", flush=True)
    return {
        "num_frames": NUM_FRAMES,
        "size": SIZE,
        "n": num_repeats,
        "clips": results,
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "hardware": hardware(),
        "num_threads": torch.get_num_threads(),
    }


def name_of(clip: dict[str, Any]) -> str:
    """Return the file name of a clip."""
    return str(clip["video"]).partition(":")[0]


def page(results: dict[str, Any]) -> str:
    """Return the results as a Markdown page."""
    frames, size, n = results["num_frames"], results["size"], results["n"]
    lines = [
        "# Exact pixels",
        "",
        '`pixels="fast"` scales frames in the decoder, `pixels="exact"` makes of whole frames what Pillow does.',
        f"{frames} frames of {size}x{size}, decoding included; medians of n = {n}, in turn.",
        "",
        "| clip | fast | exact | exact / fast |",
        "|---|---:|---:|---:|",
    ]
    for clip in results["clips"]:
        fast, exact = (clip["median_s"][way] for way in WAYS)
        lines.append(f"| {clip['video']} | {fast:.2f} s | {exact:.2f} s | {clip['exact_over_fast']:.2f} |")
    decoders = " and ".join(sorted({clip["decoder"] for clip in results["clips"]}))
    lines += [
        "",
        f"Levels (of 255) away from the release's: whole frames of {decoders}, padded and resized by Pillow.",
        "",
        "| clip | way | bias | mean | 99 % below | max |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for clip in results["clips"]:
        for way in WAYS:
            off = clip["levels"][way]
            cells = [name_of(clip), way, *(f"{off[key]:.{digits}f}" for key, digits in DIGITS.items())]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "How far the same model moves from fast to exact pixels: visual tokens as a part of their length, logits of",
        "the first answer token (largest difference; their own standard deviation), KL divergence in nats.",
        "",
        "| clip | model | tokens | logits | of std | divergence | first token | answer |",
        "|---|---|---:|---:|---:|---:|---|---|",
    ]
    for clip in results["clips"]:
        models = {"hicom-tiny": clip["hicom-tiny"]} | {
            f"{name}, random": found for name, found in clip["golden"].items()
        }
        for name, found in models.items():
            answer = {True: "same", False: "other", None: ""}[found.get("same_answer")]
            cells = [name_of(clip), name, f"{found['tokens_change']:.1%}", f"{found['logits_max']:.3f}"]
            cells += [f"{found['logits_std']:.2f}", f"{found['kl']:.1e}"]
            cells += ["same" if found["same_first_token"] else "other", answer]
            lines.append(f"| {' | '.join(cells)} |")
    machine = results["hardware"]
    lines += [
        "",
        "No released weights were at hand: what exact pixels are worth to them is not measured here.",
        "",
        f"{results['date']}, {machine['machine']}, {machine['cpus']} CPUs, {results['num_threads']} thread of torch, "
        f"commit `{short_commit(results['commit'])}`. `benchmarks/pixels.py` makes this page.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--num-repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "pixels.json")
    args = parser.parse_args()
    results = measure(args.videos, args.num_repeats)
    args.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    args.out.with_suffix(".md").write_text(page(results) + "\n", "utf-8")
    print(page(results))


if __name__ == "__main__":
    main()
