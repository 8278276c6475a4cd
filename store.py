"""What is said on the phone, for as long as the call lasts, in one SQLite file, or in Postgres.

A turn is a row: what the caller said, and a reply that grows, sentence by sentence, while Claude
writes it. Any process that can open the file can go on where another process stopped.
"""

import collections
import contextlib
import logging
import os
import sqlite3
import threading
import time
import weakref

log = logging.getLogger("voice-claude")

StoreError = sqlite3.Error  # the disk is full, read-only or locked, or the file is no database

MEANWHILE = ".meanwhile"  # behind the path: the file that is used while the owner mends the other

A_DAY = 24 * 60 * 60.0  # seconds
DEAD_GUESS = 1.0  # seconds without a sign of life; there is one five times as often
LOCK_PATIENCE = 2.0  # seconds to wait for others who write: writing takes 1 ms, and Twilio waits
# For those of the same process a caller waits longer: they go on one after the other, and 300 who
# begin to speak at once take some seconds on a busy machine.
QUEUE_PATIENCE = 6.0

VERSION = 1  # of these tables; a file keeps it as its ``user_version``
SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    call_sid   TEXT PRIMARY KEY,
    caller     TEXT,                        -- the number, where the words of the call are kept
    trusted    INTEGER NOT NULL DEFAULT 0,  -- 1: the number is proved, -1: to be forgotten
    turns      INTEGER NOT NULL DEFAULT 0,  -- how many there were, also when the words are gone
    tokens_in  INTEGER NOT NULL DEFAULT 0,  -- how many Claude has read
    tokens_out INTEGER NOT NULL DEFAULT 0,  -- how many Claude has written
    began      DOUBLE PRECISION NOT NULL,   -- in Unix seconds, as all moments are
    touched    DOUBLE PRECISION NOT NULL,   -- when the caller last spoke, or the call ended
    ended      DOUBLE PRECISION,            -- NULL while the call is on
    so_far     TEXT,                        -- with THINK_AHEAD: a hash of what the caller has said
    so_far_nr  INTEGER,                     -- so far in this turn, its number in Twilio's order,
    so_far_at  DOUBLE PRECISION             -- and when the caller began to say it
);
CREATE TABLE IF NOT EXISTS turns (
    call_sid  TEXT NOT NULL,
    turn      INTEGER NOT NULL,          -- 1, 2, 3 ... within its call
    delivery  TEXT,                      -- Twilio's idempotency token, or the hash of a guess
    words     TEXT NOT NULL,             -- what the caller said
    spoke_at  DOUBLE PRECISION NOT NULL, -- when the caller began to say it, about
    reply     TEXT NOT NULL DEFAULT '',  -- what Claude has written so far, ready to be spoken
    stop      TEXT,                      -- how the reply ended, or NULL while it grows
    last_part INTEGER,                   -- where the part begins that the caller may cut in on
    given_at  DOUBLE PRECISION,          -- when Twilio was given that part
    guess     INTEGER NOT NULL DEFAULT 0,  -- 1: begun before the caller was done (THINK_AHEAD)
    ahead     DOUBLE PRECISION,          -- so many seconds before Twilio asked it was begun, or
                                         -- when, for what is still a guess
    touched   DOUBLE PRECISION NOT NULL, -- the last sign of life of what writes the reply
    PRIMARY KEY (call_sid, turn),
    UNIQUE (call_sid, delivery)
);
CREATE TABLE IF NOT EXISTS phrases (     -- the line's own words, as Claude has translated them
    language  TEXT NOT NULL,
    phrase    TEXT NOT NULL,             -- in English
    words     TEXT NOT NULL,
    PRIMARY KEY (language, phrase)
);
CREATE INDEX IF NOT EXISTS calls_touched ON calls (touched);
CREATE INDEX IF NOT EXISTS calls_to_be_forgotten ON calls (touched) WHERE trusted = -1
"""

# --- SQLite, for one machine ----------------------------------------------------------------------


class Store:
    """All calls, in the file at this path. The first call makes it, with its folder; before that
    nothing is opened, since a process that is forked later can't share a connection. Every method
    is one short transaction, and raises StoreError when the disk or the file is bad.

    Args:
        keep_days: for so many days after a call its words are kept; 0 forgets them with the call.
        connections: so many at most are open at the same time.
    """

    def __init__(self, path, keep_days=0, connections=8):
        self.path, self.keep_days = path, keep_days
        self._free = threading.Semaphore(connections)  # each takes files, which may be few
        # Connections that nobody uses, by their file: to open one costs as much as 20 writes.
        self._idle = collections.defaultdict(list)
        self._one_writer = threading.Lock()
        self._clock = time.time() - time.monotonic()  # changes where somebody sets the clock
        self._no_sweep_before = 0.0
        self._looking, self._looked, self._fault = threading.Lock(), float("-inf"), None
        self._to_end = set()  # the calls whose end isn't kept yet: Twilio reports it only once
        self._must_empty_log = True  # a process before this one may have left words there
        self._clearing_up = threading.Thread()  # the one that tries again, once there is a need

    # --- A call begins

    def keep_caller(self, call_sid, caller, trusted):
        """Keep who calls: the number, or None, and whether it is proved that it is the caller's."""
        with self._writing() as database:
            self._open_call(database, call_sid)
            database.execute("UPDATE calls SET caller = ?, trusted = ? WHERE call_sid = ?",
                             [self.keep_days and caller or None, int(trusted), call_sid])

    def is_trusted(self, call_sid):
        """Whether the number of this call is proved."""
        with self._connection() as database:
            return bool(database.execute("SELECT 1 FROM calls WHERE call_sid = ? AND trusted <> 0",
                                         [call_sid]).fetchall())

    def turns_today(self):
        """How many turns there were in all calls of the last 24 hours; a few more, if a call has
        been on for all that time."""
        with self._connection() as database:
            return self._turns_today(database)

    def first_this_hour(self):
        """Whether nobody has asked this in the last hour, in any process."""
        now = time.time()
        with self._writing() as database:
            return database.execute(  # no such call, but a row with a time
                "INSERT INTO calls (call_sid, began, touched) VALUES (?, ?, ?) ON CONFLICT"
                " (call_sid) DO UPDATE SET touched = excluded.touched WHERE calls.touched < ?",
                ["limit", now, now, now - 3600]).rowcount == 1

    # --- A turn, in the order in which things happen

    def begin(self, call_sid, delivery, words, spoke_at, most, most_today, guessed=None):
        """Keep what the caller said, as a new turn. If an earlier reply of this call is still
        growing, it stops there: the caller has gone on.

        Args:
            delivery: Twilio's ``I-Twilio-Idempotency-Token``, or None. The same again is the same
                turn, delivered again.
            spoke_at: when the caller began to say it, in Unix seconds.
            most: so many turns a call may have; what comes then has the stop "max_turns".
            most_today: so many turns all calls together may have in 24 hours.
            guessed: with THINK_AHEAD, the delivery of a guess that is true if these are its words.

        Returns:
            (turn, is_new). The turn is None if the call is over, and 0 if none is left today.
            Nobody need write a reply to a turn that is not new; or is_new is None, for a guess that
            has come true.
        """
        with self._writing() as database:
            call = self._open_call(database, call_sid)
            if call["ended"]:
                return None, False
            for seen in database.execute("SELECT turn FROM turns WHERE call_sid = ?"
                                         " AND delivery = ?", [call_sid, delivery]):
                return *seen, False
            if self._turns_today(database) >= most_today:
                return 0, False
            now, came_true, wrong = time.time(), 0, 0
            database.execute("UPDATE calls SET turns = turns + 1, touched = ?, so_far = NULL,"
                             " so_far_nr = NULL, so_far_at = NULL WHERE call_sid = ?",
                             [now, call_sid])
            database.execute("UPDATE turns SET stop = 'overtaken'"
                             " WHERE call_sid = ? AND guess = 0 AND stop IS NULL", [call_sid])
            turn, spoke_at = self._last_turn(database, call_sid) + 1, call["so_far_at"] or spoke_at
            stop = "max_turns" if call["turns"] >= most else None
            if guessed:
                came_true, wrong = self._end_guesses(database, call_sid, guessed, words, delivery,
                                                     spoke_at)
            if came_true:
                turn = self._last_turn(database, call_sid)
            else:
                self._insert(database, call_sid, turn, delivery, words, spoke_at, stop=stop)
        if wrong:
            self._empty_log()
        return turn, (None if came_true else stop is None)

    def turns(self, call_sid, first, last):
        """The turns ``first`` to ``last`` of a call, as dicts of their columns."""
        with self._connection() as database:
            return self._dicts(database.execute(
                "SELECT * FROM turns WHERE call_sid = ? AND turn BETWEEN ? AND ? ORDER BY turn",
                [call_sid, first, last]))

    def earlier(self, call_sid, most):
        """The last turns of earlier calls of the same caller, if the number is proved in this call
        and was in those; each with the moment when its call ``began``."""
        with self._connection() as database:
            return self._dicts(database.execute(
                "SELECT turns.*, other.began FROM calls AS this JOIN calls AS other"
                " ON other.caller = this.caller AND other.trusted = 1 AND this.trusted = 1"
                " AND other.call_sid <> this.call_sid"
                " JOIN turns ON turns.call_sid = other.call_sid AND guess = 0"
                " WHERE this.call_sid = ? ORDER BY other.began DESC, turn DESC LIMIT ?",
                [call_sid, most]))[::-1]

    def grow(self, call_sid, turn, text, stop=None):
        """Add to a reply, and perhaps end it.

        Args:
            text: what is added. An empty one only shows that the reply is still being written.
            stop: how the reply ended, or None if it goes on.

        Returns:
            Whether the reply was still growing. If not, nothing is changed: the caller has gone on.
        """
        with self._writing() as database:
            return database.execute(
                "UPDATE turns SET reply = reply || ?, stop = ?, touched = ?"
                " WHERE call_sid = ? AND turn = ? AND stop IS NULL",
                [text, stop, time.time(), call_sid, turn]).rowcount == 1

    def wait(self, call_sid, turn, length, seconds):
        """Wait until a reply that another process writes may have more than so many characters."""
        time.sleep(0.05)  # a file tells nothing: look again soon, and cheaply

    def give(self, call_sid, turn, last_part):
        """Note that Twilio is given the last part of a reply now: the caller may cut in on it."""
        with self._writing() as database:
            database.execute("UPDATE turns SET last_part = ?, given_at = ?"
                             " WHERE call_sid = ? AND turn = ?",
                             [last_part, time.time(), call_sid, turn])

    def count_tokens(self, call_sid, tokens_in, tokens_out):
        """Add to the tokens that Claude has read and written in a call."""
        with self._writing() as database:
            database.execute(
                "UPDATE calls SET tokens_in = tokens_in + ?, tokens_out = tokens_out + ?"
                " WHERE call_sid = ?", [tokens_in, tokens_out, call_sid])

    # --- Thinking ahead

    def hear(self, call_sid, after, number, so_far, so_far_at):
        """Note what the caller has said so far. What was guessed from other words is wrong then.

        Args:
            after: the last turn before; where there was another one since, this comes too late.
            number: Twilio's number of it; what comes later with a smaller number is older.
            so_far: the words, as ``guess`` takes them.
            so_far_at: when the caller began to say them; noted once in a turn.

        Returns:
            Whether it is not too late.
        """
        with self._writing() as database:
            self._open_call(database, call_sid)
            in_time = database.execute(
                "UPDATE calls SET so_far = ?, so_far_nr = ?, so_far_at = COALESCE(so_far_at, ?)"
                " WHERE call_sid = ? AND ended IS NULL AND COALESCE(so_far_nr, 0) <= ? AND ? ="
                " (SELECT COALESCE(MAX(turn), 0) FROM turns WHERE call_sid = ? AND guess = 0)",
                [so_far, number, so_far_at, call_sid, number, after, call_sid])
            if in_time.rowcount == 1:
                database.execute("UPDATE turns SET stop = 'wrong', words = '', reply = '',"
                                 " delivery = NULL WHERE call_sid = ? AND guess = 1 AND delivery"
                                 " <> ?", [call_sid, so_far])
            return in_time.rowcount == 1

    def guess(self, call_sid, so_far, words, most, most_today):
        """Begin a turn with words of which nobody knows yet whether they are all: if they are still
        what the caller has said so far, and there were not three guesses. Returns the turn, or
        None."""
        with self._writing() as database:
            call = self._open_call(database, call_sid)
            guesses = database.execute("SELECT delivery FROM turns WHERE call_sid = ?"
                                       " AND guess = 1", [call_sid]).fetchall()
            if call["so_far"] != so_far or call["ended"] or len(guesses) >= 3 or (
                    (so_far,) in guesses or call["turns"] >= most
                    or self._turns_today(database) >= most_today):
                return None
            turn = self._last_turn(database, call_sid) + 1
            self._insert(database, call_sid, turn, so_far, words, call["so_far_at"], guess=1)
            return turn

    @staticmethod
    def _end_guesses(database, call_sid, guessed, words, delivery, spoke_at):
        """Make the guess with the delivery ``guessed``, if there is one, the turn with these words,
        and delete all others. Returns how many (came true, were wrong)."""
        now = time.time()
        came_true = database.execute(
            "UPDATE turns SET guess = 0, ahead = ? - ahead, words = ?, delivery = ?, spoke_at = ?"
            " WHERE call_sid = ? AND guess = 1 AND delivery = ? AND COALESCE(stop, '') <> 'wrong'"
            " AND (stop IS NOT NULL OR touched > ?)",
            [now, words, delivery, spoke_at, call_sid, guessed, now - DEAD_GUESS]).rowcount
        wrong = database.execute("DELETE FROM turns WHERE call_sid = ? AND guess = 1",
                                 [call_sid]).rowcount
        return came_true, wrong

    # --- The end of a call, and what is kept after it

    def end(self, call_sid):
        """The call is over: keep nothing that comes late, and delete what was said, unless it is to
        be kept. Returns the (turns, tokens_in, tokens_out) that the call had."""
        self._to_end.add(call_sid)
        try:
            counts = self._end(call_sid)
            self._to_end.discard(call_sid)
            self._empty_log()
            return counts
        except StoreError:
            self._clear_up_later()
            raise

    def _end(self, call_sid):
        with self._writing() as database:
            call, now = self._open_call(database, call_sid), time.time()
            database.execute("UPDATE calls SET ended = ?, touched = ? WHERE call_sid = ?",
                             [now, now, call_sid])
            database.execute("UPDATE turns SET stop = 'hung up'"
                             " WHERE call_sid = ? AND stop IS NULL", [call_sid])
            database.execute("DELETE FROM turns WHERE call_sid = ? AND guess = 1", [call_sid])
            if not self.keep_days or call["trusted"] == -1:
                database.execute("DELETE FROM turns WHERE call_sid = ?", [call_sid])
                database.execute("UPDATE calls SET caller = NULL WHERE call_sid = ?", [call_sid])
            return call["turns"], call["tokens_in"], call["tokens_out"]

    def forget_caller(self, call_sid, turn):
        """Delete what was said in this call before this turn, and in the caller's earlier calls if
        the number is proved; and at its end what is said in this call from now on."""
        with self._writing() as database:
            gone = ("SELECT call_sid FROM calls WHERE call_sid = ? OR caller = (SELECT caller"
                    " FROM calls WHERE call_sid = ? AND trusted <> 0)")
            database.execute(f"DELETE FROM turns WHERE call_sid IN ({gone})"
                             " AND NOT (call_sid = ? AND turn >= ? AND stop IS NULL)",
                             [call_sid, call_sid, call_sid, turn])
            database.execute("UPDATE calls SET caller = NULL, trusted = -1"
                             f" WHERE call_sid IN ({gone})", [call_sid, call_sid])
        self._empty_log()

    def calls(self):
        """The calls of which words are there, as dicts of their columns."""
        with self._connection() as database:
            return self._dicts(database.execute(
                "SELECT * FROM calls WHERE call_sid IN (SELECT call_sid FROM turns)"
                " ORDER BY began"))

    def sweep(self):
        """Forget what was kept for long enough, and the calls whose end Twilio never reported."""
        if self._must_empty_log:
            self._empty_log(patience=0)
        clock = time.time() - time.monotonic()
        if abs(clock - self._clock) > 60:
            # Somebody has set the clock, and calls may look older than they are. For an hour this
            # process forgets nothing; and a call that is on begins its two hours anew, whichever
            # process looks.
            self._clock, self._no_sweep_before = clock, time.monotonic() + 3600
            with self._writing() as database:
                database.execute("UPDATE calls SET touched = ? WHERE ended IS NULL", [time.time()])
        if time.monotonic() < self._no_sweep_before:
            return
        # The row of a call outlives its words by a day, as its turns count for turns_today().
        old = time.time() - max(1, self.keep_days) * A_DAY
        silent = time.time() - 2 * 3600  # nobody is on the phone for two hours without a word
        old_words = ("FROM turns WHERE call_sid IN (SELECT call_sid FROM calls WHERE touched < ?"
                     " OR touched < ? AND trusted = -1)")
        moments = [old if self.keep_days else silent, silent]
        with self._connection() as database:
            found = database.execute(f"SELECT 1 {old_words} UNION ALL SELECT 1 FROM calls WHERE"
                                     " touched < ? LIMIT 1", [*moments, old]).fetchone()
        if found:
            with self._writing() as database:
                database.execute(f"DELETE {old_words}", moments)
                database.execute("DELETE FROM calls WHERE touched < ?", [old])
            self._empty_log()

    def phrases(self, language):
        """The line's own words in a language, as {English: words}."""
        with self._connection() as database:
            return dict(database.execute(
                "SELECT phrase, words FROM phrases WHERE language = ?", [language]).fetchall())

    def keep_phrases(self, language, words):
        """Keep the line's own words in a language, given as {English: words}."""
        with self._writing() as database:
            for phrase in words:
                database.execute("INSERT INTO phrases VALUES (?, ?, ?) ON CONFLICT"
                                 " (language, phrase) DO UPDATE SET words = excluded.words",
                                 [language, phrase, words[phrase]])

    def check(self):
        """Write and read, to see whether the disk is well; once a second at most, or as soon as
        somebody asks again after a fault."""
        asked = time.monotonic()
        with self._looking:  # only one looks, and those who waited share what was found
            if self._looked < (asked if self._fault else asked - 1.0):
                try:
                    self._fault = self._look()
                except StoreError as error:
                    self._fault = str(error)
                self._looked = time.monotonic()
            if self._fault:
                raise sqlite3.OperationalError(self._fault)

    def _look(self):
        self._idle.clear()  # only a new connection notices that a disk is lost
        with self._connection() as database:
            # The argument 1 stops the check at the first fault, which is enough to know.
            (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
        self._end("check")  # no such call, but it writes: or a full disk would pass

    # --- What the methods above share

    def _open_call(self, database, call_sid):
        """The row of this call, which is made if there is none, and locked for the transaction."""
        now = time.time()
        database.execute("INSERT INTO calls (call_sid, began, touched) VALUES (?, ?, ?)"
                         " ON CONFLICT (call_sid) DO UPDATE SET began = calls.began",  # a lock
                         [call_sid, now, now])
        rows = database.execute("SELECT * FROM calls WHERE call_sid = ?", [call_sid])
        return self._dicts(rows)[0]

    @staticmethod
    def _last_turn(database, call_sid):
        return database.execute("SELECT COALESCE(MAX(turn), 0) FROM turns WHERE call_sid = ?",
                                [call_sid]).fetchone()[0]

    @staticmethod
    def _insert(database, call_sid, turn, delivery, words, spoke_at, stop=None, guess=0):
        now = time.time()
        database.execute("INSERT INTO turns (call_sid, turn, delivery, words, spoke_at, stop,"
                         " guess, ahead, touched) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                         [call_sid, turn, delivery, words, spoke_at, stop, guess,
                          now if guess else None, now])

    @staticmethod
    def _turns_today(database):
        return database.execute("SELECT COALESCE(SUM(turns), 0) FROM calls WHERE touched > ?",
                                [time.time() - A_DAY]).fetchone()[0]

    @staticmethod
    def _dicts(rows):
        names = [column[0] for column in rows.description]
        return [dict(zip(names, row)) for row in rows.fetchall()]

    @contextlib.contextmanager
    def _writing(self):
        """Lend a connection for a transaction that writes: all of it is done, or nothing."""
        # One thread at a time: SQLite lets threads that wait for each other starve.
        if not self._one_writer.acquire(timeout=QUEUE_PATIENCE):
            raise sqlite3.OperationalError("other threads are writing")
        try:
            with self._connection() as database:
                # From here to the commit no other process writes. So of two deliveries of the
                # same words the later one finds the turn of the first.
                database.execute("BEGIN IMMEDIATE")
                yield database
                database.execute("COMMIT")
        finally:
            self._one_writer.release()

    @contextlib.contextmanager
    def _connection(self):
        """Lend a connection to one thread."""
        if not self._free.acquire(timeout=LOCK_PATIENCE):
            raise sqlite3.OperationalError("other threads use all connections")
        try:
            file = self._which_file()  # nobody would see what is written to one that was replaced
            try:
                connection = self._idle[file].pop()
            except IndexError:
                connection, file = self._connect(), self._which_file()
            try:
                yield connection
            except BaseException as error:
                connection.close()  # when the disk recovers, a new one works; this one may not
                self._put_aside(file, error)
                raise
            self._idle[file].append(connection)
        finally:
            self._free.release()

    def _put_aside(self, file, error):
        """If the file is corrupted, begin a new one. One that has words to be kept stays where it
        is, for the owner to mend, and calls go on in a file beside it."""
        if type(error) is not sqlite3.DatabaseError or file != self._which_file():
            return
        if self.keep_days and not self.path.endswith(MEANWHILE):
            log.error("%s is corrupted (%s): mend it, or delete it, and start the line again. "
                      "Calls go on in %s", self.path, error, self.path + MEANWHILE)
            self.path += MEANWHILE
            return
        log.error("%s is corrupted (%s): calls go on in a new file", self.path, error)
        with contextlib.suppress(OSError):  # a folder that nobody may write to
            os.replace(self.path, f"{self.path}.corrupted")
            for rest in "-wal", "-shm":
                with contextlib.suppress(OSError):
                    os.remove(self.path + rest)

    def _which_file(self):
        """Device and inode of the file, which no other file has; None if there is no file."""
        with contextlib.suppress(OSError):
            found = os.stat(self.path)
            return found.st_dev, found.st_ino

    def _connect(self):
        with contextlib.suppress(OSError):  # where no folder can be made, SQLite complains next
            os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        file = self._which_file()
        try:
            connection = sqlite3.connect(
                self.path,
                timeout=LOCK_PATIENCE,
                isolation_level=None,  # a transaction begins where a BEGIN says so
                check_same_thread=False)  # one thread after the other uses it
            # Deleted words are overwritten with zeros, not only marked as deleted.
            connection.execute("PRAGMA secure_delete = ON")
            self._make_tables(connection)
            # Three times as fast. A killed process loses nothing; only a power failure could.
            connection.execute("PRAGMA synchronous = NORMAL")
            with contextlib.suppress(sqlite3.OperationalError):
                # In WAL mode readers don't wait for a writer. The file keeps the mode; a process
                # that can't change it, as another one uses the file, leaves it to the next.
                connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.Error as error:
            self._put_aside(file, error)
            raise type(error)(f"{error}: {self.path}") from error
        return connection

    def _empty_log(self, patience=LOCK_PATIENCE):
        """Empty SQLite's write-ahead log, where deleted words would stay for some time."""
        self._must_empty_log = True
        with self._connection() as database:
            database.execute(f"PRAGMA busy_timeout = {patience * 1000:.0f}")
            (busy, _, _), = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            database.execute(f"PRAGMA busy_timeout = {LOCK_PATIENCE * 1000:.0f}")
        self._must_empty_log = bool(busy)
        if busy:  # somebody reads, like a backup
            self._clear_up_later()

    def _clear_up_later(self):
        """What could not be deleted at the end of a call is tried again until it is, in a thread:
        no caller waits for that."""
        def clear_up():
            while self._to_end or self._must_empty_log:
                time.sleep(2)  # seconds: soon, and yet no load
                with contextlib.suppress(StoreError):
                    for call_sid in list(self._to_end):
                        self.end(call_sid)
                    self._empty_log()

        if not self._clearing_up.is_alive():
            self._clearing_up = threading.Thread(target=clear_up, daemon=True)
            with contextlib.suppress(RuntimeError):  # the machine has no thread left for this one
                self._clearing_up.start()

    @staticmethod
    def _make_tables(connection):
        """Make the tables in a new file; and anew in one of an older version, since that has only
        the words of calls that are on."""
        if connection.execute("PRAGMA user_version").fetchone() != (VERSION,):
            with connection:
                connection.execute("BEGIN IMMEDIATE")  # one process makes them, the others wait
                if connection.execute("PRAGMA user_version").fetchone() != (VERSION,):
                    # "ended" was a table of an older version.
                    for table in "ended", "turns", "calls", "phrases":
                        connection.execute(f"DROP TABLE IF EXISTS {table}")
                    for statement in SCHEMA.split(";"):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version = {VERSION}")


# --- Postgres, for several machines ---------------------------------------------------------------
class PostgresStore(Store):
    """All calls, in the Postgres at this URL. A process uses at most 8 connections, or as many as
    the end of the URL says: ``postgres://user:password@host/name?pool_size=20``."""

    def __init__(self, url, keep_days=0):
        global psycopg  # only those who use Postgres have it
        import psycopg
        url, _, size = url.partition("pool_size=")
        super().__init__(url.rstrip("?&"), keep_days, max(1, int(size or 8) - 1))  # one listens
        self._listener, self._hears = threading.Thread(), False
        self._awaited = weakref.WeakValueDictionary()  # an Event for each turn that is waited for

    def wait(self, call_sid, turn, length, seconds):
        with self._one_writer:
            if not self._listener.is_alive():  # it ends with its connection, and in a fork
                self._listener = threading.Thread(target=self._listen, daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread is left
                    self._listener.start()
        if not self._hears:
            return super().wait(call_sid, turn, length, seconds)
        news = self._awaited.setdefault(f"{call_sid} {turn}", threading.Event())
        for row in self.turns(call_sid, turn, turn):  # it may have come before there was an Event
            if not row["stop"] and len(row["reply"]) == length:
                news.wait(seconds)

    def _listen(self):
        self._hears = False  # a pooler lets no news through: nobody relies on it before the first
        with contextlib.suppress(psycopg.Error), self._connect() as database:
            for news in database.execute("LISTEN turns").connection.notifies():
                self._hears = True
                self._awaited.pop(news.payload, threading.Event()).set()

    def _look(self):
        self._end("check")  # no such call, but it writes

    def _turns_today(self, database):
        database.execute("SELECT pg_advisory_xact_lock(1)")  # only one gets the last of the day
        return super()._turns_today(database)

    @contextlib.contextmanager
    def _connection(self):
        try:
            with super()._connection() as database:
                yield database
        except psycopg.Error as error:
            for idle in self._idle.pop(os.getpid(), []):
                idle.close()  # the server may have closed it already
            raise StoreError(f"{type(error).__name__}: {error}".partition("\n")[0]) from error

    _which_file = staticmethod(os.getpid)  # whose connections they are: a fork has none at first

    @contextlib.contextmanager
    def _writing(self):
        with self._connection() as database, database.transaction():
            yield database

    def _connect(self):
        # A pooler knows no prepared statements. A server that is silent for 3 s counts as lost.
        connection = psycopg.connect(
            self.path, autocommit=True, prepare_threshold=None, connect_timeout=2,
            keepalives_idle=1, keepalives_interval=1, tcp_user_timeout=3000)
        execute = connection.execute
        connection.execute = lambda sql, *values: execute(sql.replace("?", "%s"), *values)
        # As with SQLite, only a crash of the server itself could lose what was just written.
        execute(f"SET synchronous_commit = off; SET lock_timeout = {1000 * LOCK_PATIENCE:.0f};"
                " SET idle_in_transaction_session_timeout = 5000")
        made = f"SELECT 1 FROM pg_proc WHERE proname = 'voice_line_{VERSION}'"
        if not execute(made).rowcount and execute("BEGIN; SELECT pg_advisory_xact_lock(1)") and (
                not execute(made).rowcount):  # one process makes the tables, the others wait
            execute(f"""{SCHEMA}; CREATE FUNCTION voice_line_{VERSION}() RETURNS trigger AS 'BEGIN
                PERFORM pg_notify(''turns'', NEW.call_sid || '' '' || NEW.turn); RETURN NULL; END'
                LANGUAGE plpgsql; CREATE TRIGGER news AFTER UPDATE ON turns FOR EACH ROW
                WHEN (NEW.reply <> OLD.reply OR NEW.stop <> '')
                EXECUTE FUNCTION voice_line_{VERSION}()""")
        connection.commit()
        return connection

    def _empty_log(self, patience=0):
        """How long deleted words stay somewhere is the server's business."""
        self._must_empty_log = False
