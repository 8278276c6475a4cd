"""The words of every call, in one SQLite file, until the call is over.

A call has a row in ``calls``, and each of its turns a row in ``turns``: what the caller said, and a
reply that grows sentence by sentence while Claude writes it. Any process that can open the file can
go on where another process stopped.
"""

import contextlib
import logging
import os
import re
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

log = logging.getLogger("voice-claude")

StoreError = sqlite3.Error  # the disk is full, read-only or locked, or the file is no database


class CallIsOver(Exception):
    """The caller has hung up, so nothing more of this call may be stored."""


class NoTurnIsLeft(Exception):
    """All calls together have had as many turns as they may have in 24 hours."""


TWO_HOURS, A_DAY = 2 * 3600.0, 24 * 3600.0  # seconds
LOCK_PATIENCE = 2.0  # seconds to wait for another process: a write takes 1 ms
QUEUE_PATIENCE = 6.0  # seconds to wait for other threads: 300 callers at once can take that long
LOOK_AGAIN = 0.05  # seconds between two looks at a reply that another process writes
SIGN_OF_LIFE = 1.0  # seconds between two signs that a reply is still being written
SPEAKING_RATE = 2.75  # words that Twilio's voices say in a second: 2.5 to 3

VERSION = 2  # of these tables; the file keeps it as its ``user_version``
SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    call_sid   TEXT PRIMARY KEY,
    began      DOUBLE PRECISION NOT NULL,            -- all moments are Unix times, in seconds
    ended      DOUBLE PRECISION,                     -- NULL while the call goes on
    keep       INTEGER NOT NULL DEFAULT 0,           -- seconds to keep the words after the call
    forget_at  DOUBLE PRECISION NOT NULL,            -- when the words are deleted
    forgotten  INTEGER NOT NULL DEFAULT 0            -- 1 once they are deleted
);
CREATE TABLE IF NOT EXISTS turns (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,    -- a deleted row's id is never reused
    call_sid   TEXT NOT NULL REFERENCES calls ON DELETE CASCADE,
    turn       INTEGER NOT NULL,                     -- 1, 2, 3 ... within the call
    delivery   TEXT,                                 -- Twilio's idempotency token
    words      TEXT NOT NULL,                        -- what the caller said
    spoke_at   DOUBLE PRECISION NOT NULL,            -- when the caller began to say it, roughly
    reply      TEXT NOT NULL DEFAULT '',             -- what Claude has written, ready to be spoken
    stop       TEXT,                                 -- how the reply ended, NULL while it grows
    touched    DOUBLE PRECISION NOT NULL,            -- the last sign that it still grows
    last_part  INTEGER,                              -- where the last part of the reply begins
    given_at   DOUBLE PRECISION,                     -- when Twilio got the last part
    tokens_in  INTEGER NOT NULL DEFAULT 0, tokens_out INTEGER NOT NULL DEFAULT 0,
    UNIQUE (call_sid, turn),
    UNIQUE (call_sid, delivery)
);
CREATE INDEX IF NOT EXISTS turns_today ON turns (spoke_at);
CREATE INDEX IF NOT EXISTS calls_due ON calls (forgotten, forget_at)
"""


class Store:
    """All calls, in the file at the path of a URL like ``sqlite:///calls.db``. All methods may
    raise StoreError. A process has one connection, which its threads use one after the other. It
    is opened when it is first needed, so that forked processes don't share it."""

    # Tables of extras, as {name: columns after call_sid}. A row is deleted with its call's words.
    extra_tables: dict[str, str] = {}

    def __init__(self, url: str):
        self.name, self.path = url, url.removeprefix("sqlite:///")
        self._lock = threading.RLock()
        self._database: sqlite3.Connection | None = None
        self._file: tuple | None = None  # the file that the connection has open
        self.growing: set[int] = set()  # ids of replies that this process is still writing
        self.awaited: dict[int, threading.Event] = {}  # the replies that its threads wait for
        self._life = threading.Thread()
        self._over: set[str] = set()  # calls whose end is reported, and not stored yet
        self.wal_holds_words = True  # an earlier process may have left deleted words in it
        self._begin_afresh()

    # --- A turn, in the order in which things happen
    def begin(self, call_sid: str) -> Any:
        """Return the row of a call. If there is none yet, make it."""
        self.sql("INSERT INTO calls (call_sid, began, forget_at) VALUES (?, ?, ?) ON CONFLICT"
                 " (call_sid) DO NOTHING", call_sid, time.time(), time.time() + TWO_HOURS)
        return self.sql("SELECT * FROM calls WHERE call_sid = ?", call_sid)[0]

    def turn(self, call_sid: str, delivery: str | None, words: str, spoke_at: float,
             most: int, most_today: int) -> tuple[int, int | None]:
        """Store what the caller said as a new turn. If an earlier reply of this call still grows,
        it ends now: the caller has spoken again. Raises CallIsOver and NoTurnIsLeft.

        Args:
            delivery: Twilio's ``I-Twilio-Idempotency-Token``, or None. Twilio may deliver a webhook
                twice; the same token again is the same turn.
            words: what the caller said; never empty.
            spoke_at: when the caller began to say it, as a Unix time.
            most: how many turns a call may have. The next one ends at once, as "max_turns".
            most_today: how many turns all calls together may have in 24 hours.

        Returns: the number of the turn, and the id of its row if somebody has to write the reply.
        """
        with self.transaction():
            if (call := self.begin(call_sid))["ended"]:
                raise CallIsOver
            if seen := self.sql("SELECT turn FROM turns WHERE call_sid = ? AND delivery = ?",
                                call_sid, delivery):
                return seen[0]["turn"], None
            if (today := self.turns_today()) >= most_today:
                raise NoTurnIsLeft
            self.sql("UPDATE turns SET stop = 'overtaken' WHERE call_sid = ? AND stop IS NULL",
                     call_sid)
            self.sql("UPDATE calls SET forget_at = ?, forgotten = 0 WHERE call_sid = ?",
                     time.time() + TWO_HOURS + call["keep"], call_sid)
            self.sql("INSERT INTO turns (call_sid, delivery, words, spoke_at, touched, turn) SELECT"
                     " ?, ?, ?, ?, ?, COALESCE(MAX(turn), 0) + 1 FROM turns WHERE call_sid = ?",
                     call_sid, delivery, words, spoke_at, time.time(), call_sid)
            new = self.sql("SELECT turn, id FROM turns WHERE call_sid = ? ORDER BY turn DESC"
                           " LIMIT 1", call_sid)[0]
            if today + 1 == most_today:
                log.warning("MAX_TURNS_A_DAY is reached: callers are told to try tomorrow")
            if new["turn"] > most:
                self.grow(new["id"], "", stop="max_turns")
                return new["turn"], None
            self.growing.add(new["id"])
            if not self._life.is_alive():  # this is the first reply of this process
                self._life = threading.Thread(target=self._show_life, daemon=True)
                self._life.start()
            return new["turn"], new["id"]

    def turns_today(self) -> int:
        """How many turns all calls together had in the last 24 hours."""
        return self.sql("SELECT COUNT(*) AS turns FROM turns WHERE spoke_at > ?",
                        time.time() - A_DAY)[0]["turns"]

    def turns(self, call_sid: str, last_id: int = 2**62) -> list[dict[str, Any]]:
        """A call's turns up to the row ``last_id``; an extra may have changed its call_sid. Turns
        whose words are deleted are left out."""
        rows = self.sql("SELECT * FROM turns WHERE (call_sid = ? AND id < ? OR id = ?)"
                        " AND words <> '' ORDER BY id", call_sid, last_id, last_id)
        return [dict(row, call_sid=call_sid) for row in rows]

    def grow(self, row_id: int, text: str, stop: str | None = None,
             tokens_in: int = 0, tokens_out: int = 0) -> bool:
        """Append to a reply, and wake the threads that wait for it. An empty text only shows that
        somebody still writes it. ``stop`` says how it ended, or is None if more may come. Returns
        whether the reply was still growing. If not, it stays as it is."""
        grew = self.sql("UPDATE turns SET reply = reply || ?, stop = ?, touched = ? WHERE id = ?"
                        " AND stop IS NULL", text, stop, time.time(), row_id) == 1
        if stop:
            self.sql("UPDATE turns SET tokens_in = ?, tokens_out = ? WHERE id = ?",
                     tokens_in, tokens_out, row_id)
        if stop or not grew:
            self.growing.discard(row_id)
        if (text or stop) and (news := self.awaited.pop(row_id, None)):
            news.set()
        return grew

    def _show_life(self) -> None:
        """Show other processes, once a second, which replies are still being written."""
        while True:
            time.sleep(SIGN_OF_LIFE)
            with contextlib.suppress(StoreError):
                for row_id in list(self.growing):
                    self.grow(row_id, "")

    def wait(self, call_sid: str, turn: int, heard: int) -> Any:
        """Return the row of a turn as soon as its reply has ended or is longer than ``heard``
        characters, and at the latest after a second. None if there is no such turn."""
        until = time.monotonic() + SIGN_OF_LIFE
        while rows := self.sql("SELECT * FROM turns WHERE call_sid = ? AND turn = ?",
                               call_sid, turn):
            row, left = rows[0], until - time.monotonic()
            if row["stop"] or len(row["reply"]) > heard or left <= 0:
                self.awaited.pop(row["id"], None)
                return row
            if news := self.awaited.get(row["id"]):
                news.wait(left if row["id"] in self.growing else min(left, LOOK_AGAIN))
            else:  # make one, and look once more: the reply may have grown in the meantime
                self.awaited[row["id"]] = threading.Event()
        return None

    def give(self, call_sid: str, turn: int, last_part: int) -> None:
        """Store that Twilio now gets the last part of a reply, from this character on."""
        self.sql("UPDATE turns SET last_part = ?, given_at = ? WHERE call_sid = ? AND turn = ?",
                 last_part, time.time(), call_sid, turn)

    # --- The end of a call
    def end(self, call_sid: str) -> Any:
        """The call is over: accept no more words, and delete those that are stored, unless they are
        to be kept. If that fails, the next ``sweep`` tries again. Returns a row: how many ``turns``
        the call had, and how many tokens Claude read (``tokens_in``) and wrote (``tokens_out``)."""
        self._over.add(call_sid)
        counts = self.sql("SELECT COUNT(*) AS turns, COALESCE(SUM(tokens_in), 0) AS tokens_in,"
                          " COALESCE(SUM(tokens_out), 0) AS tokens_out FROM turns"
                          " WHERE call_sid = ?", call_sid)[0]
        self.sweep()
        return counts

    def sweep(self) -> None:
        """Delete the words of every call that is due. Its rows stay a day longer, for
        ``turns_today``."""
        over, now, due = list(self._over), time.time(), "forgotten = 0 AND forget_at <= ?"
        if over or self.sql(f"SELECT 1 FROM calls WHERE {due} OR forgotten = 1 AND forget_at <= ?"
                            " LIMIT 1", now, now - A_DAY):
            theirs = f"WHERE call_sid IN (SELECT call_sid FROM calls WHERE {due})"
            with self.transaction():
                for call_sid in over:
                    self.sql("UPDATE calls SET ended = ?, forget_at = ? WHERE call_sid = ? AND"
                             " ended IS NULL", now, now + self.begin(call_sid)["keep"], call_sid)
                    self.sql("UPDATE turns SET stop = 'hung up' WHERE call_sid = ? AND stop IS"
                             " NULL", call_sid)
                self.sql("UPDATE turns SET words = '', reply = '', stop = 'forgotten' " + theirs,
                         now)
                for table in self.extra_tables:
                    self.sql(f"DELETE FROM {table} {theirs}", now)
                self.sql(f"UPDATE calls SET forgotten = 1 WHERE {due}", now)
                self.sql("DELETE FROM calls WHERE forgotten = 1 AND forget_at <= ?", now - A_DAY)
            self._over.difference_update(over)
            self.wal_holds_words = True  # SQLite's write-ahead log keeps them for some time
        if self.wal_holds_words:
            self._empty_log()

    def check(self) -> None:
        """Write and read something, to see whether the disk works."""
        if self._file != which_file(self.path):  # somebody has replaced or deleted it
            self._close()
        self.sql(f"PRAGMA user_version = {VERSION}")  # a write that changes nothing
        self.sql("SELECT COUNT(*) FROM turns")

    # --- The database file
    def sql(self, statement: str, *values: Any) -> Any:
        """Run one statement. Returns its rows, or how many rows it has changed."""
        with self._lend() as database:
            cursor = database.execute(statement, values)
            return cursor.fetchall() if cursor.description else cursor.rowcount

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Any]:
        """Lend the database for several statements: either all of them are stored or none. A
        transaction within another one is a part of it."""
        with self._lend() as database:
            if database.in_transaction:
                yield database
                return
            # From here to the commit no other process writes. So of two processes that get the
            # same delivery, the second one finds the turn of the first.
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                if self._database and database.in_transaction:
                    database.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _lend(self) -> Iterator[Any]:
        """Lend the database to one thread at a time."""
        if not self._lock.acquire(timeout=QUEUE_PATIENCE):
            raise sqlite3.OperationalError("other threads use the database")
        try:
            yield self._database or self._open()
        except sqlite3.Error as error:
            self._give_up_on(error)  # this rolls back
            raise type(error)(f"{str(error).partition(': /')[0]}: {self.path}") from error
        finally:
            self._lock.release()

    def _open(self) -> sqlite3.Connection:
        """Make the connection of this process, and the tables if there are none."""
        self._file, folder = which_file(self.path), os.path.dirname(os.path.abspath(self.path))
        with contextlib.suppress(OSError):  # if that fails, SQLite says so next
            os.makedirs(folder, exist_ok=True)
        self._database = database = sqlite3.connect(
            self.path, timeout=LOCK_PATIENCE,
            isolation_level=None,  # a transaction begins where we say BEGIN
            check_same_thread=False)  # the lock lets in one thread at a time
        database.row_factory = sqlite3.Row
        database.execute("PRAGMA foreign_keys = ON")
        # Deleted words are overwritten with zeros, instead of only being marked as deleted.
        database.execute("PRAGMA secure_delete = ON")
        # Three times as fast. Only a power failure can lose words, a killed process can't.
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("BEGIN IMMEDIATE")  # one process makes the tables, the others wait
        for statement in SCHEMA.split(";\n"):
            database.execute(statement)
        for table, columns in self.extra_tables.items():
            database.execute(f"CREATE TABLE IF NOT EXISTS {table} (call_sid TEXT NOT NULL"
                             f" REFERENCES calls ON DELETE CASCADE, {columns})")
        database.execute(f"PRAGMA user_version = {VERSION}")
        database.execute("COMMIT")
        # In WAL mode, a backup that reads the file delays no call. The file keeps the mode.
        if database.execute("PRAGMA journal_mode").fetchone()[0] != "wal" and wal_works(folder):
            with contextlib.suppress(sqlite3.OperationalError):  # in use: the next process does it
                database.execute("PRAGMA journal_mode = WAL")
        self._file = which_file(self.path)
        return database

    def _empty_log(self) -> None:
        with self._lock:
            if self._database and not self._database.in_transaction:
                self._database.execute("PRAGMA busy_timeout = 0")  # don't wait for a backup
                busy = self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                self._database.execute(f"PRAGMA busy_timeout = {1000 * LOCK_PATIENCE:.0f}")
                self.wal_holds_words = bool(busy)  # if it was busy, the next sweep tries again

    def _give_up_on(self, error: sqlite3.Error) -> None:
        """Close a connection that failed: a new one works as soon as the disk does. If the
        file is corrupted, put it aside, and let the calls go on in a new one."""
        self._close()
        if type(error) is sqlite3.DatabaseError and self._file == which_file(self.path):
            log.error("%s is corrupted (%s): calls go on in a new file", self.path, error)
            for rest in "", "-wal", "-shm":
                with contextlib.suppress(OSError):  # a folder that nobody may write to
                    os.replace(self.path + rest, f"{self.path}.corrupted{rest}")

    def _close(self) -> None:
        if self._database:
            self._database.close()
        self._database = None

    def _begin_afresh(self) -> None:
        """Delete a file of another version. That may end a call in progress. If the owner keeps
        words in the file, raise a ValueError instead."""
        with contextlib.suppress(sqlite3.Error), contextlib.closing(
                sqlite3.connect(f"file:{self.path}?mode=rw", uri=True)) as database:
            if database.execute("PRAGMA user_version").fetchone()[0] in (0, VERSION):
                return
            if database.execute("SELECT 1 FROM turns WHERE words <> '' AND touched < ?",
                                [time.time() - TWO_HOURS]).fetchone():
                raise ValueError(f"{self.path} holds words kept by another version of this"
                                 " app. Move it away, or set another DATABASE_URL")
            os.remove(self.path)


def which_file(path: str) -> tuple[int, int] | None:
    """A file's device and inode, which identify it. None if there is no such file."""
    found = os.stat(path) if os.path.exists(path) else None
    return found and (found.st_dev, found.st_ino)


def wal_works(folder: str) -> bool:
    """Whether SQLite's WAL mode works in a folder. On disks that can't share memory, like WSL's
    /mnt/c, SQLite still switches to it, and then can't use the file or switch back."""
    with contextlib.suppress(sqlite3.Error, OSError):
        with tempfile.TemporaryDirectory(dir=folder) as scratch, contextlib.closing(
                sqlite3.connect(f"{scratch}/test.db")) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("CREATE TABLE test (test)")
            return True
    return False


MARKS = re.compile("[\ue000-\uf8ff]")  # marks of extras, which nobody hears


def what_was_heard(turns: list[dict]) -> Iterator[tuple[dict, str, str]]:
    """Each turn, what the caller heard of its reply, and the rest. Twilio doesn't say when a caller
    interrupts, so this is estimated from the time between giving Twilio the last part and the
    caller's next words. When in doubt, all of it was heard."""
    for turn, later in zip(turns, [*turns[1:], None]):
        reply, begins, cut = turn["reply"], turn["last_part"], len(turn["reply"])
        if later and begins is not None:
            words = list(re.finditer(r"\S+\s*", reply[begins:]))
            count = max(0, round((later["spoke_at"] - turn["given_at"]) * SPEAKING_RATE))
            if count < len(words) - max(5, len(words) / 4):  # the estimate can be this far off
                cut = begins + (words[count - 1].end() if count else 0)
        yield turn, MARKS.sub("", reply[:cut]), MARKS.sub("", reply[cut:])
