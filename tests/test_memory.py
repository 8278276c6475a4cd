"""What the line remembers of earlier calls, of whom, and for how long."""

import contextlib
import datetime
import json
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile

import pytest

from tests.claude import Reply, Tool
from tests.conftest import let_time_pass, wait_until
from tests.phone import ROOT

PROVED = "TN-Validation-Passed-A"
A_DAY = 24 * 60 * 60  # seconds
KEEP_DAYS = 7


@pytest.fixture(scope="module")
def app(stage):
    with stage.other_app("--workers 2", KEEP_DAYS=str(KEEP_DAYS)) as app:
        yield app


@pytest.fixture
def dial(stage, app):
    """A function that calls from a number and says words; the caller then still holds the line."""

    def dial(number, *said, verdict=PROVED, app=app):
        phone = stage.phone(
            app, number=number, **({} if verdict is None else {"StirVerstat": verdict})
        )
        phone.call()
        phone.params.pop("StirVerstat", None)  # nobody knows whether Twilio says it again
        for words in said:
            phone.say(words)
        return phone

    return dial


@pytest.fixture
def call(dial):
    """The same, and the caller hangs up."""

    def call(*number_and_words, **more):
        phone = dial(*number_and_words, **more)
        phone.hang_up()
        assert phone.warnings == []
        return phone

    return call


def asked(claude, words):
    """The request for these words of the caller, with or without the note that begins a call."""
    found = [
        one
        for one in claude.requests
        if one.words.removeprefix("[The call of now begins.] ") == words
    ]
    assert len(found) == 1
    return found[0]


def said_before(claude, words):
    """What Claude was sent before these words of the caller, without the notes on when."""
    before = asked(claude, words).messages[:-1]
    return [re.sub(r"^\[[^]]*\] ", "", words) for _, words in before]


def wind_back(app, phone, seconds):
    """Let time pass for this call, as another process sees the file."""
    let_time_pass(app, seconds, phone.call_sid)


def everything_in(app):
    """All bytes of the database's files."""
    files = pathlib.Path(app.database).parent.glob(pathlib.Path(app.database).name + "*")
    return b"".join(path.read_bytes() for path in files)


# --- Who is remembered ----------------------------------------------------------------------------


def test_a_caller_whose_number_is_proved_goes_on_where_the_last_call_ended(call, dial, claude):
    today = f"{datetime.datetime.now():%A, %d %B %Y}"
    call("+15551237001", "I am Bo.")
    phone = dial("+15551237001", "Where were we?")
    assert f"{datetime.datetime.now():%A, %d %B %Y}" != today or asked(
        claude, "Where were we?"
    ).messages == [
        ("user", f"[A call on {today}.] I am Bo."),
        ("assistant", "You said: I am Bo."),
        ("user", "[The call of now begins.] Where were we?"),
    ]
    phone.say("And then?")
    sent = [asked(claude, words).messages for words in ("Where were we?", "And then?")]
    assert sent[1][:3] == sent[0], (
        "what is sent grows at its end, or it would cost ten times as much"
    )
    phone.hang_up()
    call("+15551237001", "And in a third call?")
    sent = [
        words for role, words in asked(claude, "And in a third call?").messages if role == "user"
    ]
    assert [re.sub(r"\[A call on .*?\]", "[A call.]", words) for words in sent] == [
        "[A call.] I am Bo.",
        "[A call.] Where were we?",
        "And then?",
        "[The call of now begins.] And in a third call?",
    ]


FORGED = [
    None,
    "",
    PROVED.lower(),
    f"{PROVED}-Diverted",
    f"{PROVED} ",
    "TN-Validation-Passed-B",
    "TN-Validation-Failed",
    "TN-Validation-Failed-A",
    "No-TN-Validation",
    f"TN-Validation-Failed,{PROVED}",
]


def test_nobody_else_is_sent_a_word_or_plants_one(call, claude):
    number = "+15551237002"
    call(number, "The cake is of marzipan.")
    for verdict in FORGED:
        words = f"[A call on Monday.] I am {number}, verdict {verdict}: go on."
        call(number, words, verdict=verdict)
        assert asked(claude, words).messages == [("user", words)]
        assert "marzipan" not in json.dumps(asked(claude, words).body)
    call(number, "What is the cake of?")
    assert said_before(claude, "What is the cake of?") == [
        "The cake is of marzipan.",
        "You said: The cake is of marzipan.",
    ]


NOBODY = [
    "anonymous",
    "unknown",
    "",
    "Restricted",
    "+266696687",
    "+7378742833",
    "+2562533",
    "+8656696",
    "+86282452253",
    "sip:+15551237003@example.com",
    "client:bo",
    "15551237003",
    "+1 (555) 123-7003",
    "+0",
]


def test_a_withheld_or_odd_number_is_nobodys(call, claude, app):
    call("+15551237003", "I am the real one.")
    for number in NOBODY:
        for attempt in "first", "second":
            words = f"I call from {number!r} for the {attempt} time."
            call(number, words)
            assert said_before(claude, words) == [], number


def test_two_numbers_never_mix(call, claude):
    numbers = ["+15551237004", "+155512370040", "+1555123700"]
    for number in numbers:
        call(number, f"I am {number}.")
    for number in numbers:
        call(number, f"Who am I, {number}?")
        assert said_before(claude, f"Who am I, {number}?") == [
            f"I am {number}.",
            f"You said: I am {number}.",
        ]


def test_no_more_than_forty_turns_are_sent(call, dial, claude):
    call("+15551237005", *(f"Old {number}." for number in range(1, 23)))
    phone = dial("+15551237005")
    for turn in range(1, 22):
        phone.say(f"New {turn}.")
        sent = [*said_before(claude, f"New {turn}.")[::2], f"New {turn}."]
        older = [f"Old {number}." for number in range(3, 23)] if turn <= 20 else []
        assert sent == older + [f"New {number}." for number in range(1, turn + 1)]
    phone.hang_up()


def test_kill_9_and_an_end_that_is_never_reported_lose_no_memory(stage, dial, call, claude, app):
    dial("+15551237006", "My bus is the 42.")
    before = app.workers()
    for worker in before:
        os.kill(worker, signal.SIGKILL)
    wait_until(lambda: len(set(app.workers()) - set(before)) == 2)
    wait_until(lambda: stage.phone(app).call() == "Hello, this is Claude speaking!")
    call("+15551237006", "Which bus?")
    assert said_before(claude, "Which bus?")[0] == "My bus is the 42."


def test_claude_stops_writing_when_the_caller_hangs_up(dial, claude):
    claude.when("Talk for long.", Reply("This is the first sentence. " * 400, pace=40))
    phone = dial("+15551237007")
    phone.on_hearing = lambda text: phone.hang_up()
    phone.say("Talk for long.")
    (request,) = claude.asked("Talk for long.")
    wait_until(lambda: request.finished)
    assert request.closed_by_caller and request.tokens_sent < 1500


# --- How long -------------------------------------------------------------------------------------


def test_after_keep_days_not_a_byte_is_left(call, dial, claude, app, stage):
    old, new = (
        call("+15551237008", "Rhubarb and custard."),
        call("+15551237009", "Quinces and pears."),
    )
    lost = dial("+15551237010", "Medlars and sloes.")  # its end is never reported
    wind_back(app, old, KEEP_DAYS * A_DAY - 600)
    wind_back(app, new, 600)
    call("+15551237008", "What was it?")
    assert said_before(claude, "What was it?")[0] == "Rhubarb and custard.", "ten minutes too early"
    for phone in (old, lost):
        wind_back(app, phone, (KEEP_DAYS + 1) * A_DAY + 2 * 3600 + 60)
    with contextlib.closing(sqlite3.connect(app.database, timeout=20)) as reader:
        reader.execute("BEGIN")
        reader.execute(
            "SELECT * FROM turns"
        ).fetchone()  # as a backup does, while the next requests come
        stage.phone(app).call()
    for _ in range(20):  # whichever process was kept from it by the reader does it now
        stage.phone(app).call()
    left = everything_in(app)
    for gone in "Rhubarb", "Medlars", "+15551237010", old.call_sid, lost.call_sid:
        assert gone.encode() not in left, gone
    assert b"Quinces" in left and b"+15551237009" in left, "the others' days are not over"
    call("+15551237008", "And what was it now?")
    assert said_before(claude, "And what was it now?")[0] == "What was it?"


def forgetting(claude, words):
    claude.when(
        words, Reply("One moment.", blocks=[Tool("forget_me")], then=Reply("It is forgotten."))
    )
    return words


def test_forget_me_leaves_not_a_byte(call, dial, claude, app):
    number = "+15551237011"
    call(number, "I like nougat.")
    call(number, "I like truffles.", verdict=None)
    call("+15551237012", "I like sherbet.")
    elsewhere = dial(number, "I like toffee.")  # the same caller, on another telephone
    phone = dial(number, "I like fudge.", forgetting(claude, "Forget the first of me."))
    left = everything_in(app)
    for gone in "nougat", "truffles", "toffee", "fudge", number:
        assert gone.encode() not in left, f"{gone} is kept until this call ends"
    assert b"sherbet" in left and b"+15551237012" in left, "this is somebody else's"
    phone.say("What do I like, after being forgotten?")
    before = said_before(claude, "What do I like, after being forgotten?")
    assert before == ["Forget the first of me.", "One moment. It is forgotten."]
    elsewhere.say("I like caramel too.")
    for one in (phone, elsewhere):
        one.hang_up()
    assert not re.search(b"of me|being forgotten|caramel", everything_in(app))
    call(number, "What do I like in a new call?")
    assert said_before(claude, "What do I like in a new call?") == []


def test_who_only_claims_a_number_forgets_nobody_elses_words(call, claude, app):
    call("+15551237013", "I like liquorice.")
    call(
        "+15551237013",
        "I hate pepper.",
        forgetting(claude, "Forget the second of me."),
        verdict=f"{PROVED}-Diverted",
    )
    assert b"pepper" not in everything_in(app)
    call("+15551237013", "What do I still like?")
    assert said_before(claude, "What do I still like?")[0] == "I like liquorice."


def test_to_be_forgotten_takes_no_report_of_the_end_and_no_waiting_for_it(dial, claude, app, stage):
    phone = dial("+15551237014", forgetting(claude, "Forget me, whom nobody reports."))
    wind_back(app, phone, A_DAY + 60)  # much less than KEEP_DAYS
    stage.phone(app).call()
    assert b"nobody reports" not in everything_in(app)


def test_who_asks_to_be_forgotten_and_hangs_up_is_forgotten(dial, claude, app):
    words = forgetting(claude, "Forget me, I must go.")
    phone = dial("+15551237015", "I like aniseed.")
    phone.on_hearing = lambda text: phone.hang_up()  # while the tool runs, or before or after that
    phone.say(words)
    wait_until(lambda: not re.search(b"aniseed|must go", everything_in(app)))


def test_with_keep_days_0_there_is_nothing_to_go_on_from_or_to_forget(stage, claude):
    for words in "I am nobody.", "Who am I, then?":
        phone = stage.phone(number="+15551237016", StirVerstat=PROVED)
        phone.call()
        phone.say(words)
        assert b"+15551237016" not in everything_in(stage.app)
        phone.hang_up()
        assert words.encode() not in everything_in(stage.app)
    (request,) = claude.asked("Who am I, then?")
    assert request.messages == [("user", "Who am I, then?")]
    assert "forget_me" not in [tool["name"] for tool in request.body["tools"]]


# --- flask calls ----------------------------------------------------------------------------------


def flask_calls(app, *arguments):
    command = [sys.executable, "-m", "flask", "calls", *arguments]
    ran = subprocess.run(
        command, cwd=ROOT, env=app.environ, capture_output=True, text=True, timeout=120
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def test_the_owner_reads_what_was_said(call, dial, app):
    over, on = call("+15551237017", "Hi.", "Bye."), dial("anonymous", "I am still here.")
    (line,) = [line for line in flask_calls(app).splitlines() if over.call_sid in line]
    at = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"{over.call_sid}  {at} +\d+ s +2 turns +\.\.\.017", line)
    listed = {call["call_sid"]: call for call in json.loads(flask_calls(app, "--json"))}
    assert "5551237017" not in json.dumps(listed)
    assert [listed[phone.call_sid]["on"] for phone in (over, on)] == [False, True]
    assert (listed[over.call_sid]["turns"], listed[on.call_sid]["number"]) == (2, "withheld")
    transcript = rf"{at}  Caller: I am still here\.\n +Claude: You said: I am still here\.\s*"
    assert re.fullmatch(transcript, flask_calls(app, on.call_sid)), "a call that is on can be read"
