"""What is said on the phone, for as long as the call lasts, in one SQLite file.

A row is a turn: what the caller said, and a reply that grows, sentence by sentence, while Claude writes it. Whoever
holds the file holds the call, so any process can go on where another one stopped.
"""

import contextlib
import os
import sqlite3
import time
from typing import NamedTuple

StoreError = sqlite3.Error  # the disk is full, read-only, locked, or holds something else

LOCK_PATIENCE = 2.0  # seconds: no statement takes a thousandth of that, and Twilio is waiting for an answer
A_DAY = 24 * 60 * 60  # seconds: no phone call is longer

SCHEMA = """
CREATE TABLE IF NOT EXISTS turns (
    call_sid TEXT NOT NULL,
    turn     INTEGER NOT NULL,          -- 1, 2, 3 ... within its call
    delivery TEXT,                      -- Twilio's idempotency token: the same one again is the same turn
    words    TEXT NOT NULL,             -- what the caller said
    reply    TEXT NOT NULL DEFAULT '',  -- what Claude has answered so far, ready to be spoken
    stop     TEXT,                      -- how the reply ended; NULL while it grows
    touched  REAL NOT NULL,             -- when this row last changed, in Unix seconds
    PRIMARY KEY (call_sid, turn),
    UNIQUE (call_sid, delivery)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ended (      -- calls that are over: what comes late for them is not kept
    call_sid TEXT PRIMARY KEY,
    at       REAL NOT NULL
) WITHOUT ROWID;
"""


class Reply(NamedTuple):
    """How far a reply has come.

    Attributes:
        text: what may be spoken.
        stop: None while it grows. Then Claude's ``stop_reason``; or "hang_up", if Claude used that tool; "max_turns";
            "overtaken", as the caller said something new; "stalled"; "lost", if there is no such turn; or an error.
        touched: when the row last changed, in Unix seconds.
    """

    text: str
    stop: str | None
    touched: float


class Store:
    """All calls in one file.

    Args:
        path: the SQLite file. It is made, with its folder, the first time it is needed; nothing is opened before.

    Every method raises StoreError when the disk or the file is no good, and holds the database for one short
    transaction, never while Claude thinks.
    """

    def __init__(self, path):
        self.path = path
        self._idle = []  # open connections that nobody uses, and to which file: to open one costs as much as 20 writes

    def begin(self, call_sid, delivery, words):
        """Write down what the caller said, as a new turn with an empty reply.

        A reply of this call that is still growing is stopped: the caller talks about something else now.

        Args:
            call_sid: the call.
            delivery: Twilio's ``I-Twilio-Idempotency-Token``. Without one (None) every request is a new turn.
            words: what the caller said.

        Returns:
            (turn, is_new): not new when this delivery was seen before. (None, False) when the call is over.
        """
        with self._connection() as database:
            # At once the only one to write: of two deliveries of the same words, one has to find the other's turn.
            database.execute("BEGIN IMMEDIATE")
            if database.execute("SELECT 1 FROM ended WHERE call_sid = ?", [call_sid]).fetchone():
                return None, False
            seen = database.execute(
                "SELECT turn FROM turns WHERE call_sid = ? AND delivery = ?", [call_sid, delivery]
            ).fetchone()
            if seen:
                return seen[0], False
            database.execute("UPDATE turns SET stop = 'overtaken' WHERE call_sid = ? AND stop IS NULL", [call_sid])
            (turn,) = database.execute(
                "SELECT COALESCE(MAX(turn), 0) + 1 FROM turns WHERE call_sid = ?", [call_sid]
            ).fetchone()
            database.execute(
                "INSERT INTO turns (call_sid, turn, delivery, words, touched) VALUES (?, ?, ?, ?, ?)",
                [call_sid, turn, delivery, words, time.time()],
            )
            if turn == 1:
                self._forget_old(database)
            return turn, True

    def history(self, call_sid, first, last):
        """The turns ``first`` to ``last`` of a call, in order, as (words, reply, stop) tuples."""
        with self._connection() as database:
            return database.execute(
                "SELECT words, reply, stop FROM turns WHERE call_sid = ? AND turn BETWEEN ? AND ? ORDER BY turn",
                [call_sid, first, last],
            ).fetchall()

    def grow(self, call_sid, turn, text, stop=None):
        """Add to a reply, and perhaps end it.

        Args:
            text: what is added; it may be empty, as a sign of life.
            stop: how the reply ended, or None if it goes on.

        Returns:
            Whether the reply was still growing. If not (the caller went on, or the call is over), nothing is written,
            and whoever writes it should stop.
        """
        with self._connection() as database:
            return 1 == database.execute(
                "UPDATE turns SET reply = reply || ?, stop = ?, touched = ?"
                " WHERE call_sid = ? AND turn = ? AND stop IS NULL",
                [text, stop, time.time(), call_sid, turn],
            ).rowcount

    def reply(self, call_sid, turn):
        """How far the reply of this turn has come: a Reply, or None if this call has no such turn."""
        with self._connection() as database:
            row = database.execute(
                "SELECT reply, stop, touched FROM turns WHERE call_sid = ? AND turn = ?", [call_sid, turn]
            ).fetchone()
        return row and Reply(*row)

    def forget(self, call_sid):
        """The call is over: delete what was said in it, and take nothing more."""
        with self._connection() as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("DELETE FROM turns WHERE call_sid = ?", [call_sid])
            database.execute("INSERT OR REPLACE INTO ended VALUES (?, ?)", [call_sid, time.time()])
        with self._connection() as database:
            # Or the words would stay in the write-ahead log until it happens to be written over.
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def check(self):
        """Forget what is old, then write and read. On a new connection, as that one notices when the disk is gone."""
        with contextlib.closing(self._open()) as database:
            self._forget_old(database)
            # Something must be written, or a full disk would pass: the end of a call that never was.
            database.execute("INSERT OR REPLACE INTO ended VALUES ('check', ?)", [time.time()])
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()  # 1: the first fault is enough
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # for what was just forgotten, as in ``forget``

    @staticmethod
    def _forget_old(database):
        """Forget the calls whose end was never reported."""
        database.execute("DELETE FROM turns WHERE touched < ?", [time.time() - A_DAY])
        database.execute("DELETE FROM ended WHERE at < ?", [time.time() - A_DAY])

    @contextlib.contextmanager
    def _connection(self):
        """Lend a connection for one transaction, which is committed at the end, or rolled back by an error."""
        connection, file = self._borrow()
        try:
            with connection:
                yield connection
        except BaseException:
            connection.close()  # after trouble with the disk a new connection is the one that finds it mended
            raise
        self._idle.append((connection, file))

    def _borrow(self):
        """An idle connection to the file that is there now, or a new one, and which file that is."""
        while True:
            try:
                connection, file = self._idle.pop()  # no two threads get the same one
            except IndexError:
                connection = self._open()
                return connection, self._which_file()
            if file == self._which_file():
                return connection, file
            connection.close()  # its file was deleted or replaced: others would not see what is written there

    def _which_file(self):
        """Device and inode of the file, or None if it isn't there."""
        with contextlib.suppress(OSError):
            found = os.stat(self.path)
            return found.st_dev, found.st_ino

    def _open(self):
        with contextlib.suppress(OSError):  # where it can't be made, SQLite will say so
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        connection = sqlite3.connect(
            self.path,
            timeout=LOCK_PATIENCE,
            isolation_level=None,  # a transaction begins where a BEGIN says so, and nowhere else
            check_same_thread=False,  # it is lent to one thread after the other
        )
        try:
            connection.execute("PRAGMA secure_delete = ON")  # forgotten words are overwritten, not only unlinked
            connection.executescript(SCHEMA)
            connection.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing; only a power cut could
            with contextlib.suppress(sqlite3.OperationalError):
                # In WAL mode readers don't wait for a writer. The mode stays with the file, and changing it heeds no
                # timeout: a process that finds the file in use can leave it to the one that is using it.
                connection.execute("PRAGMA journal_mode = WAL")
        except BaseException:
            connection.close()
            raise
        return connection
