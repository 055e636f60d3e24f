"""Features on disk: what is read is what was written, or nothing; bounded; safe among processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hicom.data.cache import CacheWarning, Entry, FeatureCache, content_digest

KEY = {"content": "abc", "choice": {"num_frames": 4}}


def entry(seed: int = 0, rows: int = 4) -> Entry:
    values = torch.randn(rows, 5, 5, 8, generator=torch.Generator().manual_seed(seed))
    return Entry({"values": values, "half": values.to(torch.bfloat16)}, {"name": f"clip {seed}"})


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


def test_what_is_read_is_what_was_written(cache: FeatureCache) -> None:
    assert cache.read(KEY) is None
    cache.write(KEY, entry())
    found = FeatureCache(cache.folder).read(KEY)
    assert found is not None
    assert found.facts == entry().facts
    for name, x in entry().tensors.items():
        assert torch.equal(found.tensors[name], x)
        assert found.tensors[name].dtype == x.dtype
    assert cache.read(KEY | {"content": "abd"}) is None
    assert cache.read(KEY | {"choice": {"num_frames": 5}}) is None


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "text"])
def test_a_damaged_entry_is_noticed_and_removed(cache: FeatureCache, harm: str) -> None:
    cache.write(KEY, entry())
    path = cache.path(KEY)
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[-3] ^= 0x10  # in a tensor: the header is whole
    changed = {"flip": bytes(data), "cut": bytes(data[:-100]), "empty": b"", "text": b"not a safetensors file" * 9}
    path.write_bytes(changed[harm])
    with pytest.warns(CacheWarning, match="is damaged; its video is encoded again"):
        assert cache.read(KEY) is None
    assert not path.exists()
    cache.write(KEY, entry())
    assert cache.read(KEY) is not None


def test_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    one = entry()
    size = sum(x.numel() * x.element_size() for x in one.tensors.values()) + 1000
    cache = FeatureCache(tmp_path, max_bytes=3 * size)
    for number in range(3):
        cache.write({"number": number}, entry(number))
        time.sleep(0.02)
    assert cache.read({"number": 0}) is not None  # used: 1 is the oldest now
    time.sleep(0.02)
    cache.write({"number": 3}, entry(3))
    assert [cache.read({"number": n}) is not None for n in range(4)] == [True, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= cache.max_bytes


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, max_bytes=5000)
    cache.write({"number": 0}, entry(rows=1))
    with pytest.warns(CacheWarning, match=r"exceed the whole cache \(0.00 GB\), so they are not kept"):
        cache.write({"number": 1}, entry(rows=100))
    assert cache.read({"number": 0}) is not None
    assert cache.read({"number": 1}) is None


def test_a_full_disk_costs_the_entry_and_nothing_else(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hicom.data.cache.save_file", full)
    with pytest.warns(CacheWarning, match="cannot be written, so features are not kept"):
        cache.write(KEY, entry())
    assert list(cache.folder.glob("*.part")) == []


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_bytes=0"):
        FeatureCache(tmp_path, max_bytes=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; a feature cache needs a folder"):
        FeatureCache(tmp_path / "file")


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"the same bytes")
    assert (
        content_digest(tmp_path / "a.mp4")
        == content_digest(str(tmp_path / "b.mp4"))
        == content_digest(b"the same bytes")
    )
    (tmp_path / "b.mp4").write_bytes(b"other bytes..")
    assert content_digest(tmp_path / "b.mp4") != content_digest(tmp_path / "a.mp4")
    assert content_digest(tmp_path) is None
    assert content_digest([1, 2]) is None


WORKER = """
import sys, torch
from hicom.data.cache import Entry, FeatureCache
cache = FeatureCache(sys.argv[1])
print("ready", flush=True); input()
made = 0
for number in range(6):
    key = {"number": number}
    with cache.building(key):
        found = cache.read(key)
        if found is None:
            made += 1
            cache.write(key, Entry({"values": torch.full((50, 100), float(number))}, {}))
    found = cache.read(key)
    assert found is not None and bool((found.tensors["values"] == number).all())
print(made)
"""


def test_of_many_processes_one_makes_an_entry(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", WORKER, str(tmp_path)]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    made = [int(worker.communicate()[0]) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers)
    assert sum(made) == 6
