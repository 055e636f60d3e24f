"""The instruction: what of a user's turn steers the compressor.

As in training it is the last user turn without media placeholders, answer options and remarks on the answer's format:
these say nothing about where to look.
"""

import re

PLACEHOLDERS = ("<video>", "<image>", "<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")

# A first option ("A. ...", "(A) ...", "A: ...") on a line of its own and a second one after it, and all that follows.
_OPTIONS = re.compile(
    r"\s*\n\s*(?:(?:answer\s+)?(?:options?|choices?|candidates)\s*:?\s*)?\(?A\s*[).:]\s*.+?\n\s*\(?B\s*[).:].*",
    re.IGNORECASE | re.DOTALL,
)
_FORMATS = re.compile(
    "|".join(
        (
            r"answer the question using a single word or phrase",
            r"answer (?:the question )?(?:shortly|briefly|in one word|in one sentence|with one word)",
            r"(?:please )?(?:provide your answer by stating|respond with|answer with|give|select|choose)"
            r" (?:only )?(?:the|an) (?:option'?s? )?letter[^.\n]*",
            r"please provide your answer by[^.\n]*",
            r"answer with the option'?s letter from the given choices(?: directly)?(?: and only give the best option)?",
            r"only give the best option",
            r"(?:the )?best (?:answer|option)(?: is)?\s*:?\s*\(?",
            r"select the best (?:answer|option)[^.\n]*",
        )
    ),
    re.IGNORECASE,
)


def extract_instruction(text: str) -> str:
    """Return what of a user's turn steers the compressor.

    Args:
        text: the turn as the user, a dataset or a benchmark wrote it.

    Returns:
        The bare question; the text without placeholders where nothing else would remain.
    """
    for placeholder in PLACEHOLDERS:
        text = text.replace(placeholder, " ")
    plain = text.strip()
    text = _OPTIONS.sub("", "\n" + plain)
    text = re.sub(r"(?:^|\n)\s*question\s*:\s*", "\n", text, flags=re.IGNORECASE)
    text = re.sub(r"\s*\b(?:options?|choices?)\s*:\s*$", "", text, flags=re.IGNORECASE)
    text = _FORMATS.sub("", text)
    # What a removed remark leaves behind: a full stop or blanks at the ends, runs of white space.
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"([?.!])(?:\s*\.)+$", r"\1", text).strip()
    return text if re.search(r"\w", text) else plain
