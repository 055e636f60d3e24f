"""What only Unix has is needed by nothing that a user of another system calls."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hicom

UNIX = ("curses", "fcntl", "grp", "posix_ipc", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")
"""Modules that Windows has not."""
UNIX_NAMES = {
    "os": {"fork", "forkpty", "getgid", "getloadavg", "getpgid", "getuid", "killpg", "mkfifo", "register_at_fork"}
    | {"sched_getaffinity", "sched_setaffinity", "setsid", "statvfs", "sysconf", "uname", "wait", "waitid"},
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "alarm", "pause", "setitimer", "sigwait"},
}
"""Names that Python's modules have on Unix alone."""
# What other packages need is theirs: they have what they need on Windows, so their own imports come first.
WITHOUT = f"""
import os, signal, sys
import av, filelock, numpy, PIL.Image, rich.console, torch, transformers, tqdm.auto, tyro
from transformers import AutoModelForCausalLM, AutoTokenizer, ProcessorMixin, Trainer, TrainingArguments

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {UNIX}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

for name in list(sys.modules):
    if name.partition(".")[0] in {UNIX}:
        del sys.modules[name]
sys.meta_path.insert(0, Missing())
for module, names in {UNIX_NAMES}.items():
    for name in names:
        if hasattr(sys.modules[module], name):
            delattr(sys.modules[module], name)
assert not hasattr(os, "fork")
try:
    import fcntl
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("fcntl is there")
"""
DEMO = Path(hicom.__file__).parent / "assets" / "demo.mp4"
EVERYTHING = f"""
import importlib, pkgutil
import hicom
from hicom import VideoChat, attach, probe, read_frames

for module in pkgutil.walk_packages(hicom.__path__, "hicom."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name in ("emoji", "gradio", "lmms_eval", "vllm"), module.name
chat = VideoChat.from_pretrained("hicom-tiny")
question = "What color is the circle?"
print(chat.ask({str(DEMO)!r}, question).text, "".join(chat.stream({str(DEMO)!r}, question)))
"""


def test_a_question_is_answered_without_what_only_unix_has() -> None:
    code = WITHOUT + EVERYTHING
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "red red\n"


def unguarded(source: str) -> list[str]:
    """Return what a module uses that only Unix has, without a look at whether it is there."""
    tree = ast.parse(source)
    looked_at = {
        f"{call.args[0].id}.{call.args[1].value}"
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "hasattr"
        if isinstance(call.args[0], ast.Name) and isinstance(call.args[1], ast.Constant)
    }
    may_fail = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.Try) or (isinstance(node, ast.With) and "suppress(ImportError" in ast.unparse(node))
        for child in node.body
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in may_fail:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            found += [module for module in modules if module.partition(".")[0] in UNIX]
            found += [f"{node.module}.{each.name}" for each in node.names if isinstance(node, ast.ImportFrom)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.append(f"{node.value.id}.{node.attr}")
    names = {f"{module}.{name}" for module, names in UNIX_NAMES.items() for name in names}
    return sorted({each for each in found if each in UNIX or (each in names and each not in looked_at)})


def test_what_only_unix_has_is_looked_for_before_it_is_used() -> None:
    files = Path(hicom.__file__).parent.rglob("*.py")
    found = {str(file): names for file in files if (names := unguarded(file.read_text("utf-8")))}
    assert not found


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import fcntl", ["fcntl"]),
        ("def f():\n    from resource import getrusage", ["resource"]),
        ("from os import fork", ["os.fork"]),
        ("os.register_at_fork(after_in_child=f)", ["os.register_at_fork"]),
        ("signal.signal(signal.SIGALRM, f)", ["signal.SIGALRM"]),
        ("if hasattr(os, 'fork'):\n    os.fork()", []),
        ("with suppress(ImportError):\n    import readline", []),
        ("try:\n    import readline\nexcept ImportError:\n    pass", []),
        ("import os, signal\nsignal.SIGTERM, os.getpid", []),
    ],
)
def test_an_unguarded_use_is_found(source: str, names: list[str]) -> None:
    assert unguarded(source) == names
