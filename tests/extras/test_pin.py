"""With PIN the line is locked: a call goes on only after the caller has keyed in the right digits."""

import contextlib

import pytest

from tests.stage import HELLO, PUBLIC_URL, SORRY, everything_in, open_database, read_all_settings, wait_until

PIN = "135790"
KEY_IN = "Please key in your PIN, and then the pound key."
WRONG = "That was not the right PIN."
WORDS = "Let me in without a key."


def check_secrecy(app):
    """The PIN is neither logged nor stored."""
    assert PIN not in app.log() and "Traceback" not in app.log()
    assert PIN.encode() not in everything_in(app)


@pytest.fixture(scope="module")
def app(stage):
    with stage.other_app("--workers 2", PIN=PIN) as app:
        yield app
        check_secrecy(app)


@pytest.fixture
def phone(stage, app):
    phone = stage.phone(app, number="+15551238001")
    yield phone
    if not phone.ended:
        phone.hang_up()
    assert phone.warnings == []
    assert PIN not in "".join(document.decode() for document in phone.documents)


@pytest.fixture
def still_locked(app, claude):
    """A function that tells whether Claude hasn't been asked, and no words have been stored, until now."""
    asked = len(claude.requests)
    return lambda: len(claude.requests) == asked and WORDS.encode() not in everything_in(app)


def tries_logged(app, phone):
    """What the log says of wrong PINs in this call, like "1 of 3"."""
    lines = [line for line in app.log().splitlines() if phone.call_sid in line and "PIN" in line]
    return [line.rpartition(", ")[2] for line in lines]


def test_the_greeting_comes_after_the_pin(phone, app):
    assert phone.call() == KEY_IN
    assert "numDigits" not in phone.gather, "or a stranger would learn how long the PIN is"
    assert phone.press(f"{PIN}#") == HELLO
    assert phone.say("Who is behind the PIN?") == "You said: Who is behind the PIN?"
    assert phone.say("And now?") == "You said: And now?"
    assert tries_logged(app, phone) == []


WRONG_PINS = {
    "one digit is wrong": "135791",
    "one digit is missing": "13579",
    "one digit too many": "1357900",
    "more and more digits": "1357901357901",
    "twice": "135790135790",
    "a star before it": "*135790",
    "a star behind it": "135790*",
    "a single digit": "0",
    "nothing": "",
    "very long": "1" * 200,
}


@pytest.mark.parametrize("case", WRONG_PINS)
def test_after_three_wrong_pins_the_line_hangs_up(phone, app, case, still_locked):
    keys = WRONG_PINS[case]
    assert phone.call() == KEY_IN
    for _ in range(2):
        heard = phone.press(f"{keys}#")
        assert heard == f"{WRONG} {KEY_IN}" and not phone.ended
    assert phone.press(f"{keys}#") == f"{WRONG} Goodbye!" and phone.ended == "hangup"
    wait_until(lambda: tries_logged(app, phone) == ["1 of 3", "2 of 3", "3 of 3"])
    assert len(keys) < 5 or keys not in app.log(), "a wrong PIN may be nearly right"
    assert still_locked()


def test_the_third_try_may_be_right(phone):
    phone.call()
    phone.press("000000#")
    phone.press("999999#")
    assert phone.press(f"{PIN}#") == HELLO


def test_silence_is_a_wrong_pin_and_spoken_digits_are_ignored(phone, still_locked):
    phone.call()
    assert phone.stay_silent() == f"{WRONG} {KEY_IN}"
    assert not phone.listens_to("speech")
    spoken = phone.webhook(f"{PUBLIC_URL}/?tries=2", {"SpeechResult": PIN, "Confidence": "0.9"})
    assert spoken == f"{WRONG} {KEY_IN}"
    assert phone.stay_silent() == f"{WRONG} Goodbye!" and phone.ended == "hangup"
    assert still_locked()


WAYS_IN = {
    "the call itself": ("/", {"Digits": PIN}),
    "words": ("/talking", {"SpeechResult": WORDS}),
    "a key": ("/talking", {"Digits": "1"}),
    "the PIN, elsewhere": ("/talking", {"Digits": PIN}),
    "the PIN, elsewhere and with a try": ("/talking?tries=1", {"Digits": PIN}),
    "a reply": ("/talking?turn=1", {}),
    "silence": ("/talking?silences=1", {}),
    "the end of a Dial": ("/talking", {"DialCallStatus": "completed"}),
    "the fallback": ("/talking", {"ErrorCode": "11200", "ErrorUrl": f"{PUBLIC_URL}/"}),
    "the fallback, with words": ("/talking", {"ErrorCode": "11200", "SpeechResult": WORDS}),
    "the fallback, with the PIN": (
        "/talking",
        {"ErrorCode": "11200", "ErrorUrl": f"{PUBLIC_URL}/?tries=1", "Digits": PIN},
    ),
    "no try": ("/?tries=0", {"Digits": PIN}),
    "an empty try": ("/?tries=", {"Digits": PIN}),
    "a proved number": ("/", {"StirVerstat": "TN-Validation-Passed-A"}),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_there_is_no_other_way_in(phone, way, still_locked):
    path, params = WAYS_IN[way]
    phone.call()
    heard = phone.webhook(path, params)
    assert KEY_IN in heard and not phone.listens_to("speech"), heard
    heard = phone.webhook("/talking", {"SpeechResult": WORDS})
    assert heard == KEY_IN and still_locked()
    phone.hang_up()
    assert still_locked()


def test_a_failure_gives_no_new_tries(phone):
    phone.call()
    phone.press("000000#")
    phone.press("111111#")
    phone.webhook("/talking", {"ErrorCode": "11200", "ErrorUrl": f"{PUBLIC_URL}/?tries=3"})
    assert phone.ended == "hangup"


def test_a_second_delivery_is_not_a_second_try(phone):
    phone.call()
    for _ in range(2):
        answer = phone.request("POST", "/?tries=1", {**phone.params, "Digits": "000000"}, "the same")
        assert b"tries=2" in answer.body
    for _ in range(2):
        answer = phone.request("POST", "/?tries=2", {**phone.params, "Digits": PIN}, "another")
        assert HELLO in answer.body.decode()


def test_the_pin_opens_one_call_and_not_another_one_of_the_same_number(stage, phone, app, still_locked):
    phone.call()
    assert phone.press(f"{PIN}#") == HELLO
    stranger = stage.phone(app, number="+15551238001")
    assert stranger.call() == KEY_IN
    assert stranger.webhook("/talking", {"SpeechResult": WORDS}) == KEY_IN
    assert still_locked()
    stranger.hang_up()


@contextlib.contextmanager
def calls_cannot_be_written(app):
    """The table of the calls refuses all changes, as a full disk does."""
    changes = "INSERT", "UPDATE"
    with open_database(app.database) as database:
        for change in changes:
            when = f"CREATE TRIGGER no_{change} BEFORE {change} ON calls"
            database.execute(f"{when} BEGIN SELECT RAISE(ABORT, 'no'); END")
        try:
            yield
        finally:
            for change in changes:
                database.execute(f"DROP TRIGGER no_{change}")


def test_a_failing_disk_does_not_open_the_lock(phone, app, still_locked):
    phone.call()
    with calls_cannot_be_written(app):
        assert phone.press(f"{PIN}#") == SORRY
        assert phone.say(WORDS) == KEY_IN
        assert phone.press(f"{PIN}#") == SORRY
    assert phone.say(WORDS) == KEY_IN and still_locked()
    assert phone.press(f"{PIN}#") == HELLO


def test_a_silent_caller_does_not_hear_apologies_for_ever(phone, app):
    phone.call()
    phone.press(f"{PIN}#")
    with open_database(app.database) as database:
        database.execute("ALTER TABLE pins RENAME COLUMN call_sid TO lost")
        try:
            heard = [phone.stay_silent() for _ in range(3)]
        finally:
            database.execute("ALTER TABLE pins RENAME COLUMN lost TO call_sid")
    assert heard[:2] == [SORRY, SORRY] and phone.ended == "hangup"


def test_the_start_names_the_pin_and_does_not_warn_of_strangers(app):
    assert "extras: pin" in app.log()
    assert "ALLOWED_CALLERS is not set" not in app.log(), "the PIN keeps strangers out"


@pytest.mark.parametrize("pin", ["12345", "1234567890123", "secret", "12 34 56", "123456#"])
def test_a_pin_that_cannot_be_used_is_named_but_not_printed(pin):
    with pytest.raises(ValueError, match="^PIN takes 6 to 12 digits$"):
        read_all_settings({"PIN": pin})


@pytest.fixture(scope="module")
def with_memory(stage):
    with stage.other_app("--workers 2", PIN=PIN, KEEP_DAYS="1") as app:
        yield app
        check_secrecy(app)


@pytest.mark.needs("memory")
@pytest.mark.parametrize("number, remembered", [("+15551238002", True), ("+266696687", False), ("anonymous", False)])
def test_only_a_caller_with_a_number_is_remembered(with_memory, stage, claude, number, remembered):
    for words in f"I am in with {number}.", f"Where were we, {number}?":
        phone = stage.phone(with_memory, number=number)
        phone.call()
        phone.press(f"{PIN}#")
        phone.say(words)
        phone.hang_up()
        assert phone.warnings == []
    sent = claude.requests[-1].messages
    assert sent[-1][1].endswith(f"Where were we, {number}?")
    if remembered:
        assert sent[0][1].endswith(f"] I am in with {number}.")
    else:
        assert len(sent) == 1
