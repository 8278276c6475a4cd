"""The owner at a terminal: ``flask connect`` points a Twilio number at the app, ``flask ring`` makes the line call.

The commands are the real ones, with Twilio's own library in them. HTTPS_PROXY leads them to a small internet on
loopback, whose hosts have a certificate for their names, and where api.twilio.com is an account that remembers what was
done to it.
"""

import base64
import contextlib
import copy
import http.server
import json
import os
import pathlib
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

import pytest

from tests.phone import ROOT, Phone

CERTIFICATE = str(pathlib.Path(__file__).with_name("certificate.pem"))
SID, TOKEN = "AC" + "0123456789abcdef" * 2, "the-token-that-nobody-may-see"
ADDRESS = "https://my-line.example.com"
MINE, ALSO_MINE, A_FRIEND = "+15550009999", "+15550008888", "+15557654321"
CONNECT, RING = ("connect",), ("ring", A_FRIEND)

both = pytest.mark.parametrize("command", [CONNECT, RING], ids=["connect", "ring"])


def test_connect_points_the_number_at_the_app(as_it_is_typed):
    command, account = as_it_is_typed

    printed, error = command.communicate(timeout=60)

    assert (command.returncode, error) == (0, "")
    assert without_warnings(printed) == (
        "+15550009999 is connected to https://my-line.example.com now.\n"
        "    voice_url: https://my-line.example.com/ (before: https://demo.twilio.com/welcome/voice/)\n"
        "    voice_fallback_url: https://my-line.example.com/talking (before: nothing)\n"
        "    status_callback: https://my-line.example.com/status_callback (before: nothing)\n"
    )
    assert account.number(MINE) == {
        "voice_url": "https://my-line.example.com/",
        "voice_method": "POST",
        "voice_fallback_url": "https://my-line.example.com/talking",
        "voice_fallback_method": "POST",
        "status_callback": "https://my-line.example.com/status_callback",
        "status_callback_method": "POST",
    }
    assert len(account.updates) == 1 and account.calls == []


def test_whoever_calls_the_number_then_reaches_the_app(owner, app):
    owner.internet.hosts["my-line.example.com"] = passed_on_to(app)
    owner.account.buy(MINE)

    assert owner.types("connect", ADDRESS).status == 0

    phone = Phone(app, TOKEN, public_url=ADDRESS, headers={"X-Forwarded-Proto": "https"})
    assert phone.call() == "Hello, this is Claude speaking!"
    assert "Who is there?" in phone.say("Who is there?")
    phone.hang_up()
    number = owner.account.number(MINE)
    assert [(url, status) for url, _, _, status in phone.webhooks] == [
        (number["voice_url"], 200),
        (number["voice_fallback_url"], 200),
        (number["status_callback"], 204),
    ]


def test_connecting_twice_changes_nothing_more(owner):
    owner.account.buy(MINE)
    owner.types("connect", ADDRESS)

    said = owner.types("connect", ADDRESS + "/")

    assert said == (0, "+15550009999 is connected to https://my-line.example.com already.\n", "")
    assert len(owner.account.updates) == 1


def test_a_number_that_moves_tells_where_it_was_but_no_password(owner):
    owner.account.buy(
        MINE,
        voice_url="https://me:my-password@other.example.com/@home?to=me@home",
        voice_method="GET",
        voice_fallback_url=f"{ADDRESS}/talking",
        voice_fallback_method="GET",
        status_callback_method="GET",
    )

    said = owner.types("connect", ADDRESS)

    assert said.printed.splitlines()[1:] == [
        "    voice_url: https://my-line.example.com/ (before: https://other.example.com/@home?to=me@home)",
        "    voice_method: POST (before: GET)",
        "    voice_fallback_method: POST (before: GET)",
        "    status_callback: https://my-line.example.com/status_callback (before: nothing)",
        "    status_callback_method: POST (before: GET)",
    ]
    assert {owner.account.number(MINE)[name] for name in Account.VOICE if name.endswith("method")} == {"POST"}


def test_an_app_below_a_path_is_called_below_it(owner):
    owner.internet.hosts["my-line.example.com"] = {"/claude/line/healthz": (200, "Voice Claude is well.\n")}
    owner.account.buy(MINE)

    owner.types("connect", ADDRESS + "/claude/line/")
    owner.types("ring", A_FRIEND, ADDRESS + "/claude/line")

    number, [call] = owner.account.number(MINE), owner.account.calls
    assert number["voice_url"] == call["Url"] == f"{ADDRESS}/claude/line/"
    assert number["voice_fallback_url"] == call["FallbackUrl"] == f"{ADDRESS}/claude/line/talking"
    assert number["status_callback"] == call["StatusCallback"] == f"{ADDRESS}/claude/line/status_callback"


def test_ring_makes_the_line_call_someone(owner):
    owner.account.buy(MINE)

    said = owner.types("ring", A_FRIEND, ADDRESS)

    assert said == (0, f"+15550009999 is calling +15557654321: {owner.account.call_sid}\n", "")
    assert owner.account.calls == [
        {
            "From": MINE,
            "To": A_FRIEND,
            "Url": "https://my-line.example.com/",
            "FallbackUrl": "https://my-line.example.com/talking",
            "StatusCallback": "https://my-line.example.com/status_callback",
        }
    ]
    assert owner.account.updates == []


# --- Which number -----------------------------------------------------------------------------------------------------


@both
def test_several_numbers_are_listed_and_left_alone(owner, command):
    owner.account.buy(MINE)
    owner.account.buy(ALSO_MINE)

    said = owner.fails(*command, ADDRESS)

    assert said.splitlines() == [
        "The account has several numbers: say which, with --number.",
        "    +15550009999",
        "    +15550008888",
    ]


def test_one_of_several_numbers_is_chosen_wherever_it_is_in_the_list(owner):
    for last in range(120):
        owner.account.buy(f"+1555000{last:04}")

    assert len(owner.fails("connect", ADDRESS).splitlines()) == 1 + 120
    owner.types("connect", ADDRESS, "--number", "+15550000119")
    owner.types("ring", A_FRIEND, ADDRESS, "--number", "+15550000118")

    assert [number for number, _ in owner.account.updates] == ["+15550000119"]
    assert [call["From"] for call in owner.account.calls] == ["+15550000118"]


@both
def test_an_account_without_that_number(owner, command):
    assert owner.fails(*command, ADDRESS) == "The account has no number."
    owner.account.buy(MINE)
    assert owner.fails(*command, ADDRESS, "--number", ALSO_MINE) == "The account has no number +15550008888."
    assert owner.fails(*command, ADDRESS, "--number", "+1555000") == "The account has no number +1555000."


@pytest.mark.parametrize(
    ["kind", "setting", "sid"],
    [("TwiML app", "voice_application_sid", "AP" + "1" * 32), ("trunk", "trunk_sid", "TK" + "2" * 32)],
)
def test_what_would_hide_the_address(owner, kind, setting, sid):
    owner.account.buy(MINE, **{setting: sid})

    assert owner.fails("connect", ADDRESS) == (
        f"+15550009999 is answered by the {kind} {sid}, and would ignore this address: take that off the number in "
        "Twilio's console, and try again."
    )
    assert owner.types("ring", A_FRIEND, ADDRESS).status == 0  # a call out brings its own address


# --- Who may be called ------------------------------------------------------------------------------------------------


def test_ring_calls_nobody_the_line_would_hang_up_on(owner):
    owner.account.buy(MINE)

    assert owner.fails("ring", A_FRIEND, ADDRESS, ALLOWED_CALLERS="+15551230001") == (
        "+15557654321 is not in ALLOWED_CALLERS: the line would hang up."
    )
    assert owner.types("ring", A_FRIEND, ADDRESS, ALLOWED_CALLERS="+1 555 123 0001, +1 (555) 765-4321").status == 0


@pytest.mark.parametrize("number", ["5557654321", "+1 555 765 4321", "+", "+1555CLAUDE", "client:claude", "+١٢٣٤٥٦"])
def test_ring_takes_a_number_as_twilio_writes_it(owner, number):
    assert owner.fails("ring", number, ADDRESS) == "TO takes a number like +15557654321."
    assert owner.internet.asked == []


# --- Whose address ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "http://my-line.example.com",
        "my-line.example.com",
        "https:///path",
        "https://me:my-password@my-line.example.com",
        "https://my-line.example.com?a=b",
        "https://my-line.example.com/#top",
        "https://my line.example.com",
    ],
)
def test_an_address_twilio_could_not_use_is_refused_before_anyone_is_asked(owner, address):
    reason = "ADDRESS takes https://, a host and maybe a path, like https://my-line.example.com"
    assert owner.fails("connect", address) == owner.fails("ring", A_FRIEND, address) == reason
    assert owner.internet.asked == []


@both
def test_an_address_where_something_else_runs(owner, command):
    owner.account.buy(MINE)
    line = owner.internet.hosts["my-line.example.com"]

    for status, text in [(200, "<h1>Welcome to nginx!</h1>"), (404, "No such page"), (410, "Voice Claude has left")]:
        line["/healthz"] = (status, text)
        assert owner.fails(*command, ADDRESS) == (
            f"What answers at https://my-line.example.com/healthz (status {status}) is not this app."
        )
    assert "api.twilio.com" not in {host for host, _ in owner.internet.asked}


@both
def test_an_address_that_leads_elsewhere_is_not_followed(owner, command):
    owner.account.buy(MINE)
    owner.internet.hosts["other.example.com"] = owner.internet.hosts["my-line.example.com"]
    owner.internet.hosts["my-line.example.com"] = {"/healthz": (301, "https://other.example.com/healthz")}

    assert owner.fails(*command, ADDRESS) == (
        "https://my-line.example.com leads on to 'https://other.example.com/healthz': Twilio needs an address that "
        "answers itself."
    )
    assert owner.internet.asked == [("my-line.example.com", "GET /healthz")]


@both
def test_an_app_that_is_not_well(owner, command):
    owner.account.buy(MINE)
    owner.internet.hosts["my-line.example.com"]["/healthz"] = (503, "The database failed: see the log.\n")

    assert owner.fails(*command, ADDRESS) == "The app at https://my-line.example.com is not well: see its log."


@both
def test_an_address_where_nobody_answers(owner, command):
    owner.account.buy(MINE)

    del owner.internet.hosts["my-line.example.com"]
    assert owner.fails(*command, ADDRESS) == (
        "https://my-line.example.com gives no answer: Tunnel connection failed: 502 Bad Gateway"
    )
    owner.internet.hosts["my-line.example.com"] = HANGS_UP
    assert owner.fails(*command, ADDRESS).startswith("https://my-line.example.com gives no answer: Remote end closed")
    owner.internet.hosts["my-line.example.com"] = TALKS_OF_ELSE
    assert owner.fails(*command, ADDRESS) == "https://my-line.example.com gives no answer: BadStatusLine"
    assert owner.fails(*command, ADDRESS, HTTPS_PROXY="http://127.0.0.1:1").endswith("Connection refused")
    no_name = "https://nobody..example.com"
    assert owner.fails(*command, no_name, HTTPS_PROXY="").startswith(f"{no_name} gives no answer: ")


def test_an_address_with_the_certificate_of_another_host(owner):
    owner.internet.hosts["your-line.example.com"] = owner.internet.hosts["my-line.example.com"]

    assert "certificate verify failed" in owner.fails("connect", "https://your-line.example.com")


# --- Twilio says no ---------------------------------------------------------------------------------------------------


@both
def test_without_credentials_it_says_which_are_missing(owner, command):
    owner.account.buy(MINE)
    shown = ": https://console.twilio.com shows both."

    assert owner.fails(*command, ADDRESS, TWILIO_ACCOUNT_SID="") == "Set TWILIO_ACCOUNT_SID" + shown
    assert owner.fails(*command, ADDRESS, TWILIO_AUTH_TOKEN="") == "Set TWILIO_AUTH_TOKEN" + shown
    assert owner.fails(*command, ADDRESS, TWILIO_ACCOUNT_SID="", TWILIO_AUTH_TOKEN="") == (
        "Set TWILIO_ACCOUNT_SID and TWILIO_AUTH_TOKEN" + shown
    )
    assert "api.twilio.com" not in {host for host, _ in owner.internet.asked}


@both
def test_wrong_credentials(owner, command):
    owner.account.buy(MINE)
    refused = "Twilio refuses TWILIO_ACCOUNT_SID with TWILIO_AUTH_TOKEN."

    assert owner.fails(*command, ADDRESS, TWILIO_AUTH_TOKEN="another-token") == refused
    assert owner.fails(*command, ADDRESS, TWILIO_ACCOUNT_SID="AC" + "f" * 32) == refused
    # A token that can't even be sent.
    assert owner.fails(*command, ADDRESS, TWILIO_AUTH_TOKEN="another-tokeń") == (
        "Twilio gave no answer of use (UnicodeEncodeError)."
    )


def test_an_account_sid_that_is_none_stops_the_start(owner):
    said = owner.types("connect", ADDRESS, TWILIO_ACCOUNT_SID=TOKEN)

    assert said == (4, "", "Voice Claude can't start: TWILIO_ACCOUNT_SID takes AC and 32 hexadecimal digits.\n")
    assert owner.account.untouched()


def test_what_twilio_does_not_allow_is_said_in_its_words(owner):
    owner.account.buy(MINE)
    owner.account.refuses["POST"] = (400, 21219, "The number is unverified. Trial accounts call verified numbers only.")

    said = "The number is unverified. Trial accounts call verified numbers only. (error 21219)"
    assert owner.fails(*CONNECT, ADDRESS) == "Twilio says no: Unable to update record: " + said
    assert owner.fails(*RING, ADDRESS) == "Twilio says no: Unable to create record: " + said


@both
def test_a_twilio_that_makes_no_sense(owner, command):
    owner.account.buy(MINE)
    owner.account.refuses["IncomingPhoneNumbers"] = (500, 20500, "Internal server error")
    assert owner.fails(*command, ADDRESS) == "Twilio gave no answer of use (TwilioException)."

    account = f"/2010-04-01/Accounts/{SID}.json"
    owner.internet.hosts["api.twilio.com"] = {account: (200, "<h1>Please log in to this hotel</h1>")}
    assert owner.fails(*command, ADDRESS) == "Twilio gave no answer of use (JSONDecodeError)."
    owner.internet.hosts["api.twilio.com"] = {account: (503, "<h1>Maintenance</h1>")}
    assert owner.fails(*command, ADDRESS) == "Twilio says no: Unable to fetch record (error 503)"


@both
def test_an_answer_that_is_lost_leaves_open_what_twilio_has_done(owner, command):
    def lost(method, *request):
        status, answer = owner.account(method, *request)
        return (status, answer) if method == "GET" else (status, "<h1>Please log in to this hotel</h1>")

    owner.account.buy(MINE)
    owner.internet.hosts["api.twilio.com"] = lost

    assert owner.types(*command, ADDRESS) == (
        1,
        "",
        "Error: Twilio gave no answer of use (JSONDecodeError); it may have done it all the same.\n",
    )
    assert not owner.account.untouched()


@both
def test_a_twilio_out_of_reach(owner, command):
    del owner.internet.hosts["api.twilio.com"]
    assert owner.fails(*command, ADDRESS) == "Twilio gave no answer of use (ProxyError)."


def test_a_twilio_that_is_silent_is_given_up_on(terminal, waiting):
    status, printed, error = terminal.read(waiting)

    assert (status, without_warnings(printed)) == (1, "")
    assert error == "Error: Twilio gave no answer of use (ReadTimeout).\n"


# --- At the terminal --------------------------------------------------------------------------------------------------


def test_help_shows_both_in_a_line_each(owner):
    lines = owner.types("--help").printed.splitlines()

    assert "  connect  Point a Twilio number at the app that runs at ADDRESS." in lines
    assert "  ring     Call the number TO from the line that runs at ADDRESS." in lines


def test_the_line_itself_does_without_twilios_client():
    """It would take longer to start, and 27 MB more."""
    imports = [line for line in (ROOT / "app.py").read_text().splitlines() if re.match(" *(import|from) ", line)]

    assert [line[:4] for line in imports if re.search(r"twilio\.(rest|http)", line)] == [" " * 4] * 2


# --- The terminal, the internet and the account -----------------------------------------------------------------------

# `python -m flask`, whenever an order comes, in a process that has loaded already what takes a second and a half.
TERMINAL = """
import json, os, runpy, sys, traceback
import conversation, flask.cli, twilio.rest.api.v2010.account
for order in sys.stdin:
    words, environ, printed, error, status_file = json.loads(order)
    if os.fork():
        continue
    for number, file in enumerate([os.devnull, printed, error]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv[1:] = words
    status = 1
    try:
        runpy.run_module("flask", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    with open(status_file, "w") as file:
        file.write(str(status))
    os._exit(0)  # without tidying up, which takes longer than all the rest
"""


class Said(NamedTuple):
    """What a command has said: its exit status, what it printed, and its errors."""

    status: int
    printed: str
    error: str


class Terminal(subprocess.Popen):
    """Where the commands are typed, in the project's folder."""

    def __init__(self):
        command = [sys.executable, "-c", TERMINAL]
        super().__init__(command, cwd=ROOT, stdin=subprocess.PIPE, text=True, start_new_session=True)

    def type(self, words, environ, folder):
        """Start a command, and go on."""
        os.mkfifo(folder / "status")
        files = [str(folder / name) for name in Said._fields[1:] + Said._fields[:1]]
        print(json.dumps([words, environ, *files]), file=self.stdin, flush=True)

    def read(self, folder):
        """What it has said, once it has ended."""
        status = int((folder / "status").read_text())
        return Said(status, (folder / "printed").read_text(), (folder / "error").read_text())


class Owner:
    """Someone with a Twilio account, at a terminal in the project's folder."""

    def __init__(self, internet, account, terminal, folder):
        self.internet, self.account, self.terminal, self.folder = internet, account, terminal, folder
        self.environ = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
            "DATABASE_URL": f"sqlite:///{folder}/calls.db",
            "TWILIO_ACCOUNT_SID": SID,
            "TWILIO_AUTH_TOKEN": TOKEN,
            "HTTPS_PROXY": f"http://127.0.0.1:{internet.server_port}",
            "SSL_CERT_FILE": CERTIFICATE,
            "REQUESTS_CA_BUNDLE": CERTIFICATE,
        }

    def types(self, *words, **environ):
        """Type ``flask`` and these words, with something else in the environment than usual."""
        environ = {**self.environ, **environ}
        folder = pathlib.Path(tempfile.mkdtemp(dir=self.folder))
        self.terminal.type(words, environ, folder)
        status, printed, error = self.terminal.read(folder)
        for secret in (TOKEN, environ["TWILIO_AUTH_TOKEN"] or TOKEN, "my-password"):
            assert secret not in printed + error
        return Said(status, without_warnings(printed), error)

    def fails(self, *words, **environ):
        """Type what can't work; returns the reason that is given, after which nothing has changed."""
        said = self.types(*words, **environ)
        reason = re.fullmatch("Error: (.+(?:\n    .+)*)\n", said.error)
        assert reason and said == (1, "", reason[0]), said
        assert self.account.untouched()
        return reason[1]


def without_warnings(printed):
    """What the command printed, without what the app says of its settings when it starts."""
    return re.sub(r"(?m)^WARNING \w+ is not set: .*\n", "", printed)


class Account:
    """The REST API of a Twilio account, as far as a line needs it. https://www.twilio.com/docs/usage/api"""

    VOICE = {"voice_url", "voice_method", "voice_fallback_url", "voice_fallback_method"}
    VOICE |= {"status_callback", "status_callback_method"}
    A_CALL = {"To", "From", "Url", "Method", "FallbackUrl", "FallbackMethod", "StatusCallback", "StatusCallbackMethod"}

    def __init__(self):
        self.numbers, self.bought = {}, {}  # by SID
        self.updates = []  # (phone number, what was set)
        self.calls = []
        self.call_sid = "CA" + "c" * 32
        self.refuses = {}  # a method, or a part of a path: the status, error code and message it is refused with

    def buy(self, phone_number, **settings):
        sid = f"PN{len(self.numbers):032x}"
        self.numbers[sid] = {
            "sid": sid,
            "account_sid": SID,
            "phone_number": phone_number,
            "voice_url": "https://demo.twilio.com/welcome/voice/",
            "voice_fallback_url": "",
            "status_callback": "",
            **{name: "POST" for name in self.VOICE if name.endswith("method")},
            "voice_application_sid": "",
            "trunk_sid": None,
            **settings,
        }
        self.bought[sid] = copy.deepcopy(self.numbers[sid])

    def number(self, phone_number):
        """How a number answers the phone."""
        [number] = [number for number in self.numbers.values() if number["phone_number"] == phone_number]
        return {name: number[name] for name in self.VOICE}

    def untouched(self):
        return self.numbers == self.bought and not self.updates and not self.calls

    def __call__(self, method, url, authorization, form):
        """One request: the status, and the JSON that answers it."""
        try:
            return self.answer(method, url, authorization, form)
        except Refused as refused:
            status, code, message = refused.args
            more = f"https://www.twilio.com/docs/errors/{code}"
            return status, json.dumps({"code": code, "message": message, "more_info": more, "status": status})

    def answer(self, method, url, authorization, form):
        if authorization != "Basic " + base64.b64encode(f"{SID}:{TOKEN}".encode()).decode():
            raise Refused(401, 20003, "Authenticate")
        for where, refusal in self.refuses.items():
            if where == method or where in url.path:
                raise Refused(*refusal)
        what = re.fullmatch(rf"/2010-04-01/Accounts/{SID}(?:/(\w+?)(?:/(PN\w+))?)?\.json", url.path)
        match (method, *(what.groups() if what else ("",))):
            case ("GET", None, None):
                return 200, json.dumps({"sid": SID, "status": "active", "type": "Full"})
            case ("GET", "IncomingPhoneNumbers", None):
                return 200, json.dumps(self.page(url.path, dict(parse_qsl(url.query))))
            case ("POST", "IncomingPhoneNumbers", sid) if sid in self.numbers:
                return 200, json.dumps(self.update(sid, form))
            case ("POST", "Calls", None):
                return 201, json.dumps(self.call(form))
        raise Refused(404, 20404, f"The requested resource {url.path} was not found")

    def page(self, path, query):
        """One page of the numbers; where the next one is found is said only in this one."""
        page, size = int(query.get("Page", 0)), min(1000, int(query.get("PageSize", 50)))
        if page and query.get("PageToken") != f"PAPN{page}":
            raise Refused(400, 20006, "Page token is required")
        numbers = [number for number in self.numbers.values() if query.get("PhoneNumber", "") in number["phone_number"]]
        start, end = page * size, min(len(numbers), (page + 1) * size)
        following = f"{path}?PageSize={size}&Page={page + 1}&PageToken=PAPN{page + 1}"
        return {
            "incoming_phone_numbers": numbers[start:end],
            "first_page_uri": f"{path}?PageSize={size}&Page=0",
            "next_page_uri": following if end < len(numbers) else None,
            "previous_page_uri": None,
            "page": page,
            "page_size": size,
            "start": start,
            "end": max(0, end - 1),
            "uri": f"{path}?{query}",
        }

    def update(self, sid, form):
        settings = {re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(): value for name, value in form.items()}
        if not settings.keys() <= self.VOICE:
            raise Refused(400, 20001, f"This number has no {settings.keys() - self.VOICE}")
        self.numbers[sid].update(settings)
        self.updates.append((self.numbers[sid]["phone_number"], settings))
        return self.numbers[sid]

    def call(self, form):
        if not form.keys() <= self.A_CALL:
            raise Refused(400, 20001, f"A call has no {form.keys() - self.A_CALL}")
        if form["From"] not in [number["phone_number"] for number in self.numbers.values()]:
            raise Refused(400, 21210, f"'From' phone number not verified: {form['From']}")
        self.calls.append(form)
        return {"sid": self.call_sid, "status": "queued", "direction": "outbound-api", "to": form["To"]}


class Refused(Exception):
    """The status, Twilio's error code and its message. https://www.twilio.com/docs/api/errors"""


HANGS_UP, SILENT, TALKS_OF_ELSE = "hangs up", "is silent", "doesn't speak HTTP"


class Internet(http.server.ThreadingHTTPServer):
    """A proxy, and the hosts behind it. The TLS of every host ends here.

    A host is what answers it: a function, or a dict of its pages; one of these three; and one that isn't here is none.
    """

    daemon_threads, block_on_close = True, False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Connection)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(CERTIFICATE)
        self.hosts = {"my-line.example.com": {"/healthz": (200, "Voice Claude is well.\n")}}
        self.asked = []  # (host, method and path) of every request
        self.over = threading.Event()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a visitor who goes away, or doesn't like the certificate
            super().handle_error(request, client_address)

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


class Connection(http.server.BaseHTTPRequestHandler):
    """One connection to the proxy, and then through it to a host."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer would take 40 ms

    def do_CONNECT(self):
        self.host = self.path.removesuffix(":443")
        answers = self.server.hosts.get(self.host)
        if answers is None:
            self.send_error(502)
        if answers == SILENT:
            self.server.over.wait(60)
        if answers in (None, SILENT, HANGS_UP):
            self.close_connection = True
            return
        self.send_response_only(200)
        self.end_headers()
        self.rfile.close()
        self.request = self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
        self.setup()
        self.close_connection = False

    def do_GET(self):
        form = dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()))
        self.server.asked.append((self.host, f"{self.command} {self.path}"))
        answers = self.server.hosts[self.host]
        if answers == TALKS_OF_ELSE:
            self.wfile.write(b"220 mail.example.com ESMTP\r\n")
            self.close_connection = True
            return
        if isinstance(answers, dict):
            status, body = answers.get(self.path, (404, "Not found"))
        else:
            status, body = answers(self.command, urlsplit(self.path), self.headers["Authorization"], form)
        self.send_response(status)
        if status in (301, 302, 307, 308):
            self.send_header("Location", body)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def finish(self):
        super().finish()
        self.connection.close()

    def log_message(self, *_):
        pass


def passed_on_to(app):
    """A host that passes on to the app what it is asked."""

    def answer(method, url, authorization, form):
        with urllib.request.urlopen(app + url.path, timeout=10) as response:
            return response.status, response.read().decode()

    return answer


@pytest.fixture(scope="module")
def terminal():
    with Terminal() as terminal:
        yield terminal
        os.killpg(terminal.pid, signal.SIGKILL)  # with what may still run there


@pytest.fixture
def internet():
    with Internet() as internet:
        yield internet


@pytest.fixture
def owner(internet, terminal, tmp_path):
    owner = Owner(internet, Account(), terminal, tmp_path)
    internet.hosts["api.twilio.com"] = owner.account
    return owner


@pytest.fixture
def app(terminal, tmp_path):
    """The app itself: where it runs, as a proxy of its own would see it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = {"DATABASE_URL": f"sqlite:///{tmp_path}/calls.db", "TWILIO_AUTH_TOKEN": TOKEN}
    terminal.type(["run", "--port", str(port)], environ, tmp_path)  # until the terminal is closed
    for _ in range(300):
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return f"http://127.0.0.1:{port}"
        time.sleep(0.1)


# Two commands that take their time run while others do.


@pytest.fixture(scope="module", autouse=True)
def waiting(terminal, tmp_path_factory):
    """The folder of a command that a silent Twilio keeps waiting."""
    folder = tmp_path_factory.mktemp("waiting")
    with Internet() as internet:
        internet.hosts["api.twilio.com"] = SILENT
        terminal.type([*CONNECT, ADDRESS], Owner(internet, None, terminal, folder).environ, folder)
        yield folder


@pytest.fixture(scope="module", autouse=True)
def as_it_is_typed(tmp_path_factory):
    """A command that loads all by itself, and the account that it is about."""
    command, pipe = [sys.executable, "-m", "flask", *CONNECT, ADDRESS], subprocess.PIPE
    with Internet() as internet:
        internet.hosts["api.twilio.com"] = account = Account()
        account.buy(MINE)
        environ = Owner(internet, account, None, tmp_path_factory.mktemp("typed")).environ
        with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=pipe, stderr=pipe, text=True) as command:
            yield command, account
