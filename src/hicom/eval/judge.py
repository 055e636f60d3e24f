"""Judging open answers with a language model.

The prompts ask for what those of Video-ChatGPT ask for, in our own words; a file with other prompts can take their
place. Scores of different judges or prompts do not compare, so results name both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .samples import JudgeRequest

_SCALE = "Give an integer score from 0 (nothing fits) to 5 (everything fits)."
_WORDING = "Synonyms and paraphrases are right; what counts is the meaning."
_ONE = "Question: {question}\nCorrect answer: {answer}\nPredicted answer: {prediction}\n"
_FORMAT = "Reply with a Python dictionary alone, without any other word, like {{'score': 3}}."


@dataclass(frozen=True)
class JudgePrompt:
    """What a judge reads: `system`, and `user` with `{question}`, `{answer}` and `{prediction}` in it."""

    system: str
    user: str

    def messages(self, request: JudgeRequest) -> list[dict[str, str]]:
        """Return the conversation for a request.

        Raises:
            ValueError: the prompt has a placeholder that the request does not fill.
        """
        try:
            user = self.user.format(**request.fields)
        except (KeyError, IndexError) as error:
            known = ", ".join(request.fields)
            raise ValueError(f"the judge's prompt for {request.aspect} needs {error}; known are {known}") from None
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]


PROMPTS = {
    "accuracy": JudgePrompt(
        "You check answers to questions about videos. Compare the predicted answer with the correct one and decide "
        f"whether they mean the same. {_WORDING}",
        f"{_ONE}Decide 'yes' or 'no', and give an integer score from 0 to 5, where 5 is a perfect match. Reply with a "
        "Python dictionary alone, without any other word, like {{'pred': 'yes', 'score': 4}}.",
    ),
    "correctness": JudgePrompt(
        "You check whether answers about videos are factually correct. The predicted answer must agree with the facts "
        f"of the correct one and must not claim or suggest anything wrong. {_WORDING}",
        f"{_ONE}How correct are the facts of the predicted answer? {_SCALE} {_FORMAT}",
    ),
    "detail": JudgePrompt(
        "You check how detailed answers about videos are. The predicted answer should have all major points of the "
        f"correct one, and specifics rather than generalities. {_WORDING}",
        f"{_ONE}How complete and specific is the predicted answer? {_SCALE} {_FORMAT}",
    ),
    "context": JudgePrompt(
        "You check whether answers fit the context of a video. The predicted answer should agree with the overall "
        f"theme and setting that the correct one tells of. {_WORDING}",
        f"{_ONE}How well does the predicted answer understand the context? {_SCALE} {_FORMAT}",
    ),
    "temporal": JudgePrompt(
        "You check whether answers get the order of events in a video right. The predicted answer should tell of "
        f"events in the sequence of the correct one. {_WORDING}",
        f"{_ONE}How right is the predicted answer about time and order? {_SCALE} {_FORMAT}",
    ),
    "consistency": JudgePrompt(
        "You check whether a model answers two wordings of a question about a video consistently. Both predicted "
        f"answers should agree with the correct one and with each other. {_WORDING}",
        "First question: {question}\nSecond question: {question2}\nCorrect answer: {answer}\nPredicted answer to the "
        "first: {prediction}\nPredicted answer to the second: {prediction2}\n"
        f"How consistent are they? {_SCALE} {_FORMAT}",
    ),
}


def read_prompts(path: Path) -> dict[str, JudgePrompt]:
    """Return the prompts of a YAML file (`aspect: {system: ..., user: ...}`); aspects not in it keep ours.

    Raises:
        ValueError: the file has another form.
    """
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: not a mapping of aspects")
    prompts = dict(PROMPTS)
    for aspect, entry in found.items():
        if aspect not in PROMPTS:
            raise ValueError(f"{path}: no aspect {aspect!r}; choose from {', '.join(PROMPTS)}")
        if not isinstance(entry, Mapping) or set(entry) != {"system", "user"}:
            raise ValueError(f"{path}: {aspect} needs 'system' and 'user', nothing else")
        prompts[aspect] = JudgePrompt(str(entry["system"]), str(entry["user"]))
    return prompts


def used_prompts(prompts: Mapping[str, JudgePrompt], aspects: Sequence[str]) -> dict[str, Any]:
    """Return the prompts of these aspects, for results."""
    return {aspect: {"system": prompts[aspect].system, "user": prompts[aspect].user} for aspect in aspects}
