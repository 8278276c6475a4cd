"""Hello, this is Claude speaking: the phone line.

Twilio asks these URLs what to do with a call, and is answered in TwiML
(https://www.twilio.com/docs/voice/twiml):

    /                  a call comes in: greet, and listen
    /talking           the caller spoke, pressed a key or stayed silent; the rest of a reply is
                       due; or Twilio got no good answer, and falls back here with an ErrorCode
    /listening         what the caller has said so far
    /hand_over         the person who is to take the call has answered
    /status_callback   the call is over

Before any of these ``who_may_call`` looks who asks. ``settings`` and ``line`` are made in the
section "Settings".

Whatever goes wrong, what Twilio asks is answered in TwiML: with anything else the caller would hear
"an application error has occurred".
"""

import contextlib
import datetime
import difflib
import hmac
import json
import logging
import os
import re
import sys
import threading
from urllib.parse import parse_qs, urlencode, urlsplit

import click
from flask import Flask, abort, g, request
from twilio.base.exceptions import TwilioException, TwilioRestException
from twilio.request_validator import RequestValidator
from twilio.twiml.voice_response import VoiceResponse
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix

from conversation import (
    SWITCH, SYSTEM_PROMPT, Caller, Conversation, Line, claude_client, heard_and_not, own_words,
    speakable)
from store import PostgresStore, Store, StoreError

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
log = logging.getLogger("voice-claude")
log.setLevel(logging.INFO)
app = Flask(__name__, static_folder=None)

# --- The call -------------------------------------------------------------------------------------
# What the line says in its own name. None of it is ever kept, or sent to Claude, as Claude's words.
ARE_YOU_THERE = ["Are you still there?", "I'm listening, whenever you're ready."]
NOBODY_THERE = "I can't hear anyone, so I'll hang up now. Call again any time. Goodbye!"
ONE_MOMENT = ["One moment.", "I'm still thinking about that.", "This is taking a little longer."]
SORRY = "Sorry, something went wrong at my end. Could you say that again?"
NO_ANSWER = "I don't know what to say to that. Could you put it another way?"
HANDING_OVER = "I'll put you through now. One moment."
NOBODY_TOOK_IT = "Nobody could take your call just now. Is there anything else I can do for you?"
A_CALLER = "A caller from Voice Claude:"
PRESS_ANY_KEY = "Press any key to take the call."
NO_KEY = "This line has no key for Claude yet, so I just repeat what I hear:"
# What follows a reply, by how the reply ended (its ``stop``). Any other end is trouble: SORRY.
AFTERWORDS = {
    "end_turn": "", "stop_sequence": "",
    "max_tokens": "There's more to say about that. Shall I go on?",
    "refusal": "I can't help with that. What else can I do for you?"}
TOMORROW = "This line has talked so much today that it has to rest. Please try tomorrow. Goodbye!"
KEY_IN = "Please key in your PIN, and then the pound key."
WRONG_PIN = "That was not the right PIN."
# After these ends the line hangs up. The words are for a reply without words of its own.
GOODBYES = {
    "hang_up": "Goodbye!",
    "max_turns": "We have talked for so long that I have to hang up now. Thank you. Goodbye!"}
OWN_WORDS = [*ARE_YOU_THERE, NOBODY_THERE, *ONE_MOMENT, SORRY, NO_ANSWER, HANDING_OVER, A_CALLER,
             NOBODY_TOOK_IT, PRESS_ANY_KEY, TOMORROW, KEY_IN, WRONG_PIN,
             *filter(None, AFTERWORDS.values()), *GOODBYES.values()]


@app.route("/", methods=["GET", "POST"])
def call_comes_in():
    """Greet, and listen."""
    call_sid = request.values["CallSid"]
    log.info("call %s begins, with %s", call_sid, last_digits())
    with contextlib.suppress(StoreError):  # a greeting needs no store
        if settings.keep_days and not settings.pin:
            verdict = request.values.get("StirVerstat")  # of the phone companies, on the number
            proved = verdict == "TN-Validation-Passed-A"
            line.store.keep_caller(call_sid, callers_number(), trusted=proved)
        if line.store.turns_today() >= settings.max_turns_a_day:
            return no_turn_is_left()
    return say_and_listen(speakable(settings.greeting))


@app.route("/talking", methods=["GET", "POST"])
def talking():
    """One step of the conversation: what the caller said, or the rest of a reply, or silence."""
    call = Conversation(request.values["CallSid"], line)
    turn, heard = number_in_url("turn"), number_in_url("heard")
    if error := request.values.get("ErrorCode"):
        log.error("call %s: Twilio fell back here after its error %s", call.call_sid, error)
        return say_and_listen(SORRY)
    if "DialCallStatus" in request.values:
        return handed_over()
    if not turn:
        words = what_was_said()
        if not words:
            silences = number_in_url("silences") or 1  # a <Gather> that heard no words has none
            if silences > len(ARE_YOU_THERE):
                return goodbye(NOBODY_THERE)
            return say_and_listen(ARE_YOU_THERE[silences - 1], silences=silences)
        if not line.claude:
            return say_and_listen(NO_KEY, speakable(words))
        delivery = request.headers.get("I-Twilio-Idempotency-Token") or None
        turn = call.caller_said(words, delivery, the_caller())
        if not turn:
            return goodbye() if turn is None else no_turn_is_left()
    g.after = turn
    return say_reply(turn, heard, *call.reply(turn, heard), number_in_url("waited"))


@app.post("/listening")
def listening():
    """The caller is still speaking, or has just stopped: think ahead. Nobody awaits the answer."""
    so_far = request.form.get("UnstableSpeechResult") or request.form.get("StableSpeechResult", "")
    if settings.think_ahead and line.claude and so_far.strip():
        # Twilio counts from 0 each time it listens, also after a silence: so the silences stand
        # before its number. It listens for a minute at most, and never comes to 9999.
        number = min(abs(request.form.get("SequenceNumber", 0, type=int)), 9999)
        number += 10_000 * min(number_in_url("silences"), 9)
        call = Conversation(request.values["CallSid"], line)
        said = so_far, number_in_url("after"), number, the_caller()
        with contextlib.suppress(RuntimeError):  # no thread is left: this can be done without
            threading.Thread(target=call.think_ahead, args=said, daemon=True).start()
    return "", 204


@app.post("/status_callback")
def status_callback():
    """The call is over: forget it. What Twilio doesn't report is forgotten two hours later."""
    if request.values.get("CallStatus") not in ("queued", "initiated", "ringing", "in-progress"):
        call_sid, seconds = request.values["CallSid"], request.values.get("CallDuration", "?")
        log.info("call %s is over: %s s, turns %d, tokens %d in %d out",
                 call_sid, seconds, *line.store.end(call_sid))
    return "", 204


@app.errorhandler(Exception)
def apologise(error):
    """Whatever went wrong, the caller is told so, and can go on."""
    if isinstance(error, HTTPException):
        return error  # this is no call: a stranger, or a browser
    expected = isinstance(error, StoreError)
    log.error("the database failed: %s" if expected else "%r", error, exc_info=not expected)
    if request.endpoint in ("healthz", "status_callback"):  # Twilio reports the end once more
        return "Voice Claude is not well: see the log.\n", 503
    if request.endpoint == "listening":
        return "", 204
    silences = number_in_url("silences")
    # On a phone that is off the hook the apologies would have no end.
    if request.endpoint == "hand_over" or silences > len(ARE_YOU_THERE):
        return goodbye()
    return say_and_listen(SORRY, silences=silences)


def no_turn_is_left():
    """All calls together have had MAX_TURNS_A_DAY."""
    if line.store.first_this_hour():
        log.warning("MAX_TURNS_A_DAY is reached: callers are told to try tomorrow")
    return goodbye(TOMORROW)


def what_was_said():
    """The caller's words, or key; empty for a silent caller."""
    # Postgres keeps no "\0" in a text.
    words = request.values.get("SpeechResult", "").replace("\0", "").strip()
    if key := request.values.get("Digits", "").strip():
        words = f"{words} [The caller pressed {key}]".strip()
    return words


def in_url(name):
    """What the URL that Twilio asks carries by this name; where Twilio falls back to another URL,
    what the one that went wrong carries. Empty if it isn't there."""
    if "in_url" not in g:
        asked = request.values.get("ErrorUrl") or request.url
        g.in_url = parse_qs(urlsplit(asked).query)
    return g.in_url.get(name, [""])[0]


def number_in_url(name):
    """The same for a number: 0 if it isn't there, or can't be one of ours."""
    number = in_url(name)
    return int(number) if re.fullmatch("[0-9]{1,9}", number) else 0


# --- What the caller hears ------------------------------------------------------------------------
# One <Say> takes 3000 characters, and 4500 once they are URL-encoded
# (https://www.twilio.com/docs/voice/twiml/say). An emoji becomes 12, so 375 characters always fit.
# A piece ends with a sentence, or at least with a word.
PIECE = re.compile(r"(?s)\s*(.{0,374}[.!?…。！？](?=\s|$)|.{1,375}(?=\s|$)|.{1,375})")
# A document takes 64 kB. 8000 characters of 5 bytes ("&amp;") are 40 kB, with room for the tags.
LONGEST_ANSWER = 8000
# Behind each URL: where no process answers, for example during a deploy, Twilio tries again
# (https://www.twilio.com/docs/usage/webhooks/webhooks-connection-overrides), 5 times at most, and
# for 15 s in all. The same delivery is the same turn. 8 s (``rt``) are more than an answer takes,
# and leave 7 s for another process: enough for the 6 s of PATIENCE.
RETRIES = "#rc=5&rp=5xx,ct,rt&rt=8000"


def twiml(response):
    """An answer to Twilio. Nothing on the way may keep it: the next answer is another one."""
    return str(response), {"Content-Type": "text/xml; charset=utf-8", "Cache-Control": "no-store"}


def url(path, **query):
    """Where Twilio goes next, on the same host; below PUBLIC_URL's path, if that has one. The URL
    carries the language of the call, if that isn't the line's first."""
    path = urlsplit(settings.public_url).path + path
    if language_of_call() != settings.languages[0]:
        query["language"] = language_of_call()
    if settings.think_ahead:
        query["after"] = g.get("after") or number_in_url("after")  # the last turn
    return path + (f"?{urlencode(sorted(query.items()))}" if query else "") + RETRIES


def say(verb, *texts):
    """Add <Say>s to a verb: as many as the texts need, none if there is nothing to say."""
    for text in texts:
        language = language_of_call()
        if text in OWN_WORDS and not language.startswith("en") and language:
            # In the call's language, once they are translated; until then in English. Before the
            # PIN a stranger must not make Claude work.
            translated = own_words(line, OWN_WORDS, language, may_ask="before_pin" not in g)
            text, language = translated.get(text, text), language if translated else "en-US"
        for piece in PIECE.findall(text.strip()):
            verb.say(piece, voice=settings.voices.get(language), language=language or None)


def say_and_listen(*texts, silences=0):
    """Say something, and let the caller speak or press a key. ``silences`` is how often in a row
    the caller was silent before."""
    response = VoiceResponse()
    ahead = url("/listening", silences=silences) if settings.think_ahead else None
    gather = response.gather(
        input="speech dtmf",
        action=url("/talking"),
        method="POST",
        timeout=5,  # seconds for the caller to begin: enough to think, and then the line asks
        # "auto": the first pause ends the words. A SPEECH_MODEL wants seconds instead. Without
        # either Twilio would wait 5 s more.
        speech_timeout="1" if settings.speech_model else "auto",
        speech_model=settings.speech_model or None,
        profanity_filter=False,  # or Claude would read "f***"
        num_digits=1,  # a key is answered at once; waiting for another one would be dead air
        finish_on_key="",  # so that # is a key like any other
        language=language_of_call() or None,
        partial_result_callback=ahead)  # Twilio's default is POST
    say(gather, *texts)
    response.redirect(url("/talking", silences=silences + 1), method="POST")  # for a silent caller
    return twiml(response)


def goodbye(*texts):
    """Say something, and hang up."""
    response = VoiceResponse()
    say(response, *texts)
    response.hangup()
    return twiml(response)


def say_reply(turn, heard, text, stop, waited):
    """Say the text that there is of a reply; then come back for the rest, or listen. ``heard`` is
    how many characters were said before, ``waited`` how often in a row there was nothing to say."""
    # Callers can cut in only on the last part, which stands in a <Gather>: after a <Gather> Twilio
    # waits for the caller, and doesn't come back for the rest. Mostly the last part is all but the
    # first sentence.
    if not stop or len(text) > LONGEST_ANSWER:
        response, text = VoiceResponse(), text[:LONGEST_ANSWER]
        heard, waited = heard + len(text), 0 if text else waited + 1
        say(response, in_its_language(text) or ONE_MOMENT[(waited - 1) % len(ONE_MOMENT)])
        response.redirect(url("/talking", turn=turn, heard=heard, waited=waited), method="POST")
        return twiml(response)
    with contextlib.suppress(StoreError):  # then the caller counts as having heard it all
        line.store.give(request.values["CallSid"], turn, heard)
    text = in_its_language(text)
    anything_said = text or heard
    if stop.startswith("hand_over") and settings.hand_over_to:
        return dial_person(turn, text if anything_said else HANDING_OVER)
    if stop in GOODBYES:
        return goodbye(text if anything_said else GOODBYES[stop])
    afterword = AFTERWORDS.get(stop, SORRY)
    return say_and_listen(text, afterword if anything_said or afterword else NO_ANSWER)


def in_its_language(text):
    """The words of a part of a reply, which may begin with a switch of the call's language."""
    _, switch, rest = text.partition(SWITCH[0])
    if switch:
        g.language, _, text = rest.partition(SWITCH[-1])
    return text


def language_of_call():
    """What is spoken and listened for: the URL says so, until Claude switches."""
    if "language" not in g:
        language = in_url("language")
        g.language = language if language in settings.languages else settings.languages[0]
    return g.language


# --- Handing a call over (with HAND_OVER_TO) ------------------------------------------------------


def dial_person(turn, text):
    """Say something, and dial a person. What that person hears first is asked of /hand_over."""
    response = VoiceResponse()
    say(response, text)
    own = request.values.get("From" if is_outbound() else "To")
    # After 20 s of ringing nobody comes. The caller hears it ring, as the call isn't bridged yet.
    dial = response.dial(action=url("/talking"), method="POST", timeout=20, caller_id=own,
                         answer_on_bridge=True)
    ask = url("/hand_over", call_sid=request.values["CallSid"], turn=turn)
    dial.number(settings.hand_over_to, url=ask, method="POST")
    return twiml(response)


@app.post("/hand_over")
def hand_over():
    """Someone has answered: a person, who presses a key and is put through, or a voicemail."""
    response = VoiceResponse()
    if "Digits" not in request.values:
        turn = number_in_url("turn")
        found = line.store.turns(request.args.get("call_sid"), turn, turn)
        reason = [row["stop"].partition(":")[2] for row in found if row["stop"]]
        if not reason:
            return goodbye()  # the caller is gone
        gather = response.gather(input="dtmf", num_digits=1, finish_on_key="", timeout=10,
                                 action=url("/hand_over"), method="POST")
        say(gather, A_CALLER, *reason, PRESS_ANY_KEY)
        response.hangup()
    return twiml(response)  # a key was pressed: it is empty, and Twilio puts the caller through


def handed_over():
    """The person has hung up, or nobody took the call, and the caller is still there."""
    status, bridged = request.values["DialCallStatus"], request.values.get("DialBridged")
    log.info("call %s handed over: %s", request.values["CallSid"], status)
    return goodbye(GOODBYES["hang_up"]) if bridged == "true" else say_and_listen(NOBODY_TOOK_IT)


# --- Who may call ---------------------------------------------------------------------------------
# Platforms put one proxy before the app: take scheme and host from what that says. A forged header
# gains nothing, since the signature covers the real URL.
app.wsgi_app = ProxyFix(app.wsgi_app, x_for=0, x_proto=1, x_host=1)


@app.before_request
def who_may_call():
    """Three checks: a stranger could spend the owner's money, and hear what was said."""
    try:
        is_an_address = request.scheme in ("http", "https") and request.url
    except ValueError:
        is_an_address = False
    if not is_an_address:
        abort(400)  # an X-Forwarded-Proto or X-Forwarded-Host that no proxy sends
    if request.endpoint in (None, "healthz"):
        return None  # this is not about a call; without an endpoint Flask says 404
    if request.path == "/" and request.method != "POST" and "CallSid" not in request.args:
        return page()  # a person looks whether the line runs: Twilio always sends a CallSid
    only_twilio()
    if request.endpoint != "listening":  # there are many, and they have to be quick
        with contextlib.suppress(StoreError):  # whatever request comes next forgets what is old
            line.store.sweep()
    if request.endpoint in ("hand_over", "status_callback"):
        return None  # the line itself has called that person; and nobody talks after the end
    return only_allowed_callers() or only_with_pin()


def only_twilio():
    """Twilio posts forms, and signs what it sends with the account's auth token
    (https://www.twilio.com/docs/usage/security#validating-requests)."""
    if request.method == "POST" and request.mimetype != "application/x-www-form-urlencoded":
        abort(415)
    token, signature = settings.twilio_auth_token, request.headers.get("X-Twilio-Signature", "")
    if not token:  # the validator takes an empty one for a token like any other
        log.warning("403: set TWILIO_AUTH_TOKEN, and Twilio's requests will be answered")
        abort(403)
    if not RequestValidator(token).validate(called_url(), request.form, signature):
        log.warning("403 for %s: wrong signature; is the token right, and PUBLIC_URL?",
                    called_url().partition("?")[0][:200])
        abort(403)
    if "CallSid" not in request.values:
        abort(400)


def only_allowed_callers():
    """Everyone may call, or only the numbers in ALLOWED_CALLERS."""
    if not settings.allowed_callers or the_caller().number in settings.allowed_callers:
        return None
    if request.endpoint != "call_comes_in":
        return goodbye()  # this call has been answered already
    log.info("call %s rejected: %s is not in ALLOWED_CALLERS",
             request.values["CallSid"], last_digits())
    response = VoiceResponse()
    response.reject()  # the call isn't answered, and costs nothing
    return twiml(response)


def called_url():
    """The URL that Twilio called, as it was sent: ``request.url`` has some %-escapes undone."""
    sent = urlsplit(request.environ.get("RAW_URI") or request.full_path)  # gunicorn has the former
    path = sent._replace(scheme="", netloc="").geturl()  # some proxies send the whole URL
    return (settings.public_url or request.host_url.rstrip("/")) + path


def only_with_pin():
    """With a PIN nothing of a call goes on before the caller has keyed it in, one of three times.
    The URL carries the count, so the caller can't change it, and no failure begins it anew."""
    call_sid, keyed = request.values["CallSid"], request.form.get("Digits", "")
    if not settings.pin or line.store.is_trusted(call_sid):
        return None
    tries = number_in_url("tries")
    if request.endpoint == "call_comes_in" and tries:
        if hmac.compare_digest(keyed.encode(), settings.pin.encode()):
            line.store.keep_caller(call_sid, callers_number(), trusted=True)
            return None
        log.warning("call %s: PIN wrong or missing, %d of 3", call_sid, tries)
    g.before_pin = True
    if tries >= 3:
        return goodbye(WRONG_PIN, GOODBYES["hang_up"])
    response, again = VoiceResponse(), url("/", tries=tries + 1)
    # No num_digits: that would tell a stranger how long the PIN is.
    gather = response.gather(input="dtmf", action=again, method="POST", timeout=8)
    say(gather, WRONG_PIN if tries else "", KEY_IN)
    response.redirect(again, method="POST")
    return twiml(response)


# What stands for a withheld number: ANONYMOUS, BLOCKED, RESTRICTED, UNAVAILABLE and UNKNOWN, on the
# keys of a telephone.
WITHHELD = {"+266696687", "+2562533", "+7378742833", "+86282452253", "+8656696"}


def is_outbound():
    """Whether the line has called, by ``flask ring``, instead of being called."""
    return request.values.get("Direction", "").startswith("outbound")


def the_caller():
    """The one who talks with Claude: who called, or was called by the line."""
    who = "To" if is_outbound() else "From"
    twilio_says = {"city": "City", "region": "State", "country": "Country"}
    place = {name: request.values.get(who + field) for name, field in twilio_says.items()}
    return Caller(request.values.get(who, ""), {name: at for name, at in place.items() if at})


def callers_number():
    """The caller's number if it is one, exactly as Twilio writes numbers; otherwise None."""
    number = the_caller().number
    return number if re.fullmatch(NUMBER, number) and number not in WITHHELD else None


def last_digits():
    """The caller's number as it may stand in the log."""
    number = the_caller().number
    return f"...{number[-3:]}" if re.fullmatch(NUMBER, number) else "a withheld number"


# --- Settings -------------------------------------------------------------------------------------
# For each environment variable: its default, a pattern for its values, and what it takes in words.
# A value in quotes, or "...", was pasted and not meant: no pattern lets it through.
TEXT = r"""(?s)(?!(["']).*\1$).*\w.*"""
TAG = "[A-Za-z]{2,3}(-[A-Za-z0-9]+)*"
NUMBER = r"\+[1-9][0-9]{6,14}"  # as Twilio writes one (https://www.itu.int/rec/T-REC-E.164)
SETTINGS = {
    "ANTHROPIC_API_KEY": ("", r"(?!.*\.\.)[\w.~+/-]{8,}=*", "the key as Anthropic shows it"),
    "TWILIO_AUTH_TOKEN": ("", r"[\w-]+", "the token as Twilio shows it"),
    "TWILIO_ACCOUNT_SID": ("", r"AC[0-9a-fA-F]{32}", "AC and 32 hexadecimal digits"),
    "PUBLIC_URL": ("", r"https?://\w[\w.-]*(:\d+)?(/[\w./~%-]*)?", "an address: https://host/path"),
    "CLAUDE_MODEL": ("claude-haiku-5-5", r"[\w.:/@-]+", "the name of a model"),
    "CLAUDE_EFFORT": ("low", "low|medium|high|xhigh|max", "low, medium, high, xhigh or max"),
    "SYSTEM_PROMPT": (SYSTEM_PROMPT, TEXT, "words, without quotes around them"),
    "GREETING": ("Hello, this is Claude speaking!", TEXT, "words, without quotes around them"),
    "LANGUAGE": ("", rf"{TAG}(\s*,\s*{TAG})*", "a language, like en-GB, or several: en-GB,de-DE"),
    "VOICE": ("", r"[\w.-]+(\s*,\s*[\w.-]+)*", "a voice of Twilio's for each language in LANGUAGE"),
    "SPEECH_MODEL": ("", r"[a-z][\w.-]*", "a speechModel of Twilio's, like deepgram_nova-3"),
    "ALLOWED_CALLERS": ("", rf",*{NUMBER}(,+{NUMBER})*,*",
                        "numbers like +15551234567, separated by commas"),
    "MAX_TURNS": (100, r"0*[1-9]\d{0,8}", "a whole number, 1 or more"),
    "MAX_TURNS_A_DAY": (1000, r"0*[1-9]\d{0,8}", "a whole number, 1 or more"),
    "PIN": ("", r"\d{6,12}", "6 to 12 digits"),
    "KEEP_DAYS": (0, r"\d{1,4}", "a whole number of days"),
    "THINK_AHEAD": ("no", "yes|no", "yes or no"),
    "WEB_SEARCHES": (0, r"\d{1,9}", "a whole number"),
    "HAND_OVER_TO": ("", NUMBER, "a number like +15551234567"),
    "DATABASE_URL": ("sqlite:///calls.db", r"sqlite:///[^~:?\s][^:?]*|"
                     r"postgres(ql)?://(?!.*pool_size=(?![1-9]\d{0,3}$))\S+",
                     "sqlite:/// and the path of a file, without ~, or postgres://user:password@"
                     "host/name, which may end with ?pool_size=20")}


class Settings:
    """The environment variables, as attributes with small letters. A value that can't be used is a
    ValueError: that says what the variable takes, but not the value, which may be a secret."""

    def __init__(self, environ):
        for name, (default, pattern, takes) in SETTINGS.items():
            value = written = environ.get(name, "").strip()
            if name == "LANGUAGE" and re.search("[_:]", written):
                written = ""  # en_GB:en is the operating system's, for the programs on its screen
            if name in ("ALLOWED_CALLERS", "HAND_OVER_TO"):  # people write +44 (0)20 7946 0958
                value = re.sub(r"\(0\)|[ ()./-]", "", written)
            if written and not re.fullmatch(pattern, value):
                raise ValueError(f"{name} takes {takes}")
            # Some models refuse any effort, so an empty CLAUDE_EFFORT is not the default.
            if not written and not (name == "CLAUDE_EFFORT" and name in environ):
                value = default
            setattr(self, name.lower(), type(default)(value))  # a number, where the default is one
        self.public_url = self.public_url.rstrip("/")
        self.allowed_callers = set(filter(None, self.allowed_callers.split(",")))
        # Claude would search for words that may not be all.
        self.think_ahead = self.think_ahead == "yes" and not self.web_searches
        self.languages, voices = re.split(r"\s*,\s*", self.language), self.voice.split(",")
        if self.voice and len(voices) != len(self.languages):
            raise ValueError(f"VOICE takes {SETTINGS['VOICE'][2]}")
        self.voices = dict(zip(self.languages, map(str.strip, voices))) if self.voice else {}


try:
    settings = Settings(os.environ)
    kind = PostgresStore if settings.database_url.startswith("postgres") else Store
    store = kind(settings.database_url.removeprefix("sqlite:///"), settings.keep_days)
except (ValueError, ImportError) as error:
    if isinstance(error, ImportError):
        error = "a Postgres in DATABASE_URL needs psycopg: pip install 'psycopg[binary]'"
    print(f"Voice Claude can't start: {error}.", file=sys.stderr)
    sys.exit(4)  # gunicorn knows by this status that it need not try again
key = settings.anthropic_api_key
line = Line(settings, store, claude_client(key) if key else None)

# --- For the owner --------------------------------------------------------------------------------


@app.get("/healthz")
def healthz():
    """For the platform: 200 as long as calls can be remembered. Strangers may ask too, so the store
    looks once a second at most."""
    line.store.sweep()
    line.store.check()
    return "Voice Claude is well.\n"


def page():
    """For a person who opens the address in a browser."""
    base = settings.public_url or request.host_url.rstrip("/")
    text = f"""Voice Claude is running. The addresses for your Twilio number, all with POST:

    A call comes in         {base}/{RETRIES}
    Primary handler fails   {base}/talking{RETRIES}
    Call status changes     {base}/status_callback{RETRIES}\n"""
    for name in "TWILIO_AUTH_TOKEN", "ANTHROPIC_API_KEY":
        text += "" if getattr(settings, name.lower()) else f"\n{name} is not set yet.\n"
    return app.response_class(text, mimetype="text/plain")


def announce():
    """Tell the log what runs here, in one line, and what the owner may have missed."""
    callers = len(settings.allowed_callers)
    # postgres:// or postgresql://, without user and password, which end with an @.
    database = re.sub("(?<=s://|l://)[^/]*@", "", settings.database_url).partition("?")[0]
    log.info("Voice Claude: model %s, effort %s, database %s, calls from %s%s, %d turns a call, "
             "%d a day, words kept for %d days", settings.claude_model,
             settings.claude_effort or "none", database,
             f"{callers} number{'s' * (callers > 1)}" if callers else "everyone",
             " with the PIN" * bool(settings.pin),
             settings.max_turns, settings.max_turns_a_day, settings.keep_days)
    for name, so in [("TWILIO_AUTH_TOKEN", "no call is answered"),
                     ("ANTHROPIC_API_KEY", "the line repeats what it hears"),
                     ("ALLOWED_CALLERS", "whoever dials the number talks at your expense")]:
        if not getattr(settings, name.lower()) and not (name == "ALLOWED_CALLERS" and settings.pin):
            log.warning("%s is not set: %s", name, so)
    for name in sorted(set(os.environ) - set(SETTINGS)):
        for setting in difflib.get_close_matches(name.upper(), SETTINGS, n=1, cutoff=0.8):
            log.warning("%s is not a setting of this line: %s is", name, setting)


# --- flask connect, flask ring --------------------------------------------------------------------
@app.cli.command("connect")
@click.argument("address")
@click.option("--number", help="The line's own number, if the account has several.")
def connect(address, number):
    """Point a Twilio number at the app that runs at ADDRESS."""
    with line_at(address, number) as (_, own, urls):
        if other := own.trunk_sid or own.voice_application_sid:
            sys.exit(f"{own.phone_number} is answered by the trunk or TwiML app {other}. "
                     "Take that off the number in Twilio's console.")
        before = {name: getattr(own, name) for name in urls if getattr(own, name) != urls[name]}
        if before:
            own.update(**urls)
    click.echo(f"{own.phone_number} {'is now' if before else 'was already'} connected.")
    for name, old in before.items():
        old = re.sub("//[^/?#]*@", "//", old or "nothing")  # a URL can have a password in it
        click.echo(f"    {name}: {urls[name]} (before: {old})")


@app.cli.command("ring")
@click.argument("to")
@click.argument("address")
@click.option("--number", help="The line's own number, if the account has several.")
def ring(to, address, number):
    """Call the number TO from the line that runs at ADDRESS."""
    if settings.allowed_callers and to not in settings.allowed_callers:
        sys.exit(f"{to} is not in ALLOWED_CALLERS: the line would hang up.")
    with line_at(address, number) as (twilio, own, urls):
        urls = {name.removeprefix("voice_"): url for name, url in urls.items()}  # as a call has it
        call = twilio.calls.create(to=to, from_=own.phone_number, **urls)
    click.echo(f"{own.phone_number} is calling {to}: {call.sid}")


@contextlib.contextmanager
def line_at(address, number):
    """Twilio's client, the line's own number, and what Twilio is to ask the line at this address.
    Whatever goes wrong, also later in the ``with``, is one sentence in the terminal."""
    from twilio.http.http_client import TwilioHttpClient  # 27 MB that the line itself never needs
    from twilio.rest import Client

    address = address.rstrip("/")
    if not re.fullmatch(r"(?a)https://[a-z0-9.-]+(:\d+)?(/[\w./~-]*)?", address):
        sys.exit("ADDRESS takes an address like https://my-line.example.com")
    http = TwilioHttpClient(timeout=10)  # seconds; by default it waits for ever
    twilio = Client(settings.twilio_account_sid, settings.twilio_auth_token, http_client=http)
    try:
        twilio.api.account.fetch()  # says that the token is wrong, where a list only fails
        own = {one.phone_number: one for one in twilio.incoming_phone_numbers.list()}
        if len(own) == 1 and not number:
            (number,) = own
        if number not in own:
            sys.exit(f"Choose with --number one of: {', '.join(own) or 'none'}")
        make_sure_that_it_answers(address, http)
        urls = {}
        for name, path in ("voice_url", "/"), ("voice_fallback_url", "/talking"), (
                "status_callback", "/status_callback"):
            urls |= {name: address + path + RETRIES, f"{name.removesuffix('_url')}_method": "POST"}
        yield twilio, own[number], urls
    except TwilioRestException as error:
        both = "TWILIO_ACCOUNT_SID and TWILIO_AUTH_TOKEN as https://console.twilio.com shows them"
        sys.exit(f"Set {both}." if error.status == 401 else f"Twilio says no: {error.msg}")
    except (TwilioException, OSError, ValueError) as error:  # ValueError: what came isn't JSON
        sys.exit(f"No answer of use: {error}")  # names the host that was asked


def make_sure_that_it_answers(address, http):
    """Send what Twilio sends when a call comes in. The line only greets, so this costs nothing."""
    url, number = f"{address}/", min(settings.allowed_callers, default="+15551234567")
    call = {"CallSid": "CA" + "0" * 32, "From": number, "CallStatus": "ringing"}
    signature = RequestValidator(settings.twilio_auth_token).compute_signature(url, call)
    answer = http.request("POST", url, data=call, headers={"X-Twilio-Signature": signature})
    if answer.status_code == 403:
        sys.exit(f"The line at {address} refuses calls. Set there TWILIO_AUTH_TOKEN to the token "
                 f"that is set here, and PUBLIC_URL to {address}")
    if answer.status_code != 200 or "<Response" not in answer.text:
        seen = answer.headers.get("Location") or answer.text[:50]
        sys.exit(f"Not this app: {url} answers {answer.status_code}, {seen!a}")


# --- flask calls ----------------------------------------------------------------------------------


@app.cli.command("calls")
@click.argument("call_sid", default="")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def calls(call_sid, as_json):
    """List the calls of which words are there; or print one, by its CALL_SID, as a transcript."""
    clock = datetime.datetime.fromtimestamp
    if call_sid:
        turns = [turn for turn in line.store.turns(call_sid, 1, 10**9) if not turn["guess"]]
        found = [{"at": clock(int(turn["spoke_at"])), "caller": turn["words"], "heard": said,
                  "not_heard": rest, "stop": turn["stop"], "seconds_ahead": turn["ahead"]}
                 for turn, said, rest in heard_and_not(turns)]
    else:
        found = [{"call_sid": call["call_sid"], "began": clock(int(call["began"])),
                  "seconds": round(call["touched"] - call["began"]), "turns": call["turns"],
                  "number": f"...{call['caller'][-3:]}" if call["caller"] else "withheld",
                  "on": call["ended"] is None} for call in line.store.calls()]
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False, default=str))
        return
    for row in found:
        if call_sid:
            cut = f"[cut in] {row['not_heard']}" if row["not_heard"] else ""
            early = f" [begun {row['seconds_ahead']:.1f} s early]" if row["seconds_ahead"] else ""
            click.echo(f"{row['at']}  Caller: {row['caller']}")
            click.echo(f"{'':19}  Claude: {row['heard']}{cut}{early}")
        else:
            click.echo("{call_sid}  {began}  {seconds:5} s  {turns:3} turns  {number}".format(**row)
                       + ("  on" if row["on"] else ""))


# --- The start ------------------------------------------------------------------------------------

if __name__ == "__main__":
    sys.exit("Start the line with: gunicorn app:app -c .gunicorn.conf.py --threads 200"
             " --keep-alive 95 --no-control-socket")
if not set(sys.argv) & set(app.cli.commands):  # a command of these is no line
    announce()
