"""The telephone: the pretend Twilio is as strict as Twilio, and a person can call from a terminal."""

import os
import pty
import signal
import subprocess
import time
import urllib.parse

import pytest

from tests.phone import Phone, sign
from tests.stage import TOKEN, Script, telephone, twiml, wait_until

LISTEN = '<Gather input="speech dtmf" action="{action}"><Say>Go on.</Say></Gather>'
SAVED = twiml("<Say>Saved.</Say>")  # what the fallback says


def form_of(request):
    """The parameters of a request to a Script, as a dictionary."""
    return dict(urllib.parse.parse_qsl(request[2], keep_blank_values=True))


def paths(server):
    return [path for _, path, _, _ in server.asked]


# --- What Twilio refuses --------------------------------------------------------------------------


def test_the_signature_is_that_of_twilios_own_example():
    params = {
        "CallSid": "CA1234567890ABCDE", "Caller": "+14158675310", "Digits": "1234", "From": "+14158675310",
        "To": "+18005551212",
    }
    assert sign(TOKEN, "https://example.com/myapp.php?foo=1&bar=2", params) == "L/OH5YylLD5NRKLltdqwSvS0BnU="


@pytest.mark.parametrize("body, error", [
    ("<Response><Say>a & b</Say></Response>", 12100),
    ("<Response><Say>\x0b</Say></Response>", 12100),
    ("<Response><Say>open</Response>", 12100),
    ("", 12100),
    ("<Answer/>", 12100),
    ("<Response><Speak>x</Speak></Response>", 12200),
    ('<Response><Say tone="high">x</Say></Response>', 12200),
    ('<Response><Gather input="speech touch"/></Response>', 12200),
    ('<Response><Gather timeout="soon"/></Response>', 12200),
    ("<Response><Gather><Hangup/></Gather></Response>", 12200),
    ("<Response><Say>x</Say><Reject/></Response>", 12200),
    ('<Response><Gather speechTimeout="auto" speechModel="phone_call"/></Response>', 13335),
    ("<Response><Say>" + "x" * 70_000 + "</Say></Response>", 11750),
    ("<Response><Number>+15557770000</Number></Response>", 12200),
    ("<Response><Dial><Say>x</Say></Dial></Response>", 12200),
    ('<Response><Dial numDigits="1">+15557770000</Dial></Response>', 12200),
    ('<Response><Dial answerOnBridge="yes">+15557770000</Dial></Response>', 12200),
    ('<Response><Dial><Number action="/x">+15557770000</Number></Dial></Response>', 12200),
    ('<Response><Dial method="PUT">+15557770000</Dial></Response>', 12200),
    ("<Response><Dial/></Response>", 12200),
    ("<Response><Dial>my office</Dial></Response>", 13223),
    ('<Response><Dial timeout="4">+15557770000</Dial></Response>', 13212),
    ('<Response><Dial timeout="601">+15557770000</Dial></Response>', 13212),
], ids=lambda value: repr(value)[:70])
def test_a_document_that_twilio_refuses_ends_the_call_with_its_error(body, error):
    with Script({"/": (200, {}, body), "/talking": (500, {}, "")}) as (server, phone):
        assert phone.call().endswith("an application error has occurred. Goodbye.")
        assert phone.warnings[0].startswith(f"Twilio error {error}")
        method, path, form, headers = server.asked[-1]
        assert path == "/talking" and f"ErrorCode={error}" in form and "ErrorUrl=" in form


@pytest.mark.parametrize("status, headers, error", [
    (404, {}, 11200), (500, {}, 11200), (200, {"Content-Type": "application/json"}, 12300)
])
def test_the_fallback_saves_a_call_after_a_wrong_status_or_content_type(status, headers, error):
    with Script({"/": twiml("<Say>x</Say>", status, **headers), "/talking": SAVED}) as (_, phone):
        assert phone.call() == "Saved."
        assert str(error) in phone.warnings[0]


def test_plain_text_is_read_aloud():
    with Script({"/": (200, {"Content-Type": "text/plain"}, "Read aloud.")}) as (_, phone):
        assert phone.call() == "Read aloud."


def test_twilio_warns_of_words_that_are_empty_or_too_long():
    with Script({"/": twiml("<Say/><Say>" + "é" * 800 + "</Say>")}) as (_, phone):
        phone.call()
        assert [warning[:5] for warning in phone.warnings] == ["13520", "13521"]


def test_a_language_without_a_region_is_not_listened_for():
    verbs = '<Gather input="speech" language="de"><Say>Hallo?</Say></Gather><Say>Nobody.</Say><Hangup/>'
    with Script({"/": twiml(verbs)}) as (_, phone):
        assert phone.call() == "Hallo? Nobody." and phone.ended == "hangup"
        assert phone.warnings[0].startswith("13331")


# --- What Twilio does with a document -------------------------------------------------------------


def test_the_call_ends_behind_the_last_verb():
    with Script({"/": twiml("<Say>Bye.</Say>")}) as (_, phone):
        assert phone.call() == "Bye." and phone.ended == "hangup"


def test_a_silent_caller_hears_what_is_behind_the_gather_and_urls_are_relative():
    verbs = LISTEN.format(action="next?x=1") + "<Say>Hello?</Say><Redirect>again/deep</Redirect>"
    answers = {"/": twiml(verbs), "/again/deep": twiml(LISTEN.format(action="../other")), "/other": twiml("<Hangup/>")}
    with Script(answers) as (server, phone):
        assert phone.call() == "Go on."
        assert phone.stay_silent() == "Hello? Go on."
        phone.say("Yes & no.")
        assert server.asked[-1][1] == "/other" and "SpeechResult=Yes+%26+no." in server.asked[-1][2]
        assert phone.ended == "hangup"


def test_a_redirect_by_http_loses_the_callers_words():
    answers = {
        "/": twiml(LISTEN.format(action="/talking")), "/talking": (308, {"Location": "/talking/"}, ""),
        "/talking/": twiml("<Say>What?</Say>"),
    }
    with Script(answers) as (server, phone):
        phone.call()
        assert phone.say("Hello.") == "What?"
        method, path, body, _ = server.asked[-1]
        assert method == "GET" and "SpeechResult" not in path + body


@pytest.mark.parametrize("attributes, digits", [
    ("", "12"), ('numDigits="1"', "1"), ('finishOnKey=""', "12%233"), ('finishOnKey="2"', "1")
])
def test_keys_end_at_the_finishing_key_or_when_there_are_enough(attributes, digits):
    gather = f'<Gather input="dtmf" {attributes} action="/a"/>'
    with Script({"/": twiml(gather), "/a": twiml("<Hangup/>")}) as (server, phone):
        phone.call()
        phone.press("12#3")
        assert f"Digits={digits}&" in server.asked[-1][2]


def test_a_caller_who_hangs_up_in_the_middle_hears_no_more():
    with Script({"/": twiml("<Say>One.</Say><Say>Two.</Say><Redirect>/</Redirect>")}) as (_, phone):
        phone.on_hearing = lambda text: phone.hang_up()
        assert phone.call() == "One." and phone.ended == "hung up by the caller"


# --- Webhooks, and when they are tried again ------------------------------------------------------


BROKEN = (503, {}, "")
SLOW = (200, {}, lambda: time.sleep(0.5) or "<Response/>")


def goes_on_at(url, method="POST"):
    """A document that listens, and has Twilio fetch this URL with the caller's words."""
    return twiml(f'<Gather input="speech" method="{method}" action="{url}"/>')


def test_a_webhook_changes_the_call_and_a_request_does_not():
    other = twiml("<Say>Other.</Say><Redirect>/</Redirect>")
    with Script({"/": goes_on_at("/next"), "/other": other, "/raw": twiml("<Hangup/>")}) as (server, phone):
        assert phone.webhook("/other", {"Digits": "7"}) == "Other."
        form = form_of(server.asked[0])
        assert (form["CallSid"], form["Digits"]) == (phone.call_sid, "7")
        assert phone.gather == {"input": "speech", "method": "POST", "action": "/next"}
        response = phone.request("PUT", "/raw", {"a": "b"}, token="mine")
        assert (response.status, response.body) == (200, b"<Response><Hangup/></Response>")
        assert server.asked[-1][:2] == ("PUT", "/raw")
        assert phone.listens_to("speech") and not phone.ended


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_the_fragment_of_a_url_says_how_often_it_is_tried(method):
    answers = {
        "/": goes_on_at("/next?a=1#rc=2&amp;rp=ct,5xx", method),
        "/next": [BROKEN, BROKEN, twiml("<Say>Here.</Say>")],
    }
    with Script(answers) as (server, phone):
        phone.token = TOKEN
        phone.call()
        assert phone.say("Hello?") == "Here." and phone.warnings == []
        tries = server.asked[1:]
        assert [status for *_, status in phone.webhooks] == [200, 503, 503, 200]
        (path,) = {path for _, path, _, _ in tries}
        assert path.startswith("/next?a=1")
        assert "#" not in path and "rc=" not in path, "the fragment isn't sent"
        (token,) = {headers["I-Twilio-Idempotency-Token"] for *_, headers in tries}
        assert token != server.asked[0][3]["I-Twilio-Idempotency-Token"]
        (signature,) = {headers["X-Twilio-Signature"] for *_, headers in tries}
        assert signature == sign(TOKEN, phone.url + path, form_of(tries[0])), "nor is it signed"


@pytest.mark.parametrize("fragment, answer, tries", [
    ("", BROKEN, 1), ("#rc=3", BROKEN, 1), ("#rp=5xx", BROKEN, 2), ("#rc=0&amp;rp=5xx", BROKEN, 1),
    pytest.param("#rc=5&amp;rp=all", BROKEN, 6, marks=pytest.mark.slow),
    ("#rc=2&amp;rp=4xx", BROKEN, 1), ("#rc=2&amp;rp=4xx,rt", (404, {}, ""), 3),
    pytest.param("#rt=100&amp;rc=2&amp;rp=rt", SLOW, 3, marks=pytest.mark.slow), ("#rt=100&amp;rc=2", SLOW, 1),
])
def test_only_the_failures_that_the_fragment_names_are_tried_again(fragment, answer, tries):
    with Script({"/": goes_on_at(f"/next{fragment}"), "/next": answer, "/talking": SAVED}) as (server, phone):
        phone.call()
        assert phone.say("Hello?") == "Saved."
        assert paths(server).count("/next") == tries
        assert form_of(server.asked[-1])["ErrorUrl"] == phone.url + "/next"


def test_a_good_answer_is_not_asked_for_again():
    with Script({"/": goes_on_at("/next#rc=3&amp;rp=all"), "/next": twiml("")}) as (server, phone):
        phone.call()
        assert phone.say("Hello?") == "" and paths(server) == ["/", "/next"]


def test_a_closed_port_is_twilios_error():
    phone = Phone("http://127.0.0.1:9")
    assert "application error" in phone.call() and "11205" in phone.ended


@pytest.mark.slow
def test_a_closed_port_is_tried_as_often_as_the_fragment_says():
    begun = time.monotonic()
    phone = Phone("http://127.0.0.1:9")
    phone.webhook("http://127.0.0.1:9/#rc=5")
    assert time.monotonic() - begun >= 0.5, "a tenth of a second before each"
    assert "11205" in phone.warnings[0]


@pytest.mark.parametrize("fragment", ["rc=9", "rp=6xx", "rc=lots", "retries=3", "here"])
def test_twilio_warns_of_a_fragment_that_it_does_not_understand(fragment):
    with Script({"/": goes_on_at(f"/next#{fragment}"), "/next": twiml("<Say>Here.</Say>")}) as (_, phone):
        phone.call()
        assert phone.say("Hello?") == "Here."
        assert fragment in phone.warnings[0]


@pytest.mark.slow
def test_all_tries_together_have_fifteen_seconds():
    slow = (200, {}, lambda: time.sleep(6) or "<Response/>")
    answers = {"/": goes_on_at("/next#rc=5&amp;rp=rt&amp;rt=5000"), "/next": slow, "/talking": SAVED}
    with Script(answers) as (server, phone):
        phone.call()
        assert phone.say("Hello?") == "Saved."
        assert 1 < paths(server).count("/next") < 5


@pytest.mark.slow
def test_after_fifteen_seconds_twilio_asks_the_fallback():
    slow = (200, {"Content-Length": 11}, lambda: time.sleep(16) or "<Response/>")
    with Script({"/": slow, "/talking": SAVED}) as (_, phone):
        assert phone.call() == "Saved."
        assert "11200" in phone.warnings[0]


# --- A call to another number ---------------------------------------------------------------------


DIAL = """<Say>Wait.</Say>
    <Dial callerId="+15550009999" timeout="20" answerOnBridge="true" action="/after?a=1">
    <Number url="/whisper">+15557770000</Number></Dial><Say>This is never heard.</Say>"""
WHISPER = """<Gather input="dtmf" numDigits="1" action="/key"><Say language="en-GB">For you!</Say>
    </Gather><Hangup/>"""


@pytest.mark.parametrize("does, status, bridged, asked", [
    ("takes it", "completed", "true", ["/whisper", "/key"]),
    ("presses nothing", "completed", "false", ["/whisper"]),
    ("busy", "busy", "false", []), ("no answer", "no-answer", "false", []), ("failed", "failed", "false", []),
])
def test_another_number_is_called_and_then_the_call_comes_back(does, status, bridged, asked):
    answers = {"/": twiml(DIAL), "/whisper": twiml(WHISPER), "/key": twiml(""), "/after": twiml("<Say>Back.</Say>")}
    with Script(answers) as (server, phone):
        phone.token, phone.handed_over = TOKEN, does
        assert phone.call() == "Wait. Back." and phone.warnings == []
        assert phone.dialled[0]["Number"] == "+15557770000" and phone.dialled[0]["timeout"] == "20"
        assert paths(server) == ["/", *asked, "/after?a=1"]
        _, *second, last = map(form_of, server.asked)
        assert (last["CallSid"], last["DialCallStatus"]) == (phone.call_sid, status)
        assert last["DialBridged"] == bridged
        for leg in second:
            assert (leg["From"], leg["To"]) == ("+15550009999", "+15557770000")
            assert leg["ParentCallSid"] == phone.call_sid and leg["Direction"] == "outbound-dial"
            assert leg["CallSid"] == last["DialCallSid"] != phone.call_sid
        assert [leg.get("Digits") for leg in second[1:]] == ["1"] * len(second[1:])
        assert all("X-Twilio-Signature" in headers for *_, headers in server.asked)
        if asked:
            assert phone.other_person.voices == [("For you!", None, "en-GB")]
            assert phone.other_person.ended == ("connected" if bridged == "true" else "hangup")
        else:
            assert phone.other_person is None


def test_without_a_url_a_voicemail_takes_the_call_and_without_an_action_the_document_goes_on():
    with Script({"/": twiml("<Dial>+15557770000</Dial><Say>Back.</Say>")}) as (_, phone):
        phone.handed_over = "presses nothing"
        assert phone.call() == "Back." and phone.other_person.ended == "connected"


def test_twilio_warns_of_a_strange_caller_id_and_calls_nobody():
    verbs = DIAL.replace("+15550009999", "+15551112222")
    with Script({"/": twiml(verbs), "/after": twiml("")}) as (server, phone):
        phone.call()
        assert phone.warnings[0].startswith("13214") and phone.other_person is None
        assert "DialCallStatus=failed" in server.asked[-1][2]


@pytest.mark.parametrize("caller_id", ["sip:bo@example.com", "", "whatsapp:+15551112222"])
def test_a_caller_id_that_is_no_number_ends_the_call(caller_id):
    verbs = DIAL.replace("+15550009999", caller_id)
    with Script({"/": twiml(verbs), "/after": twiml("")}) as (_, phone):
        phone.call()
        assert "13214" in phone.ended and phone.other_person is None


@pytest.mark.parametrize("answer", [(500, {}, ""), twiml("<Dial>+15557770000</Dial>")], ids=["an error", "a dial"])
def test_a_bad_document_for_the_other_person_connects_nobody(answer):
    with Script({"/": twiml(DIAL), "/whisper": answer, "/after": twiml("")}) as (server, phone):
        phone.call()
        assert "DialBridged=false" in server.asked[-1][2]
        assert phone.other_person.ended.startswith("Twilio error")


# --- The telephone in the terminal ----------------------------------------------------------------


def call_from_terminal(typed, *arguments, **more):
    """Call with the telephone and type this; returns what it printed and its exit status."""
    process = telephone(*arguments, **more)
    try:
        out, err = process.communicate(typed, timeout=120)
    finally:
        process.kill()
    return out, err, process.returncode


# With an app that runs already


def test_a_running_line_is_called_by_its_address(stage):
    token = {"TWILIO_AUTH_TOKEN": stage.app.token}
    out, err, status = call_from_terminal("Hello there.\n/bye\n", stage.app.url, settings=token)
    assert "You said: Hello there." in out and (status, err) == (0, "")


@pytest.mark.slow
def test_a_line_that_is_not_there_is_twilios_error():
    out, _, status = call_from_terminal("", "http://127.0.0.1:9")
    assert "Twilio error 11205" in out and status == 1


def test_an_address_without_a_scheme_is_refused():
    _, err, status = call_from_terminal("", "my-line.example.com")
    assert "http://" in err and status == 2


def test_a_pretend_claude_cannot_be_brought_to_a_running_line():
    _, err, status = call_from_terminal("", "--pretend", "http://127.0.0.1:9")
    assert "leave the address out" in err and status == 2


def test_without_an_app_in_the_folder_none_is_started(tmp_path):
    out, err, status = call_from_terminal("", cwd=tmp_path)
    assert f"There is no app.py in this folder ({os.path.realpath(tmp_path)})" in err
    assert (out, status) == ("", 1)


@pytest.mark.slow
def test_of_two_errors_the_first_one_is_named_at_the_end():
    with Script({"/": (500, {}, ""), "/talking": (404, {}, "")}) as (_, phone):
        out, _, status = call_from_terminal("", phone.url)
        assert f"The call has ended: Twilio error 11200: HTTP 500 from {phone.url}/." in out
        assert "HTTP 404" in out and status == 1


@pytest.mark.slow
def test_commands_are_never_spoken():
    listens = twiml('<Gather input="speech dtmf" numDigits="1" action="/next"/>')
    with Script({"/": listens, "/next": listens, "/status_callback": (204, {}, "")}) as (server, phone):
        typed = "/help\n/x\n/\n/5x\n/help me\n/5 5\n/55\n/bye now\nHello?\n"
        out, err, status = call_from_terminal(typed, phone.url)
        turns = [form_of(request) for request in server.asked if request[1] == "/next"]
        assert [turn.get("Digits") for turn in turns] == ["5", "5"]
        assert not any("SpeechResult" in turn for turn in turns)
        assert out.count("/bye           hang up") == 3, "at the start, and twice for /help"
        assert out.count("the keys are 0 1 2 3 4 5 6 7 8 9 * #") == 4
        assert "there is no /x" in out and (status, err) == (0, "")


@pytest.mark.slow
def test_a_line_that_takes_several_keys_gets_them_together():
    listens = twiml('<Gather input="dtmf" action="/next"/>')
    with Script({"/": listens, "/next": listens, "/status_callback": (204, {}, "")}) as (server, phone):
        call_from_terminal("/4711\n/bye\n", phone.url)
        assert [form_of(request)["Digits"] for request in server.asked if request[1] == "/next"] == ["4711"]


class Terminal:
    """The telephone in a real terminal, where one can cut in."""

    def __init__(self, *arguments):
        self.end, other_end = pty.openpty()
        self.shown = ""
        self.process = telephone(*arguments, stdin=other_end, stdout=other_end, stderr=other_end)
        os.close(other_end)

    def shows(self, text, times=1):
        """Wait until it has shown this so many times."""
        while self.shown.count(text) < times:
            self.shown += os.read(self.end, 4096).decode()

    def type(self, text):
        os.write(self.end, text.encode())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.end)


@pytest.mark.slow
def test_enter_cuts_in_and_is_not_taken_for_silence():
    many = " ".join(f"word{number}" for number in range(200))
    gather = f'<Gather input="speech" action="/next"><Say>{many}</Say></Gather>'
    answers = {
        "/": twiml(f"{gather}<Say>Silent?</Say>"), "/next": twiml("<Say>Bye.</Say>"), "/status_callback": (204, {}, "")
    }
    with Script(answers) as (server, phone), Terminal(phone.url) as terminal:
        terminal.shows("word1 ")
        terminal.type("\n")
        terminal.shows("-")
        terminal.shows("> ", 2)  # the first prompt got the Enter
        terminal.type("Now listen.\n")
        terminal.shows("The call has ended: hangup.")
        after = terminal.shown.rpartition("word1 ")[2]
        assert "word199" not in after and "silent" not in after
        assert paths(server) == ["/", "/next", "/status_callback"]
        assert "SpeechResult=Now+listen." in server.asked[1][2]


# With an app that the telephone starts


@pytest.fixture
def scratch(tmp_path):
    """The folder in which the telephone keeps its files meanwhile."""
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def folder_with(app, tmp_path):
    """A learner's folder with this app.py."""
    (tmp_path / "line").mkdir()
    (tmp_path / "line" / "app.py").write_text(app)
    return tmp_path / "line"


@pytest.mark.slow
def test_the_telephone_starts_the_app_and_calls_it_without_a_key():
    out, err, status = call_from_terminal("/bye\n")
    assert "ANTHROPIC_API_KEY is not set, so a pretend Claude answers." in out
    assert "Hello, this is Claude speaking!" in out and "The call has ended: hung up by the caller." in out
    assert "the app:" not in out and (status, err) == (0, "")


@pytest.mark.slow
def test_a_whole_call_in_the_terminal_needs_no_key():
    typed = "Hello there.\nHow are you?\n\n/5\nGood bye.\n/bye\n"
    out, err, status = call_from_terminal(typed)
    assert "Hello, this is Claude speaking!" in out
    assert "ANTHROPIC_API_KEY is not set, so a pretend Claude answers." in out
    for heard in ("Hello there.", "How are you?", "pressed 5", "Goodbye!"):
        assert heard in out
    assert "Are you still there?" in out and "stay silent" in out
    assert "hang up" in out, "the keys are shown at the start"
    assert "the app:" not in out and (status, err) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"ANTHROPIC_BASE_URL": "http://127.0.0.1:9", "ANTHROPIC_API_KEY": "sk-ant-real"}],
    ids=["no key", "another key"],
)
def test_the_pretend_claude_needs_no_key_and_no_network(settings):
    out, err, status = call_from_terminal("Hello there.\n/bye\n", "--pretend", settings=settings)
    assert "no key for Claude" not in out and "something went wrong" not in out
    assert "the app:" not in out and "Hello there." in out
    assert (status, err) == (0, "")


@pytest.mark.slow
def test_an_error_of_the_app_is_on_the_screen(stage):
    wrong = {"ANTHROPIC_API_KEY": "sk-ant-mistyped", "ANTHROPIC_BASE_URL": stage.claude.url}
    out, _, _ = call_from_terminal("Hello there.\nCan you hear me?\nAre you there?\n/bye\n", settings=wrong)
    assert "AuthenticationError 401" in out and "Booting worker" not in out


@pytest.mark.slow
def test_a_warning_of_the_app_is_on_the_screen():
    out, _, _ = call_from_terminal("/bye\n", "--number", "+15551230002")
    assert "[the app: WARNING ALLOWED_CALLERS is not set: " in out


# Says when a call is over.
LINE = """
import pathlib, threading, time
import flask
app = flask.Flask(__name__)

@app.route("/", methods=["GET", "POST"])
def call_comes_in():
    return '<Response><Gather input="speech"/></Response>', {"Content-Type": "text/xml"}

@app.post("/status_callback")
def status_callback():
    pathlib.Path("asked").touch()
    return "", 204
"""
# Takes its time over that, and then over its own end.
SLOW_TO_END = LINE.replace("    return \"\"", """\
    threading.Thread(target=time.sleep, args=(2.5,)).start()
    time.sleep(1)
    return \"\"""")


@pytest.mark.slow
def test_a_traceback_of_the_app_is_on_the_screen(tmp_path):
    here = folder_with(LINE.replace("    return '<", "    1 / 0\n    return '<"), tmp_path)
    out, _, status = call_from_terminal("", cwd=here)
    assert "[the app: Traceback (most recent call last):]" in out
    assert "[the app: ZeroDivisionError: division by zero]" in out
    assert ", in call_comes_in]" in out and status == 1


def descendants(pid):
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children = [int(child) for child, parent in map(str.split, listing.splitlines()) if int(parent) == pid]
    return children + [pid for child in children for pid in descendants(child)]


def is_running(pid):
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return listed.stdout.strip()[:1] not in ("", "Z")  # of a zombie only the number is left


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["Starting", "Calling"])
def test_ctrl_c_leaves_nothing_behind(scratch, moment):
    process = telephone(start_new_session=True, settings={"TMPDIR": str(scratch)})
    while moment not in process.stdout.readline():
        assert process.poll() is None
    running = wait_until(lambda: descendants(process.pid))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert err == "" and process.returncode == 0
    for pid in running:
        wait_until(lambda pid=pid: not is_running(pid))
    assert os.listdir(scratch) == []


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [
    (signal.SIGINT, "hanging up"), ("/bye\n", "hanging up"), ("/bye\n", "ended")
], ids=["Ctrl-C, hanging up", "bye, hanging up", "bye, ended"])
def test_a_second_ctrl_c_leaves_nothing_behind_either(tmp_path, scratch, first, then):
    here = folder_with(SLOW_TO_END, tmp_path)
    process = telephone(start_new_session=True, settings={"TMPDIR": str(scratch)}, cwd=here)
    while "Calling" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    running = wait_until(lambda: descendants(process.pid))
    if first == signal.SIGINT:
        process.send_signal(first)
    else:
        process.stdin.write(first)
        process.stdin.flush()
    wait_until((here / "asked").exists)
    while then == "ended" and "The call has ended" not in (line := process.stdout.readline()):
        assert line, "all that was printed has been read"
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, err = process.communicate(timeout=60)
    assert err == "" and process.returncode == 0
    assert not any(map(is_running, running)) and os.listdir(scratch) == []
