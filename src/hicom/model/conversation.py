"""Conversations as chat templates take them: content as text with placeholders, media collected on the way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from .call_options import is_about_text, nearest
from .instruction import join_parts
from .media_inputs import Kind, Medium, parse_part

TEMPLATE_VARIABLES = ("enable_thinking", "thinking", "reasoning_effort")
"""Variables that callers pass to every chat template: None and False ask for nothing where a template has none."""


@dataclass(frozen=True, kw_only=True)
class ChatRenderer:
    """Renders conversations with one chat template.

    Attributes:
        template: Jinja.
        tokens: the placeholders, by kind of media.
        image_size: height and width of the frames that the vision tower takes.
        variables: that the template is given.
    """

    template: str
    tokens: Mapping[Kind, str]
    image_size: int
    variables: Mapping[str, Any] = field(default_factory=dict)

    def render(self, chats: Sequence[Any], **how: Any) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """Return the texts of conversations, and with `return_assistant_tokens_mask` where their answers stand."""
        texts, spans = render_jinja_template(
            conversations=list(chats), chat_template=self.template, **how, **self.variables
        )
        return texts, spans

    def check_written(self, variables: Mapping[str, Any]) -> None:
        """Raise ValueError where the template would drop what it is given."""
        for name, value in variables.items():
            if value not in (None, False, []) and not mentions(self.template, name):
                raise ValueError(f"this chat template does not write {name!r}; leave it out, or pass another template")

    def check_answers(self, *, tokenize: bool) -> None:
        """Raise ValueError where answers cannot be told from the rest."""
        if not (tokenize and re.search(r"\{%-?\s*generation\s*-?%\}", self.template)):
            raise ValueError(
                "return_assistant_tokens_mask needs tokenize=True and a chat template that marks answers with "
                "{% generation %}; return_labels=True marks the last answer with any"
            )

    def starts_of_answers(self, chats: Sequence[Any], texts: Sequence[str], **how: Any) -> list[int]:
        """Return at which character of its text the last message of every conversation starts.

        Raises:
            ValueError: it is no answer, or the template changes what stands before.
        """
        starts = []
        for messages, text in zip(chats, texts, strict=True):
            if len(messages) < 2 or messages[-1]["role"] != "assistant":
                raise ValueError("return_labels needs conversations that end with an assistant's answer")
            prefix = self.render([messages[:-1]], add_generation_prompt=True, **how)[0][0]
            if not text.startswith(prefix):
                raise ValueError(
                    "this chat template changes earlier turns when an answer follows; labels need one that does not"
                )
            starts.append(len(prefix))
        return starts

    def flatten(self, message: Any, media: dict[str, list[Medium]]) -> dict[str, Any]:
        """Return a message whose content is text with placeholders; its media are appended to `media`."""
        if hasattr(message, "model_dump"):  # as clients of OpenAI's API return them
            message = message.model_dump()
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"a message is a dictionary with 'role' and 'content', not {message!r}")
        kept = {name: value for name, value in message.items() if value is not None}
        if kept.get("tool_calls") and not mentions(self.template, "tool_calls"):
            raise ValueError("a message has tool_calls, which this chat template does not write; pass one that does")
        content = kept.get("content", "")
        if isinstance(content, str):
            return {**kept, "content": with_placeholders(content, self.tokens)}
        if not isinstance(content, list | tuple):
            raise ValueError(f"a message's content is a {type(content).__name__}; give text or a list of parts")
        parts = [parse_part(part, self.image_size) for part in content]
        found = [part for part in parts if isinstance(part, Medium)]
        texts = iter(self._without_leading(found, [part for part in parts if isinstance(part, str)]))
        pieces = [self.tokens[part.kind] if isinstance(part, Medium) else next(texts) for part in parts]
        for medium in found:
            if medium.source is not None:
                media[f"{medium.kind}s"].append(medium)
        return {**kept, "content": join_parts(pieces)}

    def _without_leading(self, media: list[Medium], texts: list[str]) -> list[str]:
        """Return a message's texts without the placeholders that data sets write in front of a question.

        They are dropped only where they say again what the parts say: as many of each kind as there are media.
        """
        texts = [with_placeholders(text, self.tokens) for text in texts]
        if not media or not texts:
            return texts
        kinds = {token: kind for kind, token in self.tokens.items()}
        pattern = "|".join(map(re.escape, kinds))
        head = re.match(rf"\s*(?:(?:{pattern})\s*)+", texts[0])
        if head is None:
            return texts
        written = [kinds[token] for token in re.findall(pattern, head.group())]
        if sorted(written) != sorted(medium.kind for medium in media):
            return texts
        return [texts[0][head.end() :], *texts[1:]]


def with_placeholders(text: str, tokens: Mapping[Kind, str]) -> str:
    """Return a text whose `<video>` and `<image>`, as datasets write them, are a model's placeholders."""
    for kind, token in tokens.items():
        text = text.replace(f"<{kind}>", token)
    return text


def as_texts(text: Any, images: Any, tokens: Mapping[Kind, str]) -> list[str] | None:
    """Return the prompts of a call, with a model's placeholders; None where there are none.

    Raises:
        ValueError: they are no strings, or stand where images do.
    """
    order = "the order of arguments is (images, text, videos), as in transformers; pass text="
    if text is None:
        strings = [images] if isinstance(images, str) else images if isinstance(images, list | tuple) else []
        if any(isinstance(each, str) and (" " in each or "<" in each) for each in strings):
            raise ValueError(f"images is {images!r}, and there is no text; {order}")
        return None
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(each, str) for each in texts):
        raise ValueError(f"text is {type(text).__name__}; give a string or a list of strings: {order}")
    return [with_placeholders(each, tokens) for each in texts]


def choose_template(own: Any, name: str | None) -> str:
    """Return a chat template: a processor's own, one that it has by name, or the one that is given."""
    if not isinstance(own, dict):
        return str(own if name is None else name)
    if name is None and "default" not in own:
        raise ValueError(f"there are several chat templates; pass chat_template, one of {', '.join(own)}")
    return str(own.get(name or "default", name))


def mentions(template: str, name: str) -> bool:
    """Return whether a chat template has a name in it."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def split_variables(
    inside: Mapping[str, Any], beside: Mapping[str, Any], template: str, known: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return which arguments are of a processor's call, and which are variables of the chat template.

    Args:
        inside: `processor_kwargs`, all of the call.
        beside: further arguments of `apply_chat_template`.
        template: the chat template.
        known: names of the call's arguments.

    Raises:
        ValueError: a name is given twice, or neither knows it.
    """
    if not isinstance(inside, Mapping):
        raise ValueError(f"processor_kwargs must be a dictionary, not {type(inside).__name__}")
    if twice := sorted(set(inside) & set(beside)):
        raise ValueError(f"{twice[0]} is given twice: in processor_kwargs and by itself; give it once")
    call, variables = dict(inside), {}
    for name, value in beside.items():
        if name in known:
            call[name] = value
        elif name in TEMPLATE_VARIABLES or mentions(template, name):
            variables[name] = value
        else:
            raise ValueError(
                f"HIComProcessor does not know the argument {name!r}{nearest(name, (*known, *TEMPLATE_VARIABLES))}; "
                f"neither does the chat template"
            )
    return call, variables


def refuse_without_tokens(call: Mapping[str, Any]) -> None:
    """Raise ValueError where arguments about media come with `tokenize=False`: a text does not hold their effect."""
    for name, value in call.items():
        if value is not None and value is not False and not is_about_text(name):
            raise ValueError(f"{name} has no effect with tokenize=False; give it to the call that takes the text")
