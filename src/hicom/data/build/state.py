"""All that a build knows, in one SQLite file: what was done, what came out, what was dropped and why."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from ...files import naming

TABLES = """
CREATE TABLE IF NOT EXISTS videos (
    id TEXT PRIMARY KEY, path TEXT UNIQUE NOT NULL, bytes INTEGER NOT NULL, changed_ns INTEGER NOT NULL,
    duration_s REAL, width INTEGER, height INTEGER);
CREATE TABLE IF NOT EXISTS done (
    step TEXT, item TEXT, settings TEXT NOT NULL, error TEXT, PRIMARY KEY (step, item));
CREATE TABLE IF NOT EXISTS similarities (
    video TEXT REFERENCES videos ON DELETE CASCADE, category TEXT, value REAL, PRIMARY KEY (video, category));
CREATE TABLE IF NOT EXISTS selected (
    video TEXT PRIMARY KEY REFERENCES videos ON DELETE CASCADE, category TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS shots (
    video TEXT REFERENCES videos ON DELETE CASCADE, start_s REAL, end_s REAL, PRIMARY KEY (video, start_s));
CREATE TABLE IF NOT EXISTS keyframes (
    video TEXT REFERENCES videos ON DELETE CASCADE, time_s REAL, PRIMARY KEY (video, time_s));
CREATE TABLE IF NOT EXISTS clips (
    id TEXT PRIMARY KEY, video TEXT REFERENCES videos ON DELETE CASCADE, start_s REAL, end_s REAL,
    num_keyframes INTEGER, dropped TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS captions (clip TEXT PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS pairs (
    clip TEXT, number INTEGER, instruction TEXT NOT NULL, description TEXT NOT NULL, dropped TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (clip, number));
CREATE TABLE IF NOT EXISTS spent (model TEXT PRIMARY KEY, requests INTEGER, prompt_tokens INTEGER,
    completion_tokens INTEGER);
"""


class State:
    """The file `state.sqlite` of a build. Every result is committed with the note that it is done, or not at all.

    Args:
        path: made where it is not there.

    Raises:
        ValueError: the file is no such state.
        OSError: it cannot be written, then or later; it is named.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        with naming(path):
            self._connection = sqlite3.connect(path, timeout=60, isolation_level=None)
        try:
            with naming(path):
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA foreign_keys = ON")
                self._connection.executescript(TABLES)
        except OSError:
            self._connection.close()
            raise
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise ValueError(f"{path}: not the state of a build ({error}); choose another `out`") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all changes of a block one."""
        with naming(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite may have done so by itself
                    self._connection.execute("ROLLBACK")
                raise

    def run(self, statement: str, values: Sequence[Any] = ()) -> None:
        """Execute a statement."""
        self._connection.execute(statement, values)

    def run_many(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        """Execute a statement for every row."""
        self._connection.executemany(statement, rows)

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of a query."""
        return self._connection.execute(query, values).fetchall()

    def number(self, query: str, values: Sequence[Any] = ()) -> int:
        """Return the number that a query counts."""
        return int(self.rows(query, values)[0][0])

    # What was done

    def todo(self, step: str, items: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        """Return the items that a step has not done with these settings; those that failed are among them."""
        digest = _digest(settings)
        done = {
            item
            for (item,) in self.rows(
                "SELECT item FROM done WHERE step = ? AND settings = ? AND error IS NULL", (step, digest)
            )
        }
        return [item for item in items if item not in done]

    def mark(self, step: str, item: str, settings: Mapping[str, Any], error: str | None = None) -> None:
        """Note that an item is done, or why it failed."""
        self.run("INSERT OR REPLACE INTO done VALUES (?, ?, ?, ?)", (step, item, _digest(settings), error))

    def errors(self, step: str) -> list[tuple[str, str]]:
        """Return the items of a step that failed, and why."""
        return [
            (item, error)
            for item, error in self.rows(
                "SELECT item, error FROM done WHERE step = ? AND error IS NOT NULL ORDER BY item", (step,)
            )
        ]

    def forget_video(self, video: str) -> None:
        """Remove a video that has changed, with all that came of it but what was paid for."""
        clips = [clip for (clip,) in self.rows("SELECT id FROM clips WHERE video = ?", (video,))]
        self.run_many("DELETE FROM done WHERE item = ?", [(item,) for item in (video, *clips)])
        self.run("DELETE FROM videos WHERE id = ?", (video,))


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]
