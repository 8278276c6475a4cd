"""THINK_AHEAD: Claude is asked before Twilio is sure that the caller has finished.

While the caller speaks, Twilio reports what it has understood so far (partial results). When that
stays the same for a moment, it may be all, so a Guess begins to write a reply to it. If the final
words are the same, the reply is partly or completely there already.

A guess is a turn of a *shadow call*, whose CallSid is the call's with a "~" at its end. Before
``/talking`` begins a turn, ``confirm`` moves a correct guess into the call, under the token of this
delivery. To the core it then looks like a delivery that has arrived before. A wrong guess is
deleted: its Writer stops, and nobody has heard it.
"""

import contextlib
import hashlib
import logging
import os
import threading
import time
import unicodedata
from dataclasses import dataclass

from flask import copy_current_request_context, g, request

from app import (
    BEFORE_LISTENING,
    FAST,
    number_in_url,
    read_settings,
    setting,
    twilio,
    url,
    what_the_caller_said,
)
from conversation import CallerGone, Writer
from store import CallIsOver, NoTurnIsLeft, Store, StoreError

log = logging.getLogger("voice-claude")

# Words that are unchanged for this long may be complete. With less, partial results that are 0.45 s
# apart would all look stable; and half a second of head start is all that a reply can use.
STABLE = 0.5  # seconds
MOST_GUESSES = 3  # in one turn; each costs a request
DEAD = 1.0  # seconds without a sign of life from the process that writes a guess
SIGNS = 0.2  # seconds between two such signs


@dataclass(frozen=True)
class Settings:
    think_ahead: str = setting("no", "yes", "yes or no")


class Guess(Writer):
    """Writes a reply to words that may not be all. It uses no tool before that is known."""

    def __init__(self, line, call_sid: str, turn: int, row_id: int):
        super().__init__(line, call_sid, turn, row_id)
        self.name, self.turn = f"call {call_sid} guess", turn

    def is_confirmed(self) -> bool:
        """Whether the caller has said no more than these words. Raises CallerGone once it is known
        to be wrong."""
        rows = self.line.store.sql("SELECT call_sid FROM turns WHERE id = ?", self.row_id)
        if not rows:
            raise CallerGone
        if rows[0]["call_sid"] != self.call_sid:
            return False
        self.name = f"call {self.call_sid} turn {self.turn}"
        return True

    def answer(self) -> str:
        try:
            return super().answer()
        except Exception:
            if not self.is_confirmed():  # then Claude is asked again when Twilio asks
                self.line.store.sql("DELETE FROM turns WHERE id = ? AND call_sid <> ?",
                                    self.row_id, self.call_sid)
            raise

    def use(self, name, tool_input):
        while not self.is_confirmed():
            if self.row_id not in self.line.store.growing:
                raise CallerGone
            time.sleep(0.05)
        return super().use(name, tool_input)

    def keep(self, text, stop=None):
        super().keep(text, stop)
        if stop:
            with contextlib.suppress(StoreError, CallerGone):
                self.is_confirmed()  # so that the log says which turn it is, if it is one

    def show_life(self) -> None:
        """Until it is confirmed, show more often than a Writer that this process is alive."""
        with contextlib.suppress(StoreError, CallerGone):
            while not self.is_confirmed() and self.line.store.grow(self.row_id, ""):
                time.sleep(SIGNS)


def comparable(words: str) -> str:
    """A hash of words, so that the database holds none of them. Case, punctuation and white space
    make no difference."""
    letters = "".join(letter for letter in words.casefold()
                      if unicodedata.category(letter)[0] not in "PZC")
    return hashlib.sha256(letters.encode()).hexdigest()


def activate(line) -> str | None:
    read_settings(Settings, os.environ)
    if "web_search" in line.extras:  # it would search for words that may not be all
        return "think_ahead (off, because of WEB_SEARCHES)"
    settings = line.settings
    Store.extra_tables["hearing"] = (  # one row for the turn that the caller is speaking
        "after INTEGER NOT NULL, number INTEGER NOT NULL, so_far TEXT NOT NULL,"
        " began DOUBLE PRECISION NOT NULL, heard_at DOUBLE PRECISION NOT NULL,"
        " guesses INTEGER NOT NULL DEFAULT 0, guessed_at DOUBLE PRECISION, UNIQUE (call_sid)")
    Store.extra_tables["ahead"] = "turn INTEGER NOT NULL, seconds DOUBLE PRECISION NOT NULL"

    def last_turn(call_sid: str) -> int:
        return line.store.sql("SELECT COALESCE(MAX(turn), 0) AS last FROM turns"
                              " WHERE call_sid = ?", call_sid)[0]["last"]

    def ask_for_partial_results(gather) -> None:
        """The URL says which turn and which <Gather> the partial results belong to."""
        with contextlib.suppress(StoreError):
            after = last_turn(request.values["CallSid"])
            silences = min(number_in_url("silences"), 9)
            gather.attrs["partialResultCallback"] = url("listening", after=after, silences=silences)

    @twilio.post("/listening")
    def listening():
        """The caller is still speaking, or has just stopped. Nobody waits for the answer."""
        words = request.form.get("UnstableSpeechResult") or request.form.get(
            "StableSpeechResult", "")
        count, began = len(words.split()), time.time() - len(words.split()) / FAST
        # Twilio counts from 0 for each <Gather>, which listens for a minute at most.
        number = 10_000 * number_in_url("silences") + min(
            abs(request.form.get("SequenceNumber", 0, type=int)), 9999)
        call_sid, so_far = request.values["CallSid"], comparable(words)
        # What goes wrong here costs nothing but a guess. RuntimeError: no thread is left.
        with contextlib.suppress(StoreError, RuntimeError):
            # One word is rarely the whole utterance.
            if line.claude and count and hear(call_sid, number, so_far, began) and count > 1:
                threading.Thread(target=copy_current_request_context(wait_and_guess), daemon=True,
                                 args=[call_sid, so_far, words]).start()
        return "", 204

    def wait_and_guess(call_sid: str, so_far: str, words: str) -> None:
        """Begin a guess, if these words stay the same for a moment."""
        time.sleep(STABLE)
        with contextlib.suppress(StoreError, NoTurnIsLeft, CallIsOver):
            if guess := make_guess(call_sid, so_far, words):
                threading.Thread(target=guess.write).start()
                guess.show_life()

    def hear(call_sid: str, number: int, so_far: str, began: float) -> bool:
        """Note what the caller has said so far. Returns whether it is news."""
        after, now = number_in_url("after"), time.time()
        with line.store.transaction() as database:
            if line.store.begin(call_sid)["ended"] or last_turn(call_sid) != after:
                return False
            row = database.execute("SELECT * FROM hearing WHERE call_sid = ?",
                                   [call_sid]).fetchone()
            if not row or row["after"] != after:
                database.execute("DELETE FROM hearing WHERE call_sid = ?", [call_sid])
                database.execute("INSERT INTO hearing (call_sid, after, number, so_far, began,"
                                 " heard_at) VALUES (?, ?, ?, ?, ?, ?)",
                                 [call_sid, after, number, so_far, began, now])
            elif row["number"] > number:
                return False
            else:
                database.execute("UPDATE hearing SET number = ?, so_far = ?, heard_at = ?"
                                 " WHERE call_sid = ?", [number, so_far, now, call_sid])
            delete_guesses(call_sid, but=so_far)
            return True

    def make_guess(call_sid: str, so_far: str, words: str) -> Guess | None:
        with line.store.transaction() as database:
            call = line.store.begin(call_sid)  # first: on Postgres, this locks the call
            row = database.execute("SELECT * FROM hearing WHERE call_sid = ?",
                                   [call_sid]).fetchone()
            if not row or row["so_far"] != so_far or row["guesses"] >= MOST_GUESSES or (
                    row["after"] >= settings.max_turns or call["ended"]):
                return None
            _, row_id = line.store.turn(call_sid + "~", so_far, words, row["began"],
                                        settings.max_turns, settings.max_turns_a_day)
            if row_id is None:  # there is such a guess already
                return None
            database.execute("UPDATE hearing SET guesses = guesses + 1, guessed_at = ?"
                             " WHERE call_sid = ?", [time.time(), call_sid])
            return Guess(line, call_sid, row["after"] + 1, row_id)

    def delete_guesses(call_sid: str, but: str = "") -> None:
        if line.store.sql("DELETE FROM turns WHERE call_sid = ? AND delivery <> ?",
                          call_sid + "~", but):
            line.store.wal_holds_words = True

    @twilio.before_request
    def confirm() -> None:
        """The final words are there: make the guess with these words a turn, and delete all other
        guesses. At the end of the call, delete all."""
        call_sid, words = request.values["CallSid"], what_the_caller_said()
        delivery = request.headers.get("I-Twilio-Idempotency-Token")
        if request.endpoint == "twilio.status_callback":
            words = delivery = ""
        elif request.endpoint != "twilio.talking" or number_in_url("turn") or not words:
            return
        # Without a database there is no guess; but the end of the call is to be reported again.
        expected = [StoreError] if request.endpoint != "twilio.status_callback" else []
        with contextlib.suppress(*expected), line.store.transaction() as database:
            line.store.begin(call_sid)  # first: on Postgres, this locks the call
            now, hearing = time.time(), database.execute(
                "SELECT * FROM hearing WHERE call_sid = ? AND after = ?",
                [call_sid, last_turn(call_sid)]).fetchone()
            guess = database.execute(
                "SELECT * FROM turns WHERE call_sid = ? AND delivery = ?"
                " AND (stop IS NOT NULL OR touched > ?)",
                [call_sid + "~", comparable(words), now - DEAD]).fetchone()
            if hearing and words:
                g.spoke_at = hearing["began"]
                log.info("call %s: the last partial result came %d ms before Twilio asked",
                         call_sid, 1000 * (now - hearing["heard_at"]))
            if guess and delivery and hearing and hearing["guessed_at"]:
                come_true(database, call_sid, guess, words, delivery, hearing)
            delete_guesses(call_sid)
            database.execute("DELETE FROM hearing WHERE call_sid = ?", [call_sid])

    def come_true(database, call_sid, guess, words, delivery, hearing) -> None:
        began, ahead = hearing["began"], time.time() - hearing["guessed_at"]
        # So that ``turns_today`` doesn't count it twice.
        database.execute("UPDATE turns SET spoke_at = 0 WHERE id = ?", [guess["id"]])
        turn, row_id = line.store.turn(call_sid, delivery, words, began,
                                       settings.max_turns, settings.max_turns_a_day)
        if row_id is None:
            return  # this delivery has arrived before
        line.store.growing.discard(row_id)
        database.execute("DELETE FROM turns WHERE id = ?", [row_id])
        database.execute("UPDATE turns SET call_sid = ?, turn = ?, delivery = ?, words = ?,"
                         " spoke_at = ? WHERE id = ?",
                         [call_sid, turn, delivery, words, began, guess["id"]])
        database.execute("INSERT INTO ahead (call_sid, turn, seconds) VALUES (?, ?, ?)",
                         [call_sid, turn, ahead])
        log.info("call %s turn %d: begun %d ms before Twilio asked", call_sid, turn, 1000 * ahead)

    BEFORE_LISTENING.append(ask_for_partial_results)
    return None
