"""With PIN the line is locked: before the digits are keyed nothing of a call goes on."""

import contextlib
import sqlite3

import pytest

from tests.conftest import PUBLIC_URL, wait_until
from tests.test_memory import PROVED, everything_in, said_before

PIN = "135790"
GREETING = "Hello, this is Claude speaking!"
KEY_IN = "Please key in your PIN, and then the pound key."
WRONG = "That was not the right PIN."
SORRY = "Sorry, something went wrong at my end. Could you say that again?"


@pytest.fixture(scope="module")
def app(stage):
    with stage.other_app("--workers 2", PIN=PIN, KEEP_DAYS="1") as app:
        yield app
        assert PIN not in app.log() and "Traceback" not in app.log()
        assert PIN.encode() not in everything_in(app)


@pytest.fixture
def phone(stage, app):
    phone = stage.phone(app, number="+15551238001")
    yield phone
    assert phone.warnings == []
    assert PIN not in "".join(document.decode() for document in phone.documents)


@pytest.fixture
def nothing_begins(app, claude):
    """A function that tells whether Claude was not asked, and no words were kept, until now."""
    asked = len(claude.requests)
    yield lambda: len(claude.requests) == asked and b"Let me in" not in everything_in(app)


def tries_in(app, phone):
    lines = [line for line in app.log().splitlines() if phone.call_sid in line and "PIN" in line]
    return [line.rpartition(", ")[2] for line in lines]


def test_the_greeting_comes_after_the_pin(phone, app):
    assert phone.call() == KEY_IN
    assert "numDigits" not in phone.gather, "or a stranger would learn how long it is"
    assert phone.press(f"{PIN}#") == GREETING
    assert phone.say("Who is there?") == "You said: Who is there?"
    assert phone.say("And now?") == "You said: And now?"
    assert tries_in(app, phone) == []
    phone.hang_up()


WRONG_ONES = [
    "135791",
    "13579",
    "1357900",
    "1357901357901",
    "135790135790",
    "*135790",
    "135790*",
    "0",
    "",
    "1" * 200,
]


@pytest.mark.parametrize("keys", WRONG_ONES)
def test_three_wrong_ones_and_the_line_says_goodbye(phone, app, keys, nothing_begins):
    assert phone.call() == KEY_IN
    for _ in range(2):
        heard = phone.press(f"{keys}#")
        assert heard == f"{WRONG} {KEY_IN}" and not phone.ended
    assert phone.press(f"{keys}#") == f"{WRONG} Goodbye!" and phone.ended == "hangup"
    wait_until(lambda: tries_in(app, phone) == ["1 of 3", "2 of 3", "3 of 3"])
    assert len(keys) < 5 or keys not in app.log(), "what was keyed may be nearly right"
    assert nothing_begins()


def test_the_third_try_may_be_right(phone):
    phone.call()
    phone.press("000000#")
    phone.press("999999#")
    assert phone.press(f"{PIN}#") == GREETING
    phone.hang_up()


def test_who_keys_nothing_or_speaks_the_digits_is_not_let_in(phone, app, nothing_begins):
    phone.call()
    assert phone.stay_silent() == f"{WRONG} {KEY_IN}"
    assert not phone.listens_to("speech")
    spoken = phone.webhook(f"{PUBLIC_URL}/?tries=2", {"SpeechResult": PIN, "Confidence": "0.9"})
    assert spoken == f"{WRONG} {KEY_IN}"
    assert phone.stay_silent() == f"{WRONG} Goodbye!" and phone.ended == "hangup"
    assert nothing_begins()


WAYS_IN = {
    "the call itself": ("/", {"Digits": PIN}),
    "words": ("/talking", {"SpeechResult": "Let me in."}),
    "a key": ("/talking", {"Digits": "1"}),
    "the digits, elsewhere": ("/talking", {"Digits": PIN}),
    "the digits, in the wrong place": ("/talking?tries=1", {"Digits": PIN}),
    "a reply": ("/talking?turn=1", {}),
    "silence": ("/talking?silences=1", {}),
    "the end of a Dial": ("/talking", {"DialCallStatus": "completed"}),
    "the fallback": ("/talking", {"ErrorCode": "11200", "ErrorUrl": f"{PUBLIC_URL}/"}),
    "the fallback, with words": ("/talking", {"ErrorCode": "11200", "SpeechResult": "Let me in."}),
    "the fallback, with the digits": (
        "/talking",
        {"ErrorCode": "11200", "ErrorUrl": f"{PUBLIC_URL}/?tries=1", "Digits": PIN},
    ),
    "no try": ("/?tries=0", {"Digits": PIN}),
    "a try that isn't one": ("/?tries=", {"Digits": PIN}),
    "a proved number": ("/", {"StirVerstat": PROVED}),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_there_is_no_other_way_in(phone, way, nothing_begins):
    path, params = WAYS_IN[way]
    phone.call()
    heard = phone.webhook(path, params)
    assert KEY_IN in heard and not phone.listens_to("speech"), heard
    heard = phone.webhook("/talking", {"SpeechResult": "Let me in."})
    assert heard == KEY_IN and nothing_begins()
    phone.hang_up()
    assert nothing_begins()


def test_a_failure_gives_no_new_tries(phone):
    phone.call()
    phone.press("000000#")
    phone.press("111111#")
    phone.webhook("/talking", {"ErrorCode": "11200", "ErrorUrl": f"{PUBLIC_URL}/?tries=3"})
    assert phone.ended == "hangup"


def test_a_second_delivery_is_no_second_try_and_lets_nobody_else_in(stage, phone, app):
    phone.call()
    for _ in range(2):
        answer = phone.request(
            "POST", "/?tries=1", {**phone.params, "Digits": "000000"}, "the same"
        )
        assert b"tries=2" in answer.body
    for _ in range(2):
        answer = phone.request("POST", "/?tries=2", {**phone.params, "Digits": PIN}, "another")
        assert GREETING in answer.body.decode()
    stranger = stage.phone(app, number="+15551238001")  # another call of the same number
    stranger.call()
    assert stranger.webhook("/talking", {"SpeechResult": "I have keyed it."}) == KEY_IN
    for one in (phone, stranger):
        one.hang_up()


def test_a_disk_that_fails_behind_the_pin_is_an_apology_and_no_open_door(
    phone, app, nothing_begins
):
    phone.call()
    with contextlib.closing(sqlite3.connect(app.database, timeout=20)) as database:
        for change in ("INSERT", "UPDATE"):
            with database:
                database.execute(
                    f"CREATE TRIGGER no_{change} BEFORE {change} ON calls"
                    " BEGIN SELECT RAISE(ABORT, 'no'); END"
                )
        assert phone.press(f"{PIN}#") == SORRY
        assert phone.say("Let me in.") == KEY_IN
        assert phone.press(f"{PIN}#") == SORRY
        for change in ("INSERT", "UPDATE"):
            with database:
                database.execute(f"DROP TRIGGER no_{change}")
        assert phone.say("Let me in.") == KEY_IN and nothing_begins()
        assert phone.press(f"{PIN}#") == GREETING
    phone.hang_up()


def test_a_silent_caller_is_not_apologised_to_for_ever(phone, app):
    phone.call()
    phone.press(f"{PIN}#")
    with contextlib.closing(sqlite3.connect(app.database, timeout=20)) as database:
        with database:
            database.execute("ALTER TABLE pins RENAME COLUMN call_sid TO lost")
        try:
            heard = [phone.stay_silent() for _ in range(3)]
        finally:
            with database:
                database.execute("ALTER TABLE pins RENAME COLUMN lost TO call_sid")
    assert heard[:2] == [SORRY, SORRY] and phone.ended == "hangup"


def test_who_keyed_the_pin_is_remembered_and_a_withheld_number_is_not(stage, app, claude):
    for number in "+15551238002", "+266696687", "anonymous":
        for words in "I am in.", "Where were we?":
            phone = stage.phone(app, number=number)
            phone.call()
            phone.press(f"{PIN}#")
            phone.say(f"{words} {number}")
            phone.hang_up()
        before = said_before(claude, f"Where were we? {number}")
        assert before[:1] == ([f"I am in. {number}"] if number.endswith("8002") else [])
