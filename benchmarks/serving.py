"""How a server behaves under load: `python benchmarks/serving.py load` and `... soak`.

`load` puts the same towers and LLM behind three compressors - ours, LLaVA-Video's 2x2 pooling, and none - each into a
vLLM server of its own, all of them up at once, and asks them in turn with 1, 4 and 16 clients. What the pooling and the
plain connector say is noise, as their weights are random; what it costs is not. Every answer has the same length.

`soak` asks one server without a pause for minutes, goes away in the middle of every third answer, sends nonsense in
between, and looks whether memory grows, a request is stuck or an answer changes.

Run it with an environment that has vLLM (`make test-vllm` builds `.venv-vllm`), or `soak --engine local` without.
"""

import asyncio
import base64
import contextlib
import copy
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import torch
import tyro
from transformers import Qwen2Config
from transformers.utils import logging

import hicom
from hicom.bench.shapes import QWEN
from hicom.inference import VideoChat
from hicom.model.hub import find_model
from hicom.model.modeling import HIComForConditionalGeneration
from hicom.model.processing import HIComProcessor
from hicom.provenance import git_commit, hardware, short_commit
from hicom.tables import markdown
from hicom.video import write_video

ROOT = Path(__file__).parents[1]
DEMO = Path(hicom.__file__).parent / "assets" / "demo.mp4"
COLUMNS = {"hicom": "HICom", "llava_video": "2x2 pooling", "no_compression": "no compression"}
CLIENTS = (1, 4, 16)
WORKLOADS = {"new": "every request about a video of its own", "same": "requests about the same two videos"}
THINGS = ("circle", "square", "triangle", "dog", "cat", "car", "tree", "sun", "star", "heart")
QUESTIONS = ("What color is the {}?", "Which way does the {} move?", "What is next to the {}?", "Is there a {}?")


# Models


def make_folder(column: str, llm: str, folder: Path) -> Path:
    """Write hicom-tiny with another compressor or LLM, whose weights are random; the towers stay."""
    source = find_model("hicom-tiny")
    chat = VideoChat.from_pretrained(source, device="cpu")
    config = copy.deepcopy(chat.model.config)
    config.compressor = column
    if llm != "tiny":
        small = {name: getattr(config.text_config, name) for name in ("vocab_size", "eos_token_id", "pad_token_id")}
        config.text_config = Qwen2Config(**(QWEN[llm] | small), tie_word_embeddings=True)
        config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = HIComForConditionalGeneration(config)
    own = model.state_dict()
    same = {n: x for n, x in chat.model.state_dict().items() if n in own and own[n].shape == x.shape}
    model.load_state_dict(own | same)
    model.save_pretrained(folder)
    processor = HIComProcessor.from_pretrained(source)
    processor.compressor, processor.is_conditional = config.compressor, config.is_conditional
    processor.save_pretrained(folder)
    return folder


# Servers


@dataclass
class Server:
    """A server that is up.

    Attributes:
        url: of its API.
        process: of the operating system.
    """

    url: str
    process: subprocess.Popen[bytes]

    def memory(self) -> int:
        """Return what the server's processes hold, in bytes (proportional set size: shared pages count once)."""
        return sum(proportional_size(pid) for pid in tree(self.process.pid))

    def metric(self, name: str) -> float:
        """Return a number of its `/metrics`, summed over labels."""
        lines = httpx.get(f"{self.url[:-3]}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def tree(pid: int) -> list[int]:
    """Return a process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in tree(int(child)))]


def proportional_size(pid: int) -> int:
    """Return the bytes of memory that a process accounts for."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def serve(model: str, engine: str, log: Path, *options: str) -> Iterator[Server]:
    """Start `hicom serve` and wait until it answers; its output goes into a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "hicom",
        "serve",
        model,
        "--name",
        "hicom",
        "--engine",
        engine,
        "--port",
        str(port),
    ]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | os.environ
    with log.open("wb") as file:
        process = subprocess.Popen([*command, *options], stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + 600
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server did not start:\n{log.read_text('utf-8', 'replace')[-3000:]}")
            time.sleep(0.5)
        yield Server(f"http://127.0.0.1:{port}/v1", process)
    finally:
        process.terminate()
        process.wait(60)


# Requests


def make_video(seed: int, folder: Path) -> str:
    """Return the data URL of a clip of 4 seconds that no other seed gives."""
    generator = np.random.default_rng(seed)
    colour, place, speed = generator.integers(0, 255, 3), generator.integers(40, 80, 2), generator.integers(1, 4, 2)

    def frames() -> Iterator[np.ndarray]:
        for number in range(64):
            frame = np.full((180, 320, 3), 255 - colour, np.uint8)
            y, x = place + speed * number % 80
            frame[y : y + 40, x : x + 40] = colour
            yield frame

    path = folder / f"{seed}.mp4"
    write_video(path, frames(), 16.0)
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def body(video: str, question: str, **fields: Any) -> dict[str, Any]:
    """Return a request."""
    content = [{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": question}]
    message = {"role": "user", "content": content}
    return {"model": "hicom", "messages": [message], "temperature": 0, "stream": True} | fields


async def ask(client: httpx.AsyncClient, url: str, request: dict[str, Any], most: int | None = None) -> dict[str, Any]:
    """Return the text of a streamed answer, the seconds to its first piece and to its end; read at most some pieces."""
    start = time.perf_counter()
    first, pieces = None, []
    async with client.stream("POST", f"{url}/chat/completions", json=request) as response:
        if response.status_code != 200:
            return {"status": response.status_code, "error": (await response.aread()).decode()[:500]}
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    return {"status": 0, "error": event["error"]}
                choices = event["choices"]
                piece = choices[0]["delta"].get("content") if choices else None
                if piece:
                    first = first or time.perf_counter() - start
                    pieces.append(piece)
                    if most is not None and len(pieces) >= most:
                        break
    return {"status": 200, "text": "".join(pieces), "first_s": first, "seconds": time.perf_counter() - start}


async def ask_all(url: str, requests: list[dict[str, Any]], clients: int) -> tuple[float, list[dict[str, Any]]]:
    """Return the seconds that all requests took, and what came of each; so many are in flight at any time."""
    waiting = iter(requests)
    found: list[dict[str, Any]] = []

    async def work(client: httpx.AsyncClient) -> None:
        for request in waiting:
            found.append(await ask(client, url, request))

    async with httpx.AsyncClient(timeout=600) as client:
        start = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(clients)))
        seconds = time.perf_counter() - start
    bad = [each for each in found if each["status"] != 200]
    if bad:
        sys.exit(f"a request failed with status {bad[0]['status']}")
    return seconds, found


def load(
    llm: Literal["tiny", "0.5b", "1.5b"] = "tiny",
    num_frames: int = 32,
    num_requests: int = 32,
    max_tokens: int = 16,
    out: Path | None = None,
) -> None:
    """Measure throughput and latency beside other compressors, on vLLM.

    Args:
        llm: hicom-tiny's own, or one of the shape of a Qwen2.5, with random weights.
        num_frames: of a video.
        num_requests: of each compressor, workload and number of clients.
        max_tokens: of every answer.
        out: JSON file of the results; a page goes beside it.
    """
    logging.set_verbosity_error()
    out = out or ROOT / "docs" / "results" / f"serving-{llm}.json"
    facts: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "hardware": hardware()}
    facts |= {"llm": llm, "num_frames": num_frames, "num_requests": num_requests, "max_tokens": max_tokens}
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers, counts = {}, {}
        for column in COLUMNS:
            model = make_folder(column, llm, folder / column)
            counts[column] = HIComProcessor.from_pretrained(model).token_count(num_frames)
            options = ["--num-frames", str(num_frames), "--", "--enforce-eager", "--max-num-seqs", "16"]
            options += ["--max-model-len", "4096", "--block-size", "32"]
            servers[column] = stack.enter_context(serve(str(model), "vllm", folder / f"{column}.log", *options))
            print(f"{column}: up", flush=True)
        number = 0
        for workload in WORKLOADS:
            for clients in (0, *CLIENTS):  # the first round warms up
                for column, server in servers.items():
                    requests = []
                    for place in range(num_requests if clients else 2):
                        number += 1
                        seed = number if workload == "new" else -(place % 2) - 1
                        question = QUESTIONS[place % len(QUESTIONS)].format(THINGS[place // 4 % len(THINGS)])
                        fields = {"max_tokens": max_tokens, "ignore_eos": True, "skip_special_tokens": False}
                        requests.append(body(make_video(abs(seed), folder), question, **fields))
                    seconds, found = asyncio.run(ask_all(server.url, requests, clients or 1))
                    if not clients:
                        continue
                    row = {
                        "workload": workload,
                        "clients": clients,
                        "column": column,
                        "num_visual_tokens": counts[column],
                        "requests_per_s": num_requests / seconds,
                        # An answer of random weights may have no text at all.
                        "first_s": [each["first_s"] for each in found if each["first_s"] is not None],
                        "seconds": [each["seconds"] for each in found],
                    }
                    rows.append(row)
                    print(workload, clients, column, f"{row['requests_per_s']:.3f} requests/s", flush=True)
    out.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n", "utf-8")
    out.with_suffix(".md").write_text(load_page(facts, rows), "utf-8")
    print(out.with_suffix(".md").read_text("utf-8"))


def load_page(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the results of `load` as Markdown."""
    name = "its own LLM" if facts["llm"] == "tiny" else f"an LLM of the shape of Qwen2.5-{facts['llm'].upper()}"
    parts = [
        f"# Serving under load, {facts['llm']}",
        f"hicom-tiny's towers and {name} behind three compressors, each in a vLLM server of its own; "
        f"{facts['num_frames']} frames a video, {facts['max_tokens']} tokens an answer, {facts['num_requests']} "
        "requests for every line. Ratios to HICom in the same line: throughput (higher is better), median time to the "
        "first token, median and 95th percentile of the whole answer (lower is better). All of it on CPUs, decoding "
        "included.",
    ]
    for workload, title in WORKLOADS.items():
        cells = []
        for row in (row for row in rows if row["workload"] == workload):
            ours = next(
                r for r in rows if r["column"] == "hicom" and all(r[k] == row[k] for k in ("workload", "clients"))
            )
            times = [f"{row['requests_per_s'] / ours['requests_per_s']:.2f}"]
            for key, quantile in (("first_s", 0.5), ("seconds", 0.5), ("seconds", 0.95)):
                ratio = np.quantile(row[key], quantile) / np.quantile(ours[key], quantile)
                times.append(f"{ratio:.2f}")
            absolute = f"{row['requests_per_s']:.2f}/s, {statistics.median(row['first_s']):.2f} s"
            count = f"{row['num_visual_tokens']:,}"
            cells.append([str(row["clients"]), COLUMNS[row["column"]], count, *times, absolute])
        header = [
            "clients",
            "compressor",
            "visual tokens",
            "throughput",
            "first token",
            "answer",
            "answer, p95",
            "absolute",
        ]
        parts.append(f"## {title[0].upper()}{title[1:]}\n\n{markdown(header, cells)}")
    parts.append(origin(facts, "load" + (f" --llm {facts['llm']}" if facts["llm"] != "tiny" else "")))
    return "\n\n".join(parts) + "\n"


def origin(facts: dict[str, Any], command: str) -> str:
    """Return where results come from."""
    machine = facts["hardware"]
    return (
        f"{machine['machine']}, {machine['cpus']} CPUs, {facts['date']}, commit `{short_commit(facts['commit'])}`. "
        f"Made by `python benchmarks/serving.py {command}`."
    )


# Minutes of it


async def disturb(server: Server, minutes: float, clients: int, videos: list[str], facts: dict[str, Any]) -> None:
    """Ask for minutes, and go away in between; counts and sizes go into `facts`."""
    end = time.monotonic() + 60 * minutes
    expected: dict[tuple[str, str], str] = {}
    counts = dict.fromkeys(("answered", "left", "refused", "changed", "failed"), 0)
    facts |= {"counts": counts, "bytes": [], "errors": []}

    def count(found: dict[str, Any], name: str, status: int = 200) -> None:
        counts[name if found["status"] == status else "failed"] += 1
        if found["status"] != status:
            facts["errors"].append({"status": found["status"], "error": found.get("error")})

    async def work(number: int) -> None:
        chance = random.Random(number)
        async with httpx.AsyncClient(timeout=120) as client:
            while time.monotonic() < end:
                key = (chance.choice(videos), chance.choice(QUESTIONS).format(chance.choice(THINGS)))
                fate = chance.random()
                if fate < 0.1:  # nonsense
                    found = await ask(client, server.url, body(chance.choice(("data:x", "file:///etc/passwd")), key[1]))
                    count(found, "refused", 400)
                elif fate < 0.4:  # goes away after a few pieces
                    request = body(*key, max_tokens=256, ignore_eos=True, min_tokens=200)
                    if facts["engine"] == "local":
                        request = body(*key)
                    found = await ask(client, server.url, request, most=chance.randint(1, 3))
                    count(found, "left")
                elif fate < 0.5:  # or before anything came
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(ask(client, server.url, body(*key)), chance.random() * 0.2)
                    counts["left"] += 1
                else:
                    found = await ask(client, server.url, body(*key, max_tokens=8))
                    is_same = found["status"] != 200 or expected.setdefault(key, found["text"]) == found["text"]
                    count(found, "answered" if is_same else "changed")

    async def watch() -> None:
        while time.monotonic() < end:
            facts["bytes"].append(await asyncio.to_thread(server.memory))
            await asyncio.sleep(10)

    await asyncio.gather(watch(), *(work(number) for number in range(clients)))


def soak(
    engine: Literal["vllm", "local"] = "vllm",
    minutes: float = 10,
    clients: int = 8,
    out: Path | None = None,
) -> None:
    """Ask a server of hicom-tiny without a pause, with clients that go away.

    Args:
        engine: of `hicom serve`.
        minutes: for how long.
        clients: that ask at the same time.
        out: JSON file of the results; a page goes beside it.
    """
    out = out or ROOT / "docs" / "results" / f"serving-soak-{engine}.json"
    facts: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "hardware": hardware()}
    facts |= {"engine": engine, "minutes": minutes, "clients": clients}
    running = "hicom_requests_waiting" if engine == "local" else "vllm:num_requests_running"
    waiting = running if engine == "local" else "vllm:num_requests_waiting"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        videos = [make_video(seed, folder) for seed in range(12)]
        options = (
            [] if engine == "local" else ["--", "--enforce-eager", "--max-model-len", "1024", "--block-size", "32"]
        )
        with serve("hicom-tiny", engine, folder / "log", *options) as server:
            asyncio.run(disturb(server, minutes, clients, videos, facts))
            start = time.monotonic()
            while server.metric(running) + server.metric(waiting) and time.monotonic() < start + 60:
                time.sleep(0.1)
            facts["stuck"] = int(server.metric(running) + server.metric(waiting))
            facts["seconds_to_quiet"] = time.monotonic() - start
        if facts["errors"]:
            print((folder / "log").read_text("utf-8", "replace")[-10_000:], file=sys.stderr)
    out.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    out.with_suffix(".md").write_text(soak_page(facts), "utf-8")
    print(out.with_suffix(".md").read_text("utf-8"))


def soak_page(facts: dict[str, Any]) -> str:
    """Return the results of `soak` as Markdown."""
    counts, sizes = facts["counts"], facts["bytes"]
    tenth = max(1, len(sizes) // 10)
    parts = [statistics.mean(sizes[i * tenth : (i + 1) * tenth]) / 2**20 for i in range(len(sizes) // tenth)]
    rows = [
        ["answered as before", f"{counts['answered']:,}"],
        ["client went away", f"{counts['left']:,}"],
        ["nonsense, refused", f"{counts['refused']:,}"],
        ["another answer than before", f"{counts['changed']:,}"],
        ["failed", f"{counts['failed']:,}"],
        ["stuck at the end", f"{facts['stuck']:,}"],
    ]
    return (
        f"# Soak of the {facts['engine']} engine\n\n{facts['minutes']:g} minutes, {facts['clients']} clients at once, "
        f"12 videos, hicom-tiny.\n\n{markdown(['requests', 'number'], rows)}\n\nMemory of all processes, mean of "
        f"every tenth of the time, MiB: {', '.join(f'{part:,.0f}' for part in parts)}. "
        f"Quiet {facts['seconds_to_quiet']:.1f} s after the last client went.\n\n"
        f"{origin(facts, 'soak --engine ' + facts['engine'])}\n"
    )


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"load": load, "soak": soak})
