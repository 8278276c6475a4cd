"""The telephone itself: it must be as strict as Twilio, or the other tests prove nothing."""

import contextlib
import http.server
import os
import pathlib
import pty
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

import pytest

from tests.conftest import meanwhile, wait_until
from tests.phone import ROOT, Phone, sign

LISTEN = '<Gather input="speech dtmf" action="{action}"><Say>Go on.</Say></Gather>'


class Script(http.server.ThreadingHTTPServer):
    """A web server that answers each path with what it is given: (status, headers, body)."""

    daemon_threads = True

    def __init__(self, answers):
        self.answers, self.asked = answers, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                self.server.asked.append((self.command, self.path, body.decode(), self.headers))
                answer = self.server.answers[self.path.split("?")[0]]
                # A list is one answer after the other, and the last one for ever.
                if isinstance(answer, list):
                    answer = answer.pop(0) if len(answer) > 1 else answer[0]
                status, headers, body = answer
                if callable(body):
                    body = body()
                self.send_response(status)
                for name, value in {"Content-Type": "text/xml", "Content-Length": len(body.encode()), **headers}.items():
                    self.send_header(name, str(value))
                with contextlib.suppress(ConnectionError):  # the telephone may have given up
                    self.end_headers()
                    self.wfile.write(body.encode())

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self, Phone(f"http://127.0.0.1:{self.server_address[1]}")

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def twiml(verbs, status=200, **headers):
    return status, headers, f"<Response>{verbs}</Response>"


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
])
def test_what_twilio_would_refuse_ends_the_call_with_its_error(body, error):
    with Script({"/": (200, {}, body), "/talking": (500, {}, "")}) as (server, phone):
        assert phone.call().endswith("an application error has occurred. Goodbye.")
        assert phone.warnings[0].startswith(f"Twilio error {error}")
        method, path, form, headers = server.asked[-1]
        assert path == "/talking" and f"ErrorCode={error}" in form and "ErrorUrl=" in form


def test_statuses_and_content_types():
    for status, headers, error in [(404, {}, 11200), (500, {}, 11200), (200, {"Content-Type": "application/json"}, 12300)]:
        with Script({"/": twiml("<Say>x</Say>", status, **headers), "/talking": twiml("<Say>Saved.</Say>")}) as (_, phone):
            assert phone.call() == "Saved.", "by the fallback"
            assert str(error) in phone.warnings[0]
    with Script({"/": (200, {"Content-Type": "text/plain"}, "Read aloud.")}) as (_, phone):
        assert phone.call() == "Read aloud."


def test_too_long_or_empty_words_are_warned_of():
    with Script({"/": twiml("<Say/><Say>" + "é" * 800 + "</Say>")}) as (_, phone):
        phone.call()
        assert [warning[:5] for warning in phone.warnings] == ["13520", "13521"]


def test_the_last_verb_hangs_up():
    with Script({"/": twiml("<Say>Bye.</Say>")}) as (_, phone):
        assert phone.call() == "Bye." and phone.ended == "hangup"


def test_a_silent_gather_falls_through_and_urls_are_relative():
    verbs = LISTEN.format(action="next?x=1") + "<Say>Hello?</Say><Redirect>again/deep</Redirect>"
    answers = {"/": twiml(verbs), "/again/deep": twiml(LISTEN.format(action="../other")), "/other": twiml("<Hangup/>")}
    with Script(answers) as (server, phone):
        assert phone.call() == "Go on."
        assert phone.stay_silent() == "Hello? Go on."
        phone.say("Yes & no.")
        assert server.asked[-1][1] == "/other" and "SpeechResult=Yes+%26+no." in server.asked[-1][2]
        assert phone.ended == "hangup"


def test_a_redirect_by_http_loses_what_the_caller_said():
    answers = {"/": twiml(LISTEN.format(action="/talking")), "/talking": (308, {"Location": "/talking/"}, ""),
               "/talking/": twiml("<Say>What?</Say>")}
    with Script(answers) as (server, phone):
        phone.call()
        assert phone.say("Hello.") == "What?"
        assert server.asked[-1][0] == "GET" and "SpeechResult" not in server.asked[-1][1] + server.asked[-1][2]


def test_keys_end_at_the_finishing_key_or_when_there_are_enough():
    for attributes, digits in [("", "12"), ('numDigits="1"', "1"), ('finishOnKey=""', "12%233"), ('finishOnKey="2"', "1")]:
        gather = f'<Gather input="dtmf" {attributes} action="/a"/>'
        with Script({"/": twiml(gather), "/a": twiml("<Hangup/>")}) as (server, phone):
            phone.call()
            phone.press("12#3")
            assert f"Digits={digits}&" in server.asked[-1][2]


def test_a_delivery_that_finds_nobody_is_tried_again_as_the_same():
    phone = Phone("http://127.0.0.1:9")
    assert "application error" in phone.call() and "11205" in phone.ended


DIAL = """<Say>Wait.</Say>
    <Dial callerId="+15550009999" timeout="20" answerOnBridge="true" action="/after?a=1">
    <Number url="/whisper">+15557770000</Number></Dial><Say>This is never heard.</Say>"""
WHISPER = """<Gather input="dtmf" numDigits="1" action="/key"><Say language="en-GB">For you!</Say>
    </Gather><Hangup/>"""


@pytest.mark.parametrize("does, status, bridged, asked", [
    ("takes it", "completed", "true", ["/whisper", "/key"]),
    ("presses nothing", "completed", "false", ["/whisper"]),
    ("busy", "busy", "false", []), ("no answer", "no-answer", "false", []),
    ("failed", "failed", "false", []),
])
def test_a_number_is_dialled_and_the_call_comes_back(does, status, bridged, asked):
    answers = {"/": twiml(DIAL), "/whisper": twiml(WHISPER), "/key": twiml("")}
    answers["/after"] = twiml("<Say>Back.</Say>")
    with Script(answers) as (server, phone):
        phone.token, phone.handed_over = "12345", does
        assert phone.call() == "Wait. Back." and phone.warnings == []
        assert phone.dialled[0]["Number"] == "+15557770000" and phone.dialled[0]["timeout"] == "20"
        assert [path for _, path, _, _ in server.asked] == ["/", *asked, "/after?a=1"]
        forms = [dict(urllib.parse.parse_qsl(form)) for _, _, form, _ in server.asked]
        _, *second, last = forms
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


def test_without_a_url_even_a_voicemail_takes_the_call_and_without_an_action_it_goes_on_behind():
    verbs = "<Dial>+15557770000</Dial><Say>Back.</Say>"
    with Script({"/": twiml(verbs)}) as (_, phone):
        phone.handed_over = "presses nothing"
        assert phone.call() == "Back." and phone.other_person.ended == "connected"


def test_a_strange_caller_id_is_warned_of_and_nobody_is_called():
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


def test_a_language_without_a_region_is_not_listened_for():
    verbs = '<Gather input="speech" language="de"><Say>Hallo?</Say></Gather><Say>Nobody.</Say><Hangup/>'
    with Script({"/": twiml(verbs)}) as (_, phone):
        assert phone.call() == "Hallo? Nobody." and phone.ended == "hangup"
        assert phone.warnings[0].startswith("13331")


@pytest.mark.parametrize("answer", [(500, {}, ""), twiml("<Dial>+15557770000</Dial>")])
def test_who_cannot_be_asked_is_not_connected(answer):
    with Script({"/": twiml(DIAL), "/whisper": answer, "/after": twiml("")}) as (server, phone):
        phone.call()
        assert "DialBridged=false" in server.asked[-1][2]
        assert phone.other_person.ended.startswith("Twilio error")


BROKEN = (503, {}, "")


def goes_on_at(url, method="POST"):
    """A document that listens, and has Twilio fetch this URL with what the caller says."""
    return twiml(f'<Gather input="speech" method="{method}" action="{url}"/>')


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_the_fragment_of_a_url_says_how_often_it_is_tried(method):
    answers = {
        "/": goes_on_at("/next?a=1#rc=2&amp;rp=ct,5xx", method),
        "/next": [BROKEN, BROKEN, twiml("<Say>Here.</Say>")],
    }
    with Script(answers) as (server, phone):
        phone.token = "12345"
        phone.call()
        assert phone.say("Hello?") == "Here." and phone.warnings == []
        tries = server.asked[1:]
        assert [status for *_, status in phone.webhooks] == [200, 503, 503, 200]
        (path,) = {path for _, path, _, _ in tries}
        assert path.startswith("/next?a=1")
        assert "#" not in path and "rc=" not in path, "the fragment isn't sent"
        (token,) = {headers["I-Twilio-Idempotency-Token"] for *_, headers in tries}
        assert token != server.asked[0][3]["I-Twilio-Idempotency-Token"]
        params = dict(urllib.parse.parse_qsl(tries[0][2], keep_blank_values=True))
        (signature,) = {headers["X-Twilio-Signature"] for *_, headers in tries}
        assert signature == sign("12345", phone.url + path, params), "nor is it signed"


@pytest.mark.parametrize("fragment, answer, tries", [
    ("", BROKEN, 1), ("#rc=3", BROKEN, 1), ("#rp=5xx", BROKEN, 2), ("#rc=0&amp;rp=5xx", BROKEN, 1),
    ("#rc=5&amp;rp=all", BROKEN, 6), ("#rc=2&amp;rp=4xx", BROKEN, 1),
    ("#rc=2&amp;rp=4xx,rt", (404, {}, ""), 3),
    ("#rc=3&amp;rp=all", twiml(""), 1),
    ("#rt=100&amp;rc=2&amp;rp=rt", (200, {}, lambda: time.sleep(0.5) or "<Response/>"), 3),
    ("#rt=100&amp;rc=2", (200, {}, lambda: time.sleep(0.5) or "<Response/>"), 1),
])
def test_only_what_the_fragment_names_is_tried_again(fragment, answer, tries):
    fallback = twiml("<Say>Saved.</Say>")
    answers = {"/": goes_on_at(f"/next{fragment}"), "/next": answer, "/talking": fallback}
    with Script(answers) as (server, phone):
        phone.call()
        assert phone.say("Hello?") == ("" if answer == twiml("") else "Saved.")
        assert [path for _, path, _, _ in server.asked].count("/next") == tries
        if answer != twiml(""):
            form = dict(urllib.parse.parse_qsl(server.asked[-1][2]))
            assert form["ErrorUrl"] == phone.url + "/next"


def test_nobody_at_the_door_is_tried_as_often_as_the_fragment_says():
    phone = Phone("http://127.0.0.1:9")
    phone.webhook("http://127.0.0.1:9/#rc=0")
    begun = time.monotonic()
    phone = Phone("http://127.0.0.1:9")
    phone.webhook("http://127.0.0.1:9/#rc=5")
    assert time.monotonic() - begun >= 0.5, "a tenth of a second before each"
    assert "11205" in phone.warnings[0]


@pytest.mark.parametrize("fragment", ["rc=9", "rp=6xx", "rc=lots", "retries=3", "here"])
def test_a_fragment_that_says_nothing_to_twilio_is_warned_of(fragment):
    answers = {"/": goes_on_at(f"/next#{fragment}"), "/next": twiml("<Say>Here.</Say>")}
    with Script(answers) as (_, phone):
        phone.call()
        assert phone.say("Hello?") == "Here."
        assert fragment in phone.warnings[0]


@meanwhile
def test_all_tries_together_have_fifteen_seconds(stage):
    slow = (200, {}, lambda: time.sleep(6) or "<Response/>")
    fallback = twiml("<Say>Saved.</Say>")
    url = "/next#rc=5&amp;rp=rt&amp;rt=5000"
    answers = {"/": goes_on_at(url), "/next": slow, "/talking": fallback}
    with Script(answers) as (server, phone):
        phone.call()
        assert phone.say("Hello?") == "Saved."
        assert [path for _, path, _, _ in server.asked].count("/next") < 5


def test_twilio_fetches_what_a_test_tells_it_and_a_request_changes_nothing_in_the_call():
    other = twiml("<Say>Other.</Say><Redirect>/</Redirect>")
    answers = {"/": goes_on_at("/next"), "/other": other, "/raw": twiml("<Hangup/>")}
    with Script(answers) as (server, phone):
        assert phone.webhook("/other", {"Digits": "7"}) == "Other."
        form = dict(urllib.parse.parse_qsl(server.asked[0][2]))
        assert (form["CallSid"], form["Digits"]) == (phone.call_sid, "7")
        assert phone.gather == {"input": "speech", "method": "POST", "action": "/next"}
        response = phone.request("PUT", "/raw", {"a": "b"}, token="mine")
        assert (response.status, response.body) == (200, b"<Response><Hangup/></Response>")
        assert server.asked[-1][:2] == ("PUT", "/raw")
        assert phone.listens_to("speech") and not phone.ended


def test_who_hangs_up_while_something_is_said_hears_no_more():
    with Script({"/": twiml("<Say>One.</Say><Say>Two.</Say><Redirect>/</Redirect>")}) as (_, phone):
        phone.on_hearing = lambda text: phone.hang_up()
        assert phone.call() == "One." and phone.ended == "hung up by the caller"


@meanwhile
def test_after_fifteen_seconds_twilio_asks_the_fallback(stage):
    answers = {"/": twiml(""), "/talking": twiml("<Say>Saved.</Say>")}
    answers["/"] = (200, {"Content-Length": 11}, lambda: time.sleep(16) or "<Response/>")
    with Script(answers) as (_, phone):
        assert phone.call() == "Saved."
        assert "11200" in phone.warnings[0]


def telephone(*arguments, settings=None, **more):
    """The telephone in a terminal, as a process, in a fresh machine's environment with settings."""
    basics = {name: os.environ.get(name, "/") for name in ("PATH", "HOME")}
    basics["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "tests.phone", *arguments]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    more = {"cwd": ROOT, "env": {**basics, **(settings or {})}, "text": True, **streams, **more}
    return subprocess.Popen(command, **more)


@contextlib.contextmanager
def folder(app):
    """A learner's folder with this app.py, and one for what the telephone keeps meanwhile."""
    with tempfile.TemporaryDirectory() as name:
        here, scratch = pathlib.Path(name, "line"), pathlib.Path(name, "scratch")
        here.mkdir()
        scratch.mkdir()
        (here / "app.py").write_text(app)
        yield here, scratch


@meanwhile
def test_three_turns_in_the_terminal_without_a_key(stage):
    process = telephone()
    typed = "Hello there.\nHow are you?\n\n/5\nGood bye.\n/bye\n"
    out, err = process.communicate(typed, timeout=120)
    assert "Hello, this is Claude speaking!" in out
    assert "ANTHROPIC_API_KEY is not set, so a pretend Claude answers." in out
    for heard in ("Hello there.", "How are you?", "pressed 5", "Goodbye!"):
        assert heard in out
    assert "Are you still there?" in out and "stay silent" in out and "hang up" in out, "the keys are shown at the start"
    assert (process.returncode, err) == (0, "")


def descendants(pid):
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children = [int(child) for child, parent in map(str.split, listing.splitlines()) if int(parent) == pid]
    return children + [pid for child in children for pid in descendants(child)]


def is_running(pid):
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return listed.stdout.strip()[:1] not in ("", "Z")  # of a zombie only the number is left


@meanwhile
def test_ctrl_c_leaves_nothing_behind(stage):
    for moment in ("Starting", "Calling"):
        with tempfile.TemporaryDirectory() as scratch:
            process = telephone(start_new_session=True, settings={"TMPDIR": scratch})
            while moment not in process.stdout.readline():
                assert process.poll() is None
            running = wait_until(lambda: descendants(process.pid))
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
            assert err == "" and process.returncode == 0
            for pid in running:
                wait_until(lambda pid=pid: not is_running(pid))
            assert os.listdir(scratch) == []


# Takes its time over the end of a call, and says when that begins; and over its own end.
SLOW_TO_END = """
import pathlib, threading, time
import flask
app = flask.Flask(__name__)

@app.route("/", methods=["GET", "POST"])
def call_comes_in():
    return '<Response><Gather input="speech"/></Response>', {"Content-Type": "text/xml"}

@app.post("/status_callback")
def status_callback():
    pathlib.Path("asked").touch()
    threading.Thread(target=time.sleep, args=(2.5,)).start()
    time.sleep(1)
    return "", 204
"""


@meanwhile
def test_a_second_ctrl_c_leaves_nothing_behind_either(stage):
    moments = (signal.SIGINT, "hanging up"), ("/bye\n", "hanging up"), ("/bye\n", "ended")
    for first, then in moments:
        with folder(SLOW_TO_END) as (here, scratch):
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


@meanwhile
def test_what_the_app_complains_of_is_on_the_screen(stage):
    wrong = {"ANTHROPIC_API_KEY": "sk-ant-mistyped", "ANTHROPIC_BASE_URL": stage.claude.url}
    process = telephone(settings=wrong)
    out, _ = process.communicate("Hello there.\n/bye\n", timeout=120)
    assert "AuthenticationError 401" in out and "Booting worker" not in out
    process = telephone(settings={"LANGUAGE": "en-GB"})
    out, _ = process.communicate("/bye\n", timeout=120)
    assert "[the app: WARNING LANGUAGE is now called LANGUAGES]" in out
    with folder(SLOW_TO_END.replace("    return '<", "    1 / 0\n    return '<")) as (here, _):
        process = telephone(cwd=here)
        out, _ = process.communicate("", timeout=120)
        assert "[the app: Traceback (most recent call last):]" in out
        assert "[the app: ZeroDivisionError: division by zero]" in out
        assert ", in call_comes_in]" in out and process.returncode == 1


@meanwhile
def test_the_error_that_is_named_is_the_first_one(stage):
    with Script({"/": (500, {}, ""), "/talking": (404, {}, "")}) as (server, phone):
        process = telephone(phone.url)
        out, _ = process.communicate("", timeout=60)
        ending = f"The call has ended: Twilio error 11200: HTTP 500 from {phone.url}/."
        assert ending in out and "HTTP 404" in out and process.returncode == 1


@meanwhile
def test_without_an_app_in_the_folder_none_is_started(stage):
    with tempfile.TemporaryDirectory() as empty:
        process = telephone(cwd=empty)
        out, err = process.communicate("", timeout=60)
        assert f"There is no app.py in this folder ({os.path.realpath(empty)})" in err
        assert out == "" and process.returncode == 1


@meanwhile
def test_commands_are_never_spoken(stage):
    listens = twiml('<Gather input="speech dtmf" numDigits="1" action="/next"/>')
    answers = {"/": listens, "/next": listens, "/status_callback": (204, {}, "")}

    def turns():
        forms = [body for _, path, body, _ in server.asked if path == "/next"]
        return [dict(urllib.parse.parse_qsl(form)) for form in forms]

    with Script(answers) as (server, phone):
        process = telephone(phone.url)
        typed = "/help\n/x\n/\n/5x\n/help me\n/5 5\n/55\n/bye now\nHello?\n"
        out, err = process.communicate(typed, timeout=60)
        assert [turn.get("Digits") for turn in turns()] == ["5", "5"]
        assert not any("SpeechResult" in turn for turn in turns())
        assert out.count("/bye           hang up") == 3, "at the start, and twice for /help"
        assert out.count("the keys are 0 1 2 3 4 5 6 7 8 9 * #") == 4
        assert "there is no /x" in out and (process.returncode, err) == (0, "")
        answers["/"] = answers["/next"] = twiml('<Gather input="dtmf" action="/next"/>')
        out, _ = telephone(phone.url).communicate("/4711\n/bye\n", timeout=60)
        assert turns()[2]["Digits"] == "4711", "a line that takes several gets them together"


class Terminal:
    """The telephone in a real terminal, where one can cut in."""

    def __init__(self, *arguments):
        self.end, other_end = pty.openpty()
        self.shown = ""
        self.process = telephone(*arguments, stdin=other_end, stdout=other_end, stderr=other_end)
        os.close(other_end)

    def shows(self, text, times=1):
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


@meanwhile
def test_enter_cuts_in_and_is_not_silence_at_once(stage):
    many = " ".join(f"word{number}" for number in range(200))
    gather = f'<Gather input="speech" action="/next"><Say>{many}</Say></Gather>'
    answers = {
        "/": twiml(f"{gather}<Say>Silent?</Say>"),
        "/next": twiml("<Say>Bye.</Say>"),
        "/status_callback": (204, {}, ""),
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
        assert [path for _, path, _, _ in server.asked] == ["/", "/next", "/status_callback"]
        assert "SpeechResult=Now+listen." in server.asked[1][2]


@meanwhile
def test_a_pretend_claude_needs_no_key_and_no_network(stage):
    elsewhere = {"ANTHROPIC_BASE_URL": "http://127.0.0.1:9", "ANTHROPIC_API_KEY": "sk-ant-real"}
    for settings in ({}, elsewhere):
        process = telephone("--pretend", settings=settings)
        out, err = process.communicate("Hello there.\n/bye\n", timeout=120)
        assert "no key for Claude" not in out and "something went wrong" not in out
        assert "the app:" not in out and "Hello there." in out
        assert (process.returncode, err) == (0, "")
    process = telephone("--pretend", "http://127.0.0.1:9")
    _, err = process.communicate("", timeout=60)
    assert "leave the address out" in err and process.returncode == 2


@meanwhile
def test_a_running_line_is_called_with_its_address(stage):
    process = telephone("http://127.0.0.1:9")
    out, _ = process.communicate("", timeout=60)
    assert "Twilio error 11205" in out and process.returncode == 1
    process = telephone(stage.app.url, settings={"TWILIO_AUTH_TOKEN": stage.app.token})
    out, err = process.communicate("Hello there.\n/bye\n", timeout=60)
    assert "You said: Hello there." in out and (process.returncode, err) == (0, "")
    process = telephone("my-line.example.com")
    _, err = process.communicate("", timeout=60)
    assert "http://" in err and process.returncode == 2
