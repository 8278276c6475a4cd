"""What is said on the phone, for as long as the call lasts, in one SQLite file.

A turn is a row: what the caller said, and a reply that grows, sentence by sentence, while Claude
writes it. Any process that can open the file can go on where another process stopped.
"""

import collections
import contextlib
import os
import sqlite3
import time

StoreError = sqlite3.Error  # the disk is full, read-only or locked, or the file is no database

SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    call_sid   TEXT PRIMARY KEY,
    turns      INTEGER NOT NULL DEFAULT 0,  -- how many there were, also when the words are gone
    tokens_in  INTEGER NOT NULL DEFAULT 0,  -- how many Claude has read
    tokens_out INTEGER NOT NULL DEFAULT 0,  -- how many Claude has written
    began      REAL NOT NULL,               -- when the caller first spoke, in Unix seconds
    ended      REAL                         -- NULL while the call is on
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS turns (
    call_sid TEXT NOT NULL,
    turn     INTEGER NOT NULL,          -- 1, 2, 3 ... within its call
    delivery TEXT,                      -- Twilio's idempotency token: the same one, the same turn
    words    TEXT NOT NULL,             -- what the caller said
    reply    TEXT NOT NULL DEFAULT '',  -- what Claude has written so far, ready to be spoken
    stop     TEXT,                      -- how the reply ended, or NULL while it grows
    touched  REAL NOT NULL,             -- when this row last changed, in Unix seconds
    PRIMARY KEY (call_sid, turn),
    UNIQUE (call_sid, delivery)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS phrases (    -- the line's own words, as Claude has translated them
    language TEXT NOT NULL,
    phrase   TEXT NOT NULL,             -- in English
    words    TEXT NOT NULL,
    PRIMARY KEY (language, phrase)
) WITHOUT ROWID;
DROP TABLE IF EXISTS ended;  -- an older version's: this one keeps ended calls in ``calls``
"""


class Store:
    """All calls, in the file at this path. The first call makes it, with its folder; before that
    nothing is opened, since a process that is forked later can't share a connection.
    Every method is one short transaction, and raises StoreError when the disk or the file is bad.
    """

    def __init__(self, path):
        self.path = path
        # Connections that nobody uses, by their file: to open one costs as much as 20 writes.
        self._idle = collections.defaultdict(list)

    def begin(self, call_sid, delivery, words):
        """Keep what the caller said, as a new turn. If an earlier reply of this call is still
        growing, it stops there: the caller has gone on.

        Args:
            delivery: Twilio's ``I-Twilio-Idempotency-Token``, or None. The same again is the same
                turn, delivered again.

        Returns:
            (turn, is_new), or (None, False) if the call is over.
        """
        now = time.time()
        with self._connection() as database:
            # IMMEDIATE: from here to the commit nobody else writes. So of two deliveries of the
            # same words the later one finds the turn of the first.
            database.execute("BEGIN IMMEDIATE")
            database.execute("INSERT INTO calls (call_sid, began) VALUES (?, ?)"
                             " ON CONFLICT DO NOTHING", [call_sid, now])
            for _ in database.execute(
                    "SELECT 1 FROM calls WHERE call_sid = ? AND ended IS NOT NULL", [call_sid]):
                return None, False
            for seen in database.execute("SELECT turn FROM turns WHERE call_sid = ?"
                                         " AND delivery = ?", [call_sid, delivery]):
                return *seen, False
            database.execute("UPDATE calls SET turns = turns + 1 WHERE call_sid = ?", [call_sid])
            database.execute("UPDATE turns SET stop = 'overtaken'"
                             " WHERE call_sid = ? AND stop IS NULL", [call_sid])
            (turn,) = database.execute("SELECT COALESCE(MAX(turn), 0) + 1 FROM turns"
                                       " WHERE call_sid = ?", [call_sid]).fetchone()
            database.execute("INSERT INTO turns (call_sid, turn, delivery, words, touched)"
                             " VALUES (?, ?, ?, ?, ?)", [call_sid, turn, delivery, words, now])
            if turn == 1:
                self._sweep(database)
            return turn, True

    def turns(self, call_sid, first, last):
        """The turns ``first`` to ``last`` of a call, as (words, reply, stop, touched) tuples."""
        with self._connection() as database:
            return database.execute(
                "SELECT words, reply, stop, touched FROM turns"
                " WHERE call_sid = ? AND turn BETWEEN ? AND ? ORDER BY turn",
                [call_sid, first, last]).fetchall()

    def grow(self, call_sid, turn, text, stop=None):
        """Add to a reply, and perhaps end it.

        Args:
            text: what is added. An empty one only shows that the reply is still being written.
            stop: how the reply ended, or None if it goes on.

        Returns:
            Whether the reply was still growing. If not, nothing is changed: the caller has gone on.
        """
        with self._connection() as database:
            return database.execute(
                "UPDATE turns SET reply = reply || ?, stop = ?, touched = ?"
                " WHERE call_sid = ? AND turn = ? AND stop IS NULL",
                [text, stop, time.time(), call_sid, turn]).rowcount == 1

    def count_tokens(self, call_sid, tokens_in, tokens_out):
        """Add to the tokens that Claude has read and written in a call."""
        with self._connection() as database:
            database.execute(
                "UPDATE calls SET tokens_in = tokens_in + ?, tokens_out = tokens_out + ?"
                " WHERE call_sid = ?", [tokens_in, tokens_out, call_sid])

    def forget(self, call_sid):
        """The call is over: delete what was said in it, and keep nothing that comes late. Returns
        the (turns, tokens_in, tokens_out) that it had."""
        now = time.time()
        with self._connection() as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("DELETE FROM turns WHERE call_sid = ?", [call_sid])
            database.execute("INSERT INTO calls (call_sid, began, ended) VALUES (?, ?, ?)"
                             " ON CONFLICT (call_sid) DO UPDATE SET ended = excluded.ended",
                             [call_sid, now, now])
            counts = database.execute("SELECT turns, tokens_in, tokens_out FROM calls"
                                      " WHERE call_sid = ?", [call_sid]).fetchone()
        with self._connection() as database:
            # Or the words would stay in SQLite's write-ahead log until that is written over.
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return counts

    def phrases(self, language):
        """The line's own words in a language, as {English: words}."""
        with self._connection() as database:
            return dict(database.execute(
                "SELECT phrase, words FROM phrases WHERE language = ?", [language]).fetchall())

    def keep_phrases(self, language, words):
        """Keep the line's own words in a language, given as {English: words}."""
        with self._connection() as database:
            for phrase in words:
                database.execute("INSERT INTO phrases VALUES (?, ?, ?) ON CONFLICT"
                                 " (language, phrase) DO UPDATE SET words = excluded.words",
                                 [language, phrase, words[phrase]])

    def check(self):
        """Forget what is old, and see whether the disk is well."""
        with contextlib.closing(self._open()) as database:  # a new one notices a lost disk
            self._sweep(database)
            # The argument 1 stops the check at the first fault, which is enough to know.
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        self.forget("check")  # no such call, but it writes: otherwise a full disk would pass

    @staticmethod
    def _sweep(database):
        """Forget the calls whose end Twilio never reported, and after a day every CallSid."""
        a_day_ago = time.time() - 24 * 60 * 60  # no phone call is longer
        database.execute("DELETE FROM turns WHERE touched < ?", [a_day_ago])
        database.execute("DELETE FROM calls WHERE COALESCE(ended, began) < ?"
                         " AND call_sid NOT IN (SELECT call_sid FROM turns)", [a_day_ago])

    @contextlib.contextmanager
    def _connection(self):
        """Lend a connection to one thread. Its transaction is committed at the end, or undone."""
        file = self._which_file()  # what is written to a file that was replaced, nobody would see
        try:
            connection = self._idle[file].pop()
        except IndexError:
            connection, file = self._open(), self._which_file()
        try:
            with connection:
                yield connection
        except BaseException:
            connection.close()  # when the disk recovers, a new one works; this one may not
            raise
        self._idle[file].append(connection)

    def _which_file(self):
        """Device and inode of the file, which no other file has; None if there is no file."""
        with contextlib.suppress(OSError):
            found = os.stat(self.path)
            return found.st_dev, found.st_ino

    def _open(self):
        with contextlib.suppress(OSError):  # where no folder can be made, SQLite complains next
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        try:
            connection = sqlite3.connect(
                self.path,
                timeout=2.0,  # seconds to wait for a lock: writing takes 1 ms, and Twilio waits
                isolation_level=None,  # a transaction begins where a BEGIN says so
                check_same_thread=False)  # one thread after the other uses it
            # Deleted words are overwritten with zeros, not only marked as deleted.
            connection.execute("PRAGMA secure_delete = ON")
            connection.executescript(SCHEMA)
            # Three times as fast. A killed process loses nothing; only a power failure could.
            connection.execute("PRAGMA synchronous = NORMAL")
            with contextlib.suppress(sqlite3.OperationalError):
                # In WAL mode readers don't wait for a writer. The file keeps the mode; a process
                # that can't change it, as another one uses the file, leaves it to the next.
                connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.Error as error:
            raise type(error)(f"{error}: {self.path}") from error
        return connection
