"""With AFTER_CALL_URL a report of each call is sent when the call is over."""

import base64
import contextlib
import hashlib
import hmac
import json
import re
import time

import pytest

from tests.claude import Reply, Tool
from tests.pages import Page
from tests.stage import (
    FASTER,
    ForkedApp,
    Script,
    everything_in,
    let_time_pass,
    open_database,
    start_fails,
    turns_of,
    wait_until,
)

KEY = b"a key of the owner's own"
SECRET = "whsec_" + base64.b64encode(KEY).decode()
OK, BROKEN = (200, {}, "thanks"), (500, {}, "")
SUMMARIES = "Summarize this phone call"


@contextlib.contextmanager
def receiver(*answers):
    """A web server that gets the reports. Yields it, and the settings for an app that sends them there."""
    with Script({"/hook": list(answers)}) as (server, phone):
        yield server, {"AFTER_CALL_URL": f"{phone.url}/hook", "AFTER_CALL_SECRET": SECRET, "module": FASTER}


@pytest.fixture(scope="module")
def hook():
    with receiver(OK) as (server, settings):
        yield server, settings


@pytest.fixture(scope="module")
def app(stage, hook):
    with stage.other_app(**hook[1]) as app:
        yield app
        assert "marmalade" not in app.log() and SECRET not in app.log()


def reports(server, phone):
    """The reports of this call, as (document, headers)."""
    asked = [(json.loads(body), headers) for _, _, body, headers in list(server.asked)]
    return [one for one in asked if one[0]["data"]["call_sid"] == phone.call_sid]


def report_of(server, phone):
    """The report of this call, once it has come."""
    return wait_until(lambda: reports(server, phone))[0]


def talk(stage, app, *words, **more):
    phone = stage.phone(app, **more)
    phone.call()
    for each in words:
        phone.say(each)
    return phone


def later_calls_are_reported(stage, app, server):
    """Wait until two more calls, one after the other, are reported: by then earlier ones would have been, too."""
    for number in range(2):
        phone = talk(stage, app, f"Later call {number}.")
        phone.hang_up()
        report_of(server, phone)


def words_are_gone(app, word=b"marmalade"):
    return wait_until(lambda: word not in everything_in(app))


def tries_again_now(app):
    """The pause until the next try is over."""
    with open_database(app.database) as database:
        database.execute("UPDATE reports SET next_try = 0")


def rows(app):
    with open_database(app.database) as database:
        return database.execute("SELECT tries, next_try, document FROM reports").fetchall()


# --- The document ---------------------------------------------------------------------------------


def test_a_report_tells_who_called_and_what_was_said(stage, claude, app, hook):
    claude.when("A marmalade sandwich, please.", Reply("With pleasure. Anything else?"))
    phone = talk(stage, app, "A marmalade sandwich, please.", "No, thank you.", number="+15551239876")
    phone.hang_up()
    document, headers = report_of(hook[0], phone)
    assert document["type"] == "call.ended" and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", document["timestamp"])
    data = document["data"]
    assert (data["turns"], data["caller"], data["ended"]) == (2, "+15551239876", "completed")
    assert data["began"] <= document["timestamp"] and 0 <= data["seconds"] < 60
    assert data["tokens_in"] > 0 and data["tokens_out"] > 0
    first, second = data["transcript"]
    assert first["caller"] == "A marmalade sandwich, please." and "With pleasure.".startswith(first["claude"][:5])
    assert second["caller"] == "No, thank you.", "the last words before the hang-up are in it"
    assert data["summary"].strip()
    assert headers["Content-Type"] == "application/json"
    words_are_gone(app)
    assert f"call {phone.call_sid}: report delivered, status 200, try 1" in app.log()


def test_the_signature_is_that_of_a_standard_webhook(stage, app, hook):
    phone = talk(stage, app, "Sign this, please.")
    phone.hang_up()
    _, headers = report_of(hook[0], phone)
    (body,) = [body for _, _, body, _ in hook[0].asked if phone.call_sid in body]
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body}".encode()
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 600
    assert phone.call_sid in headers["webhook-id"]


def test_the_summary_is_one_request_without_tools(stage, claude, app, hook):
    phone = talk(stage, app, "Summarize me later.")
    phone.hang_up()
    report_of(hook[0], phone)
    (request,) = [one for one in claude.requests if one.system.startswith(SUMMARIES) and "Summarize me later." in one.words]
    assert "tools" not in request.body and not request.body.get("stream")


def test_the_report_says_how_claude_ended_the_call_and_what_was_heard(stage, claude, app, hook):
    claude.when("Marmalade, and goodbye.", Reply("It was a pleasure. Goodbye!", hang_up=True))
    phone = talk(stage, app, "Marmalade, and goodbye.")
    assert phone.ended == "hangup"
    phone.hang_up()
    data = report_of(hook[0], phone)[0]["data"]
    assert data["ended"] == "hung up by Claude"
    assert data["transcript"][0]["caller"] == "Marmalade, and goodbye."


def test_a_caller_who_hangs_up_in_a_reply_has_heard_its_beginning_only(stage, claude, app, hook):
    written = " ".join(f"This is marmalade number {number}." for number in range(40))
    claude.when("Tell me all about it.", Reply(written))
    phone = stage.phone(app)
    phone.call()
    phone.say("Tell me all about it.", token="the same")
    phone.say("Tell me all about it.", token="the same")  # now all of it goes out in one answer
    phone.hang_up()
    (turn,) = report_of(hook[0], phone)[0]["data"]["transcript"]
    assert len(turn["claude"]) < len(written) / 2 and written.startswith(turn["claude"])


def test_a_caller_who_hangs_up_in_the_first_part_has_heard_no_more(stage, claude, app, hook):
    written = " ".join(f"This is tarragon number {number}." for number in range(100))
    claude.when("Tell me about tarragon.", Reply(written, pace=1000))
    phone = stage.phone(app)
    phone.call()

    def hang_up_when_all_is_written(text):
        wait_until(lambda: turns_of(app, phone, "stop") == [("end_turn",)])
        phone.hang_up()

    phone.on_hearing = hang_up_when_all_is_written
    phone.say("Tell me about tarragon.")
    (turn,) = report_of(hook[0], phone)[0]["data"]["transcript"]
    assert len(turn["claude"]) < len(written) / 2 and written.startswith(turn["claude"])


@pytest.mark.slow
def test_a_second_report_of_the_end_is_no_second_report(stage, app, hook):
    phone = talk(stage, app, "Only once, please.")
    for _ in range(2):
        phone.hang_up()
    report_of(hook[0], phone)
    phone.hang_up()
    later_calls_are_reported(stage, app, hook[0])
    assert len(reports(hook[0], phone)) == 1


def test_a_silent_call_is_reported_after_two_hours(stage, app, hook):
    phone = talk(stage, app, "Silence follows marmalade.")
    let_time_pass(app, 2 * 3600 + 1, phone.call_sid)
    data = report_of(hook[0], phone)[0]["data"]
    assert data["ended"] == "not reported" and data["transcript"][0]["caller"] == "Silence follows marmalade."
    words_are_gone(app)


@pytest.mark.slow
def test_a_call_without_words_is_reported_only_if_twilio_reports_its_end(stage, app, hook):
    checked, silent = stage.phone(app), stage.phone(app)
    checked.call()  # like the check of ``flask connect``, which has no end
    let_time_pass(app, 2 * 3600 + 1, checked.call_sid)
    silent.call()
    silent.hang_up()
    data = report_of(hook[0], silent)[0]["data"]
    assert (data["turns"], data["transcript"]) == (0, [])
    later_calls_are_reported(stage, app, hook[0])
    assert reports(hook[0], checked) == []


@pytest.mark.slow
def test_without_a_summary_and_without_a_secret(stage):
    with receiver(OK) as (server, settings):
        with stage.other_app(**{**settings, "AFTER_CALL_SECRET": None}, AFTER_CALL_SUMMARY="no") as app:
            phone = talk(stage, app, "No summary, please.")
            phone.hang_up()
            document, headers = report_of(server, phone)
            assert "summary" not in document["data"] and "no_summary" not in document["data"]
            assert "webhook-signature" not in headers
            assert "WARNING AFTER_CALL_SECRET is not set: reports are not signed" in app.log()
            assert "extras: after_call (words kept until the report is delivered, for a day at most)" in app.log()


@pytest.mark.slow
def test_if_claude_fails_the_report_says_that_there_is_no_summary(stage):
    with receiver(OK) as (server, settings), stage.other_app(**settings, ANTHROPIC_BASE_URL="http://127.0.0.1:9") as app:
        phone = talk(stage, app, "Are you there?")
        phone.hang_up()
        data = report_of(server, phone)[0]["data"]
        assert data["no_summary"] == "APIConnectionError" and "summary" not in data


# --- Delivery -------------------------------------------------------------------------------------


def test_a_failed_delivery_is_tried_again_and_the_words_are_kept_until_then(stage):
    with receiver(BROKEN, (302, {"Location": "/elsewhere"}, ""), (429, {"Retry-After": "99999999"}, ""), OK) as (server, settings):
        with stage.other_app(**settings) as app:
            phone = talk(stage, app, "Keep the marmalade.")
            phone.hang_up()
            for tries in 1, 2, 3:
                failed = f"call {phone.call_sid}: report not delivered, status"
                wait_until(lambda tries=tries, failed=failed: app.log().count(failed) == tries)
                ((stored, next_try, document),) = rows(app)
                assert stored == len(reports(server, phone)) == tries and "marmalade" in document
                pause = next_try - time.time()
                assert 0 < pause <= 3600, "also if the receiver asks for three years"
                assert tries < 3 or pause > 3000, "the receiver asked for more than the usual pause"
                tries_again_now(app)
            wait_until(lambda: "report delivered, status 200, try 4" in app.log())
            sent = [(body, headers["webhook-id"]) for _, path, body, headers in server.asked if path == "/hook"]
            assert len(sent) == 4 and len(set(sent)) == 1, "the same each time, with the same id"
            assert {path for _, path, _, _ in server.asked} == {"/hook"}, "a redirect isn't followed"
            words_are_gone(app)


@pytest.mark.parametrize("status", [400, pytest.param(410, marks=pytest.mark.slow)])
def test_a_receiver_that_refuses_is_not_asked_again(stage, status):
    with receiver((status, {}, "")) as (server, settings), stage.other_app(**settings) as app:
        phone = talk(stage, app, "Refuse the marmalade.")
        phone.hang_up()
        wait_until(lambda: f"call {phone.call_sid}: report given up, status {status}, try 1" in app.log())
        words_are_gone(app)
        assert rows(app) == []


@pytest.mark.slow
def test_after_24_hours_a_report_is_given_up(stage):
    with receiver(BROKEN) as (server, settings), stage.other_app(**settings) as app:
        phone = talk(stage, app, "Give up the marmalade.")
        phone.hang_up()
        wait_until(lambda: "report not delivered" in app.log())
        let_time_pass(app, 24 * 3600, phone.call_sid)
        tries_again_now(app)
        wait_until(lambda: f"call {phone.call_sid}: report given up, status 500, try 2" in app.log())
        words_are_gone(app)


@pytest.mark.slow
def test_after_a_restart_another_process_delivers(stage):
    with receiver(BROKEN, OK) as (server, settings), stage.other_app(**settings) as app:
        phone = talk(stage, app, "Restart, please.")
        phone.hang_up()
        wait_until(lambda: "report not delivered" in app.log())
        app.kill()
        app.process.wait()
        tries_again_now(app)
        app.start()
        wait_until(lambda: "report delivered, status 200, try 2" in app.log())
        assert len(reports(server, phone)) == 2


@pytest.mark.slow
def test_two_processes_deliver_once(stage):
    with receiver(OK) as (server, settings), stage.other_app(**settings) as app:
        with stage.other_app(**settings, DATABASE_URL=f"sqlite:///{app.database}") as other:
            phones = [talk(stage, each, f"Once from each {number}.") for number, each in enumerate([app, other, app])]
            for phone in phones:
                phone.hang_up()
            wait_until(lambda: (app.log() + other.log()).count("report delivered") == 3)
            assert [len(reports(server, phone)) for phone in phones] == [1, 1, 1]


@pytest.mark.slow
def test_a_receiver_that_sends_no_end_or_nothing_holds_nobody_up(stage):
    def for_ever():
        time.sleep(30)
        return ""

    with receiver((200, {}, for_ever)) as (server, settings), stage.other_app(**settings) as app:
        phone = talk(stage, app, "Be slow, please.")
        phone.hang_up()
        wait_until(lambda: server.asked)
        assert talk(stage, app, "Am I held up?").said[-1][0] == "You said: Am I held up?"
        began = time.monotonic()
        app.kill(15)
        assert app.process.wait(20) == 0 and time.monotonic() - began < 20
    with receiver((200, {}, "x" * 100_000_000)) as (server, settings), stage.other_app(**settings) as app:
        phone = talk(stage, app, "Answer at length.")
        phone.hang_up()
        wait_until(lambda: "report delivered, status 200, try 1" in app.log())


# --- Together with others -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.needs("memory")
def test_with_keep_days_the_words_stay_after_the_report(stage):
    with receiver(OK) as (server, settings), stage.other_app(**settings, KEEP_DAYS="3") as app:
        phone = talk(stage, app, "Keep my marmalade for days.")
        phone.webhook("/", {"CallStatus": "ringing"})  # a second delivery changes nothing
        phone.hang_up()
        wait_until(lambda: "report delivered" in app.log())
        let_time_pass(app, 2 * 24 * 3600)
        talk(stage, app, "Another call.").hang_up()
        assert b"marmalade" in everything_in(app)
        let_time_pass(app, 24 * 3600 + 60)
        talk(stage, app, "A third call.").hang_up()
        words_are_gone(app)


@pytest.mark.needs("memory")
def test_a_caller_who_is_forgotten_is_not_reported(stage, claude):
    claude.when("Forget my marmalade.", Reply("I will.", blocks=[Tool("forget_me")], then=Reply("Done.")))
    with receiver(OK) as (server, settings), stage.other_app(**settings, KEEP_DAYS="3") as app:
        proved = {"StirVerstat": "TN-Validation-Passed-A"}
        phone = talk(stage, app, "I like marmalade.", "Forget my marmalade.", **proved)
        phone.hang_up()
        lost = talk(stage, app, "Forget my marmalade.", **proved)
        let_time_pass(app, 2 * 3600 + 60, lost.call_sid)  # and Twilio never reports the end
        later_calls_are_reported(stage, app, server)
        assert reports(server, phone) == reports(server, lost) == []
        words_are_gone(app)


@pytest.mark.slow
@pytest.mark.parametrize("name, value, takes", [
    ("AFTER_CALL_URL", "http://example.com/hook", "an https:// address"),
    ("AFTER_CALL_URL", "https://user:secret@example.com/", "an https:// address"),
    ("AFTER_CALL_SECRET", "my secret", "whsec_ and a key in Base64"),
    ("AFTER_CALL_SUMMARY", "short", "yes or no"),
])
def test_an_unusable_setting_stops_the_start(stage, name, value, takes):
    why = start_fails(stage.other_app(**{"AFTER_CALL_URL": "https://example.com/hook", name: value}))
    assert why == f"{name} takes {takes}."


@pytest.mark.slow
def test_the_receiver_in_the_documents_accepts_a_report_and_refuses_a_forged_one(stage, claude, tmp_path):
    (code,) = [block.text for block in Page("docs/features.md").blocks if "def call_ended" in block.text]
    (tmp_path / "app.py").write_text(code)
    receiver_app = ForkedApp({"AFTER_CALL_SECRET": SECRET}, folder=tmp_path)
    with receiver_app:
        settings = {"AFTER_CALL_URL": f"{receiver_app.url}/calls", "AFTER_CALL_SECRET": SECRET, "module": FASTER}
        with stage.other_app(**settings) as app:
            phone = talk(stage, app, "Report this to the documents.")
            phone.hang_up()
            wait_until(lambda: f"call {phone.call_sid}: report delivered, status 204" in app.log())
        with stage.other_app(**{**settings, "AFTER_CALL_SECRET": "whsec_" + base64.b64encode(b"another key").decode()}) as app:
            phone = talk(stage, app, "Forge this.")
            phone.hang_up()
            wait_until(lambda: f"call {phone.call_sid}: report given up, status 401" in app.log())
    (example,) = [block.text for block in Page("docs/features.md").blocks if block.language == "json"]
    assert json.loads(example)["data"].keys() == {
        "call_sid", "began", "seconds", "turns", "caller", "ended", "tokens_in", "tokens_out", "transcript", "summary"}
