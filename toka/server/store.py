"""Files and batches on disk: facts in SQLite, contents in plain files, all below one directory that belongs to one server.

    data_dir/toka.sqlite   files, batches and the results of batches that run
    data_dir/files/ID      contents; no name that a client gives is ever a path
    data_dir/partial/      being written; emptied at every start

A result is on disk before it counts as finished, so that a server that is killed runs no finished line again. All methods may be
called from any one thread at a time; `Store.run` calls them in a thread of the store's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import msgspec

from toka.errors import ConfigError, RequestError
from toka.server.keys import Caller

MAX_PAGE = 1000
_MAX_FILENAME_CHARS = 255
_COPY_BYTES = 1 << 20

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
UNFINISHED: tuple[BatchStatus, ...] = ("validating", "in_progress", "finalizing", "cancelling")

Result = TypeVar("Result")


class FileObject(msgspec.Struct):
    """A file's facts, as OpenAI tells them."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    object: Literal["file"] = "file"
    status: Literal["processed"] = "processed"


class BatchError(msgspec.Struct):
    """What is wrong with a line (from 1) of the input, or with all of it."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(msgspec.Struct):
    data: list[BatchError]
    object: Literal["list"] = "list"


class RequestCounts(msgspec.Struct):
    """completed: lines answered with 2xx; failed: the others that have ended."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, kw_only=True):
    """A batch's state, as OpenAI tells it; times in seconds since 1970."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    status: BatchStatus = "validating"
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None
    object: Literal["batch"] = "batch"


_TABLES = """
CREATE TABLE IF NOT EXISTS files (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS batches (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, input_file_id TEXT NOT NULL,
    status TEXT NOT NULL, state BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS results (
    batch_id TEXT NOT NULL, line INTEGER NOT NULL, is_error INTEGER NOT NULL, result BLOB NOT NULL,
    PRIMARY KEY (batch_id, line)) WITHOUT ROWID;
"""


class Store:
    """One server's files and batches. Raises ConfigError if the directory cannot be used, or is another server's.

    max_stored_bytes: size of all files together at most.
    """

    def __init__(self, directory: str, max_stored_bytes: int):
        root = Path(directory).expanduser().absolute()
        self._files, self._partial = root / "files", root / "partial"
        self._max_stored_bytes = max_stored_bytes
        with contextlib.ExitStack() as undo:
            try:
                root.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = undo.enter_context(open(root / "lock", "w"))  # until `close`
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(self._partial, ignore_errors=True)
                self._partial.mkdir()
                self._files.mkdir(exist_ok=True)
                self._db = sqlite3.connect(root / "toka.sqlite", check_same_thread=False)
                undo.callback(self._db.close)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute(
                    "PRAGMA synchronous=NORMAL"
                )  # what is committed survives the process, if not the power
                self._db.executescript(_TABLES)
            except BlockingIOError:
                raise ConfigError(f"data_dir={directory}: another toka server uses it; give each its own") from None
            except (OSError, sqlite3.Error) as error:
                raise ConfigError(f"data_dir={directory}: cannot be used: {error}") from None
            self._undo = undo.pop_all()
        self._remove_unknown_files()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Call work(*arguments) in the store's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def close(self) -> None:
        self._thread.shutdown()
        self._undo.close()

    def _remove_unknown_files(self) -> None:
        """Contents that no row speaks of: their server was killed between the two."""
        known = {file_id for (file_id,) in self._db.execute("SELECT id FROM files")}
        for path in self._files.iterdir():
            if path.name not in known:
                path.unlink()

    # ------------------------------------------------------------------------------------------------------------- files

    def new_partial(self) -> Path:
        """A path for contents that are not complete yet."""
        return self._partial / secrets.token_hex(12)

    def add_upload(self, source: BinaryIO, caller: Caller, filename: str, purpose: str) -> FileObject:
        """Keep a copy of source. RequestError (413) if there is no room."""
        partial = self.new_partial()
        with open(partial, "wb") as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)
        [[stored]] = self._db.execute("SELECT COALESCE(SUM(bytes), 0) FROM files")
        if stored + partial.stat().st_size > self._max_stored_bytes:
            partial.unlink()
            raise RequestError(
                f"The server keeps {self._max_stored_bytes} bytes of files at most; delete some.",
                "file",
                status=413,
                code="storage_full",
            )
        with self._db:
            return self.add_file(partial, caller.owner, filename, purpose)

    def add_file(self, partial: Path, owner: str, filename: str, purpose: str) -> FileObject:
        """Take over the complete contents at partial; call it in a transaction."""
        file = FileObject(
            id=_new_id("file-"),
            bytes=partial.stat().st_size,
            created_at=int(time.time()),
            filename=filename[-_MAX_FILENAME_CHARS:],
            purpose=purpose,
        )
        os.replace(partial, self.path_of(file))
        self._db.execute(
            "INSERT INTO files (id, owner, bytes, created_at, filename, purpose) VALUES (?, ?, ?, ?, ?, ?)",
            (file.id, owner, file.bytes, file.created_at, file.filename, purpose),
        )
        return file

    def path_of(self, file: FileObject) -> Path:
        """Where its contents are."""
        return self._files / file.id

    def file(self, file_id: str, caller: Caller, param: str = "file_id") -> FileObject:
        """RequestError (404) naming param unless it is there and belongs to caller; to the admin all belong."""
        row = self._db.execute(
            "SELECT id, bytes, created_at, filename, purpose FROM files WHERE id = ? AND (owner = ? OR ?)",
            (file_id, caller.owner, caller.is_admin),
        ).fetchone()
        if row is None:
            raise RequestError(f"There is no file {file_id[:80]!r}.", param, status=404, code="file_not_found")
        return FileObject(*row)

    def files(
        self, caller: Caller, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[FileObject], bool]:
        """A page of the caller's files, and whether there are more. after: id of the last one of the page before."""
        beyond, order = ("<", "DESC") if newest_first else (">", "ASC")
        rows = self._db.execute(
            "SELECT id, bytes, created_at, filename, purpose FROM files WHERE (owner = ? OR ?) AND (purpose = ? OR ? IS NULL)"
            f" AND (? IS NULL OR place {beyond} (SELECT place FROM files WHERE id = ?)) ORDER BY place {order} LIMIT ?",
            (caller.owner, caller.is_admin, purpose, purpose, after, after, limit + 1),
        ).fetchall()
        return [FileObject(*row) for row in rows[:limit]], len(rows) > limit

    def delete_file(self, file_id: str, caller: Caller) -> None:
        """RequestError: 404 as for `file`; 409 while a batch reads it."""
        file = self.file(file_id, caller)
        marks = ", ".join("?" * len(UNFINISHED))
        used = self._db.execute(
            f"SELECT id FROM batches WHERE input_file_id = ? AND status IN ({marks})", (file_id, *UNFINISHED)
        ).fetchone()
        if used is not None:
            raise RequestError(f"The batch {used[0]} reads this file; cancel it first.", "file_id", status=409)
        with self._db:
            self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path_of(file).unlink(missing_ok=True)

    # ----------------------------------------------------------------------------------------------------------- batches

    def add_batch(
        self, caller: Caller, endpoint: str, file_id: str, window: str, window_s: int, metadata: dict[str, str] | None
    ) -> Batch:
        """RequestError (404) unless the file is there for caller."""
        now = int(time.time())
        batch = Batch(
            id=_new_id("batch_"),
            endpoint=endpoint,
            input_file_id=self.file(file_id, caller, "input_file_id").id,
            completion_window=window,
            created_at=now,
            expires_at=now + window_s,
            metadata=metadata,
        )
        with self._db:
            self._db.execute(
                "INSERT INTO batches (id, owner, input_file_id, status, state) VALUES (?, ?, ?, ?, ?)",
                (batch.id, caller.owner, file_id, batch.status, msgspec.json.encode(batch)),
            )
        return batch

    def batch(self, batch_id: str, caller: Caller) -> Batch:
        """RequestError (404) unless it is there and belongs to caller; to the admin all belong."""
        row = self._db.execute(
            "SELECT state FROM batches WHERE id = ? AND (owner = ? OR ?)", (batch_id, caller.owner, caller.is_admin)
        ).fetchone()
        if row is None:
            raise RequestError(f"There is no batch {batch_id[:80]!r}.", "batch_id", status=404, code="batch_not_found")
        return _batch_of(row[0])

    def batches(self, caller: Caller, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """A page of the caller's batches, newest first, and whether there are more."""
        rows = self._db.execute(
            "SELECT state FROM batches WHERE (owner = ? OR ?)"
            " AND (? IS NULL OR place < (SELECT place FROM batches WHERE id = ?)) ORDER BY place DESC LIMIT ?",
            (caller.owner, caller.is_admin, after, after, limit + 1),
        ).fetchall()
        return [_batch_of(state) for (state,) in rows[:limit]], len(rows) > limit

    def unfinished_batches(self) -> list[tuple[Batch, str]]:
        """Those that have work to do, oldest first, each with its owner."""
        marks = ", ".join("?" * len(UNFINISHED))
        rows = self._db.execute(
            f"SELECT state, owner FROM batches WHERE status IN ({marks}) ORDER BY place", UNFINISHED
        ).fetchall()
        return [(_batch_of(state), owner) for state, owner in rows]

    def save_batch(self, batch: Batch) -> None:
        """Its new state."""
        with self._db:
            self._save(batch)

    def _save(self, batch: Batch) -> None:
        self._db.execute(
            "UPDATE batches SET status = ?, state = ? WHERE id = ?",
            (batch.status, msgspec.json.encode(batch), batch.id),
        )

    # ----------------------------------------------------------------------------------------------------------- results

    def add_result(self, batch: Batch, line: int, result: bytes, is_error: bool) -> None:
        """A line (from 1) of the batch has ended; the batch's counts, which the caller has brought up to date, go with it."""
        with self._db:
            self._db.execute("INSERT INTO results VALUES (?, ?, ?, ?)", (batch.id, line, is_error, result))
            self._save(batch)

    def finished_lines(self, batch: Batch) -> dict[int, bool]:
        """Lines that have ended, each with whether by an error."""
        rows = self._db.execute("SELECT line, is_error FROM results WHERE batch_id = ?", (batch.id,))
        return {line: bool(is_error) for line, is_error in rows}

    def finish_batch(self, batch: Batch, owner: str, unfinished: Iterator[bytes]) -> None:
        """Write the output and the error file (those that would have a line), and the batch's last state, all or nothing.

        unfinished: the error file's lines for those of the input that have not ended.
        """
        with self._db:
            for is_error, ending, more in ((False, "output", iter(())), (True, "error", unfinished)):
                partial = self.new_partial()
                with open(partial, "wb") as target:
                    rows = self._db.execute(
                        "SELECT result FROM results WHERE batch_id = ? AND is_error = ? ORDER BY line",
                        (batch.id, is_error),
                    )
                    for (result,) in rows:
                        target.write(result + b"\n")
                    for line in more:
                        target.write(line + b"\n")
                if partial.stat().st_size:
                    file = self.add_file(partial, owner, f"{batch.id}_{ending}.jsonl", "batch_output")
                    setattr(batch, f"{ending}_file_id", file.id)
            self._db.execute("DELETE FROM results WHERE batch_id = ?", (batch.id,))
            self._save(batch)


def _new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def _batch_of(state: bytes) -> Batch:
    return msgspec.json.decode(state, type=Batch)
