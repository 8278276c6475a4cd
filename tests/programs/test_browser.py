"""The telephone in the browser, in a real one."""

import contextlib
import http.client
import json
import signal
from urllib.parse import parse_qsl, urlsplit

import pytest

from tests.browser import BrowserPhone, Switchboard
from tests.chromium import chromium
from tests.claude import Reply
from tests.phone import Troubles
from tests.stage import HELLO, Script, telephone, twiml, wait_until

# A voice that notes what it says, and how often it is cut off. While it is held, a test says when a sentence ends.
VOICE = """
window.spoken = [];
window.cutOff = 0;
window.SpeechSynthesisUtterance = class { constructor(text) { this.text = text; } };
const speech = {
  getVoices: () => [{ lang: "en-US" }, { lang: "de-DE" }],
  speak(utterance) {
    this.now = utterance;
    spoken.push([utterance.text, utterance.lang]);
    if (!window.held) setTimeout(() => utterance.onend(), 0);
  },
  cancel() { cutOff += 1; this.now.onerror({ error: "canceled" }); },
};
window.endOfSpeech = () => speech.now.onend();
Object.defineProperty(window, "speechSynthesis", { value: speech });
"""
HELD = "window.held = true;"

# A recogniser that hears what a test tells it.
RECOGNISER = """
window.recognisers = [];
window.SpeechRecognition = class {
  start() { recognisers.push(this); this.on = true; this.onstart(); }
  abort() { if (this.on) { this.on = false; this.onerror({ error: "aborted" }); this.onend(); } }
};
window.ear = () => recognisers.find((one) => one.on) || null;
window.hear = (words, isFinal) => {
  const one = ear();
  one.onresult({ results: [Object.assign([{ transcript: words }], { isFinal })] });
  if (isFinal && one.on) { one.on = false; one.onend(); }
};
window.failToHear = (error) => {
  const one = ear();
  one.onerror({ error });
  one.on = false;
  one.onend();
};
"""
NO_RECOGNISER = "delete window.SpeechRecognition; delete window.webkitSpeechRecognition;"


class Caller:
    """A person in front of the page.

    Args:
        driver: the browser.
        switchboard: the server of the page.
    """

    def __init__(self, driver, switchboard):
        self.driver, self.switchboard = driver, switchboard

    def look(self, script="", **sizes):
        """Open the page, with this script before its own."""
        added = {"source": script or NO_RECOGNISER}
        command = "Page.addScriptToEvaluateOnNewDocument"
        added = self.driver.execute_cdp_cmd(command, added)
        self.driver.get(self.switchboard.url)
        self.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
        return self

    def call(self):
        self.click("call")

    def click(self, name):
        self.driver.find_element("id", name).click()

    def type(self, words):
        """Type, and press Enter."""
        self.driver.find_element("id", "words").send_keys(words + "\n")

    def press(self, keys):
        for key in keys:
            self.driver.find_element("css selector", f'#keys [value="{key}"]').click()

    def does(self, script, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def text(self, selector):
        found = "[...document.querySelectorAll(arguments[0])]"
        return self.does(f"{found}.map(one => one.textContent)", selector)

    def talk(self):
        return self.text("#talk li")

    def can_be_heard(self):
        """Wait until the line listens."""
        wait_until(lambda: self.does("listening !== null"))

    def hears(self, *lines):
        """Wait until these are the last lines of the talk."""
        try:
            wait_until(lambda: self.talk()[-len(lines):] == list(lines), 30)
        except AssertionError:
            raise AssertionError(f"{self.talk()} and not {lines}") from None

    def sees(self, selector, text):
        """Wait until this text stands there."""
        try:
            wait_until(lambda: any(text in one for one in self.text(selector)), 30)
        except AssertionError:
            raise AssertionError(f"{self.text(selector)} without {text!r}") from None


@pytest.fixture(scope="module")
def driver():
    with chromium() as driver:
        yield driver


@contextlib.contextmanager
def line(answers):
    """A line that gives these answers, as a Script, and a switchboard to it."""
    with Script({"/status_callback": (204, {}, ""), **answers}) as (server, phone):
        with Switchboard(lambda: BrowserPhone(phone.url, None)) as switchboard:
            yield server, switchboard


def gather(said, attributes="", behind=""):
    """A document that says this and listens."""
    say = f"<Say>{said}</Say>" if said else ""
    attributes = f'input="speech dtmf" numDigits="1" action="/next" {attributes}'
    return twiml(f"<Gather {attributes}>{say}</Gather>{behind}")


def form(server, number=-1):
    return dict(parse_qsl(server.asked[number][2]))


def paths(server):
    return [path for _, path, _, _ in server.asked]


@pytest.mark.slow
def test_three_turns_by_typing(stage, driver):
    stage.claude.when("Tell me of the sea.", Reply("It has lakes. And they have shores.", pace=60))
    with Switchboard(lambda: BrowserPhone(stage.app.url, stage.app.token)) as switchboard:
        caller = Caller(driver, switchboard).look()
        caller.call()
        caller.hears(f"Line: {HELLO}")
        caller.can_be_heard()
        caller.type("Hello there, line.")
        caller.hears("You: Hello there, line.", "Line: You said: Hello there, line.")
        caller.can_be_heard()
        caller.type("Tell me of the sea.")
        caller.sees("#talk li", "And they have shores.")
        caller.can_be_heard()
        caller.type("Good bye, browser.")
        caller.hears("You: Good bye, browser.", "Line: You said: Good bye, browser.")
        caller.can_be_heard()
        caller.click("hang-up")
        caller.hears("You have hung up.")
        wait_until(lambda: "/status_callback" in "".join(caller.text("summary")))
        messages = stage.claude.asked("Good bye, browser.")[-1].messages
        assert [words for role, words in messages if role == "user"] == [
            "Hello there, line.", "Tell me of the sea.", "Good bye, browser."
        ]
        assert caller.text(".turn h3") == [
            "You call", "You say: Hello there, line.", "You say: Tell me of the sea.",
            "You say: Good bye, browser.", "The call has ended",
        ]
        waits = caller.text(".wait")
        assert len(waits) == 4 and all("s to the first word" in one for one in waits)
        assert caller.does("document.querySelector('.bar').getBoundingClientRect().width") > 0
        first = caller.text(".turn:nth-child(2) .request")[0]
        assert first.startswith("POST /talking") and "200" in first and " ms" in first
        assert "SpeechResultHello there, line." in first and "CallStatusin-progress" in first
        assert "AccountSid" not in first, "only what matters"
        assert '<Response>\n  <Gather' in first, "indented"
        complaints = [one for one in driver.get_log("browser") if one["level"] == "SEVERE"]
        assert complaints == [], "the browser has nothing to complain of"
        assert caller.text(".failed, .error, .trouble") == [], "nothing went wrong"


@pytest.mark.slow
def test_three_turns_by_voice_in_the_lines_language(driver):
    german = 'language="de-DE" partialResultCallback="/partial"'
    say = '<Gather input="speech" action="/next" {}><Say language="de-DE">{}</Say></Gather>'
    answers = {
        "/": twiml(say.format(german, "Guten Tag.")),
        "/next": [
            twiml(say.format(german, "Eins.")),
            twiml(say.format("", "Zwei.")),
            twiml("<Say>Bye.</Say>"),
        ],
        "/partial": (204, {}, ""),
    }
    with line(answers) as (server, switchboard):
        caller = Caller(driver, switchboard).look(VOICE + RECOGNISER)
        caller.call()
        caller.hears("Line: Guten Tag.")
        wait_until(lambda: caller.does("ear()") is not None)
        assert caller.does("ear().lang") == "de-DE" and caller.does("ear().interimResults")
        caller.does("hear('Wie', false)")
        wait_until(lambda: "/partial" in paths(server))
        assert form(server)["UnstableSpeechResult"] == "Wie"
        caller.does("hear('Wie geht es?', true)")
        caller.hears("You: Wie geht es?", "Line: Eins.")
        assert form(server)["SpeechResult"] == "Wie geht es?"
        wait_until(lambda: caller.does("ear()") is not None)
        caller.does("hear('Und?', true)")
        caller.hears("You: Und?", "Line: Zwei.")
        wait_until(lambda: caller.does("ear()") is not None)
        assert caller.does("ear().lang") == "en-US", "Twilio's own"
        caller.does("hear('So long.', false)")
        assert paths(server)[-1] == "/next", "no partial results without a URL for them"
        caller.does("hear('So long.', true)")
        caller.hears("You: So long.", "Line: Bye.", "The line has hung up.")
        assert caller.does("spoken") == [
            ["Guten Tag.", "de-DE"], ["Eins.", "de-DE"], ["Zwei.", "de-DE"], ["Bye.", "en-US"]
        ]


@pytest.mark.slow
def test_the_caller_can_cut_in_on_nested_words_only(driver):
    one = "One sentence." + " And on." * 60  # so long that Twilio's side waits for the page
    first = f"<Say>{one}</Say><Redirect>/rest</Redirect>"
    rest = gather("A second sentence, a long one.")
    answers = {"/": twiml(first), "/rest": rest, "/next": twiml("<Say>Oh.</Say>")}
    with line(answers) as (server, switchboard):
        caller = Caller(driver, switchboard).look(VOICE + RECOGNISER + HELD)
        caller.call()
        caller.hears(f"Line: {one}")
        assert caller.does("ear()") is None, "nobody would hear the caller"
        caller.type("Stop!")
        caller.sees("#notice", "isn't listening")
        assert caller.does("cutOff") == 0
        assert paths(server) == ["/"], "Twilio waits until that is said"
        caller.does("document.getElementById('words').value = ''")
        caller.does("endOfSpeech()")
        caller.hears(f"Line: {one}", "Line: A second sentence, a long one.")
        wait_until(lambda: caller.does("ear()") is not None)
        caller.does("hear('a second long', false)")
        assert caller.does("cutOff") == 0, "the line has heard itself"
        caller.does("hear('Wait', false)")
        assert caller.does("cutOff") == 1 and paths(server) == ["/", "/rest"]
        assert caller.text("#talk .cut") == ["Line: A second sentence, a long one. (you cut in)"]
        caller.does("hear('Wait a moment.', true)")
        caller.hears("You: Wait a moment.", "Line: Oh.")
        assert form(server)["SpeechResult"] == "Wait a moment."


@pytest.mark.slow
def test_keys(driver):
    takes = '<Gather input="dtmf" action="/next" {}/>'
    # Without a pause, at the most keys; at the last key; after a pause.
    attributes = 'timeout="600" numDigits="3"', 'timeout="600"', 'timeout="1"'
    then = [twiml(takes.format(one)) for one in attributes]
    answers = {"/": gather("Press a key."), "/next": [*then, twiml("<Hangup/>")]}
    with line(answers) as (server, switchboard):
        caller = Caller(driver, switchboard).look()
        caller.call()
        pressed = [("5", "5"), ("407", "407"), ("12#", "12"), ("89", "89")]
        for turn, (keys, digits) in enumerate(pressed, 1):
            wait_until(lambda turn=turn: caller.does("listening && listening.turn") == turn)
            caller.press(keys)
            wait_until(lambda turn=turn: len(server.asked) > turn)
            assert form(server, turn)["Digits"] == digits
        caller.hears("You press 1 2 #", "You press 8 9", "The line has hung up.")


@pytest.mark.slow
def test_silence(driver):
    asks = "<Say>Are you there?</Say><Redirect>/</Redirect>"
    answers = {"/": gather("Hello.", 'timeout="1"', asks)}
    with line(answers) as (server, switchboard):
        caller = Caller(driver, switchboard).look(VOICE)  # no recogniser is stubbed: by hand
        caller.does("setMicrophone(false)")
        caller.call()
        caller.can_be_heard()
        caller.click("silence")
        caller.hears("You stay silent", "Line: Are you there?", "Line: Hello.")
        assert paths(server) == ["/", "/"]
        caller.look(VOICE + RECOGNISER)
        caller.call()
        caller.sees("#talk li", "Are you there?")
        caller.click("mute")
        before = caller.talk().count("Line: Are you there?")
        wait_until(lambda: caller.talk().count("Line: Are you there?") > before)
        assert caller.does("ear()") is None, "muted"


@pytest.mark.slow
def test_a_muted_caller_is_not_heard(driver):
    with line({"/": gather("Hello.", 'timeout="600"')}) as (_, switchboard):
        caller = Caller(driver, switchboard).look(VOICE + RECOGNISER)
        caller.call()
        wait_until(lambda: caller.does("ear()"))
        caller.click("mute")
        assert caller.does("ear()") is None
        caller.click("mute")
        assert caller.does("ear()") is not None


@pytest.mark.slow
def test_the_line_is_told_when_the_caller_hangs_up_or_closes_the_page(driver):
    answers = {"/": gather("Hello."), "/next": twiml("<Say>Bye.</Say><Hangup/>")}
    with line(answers) as (server, switchboard):
        caller = Caller(driver, switchboard).look(VOICE)
        caller.call()
        caller.can_be_heard()
        caller.click("hang-up")
        caller.hears("You have hung up.")
        wait_until(lambda: paths(server) == ["/", "/status_callback"])
        assert form(server)["CallStatus"] == "completed"
        assert caller.does("document.activeElement.id") == "call"
        assert caller.does("document.getElementById('hang-up').disabled")
        caller.call()
        caller.can_be_heard()
        driver.get("about:blank")  # to close the page is to hang up
        wait_until(lambda: paths(server).count("/status_callback") == 2)


@pytest.mark.slow
def test_the_voice_stops_when_the_caller_hangs_up(driver):
    one = "One. " * 60  # so long that Twilio's side waits for the page
    answers = {"/": twiml(f"<Say>{one}</Say><Say>Two.</Say><Redirect>/more</Redirect>")}
    with line(answers) as (server, switchboard):
        caller = Caller(driver, switchboard).look(VOICE + HELD)
        caller.call()
        caller.hears(f"Line: {one.strip()}")
        caller.click("hang-up")
        wait_until(lambda: paths(server) == ["/", "/status_callback"])
        wait_until(lambda: caller.does("events.readyState") == 2)
        assert caller.does("spoken.length") == caller.does("cutOff") == 1


@pytest.mark.slow
def test_a_line_that_fails_is_shown_in_red(driver):
    broken = {"/next": (500, {}, "<h1>Oh dear</h1>"), "/talking": (404, {}, "")}
    answers = {"/": gather("Hello."), **broken}
    with line(answers) as (server, switchboard):
        caller = Caller(driver, switchboard).look(VOICE)
        caller.call()
        caller.can_be_heard()
        caller.type("Hello?")
        caller.sees("#talk li", "an application error has occurred")
        caller.sees(".turn:last-child .error", "Twilio error 11200: HTTP 500 from")
        assert caller.text(".turn:nth-child(2) .failed") == ["500", "404"]
        first, second = caller.text(".turn:nth-child(2) .error")
        assert "Twilio error 11200: HTTP 500" in first and "HTTP 404" in second
        assert "ErrorCode11200" in caller.text(".turn:nth-child(2) .request")[1]
        red = caller.does("getComputedStyle(document.querySelector('.error')).color")
        assert red in ("rgb(179, 18, 29)", "rgb(255, 138, 134)")


@pytest.mark.slow
def test_complaints_of_the_app_are_shown(driver, tmp_path):
    log = tmp_path / "log"
    log.write_text("INFO all is well\nERROR the database failed\n")
    answers = {"/": gather("Hello."), "/status_callback": (204, {}, "")}
    with Script(answers) as (_, phone):
        troubles = Troubles(log)
        with Switchboard(lambda: BrowserPhone(phone.url, None, troubles=troubles)) as switchboard:
            caller = Caller(driver, switchboard).look(NO_RECOGNISER + VOICE)
            caller.call()
            caller.sees(".trouble", "The app: ERROR the database failed")
            with log.open("a") as more:
                more.write("WARNING and this comes late\n")
            caller.sees(".trouble", "The app: WARNING and this comes late")
            assert len(caller.text(".trouble")) == 2


@pytest.mark.slow
def test_a_caller_types_where_no_speech_is_recognised(driver):
    answers = {"/": gather("Hello."), "/next": gather("Well.")}
    with line(answers) as (_, switchboard):
        caller = Caller(driver, switchboard).look()
        caller.sees("#notice", "can't recognise")
        caller.look(VOICE + RECOGNISER)
        caller.call()
        wait_until(lambda: caller.does("ear()") is not None)
        caller.does("failToHear('not-allowed')")
        caller.sees("#notice", "may not use the microphone")
        caller.type("Hello.")
        caller.hears("You: Hello.", "Line: Well.")


@pytest.mark.slow
def test_words_take_time_also_without_a_voice(driver):
    said = "<Say>Three short words.</Say><Redirect>/next</Redirect>"
    answers = {"/": twiml(said), "/next": gather("")}
    with line(answers) as (server, switchboard):
        caller = Caller(driver, switchboard).look(NO_RECOGNISER + VOICE)
        caller.click("voice")
        caller.call()
        caller.can_be_heard()
        assert caller.does("spoken") == []
        took = caller.does("performance.now()") / 1000
        assert took > 3 / 2.7


@pytest.mark.slow
def test_the_page_suits_keyboards_screen_readers_and_narrow_screens(driver):
    answers = {"/": gather("Hello."), "/next": gather("Well.")}
    with line(answers) as (_, switchboard):
        caller = Caller(driver, switchboard).look(NO_RECOGNISER + VOICE)
        assert caller.text("button:not([aria-label]):empty") == []
        assert caller.does("document.querySelector('#talk').ariaLive") == "polite"
        caller.does("document.getElementById('call').focus()")
        driver.switch_to.active_element.send_keys("\n")
        caller.can_be_heard()
        assert caller.does("document.activeElement.id") == "words", "one can type at once"
        caller.type("Hello.")
        caller.hears("You: Hello.", "Line: Well.")
        size = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            assert caller.does("document.documentElement.scrollWidth") <= 320
        finally:
            driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def ask(url, method="GET", body=None, **headers):
    """The status of one request, with these headers; None leaves one out."""
    address = urlsplit(url)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    headers.setdefault("Host", address.netloc)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    with contextlib.closing(connection):
        path = address._replace(scheme="", netloc="").geturl()
        connection.putrequest(method, path, skip_host=True)
        if body is not None:
            headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        response.body = response.read()
        return response


def test_only_the_page_may_use_the_server():
    with line({"/": gather("Hello.")}) as (server, switchboard):
        url, host, origin = switchboard.url, switchboard.host, switchboard.origin
        page = ask(url)
        assert page.status == 200
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert "Access-Control-Allow-Origin" not in page.headers
        localhost = host.replace("127.0.0.1", "localhost")
        for refused in ("evil.example", localhost, "127.0.0.1", None):
            assert ask(url, Host=refused).status == 403, refused
        assert ask(url, Origin="https://evil.example").status == 403
        assert ask(f"{origin}/").status == ask(f"{origin}/x{switchboard.secret}/").status == 404
        assert ask(f"{origin}/{switchboard.secret[:-1]}/browser.js").status == 404
        assert ask(url + "browser.js").status == 200 and ask(url + "browser.py").status == 404
        own = {"Content_Type": "application/json", "Origin": origin}
        call = url + "call"
        for refused in (None, "null", "https://evil.example", f"https://{host}"):
            assert ask(call, "POST", b"{}", **{**own, "Origin": refused}).status == 403, refused
        assert ask(f"{origin}/x/call", "POST", b"{}", **own).status == 404
        form = {**own, "Content_Type": "text/plain"}  # what a form on any page can send
        assert ask(call, "POST", b"{}", **form).status == 400
        assert ask(call, "POST", b"[", **own).status == 400
        assert ask(call, "POST", b"", Content_Length="99999999", **own).status == 400
        assert server.asked == [], "nobody has called"
        assert ask(call, "POST", b"{}", **own).status == 200
        wait_until(lambda: server.asked)
        assert ask(url + "events?call=CA0").status == 404
        assert ask(url + "said", "POST", b'{"call": "CA0", "number": 0}', **own).status == 409


def test_a_page_misses_nothing_when_it_loses_its_connection():
    with line({"/": gather("Hello.")}) as (_, switchboard):
        own = {"Content_Type": "application/json", "Origin": switchboard.origin}
        call = json.loads(ask(switchboard.url + "call", "POST", b"{}", **own).body)["call"]
        wait_until(lambda: switchboard.phone.turn == 1)
        body = json.dumps({"call": call}).encode()
        assert ask(switchboard.url + "hang_up", "POST", body, **own).status == 200
        events = f"{switchboard.url}events?call={call}"
        every = ask(events).body.decode().strip().split("\n\n")
        kinds = [json.loads(event.partition("data: ")[2])["kind"] for event in every]
        assert kinds == ["request", "say", "listen", "ended", "request", "over"]
        assert ask(events, Last_Event_ID="4").body.decode().strip().split("\n\n") == every[4:]


@pytest.mark.slow
def test_the_telephone_in_the_browser_runs_as_a_program(stage):
    process = telephone("--browser", "--pretend", settings={"BROWSER": "true"})
    while not (address := process.stdout.readline().partition("The telephone is at ")[2].strip()):
        assert process.poll() is None, process.stderr.read()
    assert address.startswith("http://127.0.0.1:") and ask(address).status == 200
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
