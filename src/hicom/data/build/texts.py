"""What the captioner is asked, what its replies say, and which pairs are good enough."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

CAPTION = (
    "Describe this video in detail: the scene, the people, animals and objects in it with their looks and positions, "
    "what happens and in which order, and how the camera moves. Tell only what can be seen."
)
PAIRS = (
    "Here is a description of the video:\n{caption}\n\nWrite {number} different pairs of an instruction and an answer "
    "about this video. Each instruction asks to describe one specific thing that can be seen in it (a person, an "
    "animal, an object, an action, a place, a text) and names it. Each answer describes that thing in detail and "
    "nothing else, from what can be seen. Do not ask for reasons, numbers, opinions or the video as a whole. Reply "
    'with a JSON list alone, like [{{"instruction": "Describe the dog on the sofa.", "answer": "..."}}].'
)
PAIRS_FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "pairs",
        "schema": {
            "type": "object",
            "properties": {
                "pairs": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"instruction": {"type": "string"}, "answer": {"type": "string"}},
                        "required": ["instruction", "answer"],
                        "additionalProperties": False,
                    },
                }
            },
            "required": ["pairs"],
            "additionalProperties": False,
        },
    },
}
"""What `PAIRS` asks for, for endpoints that hold their model to a schema."""
NUM_HASHES = 128
"""Of the MinHash of a pair."""
SHINGLE = 3
"""Words in a run that near-duplicates are compared by."""
# Words that say nothing about what is seen.
_EMPTY = frozenset(
    [
        "a",
        "an",
        "the",
        "this",
        "that",
        "these",
        "those",
        "of",
        "in",
        "on",
        "at",
        "to",
        "by",
        "with",
        "from",
        "for",
        "and",
        "or",
        "as",
        "is",
        "are",
        "was",
        "were",
        "be",
        "being",
        "it",
        "its",
        "there",
        "describe",
        "explain",
        "tell",
        "show",
        "me",
        "what",
        "which",
        "who",
        "whose",
        "where",
        "when",
        "how",
        "does",
        "do",
        "did",
        "can",
        "could",
        "you",
        "please",
        "detail",
        "detailed",
        "details",
        "video",
        "clip",
        "scene",
        "footage",
        "shown",
        "seen",
        "see",
        "happens",
        "happening",
        "happen",
        "appear",
        "appears",
        "look",
        "looks",
        "like",
        "about",
        "provide",
        "give",
        "description",
        "content",
        "main",
        "whole",
        "everything",
        "any",
        "some",
        "following",
        "during",
    ]
)
# Of a line that begins an instruction or its answer, perhaps numbered and in bold.
_LABEL = re.compile(
    r"[\W\d]*(?P<kind>instruction|question|q|answer|description|a)\s*(?:\d+\s*)?[:.]\s*(?P<rest>.*)", re.IGNORECASE
)
_OTHER = re.compile(r"^\W*(?:how many|how much|how often|why|what is the reason)\b", re.IGNORECASE)


class Pair(NamedTuple):
    """An instruction and the description that answers it."""

    instruction: str
    description: str


def parse_pairs(text: str, number: int) -> list[Pair]:
    """Return the first `number` pairs of a reply: a JSON list, also in a code block, or lines that name both parts."""
    for found in re.finditer(r"\[(?=\s*\{)", text):
        try:
            items, _ = json.JSONDecoder().raw_decode(text, found.start())
        except (ValueError, RecursionError):
            continue
        pairs = [pair for pair in map(_pair, items) if pair is not None] if isinstance(items, list) else []
        if pairs:
            return pairs[:number]
    return list(islice(_labelled(text), number))


def _labelled(text: str) -> Iterator[Pair]:
    """Yield the pairs of lines such as `Instruction 1: ...` and `Answer 1: ...`; a blank line ends an answer."""
    instruction: list[str] = []
    description: list[str] | None = None  # None: it has not begun
    for line in [*text.splitlines(), "q:"]:
        label = _LABEL.match(line)
        is_first = label is not None and label["kind"].lower() in ("instruction", "question", "q")
        if is_first or (description and not line.strip()):
            pair = Pair(_clean(" ".join(instruction)), _clean(" ".join(description or ())))
            if pair.instruction and pair.description:
                yield pair
            instruction, description = [label["rest"]] if label is not None else [], None
        elif label is not None and instruction and description is None:
            description = [label["rest"]] if label["rest"].strip() else []
        elif description is not None:
            description += [line] if line.strip() else []
        elif instruction:
            instruction.append(line)


def _pair(item: Any) -> Pair | None:
    if not isinstance(item, dict):
        return None
    values = {str(key).lower(): value for key, value in item.items() if isinstance(value, str) and value.strip()}
    instruction = values.get("instruction") or values.get("question")
    description = values.get("answer") or values.get("description") or values.get("response")
    return Pair(_clean(instruction), _clean(description)) if instruction and description else None


def _clean(text: str) -> str:
    return " ".join(text.strip().strip("*").split())


def why_dropped(pair: Pair, refusals: Sequence[str], min_words: int) -> str:
    """Return why a pair is not good enough; empty where it is.

    Args:
        pair: of the captioner.
        refusals: phrases that a description must not hold.
        min_words: of a description.
    """
    description = pair.description.lower()
    for phrase in refusals:
        if phrase in description:
            return f"refusal: {phrase}"
    if len(description.split()) < min_words:
        return "description too short"
    if _OTHER.match(pair.instruction):
        return "asks for a number or a reason"
    named = content_words(pair.instruction)
    if not named:
        return "instruction names nothing"
    if not named & content_words(pair.description):
        return "description is about something else"
    return ""


def content_words(text: str) -> set[str]:
    """Return the words that name something, without their plural."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return {word.removesuffix("s") for word in words if word not in _EMPTY and len(word) > 1}


def near_duplicates(pairs: Iterable[tuple[str, Pair]], threshold: float) -> Iterator[tuple[str, str]]:
    """Yield the key of each pair that nearly equals an earlier one, and the earlier one's key.

    Compared are sets of runs of three words, by MinHash and locality-sensitive hashing; candidates that it finds are
    then compared exactly.

    Raises:
        ImportError: datasketch is missing.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise ImportError("finding near-duplicates needs datasketch: pip install 'hicom[build]'") from error
    # A lower threshold for candidates misses fewer of those at the limit.
    index = MinHashLSH(threshold=max(0.05, threshold - 0.1), num_perm=NUM_HASHES)
    kept: dict[str, frozenset[str]] = {}
    for key, pair in pairs:
        runs = _runs(f"{pair.instruction} {pair.description}")
        sketch = MinHash(num_perm=NUM_HASHES, seed=1)
        sketch.update_batch([run.encode() for run in sorted(runs)])
        same = next((k for k in sorted(index.query(sketch)) if jaccard(kept[k], runs) >= threshold), None)
        if same is not None:
            yield key, same
        else:
            index.insert(key, sketch)
            kept[key] = runs


def _runs(text: str) -> frozenset[str]:
    words = re.findall(r"\w+", text.lower())
    return frozenset(" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Return how much two sets overlap: 0 to 1."""
    return len(a & b) / len(a | b) if a or b else 1.0
