"""What the owner reads: at the start, on the page, and in the log, which keeps the callers' secrets."""

import re
import shutil
import time
from urllib.parse import urlencode

import pytest

from tests.claude import KEY, Reply
from tests.phone import Phone
from tests.stage import HELLO, PROXY, PUBLIC_URL, SORRY, copy_code, get, healthz, turn_is_logged, wait_until

HIDDEN_URL = "https://hidden.example.com/line"
PATHS = ["/", "/talking", "/status_callback"]


@pytest.fixture(scope="module")
def closed(stage):
    """An app for two callers only."""
    numbers = "+15551230001, +44 (0)20 7946 0958"
    # A desktop sets LANGUAGE, and the line must not take it for a setting of its own.
    with stage.other_app(ALLOWED_CALLERS=numbers, LANGUAGE="en_GB:en", CLAUDE_EFFORT="none") as app:
        yield app


@pytest.fixture(scope="module")
def bare(stage):
    """An app without a token and without a key, which knows its public address."""
    with stage.other_app(TWILIO_AUTH_TOKEN="", ANTHROPIC_API_KEY=None, PUBLIC_URL=HIDDEN_URL) as app:
        yield app


# --- At the start ---------------------------------------------------------------------------------


def test_the_start_logs_one_line_on_what_runs(stage, tmp_path):
    folder = copy_code(tmp_path)
    shutil.rmtree(folder / "extras", ignore_errors=True)
    with stage.other_app(folder=folder, MAX_TURNS="500") as app:
        (line,) = re.findall(r"INFO Voice Claude: (.*)", app.log())
        assert line == (
            f"model claude-haiku-5-5, effort low, database sqlite:///{app.database}, "
            "calls from everyone, 500 turns a call, 1000 a day, extras: none"
        )


def test_the_start_warns_of_an_open_line(stage):
    with stage.other_app() as app:
        assert "WARNING ALLOWED_CALLERS is not set: anyone can call at your expense" in app.log()


def test_the_start_warns_of_a_missing_token_and_a_missing_key(bare):
    assert "WARNING TWILIO_AUTH_TOKEN is not set: no call is answered" in bare.log()
    assert "WARNING ANTHROPIC_API_KEY is not set: the line repeats what it hears" in bare.log()


def test_the_start_of_a_closed_line_warns_of_nothing_and_says_how_many_may_call(closed):
    assert "effort none" in closed.log() and "calls from 2 numbers, " in closed.log()
    assert "WARNING" not in closed.log()


def test_the_start_says_that_one_number_may_call(stage):
    with stage.other_app(ALLOWED_CALLERS="+15551230001") as app:
        assert "calls from 1 number, " in app.log()


def test_a_database_that_cannot_be_opened_is_named(stage):
    with stage.other_app(DATABASE_URL="sqlite:////dev/null/calls.db") as app:
        phone = stage.phone(app)
        phone.call()
        assert phone.say("Hello?") == SORRY
        assert "ERROR the database failed: unable to open database file: /dev/null/calls.db" in app.log()
        assert healthz(app) == 503 and "Traceback" not in app.log()


# --- The page -------------------------------------------------------------------------------------


def test_the_page_takes_its_address_from_the_request_and_finds_no_fault(stage):
    status, page = get(stage.app, "/")
    assert status == 200 and "not set" not in page
    for path in PATHS:
        assert re.search(rf"https://127\.0\.0\.1:{stage.app.port}{path}#rc=\S+\n", page)


def test_the_page_has_the_address_by_which_the_line_is_known(stage):
    visitor = Phone(stage.app.url, headers={**PROXY, "Host": "line.example.com"})
    response = visitor.request("GET", "/")
    page = response.body.decode()
    assert response.status == 200 and response.headers.get_content_type() == "text/plain"
    for path in PATHS:
        assert re.search(rf"{re.escape(PUBLIC_URL + path)}#rc=\S+\n", page)
    assert stage.app.token not in page and KEY not in page


def test_the_page_knows_the_public_address_and_what_is_missing(bare):
    status, page = get(bare, "/")
    assert status == 200
    assert "TWILIO_AUTH_TOKEN is not set" in page and "ANTHROPIC_API_KEY is not set" in page
    for path in PATHS:
        assert re.search(rf"{re.escape(HIDDEN_URL + path)}#rc=\S+\n", page)
    assert "127.0.0.1" not in page, "Twilio can't find it there"


def test_a_look_whether_the_app_runs_needs_no_body(stage):
    assert get(stage.app, "/", "HEAD") == (200, "")


# --- Calls in the log -----------------------------------------------------------------------------


def test_a_call_has_a_line_for_its_beginning_and_its_end(stage, logged):
    phone = stage.phone(number="+15557654321")
    phone.call()
    phone.say("One.")
    turn_is_logged(stage.app, phone, 1)
    phone.say("Two.")
    turn_is_logged(stage.app, phone, 2)
    phone.hang_up()
    assert f"INFO call {phone.call_sid} begins, with ...321" in logged()
    over = rf"INFO call {phone.call_sid} is over: 1 s, turns 2, tokens (\d+) in (\d+) out"
    tokens_in, tokens_out = map(int, re.search(over, logged()).groups())
    turns = re.findall(rf"call {phone.call_sid} turn \d: .* tokens (\d+) in (\d+) out", logged())
    assert tokens_in == sum(int(count) for count, _ in turns) > 0
    assert tokens_out == sum(int(count) for _, count in turns) > 0
    assert "5557654321" not in logged()


@pytest.mark.parametrize("number", ["anonymous", "+266696687", "unknown", ""])
def test_a_withheld_number_is_called_that(stage, logged, number):
    phone = stage.phone(number=number)
    phone.call()
    assert f"call {phone.call_sid} begins, with a withheld number" in logged()


def test_a_rejected_caller_is_one_line_with_three_digits(stage, closed):
    stranger = stage.phone(closed, number="+15559990002")
    assert stranger.call() == ""
    stranger.hang_up()
    (line,) = [line for line in closed.log().splitlines() if stranger.call_sid in line and "rejected" in line]
    assert line.endswith(": ...002 is not in ALLOWED_CALLERS")
    assert "555999" not in closed.log()


def test_a_desktops_language_is_not_that_of_the_line(stage, closed):
    friend = stage.phone(closed, number="+442079460958")
    assert friend.call() == HELLO
    assert b"language" not in friend.documents[-1]


def test_a_turn_is_one_line_without_a_word_of_it(stage, logged):
    stage.claude.when("My secret is a marmalade sandwich.", Reply("I won't tell.", first_token=0.4))
    phone = stage.phone(number="+15557654321")
    phone.call()
    began = time.monotonic()
    phone.say("My secret is a marmalade sandwich.")
    line = turn_is_logged(stage.app, phone)
    what = r"turn 1: first sentence (\d+) ms, end (\d+) ms, tokens \d+ in \d+ out, end_turn, request req_pretend_\d+"
    found = re.fullmatch(rf"INFO call {phone.call_sid} {what}", line)
    assert 390 <= int(found[1]) <= int(found[2]) <= 1000 * (time.monotonic() - began), line
    phone.press("7")
    turn_is_logged(stage.app, phone, 2)
    for secret in ("marmalade", "pressed", "5557654321"):
        assert secret not in logged()


def test_the_log_holds_neither_the_key_nor_the_token(stage):
    with stage.other_app(TWILIO_AUTH_TOKEN="a-token-of-the-owners") as app:
        phone = stage.phone(app)
        phone.call()
        phone.say("Hello?")
        turn_is_logged(app, phone)
        phone.hang_up()
        assert get(app, "/talking?CallSid=CA1")[0] == 403
        assert KEY not in app.log() and app.token not in app.log()


def test_a_refused_request_is_logged_without_the_callers_words(stage, logged):
    query = urlencode({"CallSid": "CA1", "From": "+15551239876", "SpeechResult": "tarragon"})
    assert get(stage.app, f"/talking?{query}")[0] == 403
    wait_until(lambda: re.search("403 for .*/talking: wrong signature", logged()))
    assert "tarragon" not in logged() and "5551239876" not in logged()


def test_twilios_errors_are_logged(stage, phone, logged):
    phone.call()
    error = {"ErrorCode": "11200", "ErrorUrl": f"{PUBLIC_URL}/talking"}
    assert phone.webhook("/talking", error) == SORRY
    assert re.search(rf"ERROR .*{phone.call_sid}.*11200", logged())
