"""``flask errand``: the app calls someone, and Claude speaks first, about a purpose."""

import re

import pytest

from tests.account import A_FRIEND, ADDRESS, MINE, NUMBER, RETRIES, TOKEN, Owner, passed_on_to
from tests.claude import HeldBack, Reply
from tests.stage import (
    FASTER,
    HELLO,
    copy_code,
    everything_in,
    flask_command,
    get,
    let_time_pass,
    open_database,
    turns_of,
    wait_until,
)

pytestmark = pytest.mark.needs("commands")  # which talks with Twilio for it

PURPOSE = "Remind them to take the cake out of the oven."
OUTBOUND = {"Direction": "outbound-api", "From": MINE, "To": A_FRIEND}


@pytest.fixture(scope="module")
def app(stage):
    with stage.other_app(module=FASTER, ALLOWED_CALLERS=A_FRIEND, TWILIO_AUTH_TOKEN=TOKEN) as app:
        yield app
        assert "cake" not in app.log() and "Traceback" not in app.log()


@pytest.fixture
def owner(tmp_path, app):
    with Owner(tmp_path, **{"my-line.example.com": passed_on_to(app)}) as owner:
        owner.buy(MINE)
        yield owner


def words_of(purpose):
    """The first turn's words, which begin like this, as Claude is asked them."""
    return f"[The owner of this phone line has you call this person. Speak first. The purpose: {purpose}]"


def bring(stage, app, purpose, to=A_FRIEND, token=None):
    """The signed request of the command; returns the answer."""
    phone = stage.phone(app)
    phone.token = token or phone.token
    return phone.request("POST", "/errand", {"To": to, "Purpose": purpose, "CallSid": "errand"})


def ring(stage, app, name, **more):
    """Someone answers the call; returns the phone and what is heard first."""
    phone = stage.phone(app, CallStatus="in-progress", **{**OUTBOUND, **more})
    return phone, phone.webhook(f"/?errand={name}")


def bring_and_let_claude_write(stage, app, purpose):
    """The same, and Claude has written the reply; returns the name of the call."""
    name = bring(stage, app, purpose).body.decode()
    written = "SELECT reply FROM turns WHERE call_sid = ? AND stop = 'end_turn'"
    with open_database(app.database) as database:
        wait_until(lambda: database.execute(written, [name]).fetchone())
    return name


def test_the_command_brings_the_purpose_and_then_places_the_call(owner, app, claude):
    said = owner.types("errand", A_FRIEND, ADDRESS, PURPOSE, ALLOWED_CALLERS=A_FRIEND)
    assert f"{MINE} is calling {A_FRIEND}: CA{'c' * 32}" in said
    ((what, call),) = owner.done
    assert what == "Calls.json" and (call["from"], call["to"]) == (MINE, A_FRIEND)
    assert re.fullmatch(re.escape(f"{ADDRESS}/?errand=errand-") + f"[0-9a-f]{{32}}{re.escape(RETRIES)}", call["url"])
    assert call["status_callback"] == NUMBER["status_callback"]
    assert wait_until(lambda: claude.asked(words_of(PURPOSE))), "Claude writes while the phone rings"


def test_claude_speaks_first_and_the_person_can_change_the_subject(stage, app, claude):
    purpose = "Ask about photosynthesis."
    claude.when(words_of(purpose), Reply("Hi! Here is my first question. What do plants need light for?"))
    name = bring_and_let_claude_write(stage, app, purpose)
    phone, heard = ring(stage, app, name)
    assert heard == "Hi! Here is my first question. What do plants need light for?"
    assert phone.say("Tell me a joke instead.").endswith("You said: Tell me a joke instead.")
    (request,) = claude.asked("Tell me a joke instead.")
    assert request.messages[0] == ("user", words_of(purpose)) and request.messages[1][1].startswith("Hi!")
    assert turns_of(app, phone, "turn") == [(1,), (2,)]
    assert not any("photosynthesis" in url for url, *_ in phone.webhooks)
    phone.hang_up()
    assert b"photosynthesis" not in everything_in(app)


def test_if_the_words_are_not_ready_the_person_hears_the_greeting(stage, app, claude):
    purpose = "Think for a long time."
    late = HeldBack("Now I know.")
    claude.when(words_of(purpose), late)
    name = bring(stage, app, purpose).body.decode()
    (request,) = wait_until(lambda: claude.asked(words_of(purpose)))
    phone, heard = ring(stage, app, name)
    assert heard == HELLO and phone.listens_to("speech")
    late.begin.set()
    wait_until(lambda: request.finished or request.closed_by_caller)
    assert phone.say("Who is there, please?").endswith("You said: Who is there, please?")
    sent = claude.asked("Who is there, please?")[0].messages
    assert sent == [("user", words_of(purpose)), ("user", "Who is there, please?")], "nobody heard the late words"
    phone.hang_up()


def test_a_second_delivery_hears_the_same(stage, app, claude):
    purpose = "Say it twice."
    claude.when(words_of(purpose), Reply("I say it twice."))
    name = bring_and_let_claude_write(stage, app, purpose)
    phone, heard = ring(stage, app, name)
    assert heard == phone.webhook(f"/?errand={name}") == "I say it twice."
    phone.hang_up()


def test_without_a_call_the_purpose_is_deleted_after_ten_minutes(stage, app, claude):
    name = bring_and_let_claude_write(stage, app, "Water the tarragon.")
    let_time_pass(app, 590, name)
    assert get(app, "/healthz")[0] == 200 and b"tarragon" in everything_in(app)
    let_time_pass(app, 11, name)
    assert get(app, "/healthz")[0] == 200 and b"tarragon" not in everything_in(app)
    phone, heard = ring(stage, app, name)
    assert heard == HELLO, "whoever answers later hears the greeting"
    phone.hang_up()


def test_only_allowed_numbers_are_called(owner, stage, app, claude):
    for allowed in "", "+15551230001":
        said = owner.fails("errand", A_FRIEND, ADDRESS, "Sell them a boat.", ALLOWED_CALLERS=allowed)
        assert said.startswith(f"{A_FRIEND} is not in ALLOWED_CALLERS. An artificial voice may call only people who")
    assert owner.asked == []
    asked = len(claude.requests)
    assert bring(stage, app, "Sell them a boat.", to="+15551230009").status == 403
    assert len(claude.requests) == asked and b"boat" not in everything_in(app)


def test_only_the_owner_brings_a_purpose(stage, app, claude):
    asked = len(claude.requests)
    assert bring(stage, app, "Spend money.", token="another token").status == 403 and len(claude.requests) == asked


def test_an_app_that_takes_no_errands_is_not_asked_to_call(owner):
    said = owner.fails("errand", "+15551230001", ADDRESS, PURPOSE, ALLOWED_CALLERS="+15551230001")
    assert said == "The app takes no errand: look at its log, and at its ALLOWED_CALLERS."


@pytest.mark.needs("pin")
def test_with_a_pin_claude_speaks_after_it(stage, claude):
    purpose = "Tell them after the PIN."
    claude.when(words_of(purpose), Reply("Now I can tell you."))
    with stage.other_app(module=FASTER, ALLOWED_CALLERS=A_FRIEND, PIN="135790") as app:
        name = bring_and_let_claude_write(stage, app, purpose)
        phone, heard = ring(stage, app, name)
        assert heard.startswith("Please key in your PIN") and "tell you" not in heard
        assert phone.press("135790#") == "Now I can tell you."
        phone.hang_up()


def test_without_the_other_commands_there_is_none(tmp_path, app):
    copy = copy_code(tmp_path)
    (copy / "extras/commands.py").unlink()
    status, printed = flask_command("errand", A_FRIEND, ADDRESS, PURPOSE, environ=app.environ, folder=copy)
    assert status and "No such command 'errand'" in printed and "Traceback" not in printed
