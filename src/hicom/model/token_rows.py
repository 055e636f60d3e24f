"""Rows of tokens of different lengths: cut, padded and stacked as a call's options say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How rows of different lengths become a batch.

    Attributes:
        padding: `do_not_pad`, `longest` or `max_length`.
        side: that is padded.
        multiple: that padded lengths are of.
        max_length: longest row, or None.
        is_cut: whether rows are cut to it.
        cut_side: where.
        tensors: `pt`, `np`, or None for lists.
        has_mask: whether an attention mask is wanted.
    """

    padding: str
    side: str
    multiple: int
    max_length: int | None
    is_cut: bool
    cut_side: str
    tensors: str | None
    has_mask: bool

    @classmethod
    def of(cls, options: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Layout:
        """Return what the options of a call ask for, where they are silent the tokenizer says.

        Raises:
            ValueError: a value is none of those there are, or one needs another.
        """
        known = {True: "longest", False: "do_not_pad", None: "do_not_pad"}
        padding = _one_of("padding", options.get("padding"), known, ("longest", "max_length", "do_not_pad"))
        known = {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}
        names = ("longest_first", "only_first", "do_not_truncate")
        truncation = _one_of("truncation", options.get("truncation"), known, names)
        side = options.get("padding_side") or tokenizer.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side={side!r}: give 'left' or 'right'")
        tensors = options.get("return_tensors")
        if tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors={tensors!r}: give 'pt', 'np' or None")
        max_length = options.get("max_length")
        is_cut = truncation != "do_not_truncate"
        multiple = options.get("pad_to_multiple_of", 1)
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", multiple)):
            if value is not None and (not isinstance(value, int | np.integer) or value < 1):
                raise ValueError(f"{name}={value!r}: give a positive number of tokens")
        if max_length is not None and "truncation" not in options and padding != "max_length":
            raise ValueError(f"max_length={max_length} needs truncation=True or padding='max_length'")
        if max_length is None and (is_cut or padding == "max_length") and tokenizer.model_max_length < 10**9:
            max_length = int(tokenizer.model_max_length)
        if max_length is None and padding == "max_length":
            raise ValueError("padding='max_length' needs max_length, since the tokenizer names none")
        return cls(
            padding=padding,
            side=side,
            multiple=int(multiple),
            max_length=max_length,
            is_cut=is_cut,
            cut_side=tokenizer.truncation_side,
            tensors=tensors,
            has_mask=options.get("return_attention_mask") is not False,
        )

    def kept(self, length: int) -> slice:
        """Return what is kept of a row of `length` places."""
        if not self.is_cut or self.max_length is None or length <= self.max_length:
            return slice(None)
        return slice(self.max_length) if self.cut_side == "right" else slice(length - self.max_length, None)

    def batch(
        self, rows: Mapping[str, Sequence[np.ndarray]], counts: Mapping[int, Any], pad_token_id: int
    ) -> dict[str, Any]:
        """Return what prompts have for each token, cut, padded and stacked, and their attention mask.

        Args:
            rows: as `tokenize_rows` returns them.
            counts: by placeholder, whose tokens must not be cut off.
            pad_token_id: of the tokenizer.

        Raises:
            ValueError: visual tokens would be cut off, or rows differ in length and are not padded.
        """
        kept = [self.kept(len(ids)) for ids in rows["input_ids"]]
        for number, (ids, part) in enumerate(zip(rows["input_ids"], kept, strict=True)):
            if np.isin(ids, [*counts]).sum() != np.isin(ids[part], [*counts]).sum():
                raise ValueError(
                    f"max_length={self.max_length} cuts off visual tokens: prompt {number} has {len(ids)} tokens with "
                    f"those of its media; make it longer, or take fewer by num_frames or window"
                )
        cut = {name: [row[part] for row, part in zip(each, kept, strict=True)] for name, each in rows.items()}
        if self.has_mask:
            cut["attention_mask"] = [np.ones_like(ids) for ids in cut["input_ids"]]
        fill = {"input_ids": pad_token_id, "labels": -100}
        return {name: self._stack(each, fill.get(name, 0)) for name, each in cut.items()}

    def _stack(self, rows: Sequence[np.ndarray], value: int) -> Any:
        """Return rows as `int[B, sequence]`, filled up with `value`; or as lists."""
        if self.padding != "do_not_pad":
            length = max(len(row) for row in rows)
            if self.padding == "max_length" and self.max_length is not None:
                length = max(length, self.max_length)
            length = -(-length // self.multiple) * self.multiple
            before = self.side == "left"
            pads = [(length - len(row)) * np.array([before, not before], dtype=int) for row in rows]
            rows = [np.pad(row, pad, constant_values=value) for row, pad in zip(rows, pads, strict=True)]
        if self.tensors is None:
            return [row.tolist() for row in rows]
        lengths = {len(row) for row in rows}
        if len(lengths) > 1:
            raise ValueError(f"prompts have {min(lengths)} to {max(lengths)} tokens; pass padding=True to stack them")
        return torch.from_numpy(np.stack(rows))


def _one_of(name: str, value: Any, known: Mapping[Any, str], names: Sequence[str]) -> str:
    """Return a strategy by name, as transformers takes them: a truth value or a string."""
    if value is None or isinstance(value, bool):
        return known[value]
    if isinstance(value, str) and (text := str(getattr(value, "value", value))) in names:
        return text
    raise ValueError(f"{name}={value!r}: give True, False or one of {', '.join(names)}")


def _covered(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return 1 for tokens, from and to these characters, that lie in one of the spans; else 0."""
    return np.array([int(any(a < end and b > start for start, end in spans)) for a, b in offsets], dtype=np.int64)


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    counts: Mapping[int, Sequence[int]],
    options: Mapping[str, Any],
    answer_starts: Sequence[int] | None,
    assistant_spans: Sequence[Sequence[tuple[int, int]]] | None,
) -> dict[str, list[np.ndarray]]:
    """Return what every prompt has for each of its tokens, placeholders as often as their medium has visual tokens.

    Args:
        tokenizer: the LLM's.
        texts: prompts.
        counts: by placeholder (video, image), the visual tokens of one medium after the other, over all prompts.
        options: `CallOptions.text`.
        answer_starts: see `HIComProcessor.__call__`.
        assistant_spans: see there.
    """
    for name, given in (("answer_starts", answer_starts), ("assistant_spans", assistant_spans)):
        if given is not None and len(given) != len(texts):
            raise ValueError(f"{len(given)} {name} for {len(texts)} prompts")
    left = {token: iter(numbers) for token, numbers in counts.items()}
    video_id, image_id = counts
    rows: dict[str, list[np.ndarray]] = {}
    for number, text in enumerate(texts):
        encoding = tokenizer(
            text,
            add_special_tokens=bool(options.get("add_special_tokens")),
            return_offsets_mapping=answer_starts is not None or assistant_spans is not None,
        )
        ids = np.array(encoding["input_ids"], dtype=np.int64)
        row = {"input_ids": ids}
        if options.get("return_mm_token_type_ids"):
            row["mm_token_type_ids"] = (ids == image_id) + 2 * (ids == video_id)
        if answer_starts is not None:
            row["labels"] = _labels(ids, encoding["offset_mapping"], answer_starts[number], tokenizer.eos_token_id)
        if assistant_spans is not None:
            row["assistant_masks"] = _covered(encoding["offset_mapping"], assistant_spans[number])
        repeats = [next(left[i]) if i in left else 1 for i in ids.tolist()]
        for name, column in row.items():
            rows.setdefault(name, []).append(np.repeat(column, repeats))
    return rows


def _labels(ids: np.ndarray, offsets: Sequence[tuple[int, int]], start: int, end_id: int | None) -> np.ndarray:
    """Return the tokens of the answer that starts at character `start`, up to its end token; -100 elsewhere."""
    is_answer = np.array([offset[0] >= start for offset in offsets])
    ends = np.flatnonzero(is_answer & (ids == end_id))
    if len(ends):
        is_answer[ends[0] + 1 :] = False
    return np.where(is_answer, ids, -100)
