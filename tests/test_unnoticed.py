"""What could break without anybody noticing at once.

Only a caller in a rare call would hear it, or the owner would see it much later. The tests make
calls, send requests, read the log, and read or change the database file as another process could;
they know nothing of how the app is made.
"""

import contextlib
import http.client
import json
import os
import pathlib
import re
import signal
import socket
import sqlite3
import tempfile
import time
import urllib.error
import urllib.request
from urllib.parse import urldefrag, urlencode, urljoin
from xml.etree import ElementTree

import pytest

from tests.claude import THOUGHTS, Reply, Thinking, Tool
from tests.conftest import PROXY, PUBLIC_URL, TOKEN, in_thread, let_time_pass, meanwhile, wait_until
from tests.phone import sign

SORRY = "Sorry, something went wrong at my end. Could you say that again?"
FIRST = "This is the first sentence."
A_DAY = 24 * 60 * 60  # seconds


def post(phone, path, params=(), token=None):
    """One signed request, as Twilio makes it for this call; returns the answer as it came."""
    return phone.request("POST", path, {**phone.params, **dict(params)}, token or "")


@pytest.fixture(scope="module")
def app(stage):
    """An app with a log and a database of its own: some of these tests spoil both."""
    with stage.other_app(MAX_TURNS="500") as app:
        yield app


def get(app, path, method="GET"):
    """A request that nobody signed; returns status and body."""
    request = urllib.request.Request(app.url + path, method=method, headers=PROXY)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@contextlib.contextmanager
def another_process(path):
    """The database file, as another process opens it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=20)) as database:
        # Or what this test moves inside the file would leave its trace there.
        database.execute("PRAGMA secure_delete = ON")
        yield database


def tables(database):
    """The names of the app's tables; SQLite's own begin with "sqlite_"."""
    names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    return [name for (name,) in names if not name.startswith("sqlite_")]


def everything_in(app):
    """All bytes of the database's files."""
    files = pathlib.Path(app.database).parent.glob(pathlib.Path(app.database).name + "*")
    return b"".join(path.read_bytes() for path in files)


# --- Long calls and long replies ------------------------------------------------------------------


def test_claude_never_forgets_the_last_twenty_turns(stage, claude, phone):
    phone.call()
    for turn in range(1, 46):
        phone.say(f"This is number {turn} of many.")
        (request,) = claude.asked(f"This is number {turn} of many.")
        earlier = [words for role, words in request.messages[:-1] if role == "user"]
        newest = [f"This is number {number} of many." for number in range(1, turn)][-20:]
        assert earlier[len(earlier) - len(newest) :] == newest, turn


@meanwhile
def test_a_reply_may_take_longer_than_any_sentence(stage):
    """No sentence takes more than two seconds, all of them take 35."""
    written = " ".join(f"This is sentence number {number}." for number in range(10, 30))
    stage.claude.when("Tell me in 35 seconds.", Reply(written, pace=len(written) / 4 / 35))
    phone = stage.phone()
    phone.call()
    assert phone.say("Tell me in 35 seconds.") == written


@pytest.mark.parametrize(
    "sentence",
    [
        "这是一个很长很长的句子就是这样。",
        "这是一个很长很长的句子就是这样。 ",
        "这是一个很长很长的句子还没有完 ",
        "这是一个很长很长的句子还没有完",
    ],
    ids=["no spaces", "spaces", "spaces only", "neither"],
)
def test_long_chinese_replies_fit_into_what_twilio_takes(phone, claude, sentence):
    words = f"Speak Chinese like {sentence!r}."
    claude.when(words, Reply(sentence * 80))
    phone.call()
    phone.say(words, token="the same")
    heard = phone.say(words, token="the same")  # all is there by now, and comes in one answer
    assert heard.replace(" ", "") == (sentence * 80).replace(" ", "")
    assert phone.warnings == [], "Twilio complains of a <Say> that is too long"


def test_clocks_and_watches_are_not_read_out(phone, claude):
    clocks = "\u231a \u231b \u23e9 \u23ea \u23f0 \u23f1 \u23f2 \u23f3 \u23f0\ufe0f \u23fa"
    claude.when("Is it late?", Reply(f"It is {clocks} nine o'clock."))
    phone.call()
    assert phone.say("Is it late?") == "It is nine o'clock."


# --- What Claude sends ----------------------------------------------------------------------------


def events(*events):
    """A stream with these events, as bytes."""
    return "".join(f"event: some\ndata: {json.dumps(event)}\n\n" for event in events).encode()


def text(words):
    return {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": words},
    }


def usage(**counts):
    return {"type": "message_start", "message": {"id": "msg_1", "content": [], "usage": counts}}


BEGIN = usage(input_tokens=1, output_tokens=1)
BLOCK = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
END = {
    "type": "message_delta",
    "delta": {"stop_reason": "end_turn", "stop_sequence": None},
    "usage": {"output_tokens": 9, "input_tokens": None, "server_tool_use": None},
}

UNKNOWN = {
    "an event of another kind": {"type": "future_event", "index": 0, "delta": ["?"], "usage": 7},
    "a block of another kind": {
        "type": "content_block_start",
        "index": 1,
        "content_block": {"type": "future"},
    },
    "a delta of another kind": {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "future_delta", "x": "?"},
    },
    "an event with more in it": {**text(""), "future": {"text": "?"}},
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_claude_may_send_some_day_disturbs_nobody(phone, claude, kind):
    claude.when(
        f"Send {kind}.",
        Reply(body=events(BEGIN, BLOCK, text(FIRST), UNKNOWN[kind], text(" And another."), END)),
    )
    phone.call()
    assert phone.say(f"Send {kind}.") == f"{FIRST} And another."


BROKEN = {
    "no delta": {"type": "content_block_delta", "index": 0},
    "a delta that is null": {"type": "content_block_delta", "index": 0, "delta": None},
    "text that is a number": {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": 7},
    },
    "a list": ["content_block_delta"],
    "null": None,
    "a start without a message": {"type": "message_start"},
    "an error without a word": {"type": "error"},
    "an end without a reason": {"type": "message_delta", "usage": {"output_tokens": 1}},
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("before", ["", FIRST], ids=["at once", "in mid-reply"])
def test_an_event_that_makes_no_sense_ends_the_reply_and_not_the_call(stage, app, kind, before):
    words = f"Send {kind} after {before!r}."
    stage.claude.when(
        words, Reply(body=events(BEGIN, BLOCK, text(f"{before} "), BROKEN[kind], text("Late."), END))
    )
    phone = stage.phone(app)
    phone.call()
    assert phone.say(words) == f"{before} {SORRY}".strip(), "and nobody waits in vain"
    wait_until(lambda: re.search(rf"INFO call {phone.call_sid} turn 1: .*request", app.log()))
    assert phone.say("And now?") == "You said: And now?"
    assert phone.warnings == []


def test_what_claude_thinks_is_never_heard_kept_or_sent_again(phone, stage, claude):
    claude.when(
        "Think first.",
        Reply("I have thought.", thinking=True, blocks=[Thinking(), " And thought again."]),
    )
    phone.call()
    assert phone.say("Think first.") == "I have thought. And thought again."
    phone.say("And what was it?")
    thought = THOUGHTS.split(".")[0]
    assert thought not in json.dumps(claude.asked("And what was it?")[0].body)
    assert thought.encode() not in everything_in(stage.app)


@pytest.mark.parametrize(
    "behind", [[" One more thing."], [Tool("look_up", {"what": "a word"})]], ids=["text", "a tool"]
)
def test_whatever_stands_behind_the_tool_the_call_ends(phone, claude, behind):
    words = f"Good bye, {behind}."
    claude.when(words, Reply("It was nice.", blocks=[Tool("hang_up"), *behind], then=Reply("")))
    phone.call()
    assert phone.say(words) in ("It was nice.", "It was nice. One more thing.")
    assert phone.ended == "hangup"


def test_tokens_that_were_not_counted_disturb_nobody(phone, stage, claude):
    counts = usage(
        input_tokens=None,
        cache_creation_input_tokens=None,
        cache_read_input_tokens=None,
        output_tokens=1,
    )
    claude.when("Don't count.", Reply(body=events(counts, BLOCK, text(FIRST), END)))
    phone.call()
    assert phone.say("Don't count.") == FIRST
    wait_until(
        lambda: re.search(rf"INFO call {phone.call_sid} turn 1: .*end_turn", stage.app.log())
    )


def test_a_reply_may_be_long_and_not_endless(phone, claude):
    phone.call()
    phone.say("How long may that be?")
    (request,) = claude.asked("How long may that be?")
    assert 1000 <= request.body["max_tokens"] <= 4000, (
        "thinking counts too; and ten minutes' talk is enough"
    )


# --- The way to Claude ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble",
    [Reply(error="api_error"), Reply("Here I a", error="api_error"), Reply(ending="reset")],
    ids=["an error at once", "an error before a sentence", "a lost connection"],
)
def test_what_nobody_has_heard_is_tried_again(phone, claude, trouble):
    words = f"Try {trouble}."
    claude.when(words, trouble, Reply("Here I am again."))
    phone.call()
    assert phone.say(words) == "Here I am again."
    assert len(claude.asked(words)) == 2


@meanwhile
def test_an_address_that_swallows_connections_is_given_up_in_time(stage):
    with contextlib.ExitStack() as stack:
        abyss = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1))
        for _ in range(
            8
        ):  # nobody accepts them: its queue is full, and who comes next gets no answer
            swallowed = stack.enter_context(socket.socket())
            swallowed.setblocking(False)
            swallowed.connect_ex(abyss.getsockname())
        base = "http://127.0.0.1:%d" % abyss.getsockname()[1]
        with stage.other_app(ANTHROPIC_BASE_URL=base) as app:
            phone = stage.phone(app)
            phone.call()
            began = time.monotonic()
            assert phone.say("Anybody?").endswith(SORRY)
            assert time.monotonic() - began < 20, (
                "twice 5 s; without a limit of its own it would be 30"
            )


@meanwhile
def test_one_process_keeps_its_connection_and_another_gives_up_what_it_left(stage):
    with stage.other_app() as app:
        a_connection_to_claude_outlasts_the_pause_between_two_turns(stage, app)
        a_reply_whose_process_was_killed_is_given_up_soon(stage, app)


def a_connection_to_claude_outlasts_the_pause_between_two_turns(stage, app):
    phone = stage.phone(app)
    phone.call()
    phone.say("Keep the connection.")
    time.sleep(6)  # the HTTP client's own limit is 5
    phone.say("Use the connection.")
    (first,), (second,) = (
        stage.claude.asked("Keep the connection."),
        stage.claude.asked("Use the connection."),
    )
    assert first.connection == second.connection, "a new one would cost 100 ms, in every turn"


# --- Processes ------------------------------------------------------------------------------------


def a_reply_whose_process_was_killed_is_given_up_soon(stage, app):
    begun = "This is the first sentence of a reply whose process will be killed while it is spoken."
    stage.claude.when("Be killed.", Reply(f"{begun} And", ending="stall"))
    phone = stage.phone(app, speaking_rate=5)  # three seconds: time enough to kill it
    phone.call()
    heard = in_thread(lambda: phone.say("Be killed."))
    wait_until(lambda: len(phone.said) > 1, 20)
    os.kill(*app.workers(), signal.SIGKILL)
    killed = time.monotonic()
    heard = heard()
    assert heard.startswith(begun) and heard.endswith(SORRY) and phone.warnings == []
    assert time.monotonic() - killed < 25, "10 s and the pieces around them; 40 s would be dead air"


HIDDEN_URL = "https://hidden.example.com/line"


@meanwhile
def test_a_process_that_cannot_ask_claude_finds_what_another_one_writes(stage):
    shared = f"sqlite:///{stage.app.database}"
    with stage.other_app(
        DATABASE_URL=shared, PUBLIC_URL=HIDDEN_URL, ANTHROPIC_API_KEY=None
    ) as other_app:
        what_another_process_writes_is_found_at_once(stage, other_app)
        the_page_knows_the_public_address_and_the_missing_key(other_app)
        what_is_repeated_fits_into_what_twilio_takes(stage, other_app)


def what_another_process_writes_is_found_at_once(stage, other_app):
    stage.claude.when(
        "Go on elsewhere.", Reply(f"{FIRST} Here comes the second sentence.", pace=40)
    )
    delays = []
    for _ in range(4):  # a busy machine may be slow, but not every time
        here = stage.phone()
        there = stage.phone(other_app, public_url=HIDDEN_URL, CallSid=here.call_sid)
        begun = post(here, "/talking", {"SpeechResult": "Go on elsewhere."})
        redirect = ElementTree.fromstring(begun.body).find("Redirect")
        assert FIRST in begun.body.decode() and redirect is not None
        rest = post(there, HIDDEN_URL + urldefrag(redirect.text).url)
        heard = time.monotonic()
        assert "the second sentence" in rest.body.decode()
        request = stage.claude.asked("Go on elsewhere.")[-1]
        delays.append(heard - wait_until(lambda: request.finished))
    assert min(delays) < 1.0, "half a second until it is written, and a moment until it is seen"


def what_is_repeated_fits_into_what_twilio_takes(stage, other_app):
    words = (
        "这是一个很长很长的句子还没有完" * 60
    )  # not a single space: a piece has to end somewhere
    phone = stage.phone(other_app, public_url=HIDDEN_URL)
    phone.call()
    assert phone.say(words).replace(" ", "").endswith(words)
    assert phone.warnings == []


# --- The database file ----------------------------------------------------------------------------


def test_what_is_forgotten_after_a_day_leaves_no_byte(stage, app):
    unended, ended = stage.phone(app), stage.phone(app)
    for phone in (unended, ended):
        phone.call()
        phone.say("A marmalade sandwich.")
    ended.hang_up()
    assert b"marmalade" in everything_in(app)
    let_time_pass(app, 2 * 3600 + 60)
    assert get(app, "/healthz")[0] == 200
    assert b"marmalade" not in everything_in(app)
    let_time_pass(app, A_DAY)
    assert get(app, "/healthz")[0] == 200
    assert unended.call_sid.encode() not in everything_in(app)
    assert ended.call_sid.encode() not in everything_in(app), "nor does anything grow for ever"


@pytest.mark.parametrize("table", ["calls", "turns"])  # those that the end of a call changes
def test_an_end_that_could_not_be_written_down_is_no_half_end(stage, app, table):
    """A table refuses every change once, as a disk may in the middle of a transaction."""
    phone = stage.phone(app)
    phone.call()
    phone.say("A sandwich, please.")
    with another_process(app.database) as database:
        for change in ("UPDATE", "DELETE"):
            when = f"CREATE TRIGGER no_{change} BEFORE {change} ON {table}"
            database.execute(f"{when} BEGIN SELECT RAISE(ABORT, 'no'); END")
        assert post(phone, "/status_callback", {"CallStatus": "completed"}).status == 503
        assert database.execute("SELECT ended, words FROM calls JOIN turns USING (call_sid) WHERE call_sid = ?",
                                [phone.call_sid]).fetchall() == [(None, "A sandwich, please.")]
        for change in ("UPDATE", "DELETE"):
            database.execute(f"DROP TRIGGER no_{change}")
    assert get(app, "/healthz")[0] == 200  # the next request, whoever makes it
    assert b"sandwich" not in everything_in(app)
    assert phone.say("Is it over?") == "" and phone.ended == "hangup"


def test_a_database_without_its_tables_gets_new_ones(stage, app):
    """As when somebody puts an empty file into its place, without making a new one."""
    phone = stage.phone(app)
    phone.call()
    phone.say("Hello?")
    with another_process(app.database) as database:
        for table in tables(database):
            database.execute(f"DROP TABLE {table}")
        database.execute("PRAGMA user_version = 0")
    heard = [
        phone.say("And now?") for _ in range(10)
    ]  # each open connection may find out on its own
    assert set(heard[:-1]) <= {SORRY, "You said: And now?"} and heard[-1] == "You said: And now?"
    assert phone.warnings == []


def test_a_row_that_makes_no_sense_is_an_apology_and_a_line_in_the_log(stage, app):
    phone = stage.phone(app)
    phone.call()
    phone.say("Hello?")
    with another_process(app.database) as database:
        database.execute(
            "UPDATE turns SET reply = x'00ff', stop = NULL WHERE call_sid = ?", [phone.call_sid]
        )
    errors = app.log().count("ERROR")
    answer = post(phone, "/talking?heard=0&turn=1")
    assert answer.status == 200 and SORRY in answer.body.decode(), "Twilio takes nothing else"
    wait_until(lambda: app.log().count("ERROR") > errors)


@meanwhile
def test_a_process_may_start_while_the_file_is_in_use(stage):
    phone = stage.phone()
    phone.call()
    phone.say("Make the tables.")  # or the first to need them would wait for the lock
    with tempfile.TemporaryDirectory() as folder:
        copy = f"{folder}/copy.db"
        with another_process(stage.app.database) as database, another_process(copy) as in_use:
            database.backup(in_use)
            in_use.execute("PRAGMA journal_mode = DELETE")  # as a tool for backups may leave it
            with stage.other_app(DATABASE_URL=f"sqlite:///{copy}") as app:
                app.database = copy
                phone = stage.phone(app)
                phone.call()
                in_use.execute("BEGIN IMMEDIATE")
                heard = in_thread(lambda: phone.say("Are you there?"))
                time.sleep(0.7)  # the words come meanwhile; longer waits are another test's
                in_use.execute("ROLLBACK")
                assert heard() == "You said: Are you there?"
                the_file_is_locked(stage, app)


def the_file_is_locked(stage, app):
    """Nobody waits longer than the lock is worth: Twilio's 15 s are for Claude."""
    phone = stage.phone(app)
    phone.call()
    phone.say("Hello?")
    with another_process(app.database) as database:
        database.execute("BEGIN IMMEDIATE")
        answers = {
            "words": lambda: phone.say("Is it locked?"),
            "the end": lambda: post(phone, "/status_callback", {"CallStatus": "completed"}),
            "health": lambda: get(app, "/healthz"),
        }
        for name, answer in answers.items():
            began = time.monotonic()
            answer()
            assert time.monotonic() - began < 5, name
    other = stage.phone(app)
    other.call()
    assert other.say("And now?") == "You said: And now?"


# --- For the owner --------------------------------------------------------------------------------


def the_page_knows_the_public_address_and_the_missing_key(app):
    status, page = get(app, "/")
    assert status == 200 and "ANTHROPIC_API_KEY" in page
    for path in ("/", "/talking", "/status_callback"):
        assert re.search(rf"{re.escape(HIDDEN_URL + path)}#rc=\S+\n", page)
    assert "127.0.0.1" not in page, "that isn't where Twilio finds it"


def test_the_page_takes_its_address_from_the_request_and_finds_no_fault(stage):
    status, page = get(stage.app, "/")
    assert status == 200 and "ANTHROPIC_API_KEY" not in page
    for path in ("/", "/talking", "/status_callback"):
        assert re.search(rf"https://127\.0\.0\.1:{stage.app.port}{path}#rc=\S+\n", page)


def test_a_look_whether_it_runs_needs_no_body(stage):
    assert get(stage.app, "/", "HEAD") == (200, "")


def test_twilios_errors_are_in_the_log(phone, stage):
    phone.call()
    answer = post(phone, "/talking", {"ErrorCode": "11200", "ErrorUrl": f"{PUBLIC_URL}/talking"})
    assert answer.status == 200 and SORRY in answer.body.decode()
    wait_until(lambda: re.search(rf"ERROR .*{phone.call_sid}.*11200", stage.app.log()))


def test_a_proxy_may_be_another_machine(stage):
    """gunicorn itself takes the scheme from a proxy on the same machine only."""
    params = {"CallSid": "CA1", "From": "+15551230001", "CallStatus": "ringing"}
    headers = {
        "Host": "10.0.0.7",
        "X-Forwarded-Host": "line.example.com",
        "X-Forwarded-Proto": "https",
    }
    headers["X-Twilio-Signature"] = sign(TOKEN, f"{PUBLIC_URL}/", params)
    headers["Content-Type"] = "application/x-www-form-urlencoded"
    elsewhere = ("127.0.0.2", 0)
    connection = http.client.HTTPConnection(
        "127.0.0.1", stage.app.port, timeout=20, source_address=elsewhere
    )
    with contextlib.closing(connection):
        connection.request("POST", "/", urlencode(params), headers)
        assert connection.getresponse().status == 200
