"""Hello, this is Claude speaking: the phone line.

Twilio asks these URLs what to do with a call, and is answered in TwiML (https://www.twilio.com/docs/voice/twiml):

    /                  a call comes in: greet, and listen
    /talking           the caller spoke, pressed a key or was silent; or the rest of a reply is due; or Twilio got no
                       good answer from one of these URLs, and falls back here with an ErrorCode
    /status_callback   the call is over

Who may call is decided first. After that the answer is always TwiML, whatever goes wrong: anything else, and the caller
hears "an application error has occurred".

The commands ``flask connect`` and ``flask ring`` are at the end: no call needs them.
"""

import http.client
import logging
import os
import re
import sys
import urllib.request
from urllib.parse import urlsplit

import click
from flask import Flask, abort, request
from twilio.base.exceptions import TwilioException, TwilioRestException
from twilio.request_validator import RequestValidator
from twilio.twiml.voice_response import VoiceResponse
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix

import conversation
from conversation import Conversation, Line, speakable
from store import Store, StoreError

# --- Settings -------------------------------------------------------------------------------------------------------


class Settings:
    """The environment variables, read once. A value that can't be used is a ValueError that names the variable."""

    def __init__(self, environ):
        def setting(name, default, takes="", pattern=r"(?s).+"):
            value = environ.get(name, "").strip() or default
            if value and not re.fullmatch(pattern, value):
                raise ValueError(f"{name} takes {takes}")  # not the value: it may be a secret, or a number
            return value

        self.anthropic_api_key = setting("ANTHROPIC_API_KEY", "", "the key as Anthropic shows it", r"[!-~]+")
        takes = "AC and 32 hexadecimal digits"
        self.twilio_account_sid = setting("TWILIO_ACCOUNT_SID", "", takes, r"AC[0-9a-fA-F]{32}")
        self.twilio_auth_token = setting("TWILIO_AUTH_TOKEN", "")
        takes = "an address like https://my-line.example.com"
        self.public_url = setting("PUBLIC_URL", "", takes, r"https?://[^\s/?#@\[\]]+(/[^\s?#]*)?").rstrip("/")
        self.claude_model = setting("CLAUDE_MODEL", "claude-haiku-5-5", "the name of a model", r"\S+")
        # Some models refuse any effort: empty is a value of its own here.
        takes = "low, medium, high, xhigh or max, or nothing"
        default = "" if "CLAUDE_EFFORT" in environ else "low"
        self.claude_effort = setting("CLAUDE_EFFORT", default, takes, r"low|medium|high|xhigh|max")
        self.system_prompt = setting("SYSTEM_PROMPT", conversation.SYSTEM_PROMPT)
        self.greeting = setting("GREETING", "Hello, this is Claude speaking!", "words to speak", r"(?s).*\w.*")
        self.voice = setting("VOICE", "", "a voice of Twilio's, like Polly.Amy-Neural", r"[\w.-]+")
        self.language = setting("LANGUAGE", "", "a language, like en-GB", r"[A-Za-z]{2,3}(-[A-Za-z0-9]+)*")
        takes = "numbers like +15551234567, separated by commas"
        numbers = setting("ALLOWED_CALLERS", "", takes, r"(\s*\+[ ().-]*\d[\d ().-]*,?)+")
        self.allowed_callers = set(re.findall(r"\+\d*", re.sub(r"[^\d+]", "", numbers)))
        self.max_turns = int(setting("MAX_TURNS", "100", "a whole number, 1 or more", r"0*[1-9]\d{0,8}"))
        takes = "sqlite:/// and the path of a file: no other database is used"
        url = setting("DATABASE_URL", "sqlite:///calls.db", takes, r"sqlite:///[^:?][^?]*")
        self.database = url.removeprefix("sqlite:///")


logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
log = logging.getLogger("voice-claude")
log.setLevel(logging.INFO)

try:
    settings = Settings(os.environ)
except ValueError as error:
    print(f"Voice Claude can't start: {error}.", file=sys.stderr)
    sys.exit(4)  # by this status gunicorn knows that trying again is no use

line = Line(
    store=Store(settings.database),
    claude=conversation.claude_client(settings.anthropic_api_key) if settings.anthropic_api_key else None,
    model=settings.claude_model,
    effort=settings.claude_effort,
    system_prompt=settings.system_prompt,
    max_turns=settings.max_turns,
)
if not line.claude:
    log.warning("ANTHROPIC_API_KEY is not set: the line repeats what it hears")
if not settings.twilio_auth_token:
    log.warning("TWILIO_AUTH_TOKEN is not set: only direct requests from this machine are answered")

# What Twilio is to ask next: on the host it has just asked, and where PUBLIC_URL has a path, below that.
TALKING = urlsplit(settings.public_url).path + "/talking"

app = Flask(__name__, static_folder=None)
app.config["MAX_CONTENT_LENGTH"] = 64 * 1024  # a minute of speech is 12 kB at most, in the longest encoding
# One proxy in front says how it was called: every platform has one. A client who lies about it gains nothing, as the
# signature is made with the true address.
app.wsgi_app = ProxyFix(app.wsgi_app, x_for=0, x_proto=1, x_host=1)

# --- Who may call ---------------------------------------------------------------------------------------------------


@app.before_request
def only_twilio():
    """Let nobody else in: a stranger could spend the owner's money, and listen to what was said.

    Twilio signs its requests with the account's auth token
    (https://www.twilio.com/docs/usage/security#validating-requests).
    """
    if request.scheme not in ("http", "https"):
        abort(400)  # an X-Forwarded-Proto that no proxy sends
    if connection := request.environ.get("gunicorn.socket"):
        connection.settimeout(5)  # seconds for the rest of the body: half-sent ones would hold all threads
    # No endpoint: there is nothing at that address, and Flask will say so.
    if request.endpoint in (None, "healthz") or is_a_browser():
        return None
    if request.method == "POST" and request.mimetype != "application/x-www-form-urlencoded":
        abort(415)
    if settings.twilio_auth_token:
        signature = request.headers.get("X-Twilio-Signature", "")
        if not RequestValidator(settings.twilio_auth_token).validate(called_url(), request.form, signature):
            log.warning("403 for %s: wrong signature; is the token right, and PUBLIC_URL?", called_url().split("?")[0])
            abort(403)
    elif not is_direct():
        log.warning("403: set TWILIO_AUTH_TOKEN, and requests from Twilio will be answered")
        abort(403)
    if "CallSid" not in request.values:
        abort(400, "No CallSid: this is not about a call.")
    if settings.allowed_callers and other_party() not in settings.allowed_callers:
        log.info("call %s: ...%s is not in ALLOWED_CALLERS", request.values["CallSid"], other_party()[-3:])
        if request.endpoint != "call_comes_in":
            return goodbye("")  # it has been answered already
        response = VoiceResponse()
        response.reject()  # it isn't answered, and costs nothing
        return twiml(response)
    return None


def is_a_browser():
    """Whether this is someone who looks whether the app runs: Twilio always says which call it is about."""
    return request.endpoint == "call_comes_in" and request.method in ("GET", "HEAD") and "CallSid" not in request.args


def called_url():
    """The URL that Twilio called, character by character: ``request.url`` has some of its %-escapes undone."""
    wire = urlsplit(request.environ.get("RAW_URI") or request.full_path)
    return (settings.public_url or request.host_url.rstrip("/")) + wire._replace(scheme="", netloc="").geturl()


def is_direct():
    """Whether the request was made on this machine, by a program, to this address: neither through a tunnel or proxy,
    nor by a page in this machine's browser."""
    telling = r"(?i)forwarded|^via$|-ip$|^origin$|^referer$|^sec-fetch-"
    forwarded = any(re.search(telling, name) for name, _ in request.headers)
    to = urlsplit("//" + request.host).hostname
    here = ("127.0.0.1", "::1", "::ffff:127.0.0.1", "localhost")
    return request.remote_addr in here and to in here and not forwarded


def other_party():
    """The number of the one who talks with Claude: who called, or who was called by ``flask ring``."""
    return request.values.get("To" if request.values.get("Direction", "").startswith("outbound") else "From", "")


# --- The call -------------------------------------------------------------------------------------------------------

# What the line says in its own name. None of it is ever kept, or sent to Claude, as if Claude had said it.
ARE_YOU_THERE = ["Are you still there?", "I'm listening, whenever you're ready."]
NOBODY_THERE = "I can't hear anyone, so I'll hang up now. Call again any time. Goodbye!"
ONE_MOMENT = ["One moment.", "I'm still thinking about that.", "This is taking a little longer."]
SORRY = "Sorry, something went wrong at my end. Could you say that again?"
NO_ANSWER = "I don't know what to say to that. Could you put it another way?"
NO_KEY = "This line has no key for Claude yet, so I just repeat what I hear:"
# What is added to a reply, by how it ended. A ``stop`` that is in neither table is trouble, and gets SORRY.
ADD = {
    "end_turn": "",
    "stop_sequence": "",
    "max_tokens": "There's more to say about that. Shall I go on?",
    "refusal": "I can't help with that. What else can I do for you?",
}
GOODBYE = {
    "hang_up": "Goodbye!",
    "max_turns": "We have talked for so long that I have to hang up now. Thank you for the call. Goodbye!",
}


@app.route("/", methods=["GET", "POST"])
def call_comes_in():
    """Greet, and listen. The store and Claude aren't needed for that, so nothing can delay it."""
    if is_a_browser():
        return page()
    return listen(settings.greeting)


@app.route("/talking", methods=["GET", "POST"])
def talking():
    """One step of the conversation: what the caller said, or the rest of a reply, or silence."""
    talk = Conversation(request.values["CallSid"], line)
    turn, heard = count("turn"), count("heard")
    if error := request.values.get("ErrorCode"):
        log.error("call %s: Twilio fell back here after its error %s", talk.call_sid, error)
        return listen(SORRY)
    if not turn:
        words = what_was_said()
        if not words:
            return silence(count("silences") or 1)
        if not line.claude:
            return listen(f"{NO_KEY} {words}")
        # No turn if the call is over: nobody hears what is answered then.
        turn = talk.speak(words, request.headers.get("I-Twilio-Idempotency-Token") or None)
    return say_reply(turn, heard, talk.listen(turn, heard), count("waited"))


@app.post("/status_callback")
def status_callback():
    """The call is over: forget it. Twilio reports the end once, and not always: after a day it is forgotten anyway."""
    if request.values.get("CallStatus") not in ("queued", "initiated", "ringing", "in-progress"):
        Conversation(request.values["CallSid"], line).forget()
    return "", 204


@app.errorhandler(Exception)
def apologise(error):
    """Whatever went wrong above, the caller is told so, and can go on."""
    if isinstance(error, HTTPException):
        return error  # a stranger's request, or a browser's
    if isinstance(error, StoreError):
        log.error("the database failed: %s", error)
    else:
        log.exception("unexpected")
    return listen(SORRY)


def what_was_said():
    """The caller's words, or key; empty for a silent caller."""
    words = request.values.get("SpeechResult", "").strip()
    if key := request.values.get("Digits", "").strip():
        words = f"{words} [The caller pressed {key}]".strip()
    return words


def count(name):
    """A count from the query of one of our own URLs; 0 where it isn't there, or isn't a number."""
    return min(max(0, request.args.get(name, 0, type=int)), 10**9)  # SQLite's integers end somewhere


# --- What the caller hears ------------------------------------------------------------------------------------------

# One <Say> takes 3000 characters, and 4500 once they are URL-encoded (https://www.twilio.com/docs/voice/twiml/say):
# that makes 12 of one character at worst, so a piece has 375. It ends with a sentence, or at least with a word.
PIECE = re.compile(r"(?s)\s*(.{0,374}[.!?…。！？](?=\s|$)|.{1,375}(?=\s|$)|.{1,375})")
# One document takes 64 kB. 8000 characters of 5 bytes ("&amp;") are 40 kB, which leaves room for the tags.
LONGEST_ANSWER = 8000


def twiml(response):
    """The answer to Twilio. It is never to be kept: the same words may get another answer."""
    return app.response_class(str(response), mimetype="text/xml", headers={"Cache-Control": "no-store"})


def say(verb, text):
    """Add <Say>s to a verb: as many as the text needs, none if there is nothing to say."""
    speech = {"voice": settings.voice or None, "language": settings.language or None}
    for piece in PIECE.findall(speakable(text)):
        verb.say(piece, **speech)


def listen(text, silences=0):
    """Say something, and let the caller speak or press a key, already while it is said.

    Args:
        text: what is said; it may be empty.
        silences: how often in a row nobody has spoken.
    """
    response = VoiceResponse()
    gather = response.gather(
        input="speech dtmf",
        action=TALKING,
        method="POST",
        timeout=5,  # seconds for the caller to begin: enough to think, and then we ask
        speech_timeout="auto",  # the caller is done at the first pause; the default is to wait for as long as timeout
        profanity_filter=False,  # or Claude would get "f***"
        num_digits=1,  # a key is answered at once, where waiting for another would be dead air
        finish_on_key="",  # so that # is a key like any other
        language=settings.language or None,
    )
    say(gather, text)
    response.redirect(f"{TALKING}?silences={silences + 1}", method="POST")  # Twilio gets here if nobody speaks
    return twiml(response)


def silence(silences):
    """Ask, and ask once more in other words; the third time in a row say goodbye. Claude is told nothing."""
    if silences <= len(ARE_YOU_THERE):
        return listen(ARE_YOU_THERE[silences - 1], silences)
    return goodbye(NOBODY_THERE)


def goodbye(text):
    """Say something, and hang up."""
    response = VoiceResponse()
    say(response, text)
    response.hangup()
    return twiml(response)


def say_reply(turn, heard, reply, waited):
    """Say what there is of a reply; then come back for the rest, or listen.

    Only the last part stands in a <Gather>, so only there can the caller cut in: after a <Gather> Twilio would wait for
    the caller before it came back for the rest. Mostly the last part is all but the first sentence.

    Args:
        turn: the number of the turn.
        heard: how many characters of the reply have been said before.
        reply: the rest of it, as far as it has come.
        waited: how often in a row there was nothing new to say.
    """
    text, rest = reply.text[:LONGEST_ANSWER], reply.text[LONGEST_ANSWER:]
    if rest or not reply.stop:
        response = VoiceResponse()
        say(response, text or ONE_MOMENT[waited % len(ONE_MOMENT)])
        waited = 0 if text else waited + 1
        response.redirect(f"{TALKING}?turn={turn}&heard={heard + len(text)}&waited={waited}", method="POST")
        return twiml(response)
    if reply.stop in GOODBYE:
        return goodbye(text if text or heard else GOODBYE[reply.stop])
    add = ADD.get(reply.stop, SORRY)
    return listen(f"{text} {add}" if text or heard or add else NO_ANSWER)


# --- For the owner --------------------------------------------------------------------------------------------------


@app.get("/healthz")
def healthz():
    """For the platform: 200 as long as calls can be remembered."""
    try:
        line.store.check()
    except StoreError as error:
        log.error("the database failed: %s", error)
        return "The database failed: see the log.\n", 503
    return "Voice Claude is well.\n"


def page():
    """For whoever opens the address in a browser."""
    base = settings.public_url or request.host_url.rstrip("/")
    text = f"""Voice Claude is running. These are the addresses for your Twilio number, all with POST:

    A call comes in         {base}/
    Primary handler fails   {base}/talking
    Call status changes     {base}/status_callback
"""
    if not settings.twilio_auth_token:
        text += "\nTWILIO_AUTH_TOKEN is not set yet: until it is, Twilio's calls are refused.\n"
    if not line.claude:
        text += "\nANTHROPIC_API_KEY is not set yet: until it is, the line repeats what it hears.\n"
    return app.response_class(text, mimetype="text/plain")


# --- flask connect, flask ring ----------------------------------------------------------------------------------------

# For the owner's terminal. What stands in the way is a ClickException: click says it in one line, and exits with 1.
its_number = click.option("--number", help="The line's own number, like +15551234567, if the account has several.")


@app.cli.command("connect")
@click.argument("address")
@its_number
def connect(address, number):
    """Point a Twilio number at the app that runs at ADDRESS."""
    address = this_app(address)
    own = own_number(twilio_client(), number)
    if hidden_by := own.trunk_sid or own.voice_application_sid:
        kind = "trunk" if own.trunk_sid else "TwiML app"
        trouble = f"{own.phone_number} is answered by the {kind} {hidden_by}, and would ignore this address"
        raise click.ClickException(f"{trouble}: take that off the number in Twilio's console, and try again.")
    wanted = {
        "voice_url": f"{address}/",
        "voice_method": "POST",
        "voice_fallback_url": f"{address}/talking",
        "voice_fallback_method": "POST",
        "status_callback": f"{address}/status_callback",
        "status_callback_method": "POST",
    }
    changes = {name: value for name, value in wanted.items() if getattr(own, name) != value}
    if not changes:
        click.echo(f"{own.phone_number} is connected to {address} already.")
        return
    ask(own.update, **wanted)
    click.echo(f"{own.phone_number} is connected to {address} now.")
    for name, value in changes.items():
        before = re.sub(r"//[^/?#]*@", "//", getattr(own, name) or "nothing")  # a URL can have a password in it
        click.echo(f"    {name}: {value} (before: {before})")


@app.cli.command("ring")
@click.argument("to")
@click.argument("address")
@its_number
def ring(to, address, number):
    """Call the number TO from the line that runs at ADDRESS."""
    if not re.fullmatch(r"\+[0-9]+", to):
        raise click.ClickException("TO takes a number like +15557654321.")
    if settings.allowed_callers and to not in settings.allowed_callers:
        raise click.ClickException(f"{to} is not in ALLOWED_CALLERS: the line would hang up.")
    address = this_app(address)
    twilio = twilio_client()
    own = own_number(twilio, number)
    urls = {"url": f"{address}/", "fallback_url": f"{address}/talking", "status_callback": f"{address}/status_callback"}
    call = ask(twilio.calls.create, to=to, from_=own.phone_number, **urls)  # for a call out, POST is the default
    click.echo(f"{own.phone_number} is calling {to}: {call.sid}")


class AsItComes(urllib.request.HTTPErrorProcessor):
    """Takes any answer as it comes: no redirect is followed, and no status is an exception."""

    def https_response(self, request, response):
        return response


def this_app(address):
    """The address, without a slash at its end, once its /healthz has said that it is this app's."""
    if not re.fullmatch(r"https://[A-Za-z0-9.-]+(:[0-9]+)?(/[A-Za-z0-9./~_%-]*)?", address):
        raise click.ClickException("ADDRESS takes https://, a host and maybe a path, like https://my-line.example.com")
    address = address.rstrip("/")
    try:
        # 10 seconds: Twilio wouldn't wait much longer.
        with urllib.request.build_opener(AsItComes).open(f"{address}/healthz", timeout=10) as answer:
            status, text, location = answer.status, answer.read(100), answer.headers["Location"]
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no host can have that name
        reason = getattr(error, "reason", type(error).__name__)
        raise click.ClickException(f"{address} gives no answer: {reason}") from error
    if location:
        raise click.ClickException(f"{address} leads on to {location!a}: Twilio needs an address that answers itself.")
    if status == 503:
        raise click.ClickException(f"The app at {address} is not well: see its log.")
    if status != 200 or not text.startswith(b"Voice Claude"):
        raise click.ClickException(f"What answers at {address}/healthz (status {status}) is not this app.")
    return address


def twilio_client():
    """Twilio's REST API, as the account that the environment names."""
    needed = ("TWILIO_ACCOUNT_SID", "TWILIO_AUTH_TOKEN")
    if missing := [name for name in needed if not getattr(settings, name.lower())]:
        raise click.ClickException(f"Set {' and '.join(missing)}: https://console.twilio.com shows both.")
    from twilio.http.http_client import TwilioHttpClient  # 27 MB, with all it needs: not for the line itself
    from twilio.rest import Client

    patient = TwilioHttpClient(timeout=5)  # seconds: it answers in one, and by default it would be waited for for ever
    twilio = Client(settings.twilio_account_sid, settings.twilio_auth_token, http_client=patient)
    ask(twilio.api.account.fetch)  # says what is wrong with the credentials, where a list only says that it failed
    return twilio


def own_number(twilio, number):
    """The line's own number: the one that was chosen, or the only one there is."""
    numbers = ask(twilio.incoming_phone_numbers.list)
    found = [one for one in numbers if number in (None, one.phone_number)]
    if not found:
        raise click.ClickException(f"The account has no number {number}." if number else "The account has no number.")
    if len(found) > 1:
        listed = "\n    ".join(one.phone_number for one in found)
        raise click.ClickException(f"The account has several numbers: say which, with --number.\n    {listed}")
    return found[0]


def ask(method, /, **what):
    """What Twilio's REST API answers, or why it doesn't."""
    try:
        return method(**what)
    except TwilioRestException as error:
        if error.status == 401:
            raise click.ClickException("Twilio refuses TWILIO_ACCOUNT_SID with TWILIO_AUTH_TOKEN.") from error
        # Not str(error): on a terminal that is many lines, in colours.
        raise click.ClickException(f"Twilio says no: {error.msg} (error {error.code})") from error
    except (TwilioException, OSError, ValueError) as error:  # OSError: the network; ValueError: what came isn't JSON
        doubt = "; it may have done it all the same" if method.__name__ in ("update", "create") else ""
        raise click.ClickException(f"Twilio gave no answer of use ({type(error).__name__}){doubt}.") from error
