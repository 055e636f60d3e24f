"""HICom in vLLM: its caches never mix two questions, and its answers are those of the library."""

import asyncio
import base64
import importlib.util
import io
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hicom
import media
from bombs import png
from hicom import VideoChat, read_frames
from hicom.encoding import EncodedVideo
from hicom.serve.media import MediaError, MediaLimits
from hicom.serve.memory import Hold
from hicom.serve.requests import RequestError, RequestLimits
from hicom.serve.vllm_http import VLLMSettings, shared_memory

pytest.importorskip("vllm")

import httpx
import openai

FOLDER = Path(hicom.__file__).parent / "assets" / "hicom-tiny"
DEMO = FOLDER.parent / "demo.mp4"
QUESTIONS = ["What color is the circle?", "Which object moves left?", "What is next to the dog?", "What happens?"]
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # to look into the engine's process


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    return VideoChat.from_pretrained("hicom-tiny", device="cpu")


@pytest.fixture(scope="module")
def frames(chat: VideoChat) -> np.ndarray:
    return read_frames(DEMO, num_frames=8, size=chat.processor.image_size).frames


def prompt(chat: VideoChat, question: str, num_videos: int = 1, kind: str = "video") -> str:
    content = [*({"type": kind} for _ in range(num_videos)), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return str(chat.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


# Without an engine: what the caches know a request by


@pytest.fixture(scope="module")
def processor() -> Any:
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = ModelConfig(model=str(FOLDER), dtype="float32", max_model_len=1024)
    return MULTIMODAL_REGISTRY.create_processor(config)


@pytest.fixture(scope="module")
def cache(processor: Any) -> Any:
    from vllm.multimodal.cache import MultiModalProcessorOnlyCache

    return MultiModalProcessorOnlyCache(processor.info.ctx.model_config)


@pytest.fixture
def apply(processor: Any, cache: Any, chat: VideoChat, frames: np.ndarray) -> Any:
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    def run(
        question: str, videos: list[Any] | None = None, uuid: str | None = None, text: str | None = None, **kwargs: Any
    ) -> Any:
        videos = [frames] if videos is None else videos
        text = prompt(chat, question, len(videos))
        ids = processor.info.get_tokenizer().encode(text, add_special_tokens=False)
        items = processor.info.parse_mm_data({"video": videos})
        uuids = None if uuid is None else {"video": [uuid] * len(videos)}
        inputs = ProcessorInputs(ids, items, uuids, hf_processor_mm_kwargs=kwargs, cache=cache)
        return processor.apply(inputs, TimingContext(enabled=False))

    return run


def hash_of(found: Any) -> str:
    return str(found["mm_hashes"]["video"][0])


def test_questions_never_share_an_entry_and_repeated_ones_do(apply: Any, frames: np.ndarray) -> None:
    first, second, again = apply(QUESTIONS[0]), apply(QUESTIONS[1]), apply(QUESTIONS[0])
    assert hash_of(first) != hash_of(second)
    assert hash_of(first) == hash_of(again)
    assert hash_of(apply(QUESTIONS[0], [255 - frames])) != hash_of(first)
    # So do windows.
    assert hash_of(apply(QUESTIONS[0], window=[1, 4, 4])) != hash_of(first)
    assert hash_of(apply(QUESTIONS[0], max_visual_tokens=30)) != hash_of(first)


def test_names_that_clients_give_videos_count_for_nothing(apply: Any, frames: np.ndarray) -> None:
    """Or one could put a video of its own under the name of another's."""
    first = apply(QUESTIONS[0], uuid="mine")
    assert hash_of(first) == hash_of(apply(QUESTIONS[0]))
    assert hash_of(first) != hash_of(apply(QUESTIONS[0], [255 - frames], uuid="mine"))
    with pytest.raises(ValueError, match="a uuid cannot stand for a video"):
        apply(QUESTIONS[0], [None], uuid="mine")


def test_unknown_arguments_are_refused(apply: Any) -> None:
    with pytest.raises(ValueError, match=r"mm_processor_kwargs may hold .*, not 'size'"):
        apply(QUESTIONS[0], size=10_000)


def test_an_instruction_of_the_client_takes_the_place_of_the_question(
    apply: Any, processor: Any, chat: VideoChat
) -> None:
    assert hash_of(apply(QUESTIONS[0], instruction="red")) == hash_of(apply(QUESTIONS[1], instruction="red"))
    ids = processor.info.get_tokenizer().encode(prompt(chat, QUESTIONS[0]), add_special_tokens=False)
    same = processor.recover_instruction(ids)
    assert hash_of(apply(QUESTIONS[1], instruction=same)) == hash_of(apply(QUESTIONS[0]))
    with pytest.raises(ValueError, match="the instruction must be text"):
        apply(QUESTIONS[0], instruction=" ")


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        ("<|im_start|>user\n<video>\nWho runs?<|im_end|>\n<|im_start|>assistant\n", "Who runs?"),
        ("<|im_start|>user\nWho runs?\n<video><|im_end|>\n<|im_start|>assistant\n", "Who runs?"),
        (
            "<|im_start|>user\n<video>\nWho?<|im_end|>\n<|im_start|>assistant\nHe.<|im_end|>\n"
            "<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n",
            "And then?",
        ),
        (
            "<|im_start|>user\n<video>\nWho? Only give the best option.<|im_end|>\n<|im_start|>assistant\n",
            "Who?",
        ),
    ],
)
def test_the_instruction_is_the_last_question(text: str, instruction: str, processor: Any) -> None:
    ids = processor.info.get_tokenizer().encode(text, add_special_tokens=False)
    # The tokenizer of the model knows its world's words only, so what comes back is what it can say of them.
    expected = processor.info.get_tokenizer().decode(
        processor.info.get_tokenizer().encode(instruction, add_special_tokens=False)
    )
    assert processor.recover_instruction(ids) == expected.strip()


@pytest.mark.parametrize("kwargs", [{}, {"window": [1, 4, 4]}, {"max_visual_tokens": 30}])
def test_placeholders_are_expanded_as_the_library_does(
    kwargs: dict[str, Any], apply: Any, chat: VideoChat, frames: np.ndarray
) -> None:
    for number in (1, 3, 8):
        found = apply(QUESTIONS[0], [frames[:number]], **kwargs)
        window = kwargs.get("window")
        if "max_visual_tokens" in kwargs:
            window = chat.processor.choose_window(number, kwargs["max_visual_tokens"])
        expected = chat.processor.token_count(number, None if window is None else tuple(window))
        assert found["prompt_token_ids"].count(chat.processor.video_token_id) == expected


def test_too_many_frames_and_two_budgets(apply: Any, frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a video has 9 frames; at most 8 are taken"):
        apply(QUESTIONS[0], [np.concatenate([frames, frames[:1]])])
    with pytest.raises(ValueError, match="both choose the window"):
        apply(QUESTIONS[0], window=[1, 4, 4], max_visual_tokens=30)


def test_frames_are_those_of_training() -> None:
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    import hicom.serve.vllm_media  # noqa: F401

    loader = VIDEO_LOADER_REGISTRY.load("hicom")
    found, metadata = loader.load_bytes(DEMO.read_bytes(), num_frames=8)
    expected = read_frames(DEMO, num_frames=8)
    np.testing.assert_array_equal(found, expected.frames)
    assert metadata["timestamps_s"] == pytest.approx(expected.timestamps_s)
    assert len(loader.load_bytes(DEMO.read_bytes(), num_frames=8, fps=2)[0]) == len(read_frames(DEMO, fps=2).frames)
    assert len(loader.load_bytes(DEMO.read_bytes(), fps=2, max_frames=3)[0]) == 3


def test_what_vllm_measures_memory_with(processor: Any) -> None:
    """The longest videos, and a prompt that has no question."""
    found = processor.get_dummy_mm_inputs({"video": 2, "image": 1})
    library = processor.info.processor
    tokens = found["prompt_token_ids"]
    assert tokens.count(library.video_token_id) == 2 * library.token_count(processor.info.max_frames)
    assert tokens.count(library.image_token_id) == library.token_count(1)


MIXED = [
    ["video", "image", "video", "What color is the circle?"],
    ["What color", "video"],
    ["What color", "image", "is the circle?", "video", "Say it."],
    ["What color is the circle?", "Say it."],
    ["video"],
]


@pytest.mark.parametrize("parts", MIXED, ids=" ".join)
def test_parts_of_a_message_stand_as_in_the_library(
    parts: list[str], processor: Any, chat: VideoChat, frames: np.ndarray
) -> None:
    from vllm.renderers.chat_utils import parse_chat_messages

    picture = base64.b64encode(jpeg(frames[0])).decode()
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for part in parts:
        if part in ("video", "image"):
            url = f"data:{'video/jpeg' if part == 'video' else 'image/jpeg'};base64,{picture}"
            ours.append({"type": part})
            theirs.append({"type": f"{part}_url", f"{part}_url": {"url": url}})
        else:
            ours.append({"type": "text", "text": part})
            theirs.append({"type": "text", "text": part})
    messages: Any = [{"role": "user", "content": theirs}]
    conversation, _, _ = parse_chat_messages(messages, processor.info.ctx.model_config, "string")
    tokenizer, template = processor.info.get_tokenizer(), chat.processor.chat_template
    assert tokenizer.apply_chat_template(
        conversation, chat_template=template, tokenize=False
    ) == chat.processor.apply_chat_template([{"role": "user", "content": ours}])


def test_the_documented_command_is_one_of_vllm(chat: VideoChat) -> None:
    """It works beside `vllm-cpu`, whose command `vllm` does not start; `hicom serve` starts the same server."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    (command,) = re.findall(r"^python -m (vllm\..*?)^```", page, re.MULTILINE | re.DOTALL)
    module, *options = shlex.split(command.replace("FOLDER", str(FOLDER)).replace("32", str(chat.processor.num_frames)))
    assert importlib.util.find_spec(module) is not None
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([*options, "--dtype", "float32"])
    config = EngineArgs.from_cli_args(args).create_model_config()
    assert config.architectures == ["HIComForConditionalGeneration"]
    assert config.multimodal_config.media_io_kwargs["video"]["video_backend"] == "hicom"


SHADOW = """
import sys
from transformers import AutoConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

load_general_plugins()
hicom, other = sys.argv[1:]
print("other:", EngineArgs(model=other, dtype="float32", skip_tokenizer_init=True).create_model_config().architectures)
try:
    EngineArgs(model=hicom, dtype="float32").create_model_config()
except Exception as error:
    print("hicom:", error)
"""


def test_a_moved_interface_concerns_our_models_alone(tmp_path: Path) -> None:
    """The installed vLLM, with one name taken away."""
    import vllm
    from transformers import Qwen2Config

    root, shadow = Path(vllm.__file__).parent, tmp_path / "shadow" / "vllm"
    link = shadow
    for name in ("", "multimodal", "multimodal/processing"):
        (link := shadow / name).mkdir(parents=True)
        for entry in (root / name).iterdir():
            if entry.name not in ("multimodal", "processing", "__pycache__"):
                (link / entry.name).symlink_to(entry)
    file = link / "__init__.py"
    text = file.read_text("utf-8").replace("PromptReplacement", "PromptReplaced")
    file.unlink()
    file.write_text(
        f"from .processor import PromptReplacement as PromptReplaced\n{text}".replace("    PromptReplaced,\n", ""),
        "utf-8",
    )
    Qwen2Config(architectures=["Qwen2ForCausalLM"], hidden_size=64, num_attention_heads=2).save_pretrained(
        tmp_path / "other"
    )
    paths = os.pathsep.join([str(shadow.parent), *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])])
    command = [sys.executable, "-c", SHADOW, str(FOLDER), str(tmp_path / "other")]
    environment = os.environ | {"PYTHONPATH": paths}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert "other: ['Qwen2ForCausalLM']" in run.stdout, run.stderr[-2000:]
    told = run.stdout.partition("hicom: ")[2]
    assert "inner interfaces have moved: vllm.multimodal.processing has no PromptReplacement;" in told
    assert all("hicom-tiny" in line for line in run.stderr.splitlines() if "hicom" in line), run.stderr
    served = subprocess.run(
        [sys.executable, "-m", "hicom", "serve", "hicom-tiny", "--port", str(free_port())],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert served.returncode == 2
    assert (
        served.stderr.strip().splitlines()[-1].startswith("hicom: error: hicom cannot serve its models with this vLLM")
    )


# What clients name is fetched without trust


@pytest.fixture
def connector(monkeypatch: pytest.MonkeyPatch) -> Any:
    def create(
        settings: VLLMSettings | None = None, num_frames: int = 8, form: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

        import hicom.serve.vllm_media  # noqa: F401

        monkeypatch.setenv("HICOM_SERVE", "")
        (settings or VLLMSettings()).to_environment()
        video = {"video_backend": "hicom", "num_frames": num_frames, **(form or {})}
        return MEDIA_CONNECTOR_REGISTRY.load("hicom", media_io_kwargs={"video": video}, **kwargs)

    return create


def data_url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def jpeg(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG")
    return file.getvalue()


def test_videos_and_frames_of_clients(connector: Any, frames: np.ndarray, tmp_path: Path) -> None:
    expected = read_frames(DEMO, num_frames=8).frames
    np.testing.assert_array_equal(connector().fetch_video(data_url(DEMO.read_bytes()))[0], expected)
    np.testing.assert_array_equal(asyncio.run(connector().fetch_video_async(data_url(DEMO.read_bytes())))[0], expected)
    found = connector().fetch_image(data_url(jpeg(frames[0]), "image/jpeg"))
    assert (found.width, found.height) == frames.shape[2:0:-1]
    body = ",".join(base64.b64encode(jpeg(frame)).decode() for frame in frames)
    # Also more than the server's own choice, up to what it allows.
    assert len(connector(num_frames=4).fetch_video(f"data:video/jpeg;base64,{body}")[0]) == 8
    settings = VLLMSettings(requests=RequestLimits(max_frames=7))
    with pytest.raises(MediaError, match="the video has 8 frames; at most 7 are taken"):
        connector(settings).fetch_video(f"data:video/jpeg;base64,{body}")
    folder = VLLMSettings(media=MediaLimits(allowed_folders=(DEMO.parent,)))
    np.testing.assert_array_equal(connector(folder).fetch_video(DEMO.as_uri())[0], expected)
    np.testing.assert_array_equal(
        connector(allowed_local_media_path=str(DEMO.parent)).fetch_video(DEMO.as_uri())[0], expected
    )


def test_large_frames_of_clients_come_at_size(connector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hicom.serve import vllm_media

    blank = png(3072, 3072)
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(blank).decode() for _ in range(8))
    with pytest.raises(MediaError, match="75,497,472 pixels together; at most 67,108,864 are taken"):
        connector().fetch_video(url)
    found, metadata = connector(form={"size": 64}).fetch_video(url)
    assert found.shape == (8, 64, 64, 3)
    assert metadata["total_num_frames"] == 8
    few = "data:video/jpeg;base64," + base64.b64encode(blank).decode()
    assert connector(form={"size": 64}).fetch_video(few)[0].shape == (1, 3072, 3072, 3), "what is small stays as it was"
    monkeypatch.setattr(vllm_media, "MAX_WHOLE_PIXELS", 1)
    assert connector(form={"size": 64, "is_square": True, "color": [1, 2, 3]}).fetch_video(few)[0].shape == (
        1,
        64,
        64,
        3,
    )


def test_a_video_is_no_image(connector: Any) -> None:
    with pytest.raises(MediaError, match="send it as video_url"):
        connector().fetch_image(data_url(DEMO.read_bytes(), "image/jpeg"))


def test_media_count_against_one_memory(connector: Any) -> None:
    size = len(DEMO.read_bytes())
    limits = MediaLimits(max_held_bytes=size + 10)
    for _ in range(3):  # and are given back
        connector(VLLMSettings(media=limits)).fetch_video(data_url(DEMO.read_bytes()))
    with Hold(shared_memory(limits.max_held_bytes)) as hold:
        hold.take(20)
        with pytest.raises(RequestError, match="try again later"):
            connector(VLLMSettings(media=limits)).fetch_video(data_url(DEMO.read_bytes()))


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}/demo.mp4", "http://localhost:{port}/", "http://[::1]:{port}/"]
)
def test_private_addresses_are_not_asked(url: str, connector: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        with pytest.raises(MediaError, match="may not be fetched from this host"):
            connector().fetch_video(url.format(port=listener.getsockname()[1]))
        with pytest.raises(TimeoutError):
            listener.accept()


def test_other_media_that_are_refused(connector: Any) -> None:
    with pytest.raises(MediaError, match="local files may not be named here"):
        connector().fetch_video(DEMO.as_uri())
    with pytest.raises(MediaError, match="more than 1,000 bytes"):
        connector(VLLMSettings(media=MediaLimits(max_bytes=1000))).fetch_video(data_url(DEMO.read_bytes()))
    with pytest.raises(MediaError, match="pixels; at most 100 are taken"):
        connector(VLLMSettings(media=MediaLimits(max_pixels=100))).fetch_video(data_url(DEMO.read_bytes()))
    with pytest.raises(MediaError, match="no video or picture"):
        connector().fetch_video(data_url(b"nothing"))
    with pytest.raises(MediaError, match="may not be fetched from this host"):
        connector(allowed_media_domains=["example.com"]).fetch_video("https://example.org/clip.mp4")


# With an engine


@pytest.fixture(scope="module")
def engine() -> Any:
    from vllm import LLM

    return LLM(
        str(FOLDER),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=4,
        block_size=32,
        limit_mm_per_prompt={"video": 2, "image": 2},
    )


def generate(engine: Any, requests: list[tuple[str, dict[str, Any]]], **kwargs: Any) -> list[Any]:
    from vllm import SamplingParams

    prompts = [
        {"prompt": text, "multi_modal_data": data, "mm_processor_kwargs": kwargs} if data else {"prompt": text}
        for text, data in requests
    ]
    return list(engine.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False))


def texts(found: list[Any]) -> list[str]:
    return [each.outputs[0].text.strip() for each in found]


@pytest.mark.vllm
def test_answers_are_those_of_the_library(engine: Any, chat: VideoChat, frames: np.ndarray) -> None:
    encoded = chat.encode(DEMO)
    expected = [chat.ask(encoded, question, max_new_tokens=8) for question in QUESTIONS]
    requests = [(prompt(chat, question), {"video": frames}) for question in QUESTIONS]
    alone = [generate(engine, [request])[0] for request in requests]
    assert texts(alone) == [answer.text for answer in expected]
    assert [len(each.prompt_token_ids) for each in alone] == [answer.num_prompt_tokens for answer in expected]
    assert texts(generate(engine, requests)) == texts(alone)
    assert len(set(texts(alone))) > 2, "all answers are the same, so this test shows nothing"


@pytest.mark.vllm
def test_windows_pictures_several_videos_turns_and_text(engine: Any, chat: VideoChat, frames: np.ndarray) -> None:
    encoded = chat.encode(frames)
    found = generate(engine, [(prompt(chat, QUESTIONS[0]), {"video": frames})], window=[2, 2, 2])
    assert texts(found) == [chat.ask(encoded, QUESTIONS[0], window=(2, 2, 2), max_new_tokens=8).text]
    found = generate(engine, [(prompt(chat, QUESTIONS[0]), {"video": frames})], instruction=QUESTIONS[1])
    assert texts(found) == [chat.ask(encoded, QUESTIONS[0], instruction=QUESTIONS[1], max_new_tokens=8).text]
    other = np.ascontiguousarray(frames[::-1, :, ::-1])
    both: list[EncodedVideo] = [encoded, chat.encode(other)]
    found = generate(engine, [(prompt(chat, QUESTIONS[0], 2), {"video": [frames, other]})])
    assert texts(found) == [chat.ask(both, QUESTIONS[0], max_new_tokens=8).text]
    turns = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTIONS[0]}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    text = str(chat.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    plain = [{"role": "user", "content": QUESTIONS[0]}, turns[1], turns[2]]
    assert texts(generate(engine, [(text, {"video": frames})])) == [
        chat.reply(plain, [encoded], max_new_tokens=8).text  # type: ignore[arg-type]
    ]
    text = str(
        chat.processor.apply_chat_template(
            [{"role": "user", "content": QUESTIONS[0]}], tokenize=False, add_generation_prompt=True
        )
    )
    expected = chat.reply([{"role": "user", "content": QUESTIONS[0]}], max_new_tokens=8).text
    assert texts(generate(engine, [(text, {})])) == [expected]


@pytest.mark.vllm
def test_pictures(engine: Any, chat: VideoChat, frames: np.ndarray) -> None:
    picture = Image.fromarray(frames[0])
    text = prompt(chat, QUESTIONS[0], kind="image")
    batch = chat.processor(images=[picture], text=text, instruction=QUESTIONS[0], return_tensors="pt")
    ids = chat.model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    expected = chat.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    found = generate(engine, [(prompt(chat, QUESTIONS[0], kind="image"), {"image": picture})])
    assert texts(found) == [expected]


def num_encoded(model: Any) -> int:
    return int(model.num_encoded)


@pytest.mark.vllm
def test_another_question_about_a_video_runs_the_compressor_alone(
    engine: Any, chat: VideoChat, frames: np.ndarray
) -> None:
    fresh = np.ascontiguousarray(np.roll(frames, 3, axis=2))

    def ask(question: str) -> tuple[Any, int]:
        found = generate(engine, [(prompt(chat, question), {"video": fresh})])[0]
        return found, engine.apply_model(num_encoded)[0]

    _, before = ask(QUESTIONS[0])
    _, after = ask(QUESTIONS[1])
    assert after == before
    assert ask(QUESTIONS[0])[1] == before
    encoded = chat.encode(fresh)
    for question in QUESTIONS:
        assert texts([ask(question)[0]]) == [chat.ask(encoded, question, max_new_tokens=8).text]


PARALLEL = """
import sys
from vllm import LLM, SamplingParams
from hicom import read_frames

if __name__ == "__main__":
    folder, video, *prompts = sys.argv[1:]
    frames = read_frames(video, num_frames=8, size=64).frames
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "block_size": 32}
    engine = LLM(folder, tensor_parallel_size=2, **options)
    requests = [{"prompt": prompt, "multi_modal_data": {"video": frames}} for prompt in prompts]
    for found in engine.generate(requests, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False):
        print("answer:", found.outputs[0].text.strip())
"""


@pytest.mark.vllm
def test_two_processes_that_share_the_llm(chat: VideoChat, tmp_path: Path) -> None:
    (tmp_path / "parallel.py").write_text(PARALLEL, "utf-8")
    assert chat.processor.image_size == 64
    command = [sys.executable, str(tmp_path / "parallel.py"), str(FOLDER), str(DEMO)]
    command += [prompt(chat, question) for question in QUESTIONS]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    found = [line.partition("answer: ")[2] for line in run.stdout.splitlines() if "answer: " in line]
    assert found == [chat.ask(DEMO, question, max_new_tokens=8).text for question in QUESTIONS], run.stderr[-2000:]


@pytest.mark.vllm
def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    code = "import sys; from vllm import LLM; LLM(sys.argv[1], dtype='float32', enforce_eager=True, max_model_len=256)"
    running = {}
    for kind in ("missing", "unknown"):  # side by side
        shutil.copytree(FOLDER, tmp_path / kind)
        (file,) = (tmp_path / kind).glob("model*.safetensors")
        tensors = load_file(file)
        name = next(each for each in tensors if each.startswith("model.compressor."))
        if kind == "missing":
            tensors.pop(name)
        else:
            tensors["model.compressor.unknown.weight"] = tensors[name].clone()
        save_file(tensors, file, metadata={"format": "pt"})
        what = name.removeprefix("model.") if kind == "missing" else "compressor.unknown"
        command = [sys.executable, "-c", code, str(tmp_path / kind)]
        running[what] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for what, process in running.items():
        output, _ = process.communicate(timeout=240)
        assert process.returncode != 0
        assert what in output


@pytest.mark.vllm
def test_a_repeated_question_reuses_the_prefix_and_another_one_does_not(
    engine: Any, chat: VideoChat, frames: np.ndarray
) -> None:
    # Two videos make the prompt longer than a block of the cache, whose first holds visual tokens already.
    videos = [np.ascontiguousarray(np.roll(frames, shift, axis=2)) for shift in (5, 7)]

    def cached(question: str) -> int:
        found = generate(engine, [(prompt(chat, question, 2), {"video": videos})])[0]
        assert len(found.prompt_token_ids) > 32
        return int(found.num_cached_tokens)

    assert cached(QUESTIONS[0]) == 0
    assert cached(QUESTIONS[0]) >= 32
    assert cached(QUESTIONS[1]) == 0


# Over HTTP


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "hicom", "serve", "hicom-tiny", "--name", "hicom", "--port", str(port)]
    command += ["--allow-folder", str(DEMO.parent), "--max-mb", "20"]
    # As documented, without --enforce-eager: the model is profiled and compiled, as on every GPU. `engine` is eager.
    command += ["--", *["--max-model-len", "1024", "--max-num-seqs", "8", "--block-size", "32"]]
    process = subprocess.Popen(command, env=os.environ | {"HICOM_API_KEY": "secret"})
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return openai.OpenAI(base_url=url, api_key="secret", max_retries=0)


def ask_about(video: str, question: str = QUESTIONS[0], kind: str = "video_url", **fields: Any) -> dict[str, Any]:
    content = [{"type": kind, kind: {"url": video}}, {"type": "text", "text": question}]
    return {
        "model": "hicom",
        "max_tokens": 8,
        "temperature": 0,
        "messages": [{"role": "user", "content": content}],
    } | fields


@pytest.mark.vllm
def test_over_http(client: Any, chat: VideoChat, tmp_path: Path) -> None:
    media.write_video(tmp_path / "other.mp4", 24)
    paths = [DEMO, tmp_path / "other.mp4"]
    cases = [(path, question) for question in QUESTIONS for path in paths]
    expected = [chat.ask(path, question, max_new_tokens=8).text for path, question in cases]
    assert len(set(expected)) > 3, "too many answers are the same, so this test shows little"

    def ask(number: int) -> str:
        path, question = cases[number % len(cases)]
        video = {"url": data_url(path.read_bytes())}
        content = [{"type": "video_url", "video_url": video}, {"type": "text", "text": question}]
        options: Any = {"model": "hicom", "max_tokens": 8, "temperature": 0}
        messages: Any = [{"role": "user", "content": content}]
        if number < len(cases):
            found = client.chat.completions.create(messages=messages, **options)
            return (found.choices[0].message.content or "").strip()
        pieces = client.chat.completions.create(messages=messages, stream=True, **options)
        return "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices).strip()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(2 * len(cases)))) == expected * 2


@pytest.mark.vllm
def test_media_among_texts_stand_in_their_places(client: Any, chat: VideoChat, tmp_path: Path) -> None:
    frames = read_frames(DEMO, num_frames=8).frames
    Image.fromarray(frames[-1]).save(tmp_path / "last.png")
    texts = [{"type": "text", "text": text} for text in ("Look.", QUESTIONS[0], "Say it.")]
    png = data_url((tmp_path / "last.png").read_bytes(), "image/png")
    asked = [texts[0], {"type": "image_url", "image_url": {"url": png}}, texts[1]]
    asked += [{"type": "video_url", "video_url": {"url": DEMO.as_uri()}}, texts[2]]
    found = client.chat.completions.create(
        model="hicom", max_tokens=8, temperature=0, messages=[{"role": "user", "content": asked}], logprobs=True
    )
    content = [texts[0], {"type": "image", "image": str(tmp_path / "last.png")}, texts[1]]
    content += [{"type": "video", "video": str(DEMO)}, texts[2]]
    batch = chat.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        num_frames=8,
    )
    output = chat.model.generate(
        **batch, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    ids = output.sequences[0, batch["input_ids"].shape[1] :]
    assert found.usage.prompt_tokens == batch["input_ids"].shape[1]
    answer = chat.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert found.choices[0].message.content.strip() == answer
    # The order shows in the numbers, if not in a word.
    expected = [float(row[0].log_softmax(-1).max()) for row in output.logits]
    logprobs = [each.logprob for each in found.choices[0].logprobs.content]
    assert logprobs == pytest.approx(expected, abs=1e-3)


@pytest.mark.vllm
def test_fields_that_openai_does_not_know(client: Any, chat: VideoChat) -> None:
    def ask(**fields: Any) -> Any:
        return client.chat.completions.create(**ask_about(DEMO.as_uri()), extra_body=fields)

    encoded = chat.encode(DEMO)
    found = ask(instruction=QUESTIONS[1])
    assert found.choices[0].message.content.strip() == chat.ask(encoded, QUESTIONS[0], instruction=QUESTIONS[1]).text
    whole, small = ask().usage.prompt_tokens, ask(window=[8, 8, 8]).usage.prompt_tokens
    expected = chat.processor.token_count(8) - chat.processor.token_count(8, (8, 8, 8))
    assert whole - small == expected > 0
    assert ask(mm_processor_kwargs={"max_visual_tokens": 12}).usage.prompt_tokens < whole
    assert ask(num_frames=2).usage.prompt_tokens == whole - (
        chat.processor.token_count(8) - chat.processor.token_count(2)
    )
    frames = read_frames(DEMO, num_frames=4).frames
    body = ",".join(base64.b64encode(jpeg(frame)).decode() for frame in frames)
    found = client.chat.completions.create(**ask_about(f"data:video/jpeg;base64,{body}"))
    assert whole - found.usage.prompt_tokens == chat.processor.token_count(8) - chat.processor.token_count(4)


def png_bomb() -> bytes:
    """Return a picture of 25 million pixels in a hundred bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 5_000, 5_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


HOSTILE: dict[str, tuple[dict[str, Any], int, str]] = {
    "a file of the server": (ask_about("file:///etc/passwd"), 400, "local files may not be named here"),
    "a way out of the folder": (
        ask_about(f"{DEMO.parent.as_uri()}/../../../../../etc/passwd"),
        400,
        "local files may not be named here",
    ),
    "a private address": (ask_about("http://127.0.0.1:1/clip.mp4"), 400, "may not be fetched from this host"),
    "the cloud's metadata": (
        ask_about("http://169.254.169.254/latest", kind="image_url"),
        400,
        "may not be fetched from this host",
    ),
    "no video": (ask_about(data_url(b"nothing")), 400, "no video or picture"),
    "a bomb": (ask_about(data_url(png_bomb(), "image/png"), kind="image_url"), 400, "pixels; at most"),
    "too much": (ask_about(data_url(bytes(21 * 10**6))), 400, "more than 20,000,000 bytes"),
    "another scheme": (ask_about("ftp://example.com/clip.mp4"), 400, "media must be http, https or data URLs"),
    "too many frames": (ask_about(DEMO.as_uri(), num_frames=10**6), 400, "a whole number from 1 to 8"),
    "frames by the back door": (
        ask_about(DEMO.as_uri(), media_io_kwargs={"video": {"num_frames": 10**6}}),
        400,
        "'media_io_kwargs' is not taken",
    ),
    "another argument": (ask_about(DEMO.as_uri(), mm_processor_kwargs={"max_frames": 10**6}), 400, "may hold"),
    "two instructions": (
        ask_about(DEMO.as_uri(), instruction="red", mm_processor_kwargs={"instruction": "blue"}),
        400,
        "given twice, and differently",
    ),
    "a name for a video": (
        {
            "model": "hicom",
            "messages": [
                {"role": "user", "content": [{"type": "video_url", "video_url": None, "uuid": "another's"}]},
            ],
        },
        400,
        "",
    ),
    "too many videos": (
        ask_about("x", messages=[{"role": "user", "content": [{"type": "video_url"}] * 9}]),
        400,
        "9 media; at most 8 are taken",
    ),
    "sound": (ask_about(DEMO.as_uri(), kind="audio_url"), 400, ""),
    "an unknown model": (ask_about(DEMO.as_uri(), model="other"), 404, "other"),
    "a longer answer than there is room": (ask_about(DEMO.as_uri(), max_tokens=10**6), 400, "max_tokens"),
}


@pytest.mark.vllm
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests(name: str, url: str, client: Any) -> None:
    body, status, message = HOSTILE[name]
    response = httpx.post(f"{url}/chat/completions", json=body, headers={"Authorization": "Bearer secret"}, timeout=60)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert set(error) >= {"message", "type", "param", "code"}
    for secret in ("Traceback", "site-packages", str(DEMO.parent), str(Path.home())):
        assert secret not in response.text
    # The server keeps serving.
    assert client.chat.completions.create(**ask_about(DEMO.as_uri())).choices[0].message.content


@pytest.mark.vllm
def test_only_those_with_the_key(url: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        response = httpx.post(f"{url}/chat/completions", json=ask_about(DEMO.as_uri()), headers=headers)
        assert response.status_code == 401
        assert httpx.get(f"{url}/models", headers=headers).status_code == 401


@pytest.mark.vllm
def test_other_endpoints_take_no_arguments_for_media(url: str) -> None:
    body = {"model": "hicom", "prompt": "x", "media_io_kwargs": {"video": {"num_frames": 10**6}}}
    response = httpx.post(f"{url}/completions", json=body, headers={"Authorization": "Bearer secret"})
    assert response.status_code == 400
    assert "'media_io_kwargs' is for" in response.json()["error"]["message"]


@pytest.mark.vllm
def test_clients_that_go_away_leave_nothing(url: str, client: Any) -> None:
    headers = {"Authorization": "Bearer secret"}
    for _ in range(8):
        body = ask_about(DEMO.as_uri(), stream=True, max_tokens=512, ignore_eos=True)
        with httpx.stream("POST", f"{url}/chat/completions", json=body, headers=headers, timeout=60) as response:
            next(response.iter_lines())
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        text = httpx.get(url.replace("/v1", "/metrics"), headers=headers).text
        running = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running")]
        if running and all(float(line.rsplit(" ", 1)[1]) == 0 for line in running):
            break
        time.sleep(0.2)
    else:
        pytest.fail(f"requests still run: {running}")
    assert client.chat.completions.create(**ask_about(DEMO.as_uri())).choices[0].message.content
