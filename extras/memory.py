"""KEEP_DAYS: the words of a call are kept for so many days, and Claude remembers them when the same
caller calls again. With it Claude has the tool ``forget_me``.

Numbers can be faked, so a caller is remembered only if the number was verified in both calls: by
the PIN, or without one by the phone companies (``StirVerstat``).
"""

import contextlib
import os
import re
import time
from dataclasses import dataclass
from datetime import datetime

import anthropic
from flask import request

from app import NUMBER, WITHHELD, read_settings, setting, twilio, who_calls
from conversation import HISTORY_STEP, TOOLS, running
from store import A_DAY, Store, StoreError

# Only this value says that the caller has the right to the number
# (https://www.twilio.com/docs/voice/trusted-calling-with-shakenstir).
PROVED = "TN-Validation-Passed-A"


@dataclass(frozen=True)
class Settings:
    keep_days: int = setting(0, r"\d{1,4}", "a whole number of days", make=int)


def activate(line) -> str:
    keep_days = read_settings(Settings, os.environ).keep_days
    keep = round(keep_days * A_DAY)
    Store.extra_tables["callers"] = (
        "number TEXT NOT NULL, trusted INTEGER NOT NULL DEFAULT 0, UNIQUE (call_sid)")

    @twilio.before_request
    def note_who_calls() -> None:
        """When a call begins, and the PIN has been right if there is one."""
        if request.endpoint != "twilio.call_comes_in":
            return
        call_sid, number = request.values["CallSid"], who_calls()
        # A greeting needs no database. Without one, this call is not kept.
        with contextlib.suppress(StoreError), line.store.transaction() as database:
            if not line.store.begin(call_sid)["keep"]:  # this isn't a second delivery
                database.execute("UPDATE calls SET keep = ?, forget_at = forget_at + ?"
                                 " WHERE call_sid = ? AND ended IS NULL", [keep, keep, call_sid])
            if not re.fullmatch(NUMBER, number) or number in WITHHELD:
                return
            if "pins" in Store.extra_tables:
                trusted = database.execute("SELECT 1 FROM pins WHERE call_sid = ?",
                                           [call_sid]).fetchone() is not None
            else:
                trusted = request.values.get("StirVerstat") == PROVED
            database.execute("INSERT INTO callers (call_sid, number, trusted) VALUES (?, ?, ?)"
                             " ON CONFLICT (call_sid) DO UPDATE SET trusted = excluded.trusted",
                             [call_sid, number, int(trusted)])

    line.history = with_earlier_calls(line, line.history)
    TOOLS.append(forget_me)
    return f"memory (words kept for {keep_days} day{'s' * (keep_days > 1)})"


def with_earlier_calls(line, history):
    """``history``, with the turns of the caller's earlier calls before those of this call."""
    def remembered(call_sid: str, turns: list[dict]) -> list[dict]:
        turns = history(call_sid, turns)
        if len(turns) > HISTORY_STEP:
            return turns
        rows = line.store.sql(
            "SELECT turns.*, calls.began FROM callers AS this JOIN callers AS other"
            " ON other.number = this.number AND other.trusted = 1 AND this.trusted = 1"
            " AND other.call_sid <> this.call_sid"
            " JOIN calls ON calls.call_sid = other.call_sid"
            " JOIN turns ON turns.call_sid = other.call_sid AND words <> ''"
            " WHERE this.call_sid = ? ORDER BY calls.began DESC, turn DESC LIMIT ?",
            call_sid, HISTORY_STEP)
        earlier = [dict(row) for row in rows][::-1]
        if not earlier:
            return turns
        for turn, later in zip(earlier, [*earlier[1:], None]):
            if not later or later["call_sid"] != turn["call_sid"]:
                turn["last_part"] = None  # nobody interrupted the last reply of a call
        for before, turn in zip([None, *earlier], earlier):
            if not before or before["call_sid"] != turn["call_sid"]:
                day = datetime.fromtimestamp(turn["began"])
                turn["words"] = f"[A call on {day:%A, %d %B %Y}.] {turn['words']}"
        turns[0] = {**turns[0], "words": f"[The call of now begins.] {turns[0]['words']}"}
        return earlier + turns

    return remembered


@anthropic.beta_tool
def forget_me() -> str:
    """Delete all that is kept of what the caller has said, in this call and in earlier ones. Use it
    when the caller asks to be forgotten, and is sure."""
    writer = running.writer
    store, call_sid = writer.line.store, writer.call_sid
    theirs = ("call_sid IN (SELECT ? UNION SELECT other.call_sid FROM callers AS this JOIN callers"
              " AS other ON other.number = this.number WHERE this.call_sid = ?"
              " AND this.trusted = 1)")
    with store.transaction() as database:
        # This turn's own words go when the call ends, as does what is said from now on.
        database.execute("UPDATE turns SET words = '', reply = '', stop = 'forgotten'"
                         f" WHERE {theirs} AND id <> ?", [call_sid, call_sid, writer.row_id])
        database.execute(f"UPDATE calls SET keep = 0, forget_at = CASE WHEN ended IS NULL"
                         f" THEN forget_at - keep ELSE ? END WHERE {theirs}",
                         [time.time(), call_sid, call_sid])
        database.execute(f"DELETE FROM callers WHERE {theirs}", [call_sid, call_sid])
        store.wal_holds_words = True
    store.sweep()
    return "What is known to be this caller's is deleted, and this call will be when it ends."
