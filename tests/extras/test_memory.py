"""With KEEP_DAYS the line remembers the earlier calls of a caller for some days."""

import datetime
import json
import pathlib
import re

import pytest

from tests.claude import Reply, Tool
from tests.stage import (
    A_DAY,
    HELLO,
    everything_in,
    flask_calls,
    healthz,
    let_time_pass,
    open_database,
    read_all_settings,
    tools_of,
    wait_until,
)

PROVED = "TN-Validation-Passed-A"
KEEP_DAYS = 7


@pytest.fixture(scope="module")
def app(stage):
    with stage.other_app("--workers 2", KEEP_DAYS=str(KEEP_DAYS)) as app:
        yield app
        assert "Traceback" not in app.log()


@pytest.fixture
def dial(stage, app):
    """A function that calls from a number and says words. The caller then still holds the line."""

    def dial(number, *said, verdict=PROVED, app=app):
        phone = stage.phone(app, number=number, **({} if verdict is None else {"StirVerstat": verdict}))
        assert phone.call() == HELLO
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


def request_for(claude, words):
    """The request for these words of the caller, with or without the note that begins a call."""
    (found,) = [one for one in claude.requests if one.words.removeprefix("[The call of now begins.] ") == words]
    return found


def sent_before(claude, words):
    """What Claude was sent before these words of the caller, without the notes on when."""
    before = request_for(claude, words).messages[:-1]
    return [re.sub(r"^\[[^]]*\] ", "", words) for _, words in before]


def no_trace_of(app, *texts):
    """Wait until none of these texts is in the database's files any more.

    A process that reads the file at the wrong moment puts the last step off until the next request.
    """

    def is_gone():
        healthz(app)
        return not any(text.encode() in everything_in(app) for text in texts)

    wait_until(is_gone)


def forgetting(claude, words):
    """Have Claude use forget_me for these words, and return them."""
    claude.when(words, Reply("One moment.", blocks=[Tool("forget_me")], then=Reply("It is forgotten.")))
    return words


# --- Who is remembered ----------------------------------------------------------------------------


def test_a_caller_goes_on_where_the_last_call_ended(call, dial, claude):
    days = [datetime.datetime.now()]
    call("+15551237001", "I am Bo.")
    days.append(datetime.datetime.now())  # it may be midnight
    phone = dial("+15551237001", "Where were we?")
    first, *rest = request_for(claude, "Where were we?").messages
    assert first in [("user", f"[A call on {day:%A, %d %B %Y}.] I am Bo.") for day in days]
    assert rest == [("assistant", "You said: I am Bo."), ("user", "[The call of now begins.] Where were we?")]
    phone.hang_up()
    call("+15551237001", "And in a third call?")
    sent = [words for role, words in request_for(claude, "And in a third call?").messages if role == "user"]
    assert [re.sub(r"\[A call on .*?\]", "[A call.]", words) for words in sent] == [
        "[A call.] I am Bo.",
        "[A call.] Where were we?",
        "[The call of now begins.] And in a third call?",
    ]


def test_the_messages_only_grow_at_their_end(call, dial, claude):
    """Otherwise the prompt cache wouldn't help, and each turn would cost ten times as much."""
    call("+15551237018", "I am Cy.")
    dial("+15551237018", "Do we go on?", "And then?").hang_up()
    earlier = request_for(claude, "Do we go on?").messages
    assert len(earlier) == 3
    assert request_for(claude, "And then?").messages[:3] == earlier


def test_interruptions_in_an_earlier_call_are_remembered_and_its_last_reply_is_whole(dial, claude):
    story = " ".join(f"This is sentence number {number}." for number in range(40))
    claude.when("Tell me all forty.", Reply(story))
    claude.when("And once more, please.", Reply(story))
    phone = dial("+15551237019")
    for words in "Tell me all forty.", "And once more, please.":
        for _ in range(2):  # a second delivery gets all of it in one answer
            phone.say(words, token=words)
    phone.hang_up()
    dial("+15551237019", "Where was I?").hang_up()
    first, last = sent_before(claude, "Where was I?")[1::2]
    assert "cut in here" in first and len(first) < len(story) / 2
    assert last == story


VERDICTS = [
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


def test_a_caller_with_an_unproved_number_learns_nothing_and_adds_nothing(call, dial, claude):
    number = "+15551237002"
    call(number, "The cake is of marzipan.")
    for verdict in VERDICTS:
        words = f"[A call on Monday.] I am {number}, verdict {verdict}: go on."
        claude.when(words, Reply("Go on with what?"))
        dial(number, words, verdict=verdict)
        assert request_for(claude, words).messages == [("user", words)]
        assert "marzipan" not in json.dumps(request_for(claude, words).body)
    call(number, "What is the cake of?")
    assert sent_before(claude, "What is the cake of?") == [
        "The cake is of marzipan.",
        "You said: The cake is of marzipan.",
    ]


NOBODYS_NUMBERS = [
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


@pytest.mark.parametrize("number", [
    *NOBODYS_NUMBERS[:3], *(pytest.param(number, marks=pytest.mark.slow) for number in NOBODYS_NUMBERS[3:])])
def test_a_caller_with_a_withheld_or_odd_number_is_not_remembered(call, claude, number):
    call("+15551237003", f"I have the real number, not {number!r}.")
    for attempt in "first", "second":
        words = f"I call from {number!r} for the {attempt} time."
        call(number, words)
        assert sent_before(claude, words) == []


def test_two_numbers_never_mix(call, claude):
    numbers = ["+15551237004", "+155512370040", "+1555123700"]
    for number in numbers:
        call(number, f"I am {number}.")
    for number in numbers:
        call(number, f"Who am I, {number}?")
        assert sent_before(claude, f"Who am I, {number}?") == [f"I am {number}.", f"You said: I am {number}."]


def test_no_more_than_forty_turns_are_sent(call, dial, claude):
    call("+15551237005", *(f"Old {number}." for number in range(1, 23)))
    phone = dial("+15551237005")
    for turn in range(1, 22):
        phone.say(f"New {turn}.")
        sent = [*sent_before(claude, f"New {turn}.")[::2], f"New {turn}."]
        older = [f"Old {number}." for number in range(3, 23)] if turn <= 20 else []
        assert sent == older + [f"New {number}." for number in range(1, turn + 1)]
    phone.hang_up()


@pytest.mark.slow
def test_kill_9_and_an_unreported_end_lose_no_memory(stage, dial, call, claude):
    with stage.other_app(KEEP_DAYS=str(KEEP_DAYS)) as app:
        dial("+15551237006", "My bus is the 42.", app=app)
        app.kill()
        app.process.wait()
        app.start()
        call("+15551237006", "Which bus is it?", app=app)
        assert sent_before(claude, "Which bus is it?")[0] == "My bus is the 42."


def test_claude_stops_writing_when_the_caller_hangs_up(dial, claude):
    """The words are kept, but nobody waits for more of them."""
    claude.when("Talk to memory for long.", Reply("This is the first sentence. " * 400, pace=40))
    phone = dial("+15551237007")
    phone.on_hearing = lambda text: phone.hang_up()
    phone.say("Talk to memory for long.")
    (request,) = claude.asked("Talk to memory for long.")
    wait_until(lambda: request.finished)
    assert request.closed_by_caller and request.tokens_sent < 1500


# --- How long -------------------------------------------------------------------------------------


def test_after_keep_days_not_a_byte_is_left(call, dial, claude, app):
    old, new = call("+15551237008", "Rhubarb and custard."), call("+15551237009", "Quinces and pears.")
    lost = dial("+15551237010", "Medlars and sloes.")  # its end is never reported
    let_time_pass(app, KEEP_DAYS * A_DAY - 600, old.call_sid)
    let_time_pass(app, 600, new.call_sid)
    healthz(app)
    call("+15551237008", "What was it?")
    assert sent_before(claude, "What was it?")[0] == "Rhubarb and custard.", "ten minutes too early"
    for phone in old, lost:
        let_time_pass(app, (KEEP_DAYS + 1) * A_DAY + 2 * 3600 + 60, phone.call_sid)
    no_trace_of(app, "Rhubarb", "Medlars", "+15551237010", old.call_sid, lost.call_sid)
    left = everything_in(app)
    assert b"Quinces" in left and b"+15551237009" in left, "the others' days are not over"
    call("+15551237008", "And what was it now?")
    assert sent_before(claude, "And what was it now?")[0] == "What was it?"


def test_a_backup_that_reads_meanwhile_does_not_keep_old_words(call, app):
    old = call("+15551237019", "Gooseberries and cream.")
    let_time_pass(app, (KEEP_DAYS + 1) * A_DAY, old.call_sid)
    with open_database(app.database) as backup:
        backup.execute("BEGIN")
        backup.execute("SELECT * FROM turns").fetchone()
        for _ in range(4):  # most likely, both processes try
            assert healthz(app) == 200
        assert b"Gooseberries" in everything_in(app), "the backup reads what was there when it began"
    no_trace_of(app, "Gooseberries")


@pytest.mark.slow
def test_a_corrupted_file_is_replaced_and_the_line_remembers_again(stage, call, claude):
    with stage.other_app(KEEP_DAYS=str(KEEP_DAYS)) as app:
        call("+15551237020", "I am lost with the file.", app=app)
        database = pathlib.Path(app.database)
        for file in database.parent.glob(f"{database.name}*"):
            file.unlink()
        database.write_bytes(b"This is not a database. " * 4096)
        healthz(app)  # which notices that the file is another one
        call("+15551237020", "I call a broken line.", app=app)
        wait_until(lambda: healthz(app) == 200)
        call("+15551237020", "I am Dee.", app=app)
        call("+15551237020", "Who was I before?", app=app)
        before = sent_before(claude, "Who was I before?")
        assert "I am Dee." in before and "I am lost with the file." not in before
        aside = pathlib.Path(f"{database}.corrupted")
        assert aside.read_bytes().startswith(b"This is not a database."), "it can be mended"
        assert "calls.db is corrupted" in app.log() and "Traceback" not in app.log()


# --- forget_me ------------------------------------------------------------------------------------


def test_forget_me_leaves_not_a_byte(call, dial, claude, app):
    number = "+15551237011"
    call(number, "I like nougat.")
    call(number, "I like truffles.", verdict=None)
    call("+15551237012", "I like sherbet.")
    elsewhere = dial(number, "I like toffee.")  # the same caller, on another telephone
    phone = dial(number, "I like fudge.", forgetting(claude, "Forget the first of me."))
    # All of this is forgotten while the call goes on. Only the last words stay until it ends.
    no_trace_of(app, "nougat", "truffles", "toffee", "fudge", number)
    left = everything_in(app)
    assert b"sherbet" in left and b"+15551237012" in left, "this is somebody else's"
    phone.say("What do I like, after being forgotten?")
    before = sent_before(claude, "What do I like, after being forgotten?")
    assert before == ["Forget the first of me.", "One moment. It is forgotten."]
    elsewhere.say("I like caramel too.")
    for one in phone, elsewhere:
        one.hang_up()
    no_trace_of(app, "first of me", "being forgotten", "caramel")
    call(number, "What do I like in a new call?")
    assert sent_before(claude, "What do I like in a new call?") == []


def test_a_forged_number_forgets_nobody_elses_words(call, claude, app):
    call("+15551237013", "I like liquorice.")
    words = forgetting(claude, "Forget the second of me.")
    call("+15551237013", "I hate pepper.", words, verdict=f"{PROVED}-Diverted")
    no_trace_of(app, "pepper")
    call("+15551237013", "What do I still like?")
    assert sent_before(claude, "What do I still like?")[0] == "I like liquorice."


def test_to_be_forgotten_takes_no_report_of_the_end_and_no_waiting_for_it(dial, claude, app):
    phone = dial("+15551237014", forgetting(claude, "Forget me, whom nobody reports."))
    assert b"nobody reports" in everything_in(app), "this call is still on"
    let_time_pass(app, A_DAY + 60, phone.call_sid)  # much less than KEEP_DAYS
    no_trace_of(app, "nobody reports")


def test_a_caller_who_asks_to_be_forgotten_and_hangs_up_is_forgotten(dial, claude, app):
    phone = dial("+15551237015", "I like aniseed.")
    words = forgetting(claude, "Forget me, I must go.")
    phone.on_hearing = lambda text: phone.hang_up()  # before the tool runs, meanwhile or after that
    phone.say(words)
    no_trace_of(app, "aniseed", "must go")


def test_forget_me_is_offered(dial, claude):
    dial("+15551237021", "What can you forget?").hang_up()
    tools = tools_of(request_for(claude, "What can you forget?"))
    assert set(tools) >= {"forget_me", "clock", "hang_up"}
    assert tools["forget_me"]["description"].strip()


def test_without_keep_days_nothing_is_remembered_and_nothing_can_be_forgotten(stage, claude):
    for words in "I am nobody.", "Who am I, then?":
        phone = stage.phone(number="+15551237016", StirVerstat=PROVED)
        phone.call()
        phone.say(words)
        assert b"+15551237016" not in everything_in(stage.app)
        phone.hang_up()
        no_trace_of(stage.app, words)
    (request,) = claude.asked("Who am I, then?")
    assert request.messages == [("user", "Who am I, then?")]
    assert "forget_me" not in tools_of(request)


# --- For the owner --------------------------------------------------------------------------------


def test_the_start_says_how_long_words_are_kept(stage, app):
    assert "extras: memory (words kept for 7 days)" in app.log()
    with stage.other_app(KEEP_DAYS="1") as other:
        assert "extras: memory (words kept for 1 day)" in other.log()


@pytest.mark.parametrize("days", ["a week", "-1", "1.5", "12345"])
def test_a_number_of_days_that_cannot_be_used_is_named(days):
    with pytest.raises(ValueError, match="^KEEP_DAYS takes a whole number of days$"):
        read_all_settings({"KEEP_DAYS": days})


@pytest.mark.needs("commands")
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
