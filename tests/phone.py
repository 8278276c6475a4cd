"""A telephone, with Twilio behind it: call the line from a terminal, a browser, or a test.

    python -m tests.phone                               starts the app as the Procfile does, and calls it
    python -m tests.phone https://my-line.example.com   calls a running one, signing with TWILIO_AUTH_TOKEN
    python -m tests.phone --browser                     is a page in the browser (browser.py)
    python -m tests.phone --pretend                     brings a pretend Claude along: no key needed

An app that the telephone starts is the app.py of the folder in which the telephone is started. The
app gets this shell's TWILIO_AUTH_TOKEN, or a random one if the shell has none.

It does with the TwiML what Twilio does, and as strictly: it signs its requests, resolves relative URLs, follows
<Redirect>, goes on behind a <Gather> in which nobody speaks, gives up after 15 seconds, asks the fallback URL, and ends
the call with Twilio's error where Twilio would. In a test a call reads like one:

    phone = Phone(url)
    assert phone.call() == "Hello, this is Claude speaking!"
    assert phone.say("Who is there?") == "Me, Claude."
    phone.hang_up()
"""

import argparse
import base64
import contextlib
import hashlib
import hmac
import http.client
import math
import os
import pathlib
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import NamedTuple
from urllib.parse import parse_qsl, quote_plus, urldefrag, urlencode, urljoin, urlsplit
from xml.etree import ElementTree

ROOT = pathlib.Path(__file__).parent.parent
NUMBER = "+15551230001"  # of the caller, if no other is given
SPEAKING_RATE = 2.7  # words a second
TIMEOUT = 15  # seconds for all tries of a webhook together, https://www.twilio.com/docs/voice/twiml
LARGEST_DOCUMENT = 64 * 1024

# The part of TwiML that this telephone knows: the verbs and what each may be given.
VERBS = {
    "Say": {"voice", "language", "loop"},
    "Pause": {"length"},
    "Gather": set(
        "input action method timeout speechTimeout speechModel numDigits finishOnKey actionOnEmptyResult language "
        "hints profanityFilter partialResultCallback partialResultCallbackMethod".split()
    ),
    "Redirect": {"method"},
    "Dial": set("action method timeout callerId answerOnBridge hangupOnStar timeLimit".split()),
    "Number": {"url", "method"},
    "Hangup": set(),
    "Reject": {"reason"},
}
# The verbs that hold others, and which.
HOLDS = {"Gather": {"Say", "Pause"}, "Dial": {"Number"}}
# What becomes of a <Dial>, by what a test says of the other person: Twilio's DialCallStatus.
DIALLED = {
    "takes it": "completed",  # presses a key, if asked for one; talks, and hangs up
    "presses nothing": "completed",  # a voicemail, or a wrong person
    "busy": "busy",
    "no answer": "no-answer",
    "failed": "failed",  # there is no such number, for example
}


class TwilioError(Exception):
    """What Twilio's debugger would show. https://www.twilio.com/docs/api/errors"""

    def __init__(self, code, why):
        super().__init__(f"Twilio error {code}: {why}")
        self.code = code


class NoConnection(OSError):
    """Nobody answers the door."""


class Retries(NamedTuple):
    """How often Twilio tries a webhook again, and after which failures.

    The fragment of the webhook's URL says so, as in "/talking#rc=3&rp=5xx,ct".
    https://www.twilio.com/docs/usage/webhooks/webhooks-connection-overrides
    """

    count: int = 1
    # "ct" is for no connection, "rt" for no answer in time, "4xx" and "5xx" for a status; or "all".
    failures: tuple = ("ct",)
    connect: float = 5.0  # seconds for each try to connect ...
    read: float = 15.0  # ... and then to wait for the answer

    @classmethod
    def of(cls, fragment):
        """Raises ValueError for what Twilio wouldn't understand."""
        given = dict(parse_qsl(fragment, strict_parsing=True)) if fragment else {}
        count, failures = int(given.pop("rc", 1)), tuple(given.pop("rp", "ct").split(","))
        connect, read = int(given.pop("ct", 5000)) / 1000, int(given.pop("rt", 15000)) / 1000
        if given or not 0 <= count <= 5 or set(failures) - {"4xx", "5xx", "ct", "rt", "all"}:
            raise ValueError(fragment)
        return cls(count, failures, connect, read)

    def are_for(self, failure):
        return failure is not None and (failure in self.failures or "all" in self.failures)


class Phone:
    """One call to the line.

    Args:
        url: where the app listens; its voice URL is the root of that.
        token: the auth token to sign with; None doesn't sign.
        public_url: the address Twilio knows, where a proxy stands before ``url``.
        headers: what that proxy adds to a request.
        method: how Twilio asks for a call that comes in.
        speaking_rate: words a second, if time is to pass while something is said.
        retries: the fragment that the number's own URLs have, as in "#rc=3".
        params: more of what Twilio posts, or something else than usual.

    Every verb of the caller returns what is heard until the line listens again, or the call has ended.

    Attributes that a test may look at, beside those that ``__init__`` explains:
        language: in what the line speaks now, if its <Say> names a language.
        gather: the attributes of the <Gather> that listens now, or None.
        handed_over: what the other person does where the line dials a number: one of DIALLED.
        dialled: the attributes of every <Dial>, with the number that was dialled as "Number".
        other_person: the OtherPerson who answered last, or None.
        transcript: what was said by both, in order, as lines to read.
        on_hearing: a function that is called with each text that is heard, before Twilio does what
            comes next in the document.
    """

    def __init__(
        self,
        url,
        token=None,
        *,
        number="+15551230001",
        public_url=None,
        headers=None,
        method="POST",
        speaking_rate=None,
        retries="",
        **params,
    ):
        self.url = url.rstrip("/")
        self.public_url = (public_url or self.url).rstrip("/")
        self.token = token
        self.headers = headers or {}
        self.method = method
        self.speaking_rate = speaking_rate
        self.retries = retries
        self.call_sid = "CA" + secrets.token_hex(16)
        self.params = {
            "CallSid": self.call_sid,
            "AccountSid": "AC" + "0" * 32,
            "ApiVersion": "2010-04-01",
            "Direction": "inbound",
            "From": number,
            "To": "+15550009999",
            "CallStatus": "ringing",
            "SomethingNew": "Twilio may add parameters at any time",
            **params,
        }
        self.ended = None  # how: "hangup", "rejected", "hung up by the caller", or Twilio's error
        self.said = []  # every <Say>, as (text, when it began, whether the caller could cut in)
        self.voices = []  # every <Say>, as (text, voice, language); None where it has none
        self.waits = []  # seconds from each verb of the caller to the first word back
        self.gaps = []  # seconds of dead air inside replies
        self.webhooks = []  # every request, as (url, parameters, seconds, status)
        self.warnings = []
        self.documents = []
        self.gather = None
        self.language = None
        self.on_hearing = None
        self.transcript = []  # the call as a play: "Line: ..." and "You: ..."
        self.handed_over, self.other_person = "takes it", None
        self.dialled = []
        self._base = self.public_url + "/"

    # What the caller does

    def call(self):
        """Dial."""
        return self.webhook("/" + self.retries, method=self.method)

    def say(self, words, token=None, after=None):
        """Speak, whatever is being said at the moment. The same token again is the same delivery again.

        ``after`` so many seconds since the line began to say its last words. To speak then takes
        time too, and Twilio notices the end of the words a second late.
        """
        if not self.listens_to("speech"):
            return self.stay_silent()
        if after is not None:
            asked = self.said[-1][1] + after + len(words.split()) / 2.75 + 1.0
            time.sleep(max(0.0, asked - time.monotonic()))
        return self._turn(self._fetch, *self._action(), {"SpeechResult": words, "Confidence": "0.9"}, token)

    def speak(self, words, pace=0.3, pause=1.0, jitter=0.0):
        """Say words, one in ``pace`` seconds, give or take ``jitter``, and then nothing for ``pause`` seconds.

        Twilio reports meanwhile what it has understood so far, and waits for no answer to that. What the line makes of
        the whole is what ``say`` returns, after this.
        """
        words, url = words.split(), self.partial_results_url()
        for number in range(1, len(words) + 1):
            time.sleep(max(0.0, pace + random.uniform(-jitter, jitter)))
            so_far = " ".join(words[:number]), number, url
            threading.Thread(target=self.partial_result, args=so_far, daemon=True).start()
        time.sleep(pause)

    def press(self, keys):
        """Press keys, one quickly after the other."""
        if not self.listens_to("dtmf"):
            return self.stay_silent()
        finish, most = self.gather.get("finishOnKey", "#"), int(self.gather.get("numDigits", 1000))
        digits = ""
        for key in keys[:most]:
            if key in finish:
                break
            digits += key
        return self._turn(self._fetch, *self._action(), {"Digits": digits, "msg": "Gather End"})

    def stay_silent(self):
        """Let the line wait in vain."""
        self.transcript.append("(You say nothing.)")
        if self.gather.get("actionOnEmptyResult") == "true":
            return self._turn(self._fetch, *self._action(), {"SpeechResult": ""})
        return self._turn(list, self._after_gather)

    def hang_up(self, status="completed"):
        """Put the phone down. Twilio reports the end; nobody hears what the app thinks of it."""
        self.ended = self.ended or "hung up by the caller"
        self.params["CallStatus"] = status
        with contextlib.suppress(TwilioError, OSError):
            self._ask(self._absolute("/status_callback" + self.retries), "POST", {"CallDuration": "1"})

    def listens_to(self, what):
        """Whether the line listens now, to "speech" or to "dtmf"."""
        return self.gather is not None and what in self.gather.get("input", "dtmf").split()

    # What a test may have Twilio do, out of turn

    def webhook(self, path, params=(), method="POST"):
        """Fetch a document with these parameters and the call's own, and do what it says.

        Args:
            path: a path of the line, or a whole URL.

        Returns:
            What is heard, as for the verbs of the caller.
        """
        return self._turn(self._fetch, self._absolute(path), method, dict(params))

    def request(self, method, path, params=(), token=None):
        """Make one signed request with these parameters only, and do nothing with its answer.

        Returns:
            The response: its ``status``, ``headers`` and ``body``.
        """
        delivery = secrets.token_hex(8) if token is None else token
        return self._send(self._absolute(path), method, dict(params), delivery)

    def partial_results_url(self):
        """Where Twilio reports what the caller has said so far; None if the line doesn't want to know."""
        url = self.gather and self.gather.get("partialResultCallback")
        return url and urljoin(self._base, url)

    def partial_result(self, words, number=None, url=None, **more):
        """Report what the caller has said so far: to the line that listens now, or to a URL of an earlier turn.

        Returns:
            The status of the answer; None if there was none, or the line doesn't want to know.
        """
        if url := url or self.partial_results_url():
            params = {"UnstableSpeechResult": words, "StableSpeechResult": "", "Stability": "0.5", **more}
            with contextlib.suppress(TwilioError):  # Twilio takes no notice
                return self._ask(url, "POST", params | ({} if number is None else {"SequenceNumber": str(number)})).status
        return None

    def _absolute(self, path):
        return path if "://" in path else self.public_url + path

    # What Twilio does

    BEHIND_THE_LAST_VERB = "hangup"

    def _turn(self, fetch, *what):
        """Do what a document says, and those that it leads to, until the line listens or the call has ended."""
        said = what[2] if len(what) > 2 else {}  # the parameters of a webhook
        self.transcript += [f"You: {said[name]}" for name in ("SpeechResult", "Digits") if name in said]
        if self.ended:
            raise AssertionError(f"the call is over: {self.ended}")
        self._asked = time.monotonic()
        self.gather, self._spoken_until, so_far = None, None, len(self.said)
        try:
            verbs = fetch(*what)
            while verbs is not None and self.ended is None:
                verbs = self._run(verbs)
            if self.gather is None and self.ended is None:
                self.ended = self.BEHIND_THE_LAST_VERB
        except TwilioError as error:
            self.ended = str(error)
            self.spoken("We are sorry, an application error has occurred. Goodbye.", False)
        return " ".join(text for text, *_ in self.said[so_far:])

    def _run(self, verbs):
        """Run verbs; returns those of the next document, or None."""
        verbs = list(verbs)
        for position, verb in enumerate(verbs):
            if self.ended:  # the caller hung up while something was said
                return None
            if verb.tag == "Say":
                self._say(verb, cut_in=False)
            elif verb.tag == "Pause":
                self._pass_time(float(verb.get("length", 1)))
            elif verb.tag == "Redirect":
                return self._fetch(urljoin(self._base, verb.text.strip()), verb.get("method", "POST"))
            elif verb.tag == "Hangup":
                self.ended = "hangup"
                return None
            elif verb.tag == "Reject":
                self.ended = "rejected" if self.params["CallStatus"] == "ringing" else "hangup"
                return None
            elif verb.tag == "Dial":
                return self._dial(verb, verbs[position + 1 :])
            elif verb.tag == "Gather":
                self.params["CallStatus"] = "in-progress"
                self.gather, self._after_gather = dict(verb.attrib), verbs[position + 1 :]
                for nested in verb:
                    self._say(nested, cut_in=True) if nested.tag == "Say" else None
                if "-" in verb.get("language", "en-US"):
                    return None
                self.warned(f"13331: language={verb.get('language')!r} has no region")
                self.gather = None  # nobody is heard: Twilio goes on behind it
            self.params["CallStatus"] = "in-progress"
        return None

    def _dial(self, verb, behind):
        """Call the other person; returns the verbs of what comes after that."""
        self.params["CallStatus"] = "in-progress"
        number = verb.find("Number")
        to = ((verb if number is None else number).text or "").strip()
        own, caller = self.params["To"], self.params["From"]
        if self.params["Direction"].startswith("outbound"):
            own, caller = caller, own
        self.dialled.append({**verb.attrib, "Number": to})
        status, sid = DIALLED[self.handed_over], "CA" + secrets.token_hex(16)
        if not re.fullmatch(r"\+[1-9][0-9]{6,14}", verb.get("callerId", caller)):
            raise TwilioError(13214, f"callerId={verb.get('callerId', caller)!r} is not a phone number")
        if verb.get("callerId", own) != own:
            self.warned(f"13214: callerId={verb.get('callerId')!r} is not the line's own")
            status = "failed"
        result = {"DialCallStatus": status, "DialBridged": "false"}
        if status != "failed":
            result["DialCallSid"] = sid
        if status == "completed":
            self.other_person = other = OtherPerson(self, sid, verb.get("callerId", caller), to)
            url = None if number is None else number.get("url")
            other.answer(
                url and urljoin(self._base, url),
                "POST" if number is None else number.get("method", "POST"),
                presses=self.handed_over == "takes it",
            )
            for warning in other.warnings:
                self.warned(warning)
            if other.ended == "connected":
                self._spoken_until = None  # the two talk: that is no dead air
                result["DialBridged"] = "true"
            result["DialCallDuration"] = "1"
        if self.ended:  # the caller has hung up meanwhile
            return None
        if not verb.get("action"):
            return behind
        url = urljoin(self._base, verb.get("action"))
        return self._fetch(url, verb.get("method", "POST"), result)

    def _say(self, verb, cut_in):
        text = (verb.text or "").strip()
        if not text:
            self.warned("13520: empty <Say>")
            return
        if len(quote_plus(text)) > 4500 or len(text) > 3000:
            self.warned(f"13521: <Say> of {len(text)} characters, {len(quote_plus(text))} encoded")
        now = time.monotonic()
        if self._asked is not None:
            self.waits.append(now - self._asked)
            self._asked = None
        elif self._spoken_until is not None:
            self.gaps.append(max(0.0, now - self._spoken_until))
        self.voices.append((text, verb.get("voice"), verb.get("language")))
        self.language = verb.get("language")
        self.spoken(text, cut_in)
        self._spoken_until = time.monotonic()

    def spoken(self, text, cut_in):
        """The caller hears this. A subclass may show it."""
        self.said.append((text, time.monotonic(), cut_in))
        self.transcript.append(f"Line: {text}")
        if self.on_hearing:
            self.on_hearing(text)
        if not cut_in:  # while something nested is said the caller may answer already
            self._pass_time(len(text.split()) / (self.speaking_rate or 1))

    def warned(self, text):
        """Twilio's debugger would show this. A subclass may show it."""
        self.warnings.append(text)

    def answered(self, method, url, params, seconds, response):
        """One request got this response, or None. A subclass may show it."""

    def _pass_time(self, seconds):
        if self.speaking_rate:
            time.sleep(seconds)

    def _action(self):
        url = urljoin(self._base, self.gather.get("action", self._base))
        return url, self.gather.get("method", "POST")

    def _fetch(self, url, method, params=(), token=None):
        """The verbs of the document at this URL, or else of the fallback."""
        try:
            return self._document(url, method, dict(params), token)
        except TwilioError as error:
            self.warned(str(error))
            fallback = {"ErrorCode": str(error.code), "ErrorUrl": urldefrag(url).url}
            try:
                return self._document(self._absolute("/talking" + self.retries), "POST", fallback)
            except TwilioError as second:
                self.warned(f"{second} (the fallback)")
                raise error from second  # what went wrong first is what has to be mended

    def _document(self, url, method, params, token=None):
        response = self._ask(url, method, params, token)
        self._base = url = urldefrag(url).url
        self.documents.append(response.body)
        if response.status >= 400:
            raise TwilioError(11200, f"HTTP {response.status} from {url}")
        content_type = response.headers.get_content_type()
        if content_type == "text/plain":
            return [self._plain(response.body)]
        if content_type not in ("text/xml", "application/xml"):
            raise TwilioError(12300, f"content type {content_type}")
        return list(parse(response.body))

    @staticmethod
    def _plain(body):
        say = ElementTree.Element("Say")
        say.text = body.decode()
        return say

    def _ask(self, url, method, params, token=None):
        """The answer to one webhook, which is signed. Follows redirects."""
        params = {**self.params, **params}
        delivery = secrets.token_hex(8) if token is None else token
        for _ in range(10):
            response = self._deliver(url, method, params, delivery)
            if response.status not in (301, 302, 303, 307, 308):
                return response
            url, method, params = urljoin(url, response.headers["location"]), "GET", {}
        raise TwilioError(11215, "too many redirects")

    def _deliver(self, url, method, params, delivery):
        """The answer to one delivery. If it fails it is tried again, as the URL's fragment says.

        Without a fragment it is tried once more, and only if there was no connection.
        """
        url, fragment = urldefrag(url)
        try:
            retries = Retries.of(fragment)
        except ValueError:
            retries = Retries()
            self.warned(f"Twilio wouldn't understand this fragment: {fragment}")
        until = time.monotonic() + TIMEOUT
        for more in reversed(range(retries.count + 1)):
            began = time.monotonic()
            failure = error = response = None
            try:
                response = self._send(url, method, params, delivery, retries, until)
            except NoConnection as trouble:
                failure = "ct"
                why = type(trouble.__cause__).__name__
                error = TwilioError(11205, f"no connection to {url}: {why}")
            except (OSError, http.client.HTTPException) as trouble:
                # Twilio has no name of its own for a connection that breaks off: only "all".
                failure = "rt" if isinstance(trouble, TimeoutError) else "broken off"
                error = TwilioError(11200, f"no answer from {url}: {type(trouble).__name__}")
            else:
                self.webhooks.append((url, params, time.monotonic() - began, response.status))
                if response.status >= 400:
                    failure = f"{response.status // 100}xx"
                if time.monotonic() > until:
                    error = TwilioError(11205, f"no answer from {url} within {TIMEOUT} s")
            self.answered(method, url, params, time.monotonic() - began, response)
            if not (more and retries.are_for(failure) and time.monotonic() < until):
                break
            time.sleep(0.1)
        if error:
            raise error
        return response

    def _send(self, url, method, params, delivery, retries=Retries(), until=math.inf):
        """One HTTP request, as Twilio makes it."""
        if method == "GET" and params:
            url += ("&" if "?" in url else "?") + urlencode(params)
        headers = {"User-Agent": "TwilioProxy/1.1", "I-Twilio-Idempotency-Token": delivery, "Accept": "*/*"}
        body = None
        if method == "POST":
            body = urlencode(params)
            headers["Content-Type"] = "application/x-www-form-urlencoded; charset=UTF-8"
        if self.token is not None:
            headers["X-Twilio-Signature"] = sign(self.token, url, params if method == "POST" else {})
        headers["Host"] = urlsplit(url).netloc
        to = urlsplit(url.replace(self.public_url, self.url, 1))

        def left():
            return max(0.01, until - time.monotonic())  # 0 would mean: don't wait at all

        connection_class = http.client.HTTPSConnection if to.scheme == "https" else http.client.HTTPConnection
        connection = connection_class(to.hostname, to.port, timeout=min(retries.connect, left()))
        with contextlib.closing(connection):
            try:
                connection.connect()
            except OSError as error:
                raise NoConnection from error
            connection.sock.settimeout(min(retries.read, left()))
            connection.request(method, to._replace(scheme="", netloc="").geturl(), body, {**headers, **self.headers})
            response = connection.getresponse()
            response.body = response.read()
            return response


class OtherPerson(Phone):
    """Who answers where the line dials: a second leg of a call, whose requests are its own.

    This is a Phone, so that a test can look at what was ``said`` to the other person, at the
    ``webhooks`` and so on. ``ended`` is "connected" for one who was connected with the caller.

    Args:
        phone: the first leg.
        call_sid: of the second leg.
        number: the ``callerId``, which the other person's telephone shows.
        to: the number that was dialled.
    """

    BEHIND_THE_LAST_VERB = "connected"

    def __init__(self, phone, call_sid, number, to):
        super().__init__(
            phone.url,
            phone.token,
            number=number,
            public_url=phone.public_url,
            headers=phone.headers,
            speaking_rate=phone.speaking_rate,
            CallSid=call_sid,
            ParentCallSid=phone.call_sid,
            To=to,
            Direction="outbound-dial",
            CallStatus="in-progress",
        )
        self.call_sid = call_sid

    def answer(self, url, method, presses):
        """Pick up: hear what the line says first; press a key wherever one is asked for, or not."""
        if url is None:
            self.ended = "connected"  # voicemail too: nobody has asked for a key
            return
        self.webhook(url, method=method)
        while not self.ended:
            self.press("1") if presses and self.listens_to("dtmf") else self.stay_silent()

    def _fetch(self, url, method, params=(), token=None):
        return self._document(url, method, dict(params), token)  # this leg has no fallback

    def _dial(self, verb, behind):
        raise TwilioError(12200, "who was dialled can't be given a <Dial>")


def sign(token, url, params):
    """Twilio's signature. https://www.twilio.com/docs/usage/security#validating-requests"""
    message = url + "".join(name + value for name, value in sorted(params.items()))
    return base64.b64encode(hmac.new(token.encode(), message.encode(), hashlib.sha1).digest()).decode()


def parse(body):
    """The TwiML document in these bytes; TwilioError for what Twilio's parser and schema refuse."""
    if len(body) > LARGEST_DOCUMENT:
        raise TwilioError(11750, f"{len(body)} bytes of TwiML")
    try:
        response = ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        raise TwilioError(12100, f"the document doesn't parse: {error}") from error
    if response.tag != "Response":
        raise TwilioError(12100, f"<{response.tag}> is not <Response>")
    if any(verb.tag == "Reject" for verb in response[1:]):
        raise TwilioError(12200, "<Reject> must be the first verb")
    if response.find("Number") is not None:
        raise TwilioError(12200, "<Number> stands in a <Dial>")
    for verb in response.iter():
        if verb is response:
            continue
        if verb.tag not in VERBS:
            raise TwilioError(12200, f"this telephone doesn't know <{verb.tag}>")
        if unknown := set(verb.attrib) - VERBS[verb.tag]:
            raise TwilioError(12200, f"<{verb.tag}> has no {', '.join(sorted(unknown))}")
        if {child.tag for child in verb} - HOLDS.get(verb.tag, set()):
            raise TwilioError(12200, f"<{verb.tag}> can't hold that")
        if verb.tag == "Dial":
            check_dial(verb)
        for number in ("timeout", "timeLimit", "numDigits", "length", "loop"):
            if not verb.get(number, "1").isdecimal():
                raise TwilioError(12200, f"{number}={verb.get(number)!r}")
        if verb.get("method", "POST") not in ("GET", "POST"):
            raise TwilioError(12200, f"method={verb.get('method')!r}")
        if verb.get("speechTimeout", "auto") != "auto" and not verb.get("speechTimeout").isdecimal():
            raise TwilioError(12200, f"speechTimeout={verb.get('speechTimeout')!r}")
        if set(verb.get("input", "dtmf").split()) - {"dtmf", "speech"}:
            raise TwilioError(12200, f"input={verb.get('input')!r}")
        if verb.get("speechTimeout") == "auto" and verb.get("speechModel"):
            raise TwilioError(13335, "speechTimeout=auto with a speechModel")
    return response


def check_dial(verb):
    """TwilioError for a <Dial> that Twilio refuses, or that dials more than this telephone can."""
    numbers = [verb.text or "", *(child.text or "" for child in verb)]
    numbers = [number.strip() for number in numbers if number.strip()]
    if len(numbers) != 1 or len(verb) > 1:
        raise TwilioError(12200, f"this telephone dials one number, not {len(numbers)}")
    if not re.fullmatch(r"\+[1-9][0-9]{6,14}", numbers[0]):
        raise TwilioError(13223, f"{numbers[0]!r} is not a phone number")
    timeout = verb.get("timeout", "30")
    if not (timeout.isdecimal() and 5 <= int(timeout) <= 600):
        raise TwilioError(13212, f"timeout={timeout!r}")
    for name in ("answerOnBridge", "hangupOnStar"):
        if verb.get(name, "false") not in ("true", "false"):
            raise TwilioError(12200, f"{name}={verb.get(name)!r}")


@contextlib.contextmanager
def no_interruption():
    """Ctrl-C has to wait for the end of this block. Only the main thread is ever interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupted = []
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted and callable(before):
        before(signal.SIGINT, None)


def free_port():
    """A port of loopback where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class App:
    """The app, started as the Procfile does, on a free loopback port, with a database of its own.

    Args:
        environ: its environment variables; none are inherited but those that a program needs to run.
            If there is no TWILIO_AUTH_TOKEN the app gets a random one: without a token it would
            answer no call. An empty one leaves it without.
        folder: where app.py and the Procfile are.
        arguments: more for gunicorn.
        inherits: a listening socket's file descriptor, if the app is to use that one.
        within: a command that starts another one, like prlimit, with its options.
        module: where gunicorn finds the app, if not in app.py.
    """

    _starting = threading.Semaphore(os.cpu_count() or 1)

    def __init__(self, environ=None, *, folder=ROOT, arguments="", inherits=None, within=(), module="app:app"):
        self.scratch = tempfile.mkdtemp(prefix="voice-claude-")
        self.database = os.path.join(self.scratch, "calls.db")
        self.log_path = os.path.join(self.scratch, "log")
        self.folder, self.arguments, self.inherits, self.within = folder, arguments, inherits, within
        self.module = module
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        basics = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ}
        self.environ = {
            **basics,
            "DATABASE_URL": f"sqlite:///{self.database}",
            "TWILIO_AUTH_TOKEN": secrets.token_hex(16),
            **(environ or {}),
        }
        self.token = self.environ["TWILIO_AUTH_TOKEN"]  # what a Phone signs with
        self.process = None

    def start(self):
        """Start it, and wait until it answers. As many at a time as there are processors."""
        with self._starting:
            return self._start()

    def _start(self):
        procfile = pathlib.Path(self.folder) / "Procfile"
        if not procfile.exists():
            procfile = ROOT / "Procfile"  # a learner's folder has none yet
        command = shlex.split(procfile.read_text().partition("web:")[2].splitlines()[0])
        if "-c" not in command and not pathlib.Path(self.folder, "gunicorn.conf.py").exists():
            command += ["-c", ROOT / "gunicorn.conf.py"]  # nor that file
        command = [self.module if word == "app:app" else word for word in command]
        address = f"127.0.0.1:{self.port}" if self.inherits is None else f"fd://{self.inherits}"
        bind = f"--bind {address} {self.arguments}"
        try:
            # A Ctrl-C in the middle of Popen would leave a process that nobody ends.
            with no_interruption():
                self.process = self.start_process(command, {**self.environ, "GUNICORN_CMD_ARGS": bind})
            until = time.monotonic() + 120  # seconds: a very busy machine needs most of a minute
            while time.monotonic() < until and self.process.poll() is None:
                if self._answers():
                    return self
                time.sleep(0.005)
        except BaseException:
            self.stop()  # Ctrl-C, most likely
            raise
        log = self.log()
        self.stop()
        raise RuntimeError(f"the app did not start:\n{log}")

    def start_process(self, command, environ):
        """Start gunicorn with these arguments, in this environment."""
        with open(self.log_path, "ab") as log:
            return subprocess.Popen(
                [*self.within, sys.executable, "-m", *command],  # the gunicorn of this environment
                cwd=self.folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[] if self.inherits is None else [self.inherits],
                start_new_session=True,  # so that it and its workers can be ended together
            )

    def _answers(self):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            try:
                connection.request("GET", "/")
                connection.getresponse()
            except (OSError, http.client.HTTPException):
                return False
            return True

    def log(self):
        """What it has printed so far."""
        return pathlib.Path(self.log_path).read_text()

    def kill(self, number=signal.SIGKILL):
        """Send a signal to its first process, as a platform does; SIGKILL goes to all of them."""
        with contextlib.suppress(ProcessLookupError):
            if number != signal.SIGKILL:
                self.process.send_signal(number)
            else:
                os.killpg(self.process.pid, number)

    def workers(self):
        """The process numbers of gunicorn's workers."""
        listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
        return [pid for pid, parent in pairs if parent == self.process.pid]

    def stop(self):
        """End it, whatever it is doing, and leave nothing of it."""
        if self.process:
            self.kill(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(3)
            self.kill()
            self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()


# --- What the app that was called says of itself --------------------------------------------------

# A level, or the name of an exception: the line's own log says in INFO why Claude gave no reply.
TROUBLE = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|\b[A-Z]\w+Error\b")


class Troubles:
    """The warnings and errors in the log of an app, and its tracebacks."""

    def __init__(self, path):
        self.path, self._position, self._in_traceback = path, 0, False
        self._one_at_a_time = threading.Lock()

    def news(self):
        """The lines that have come since this was asked last."""
        with self._one_at_a_time:
            with open(self.path, "rb") as log:
                log.seek(self._position)
                new = log.read()
            new = new[: new.rfind(b"\n") + 1]  # a line may be half written yet
            self._position += len(new)
            lines = new.decode(errors="replace").splitlines()
            return [line for line in lines if self._tells(line)]

    def _tells(self, line):
        if line.startswith("Traceback "):
            self._in_traceback = True
        elif self._in_traceback and not line.startswith(" "):
            self._in_traceback = False  # the last line of a traceback, which names the exception
            return True
        return self._in_traceback or bool(TROUBLE.search(line))


# --- The telephone in the terminal ----------------------------------------------------------------

HELP = """\
You are the caller. Type what you say and press Enter; or
    just Enter     stay silent
    /5             press a key: 0 to 9, * or #; /55 presses two, one after the other
    /bye           hang up (so does Ctrl-D; Ctrl-C ends everything at once)
    /help          show this again
While Claude talks, you can interrupt with Enter, except in the first sentences of a long reply.
"""
KEYS = "0123456789*#"


class TerminalPhone(Phone):
    """Shows what is heard at the pace of speech, and lets a typed line cut in where Twilio would.

    Args:
        troubles: what the app says of itself, which is shown as well; None for an app elsewhere.
    """

    def __init__(self, *arguments, troubles=None, **more):
        super().__init__(*arguments, **more)
        self.troubles = troubles

    def spoken(self, text, cut_in):
        wait = self.waits[-1] if self.waits and not self.said_in_turn else None
        self.said.append((text, time.monotonic(), cut_in))
        if wait is not None:
            print(f"  ({wait:.2f} s)  ", end="")
        self.said_in_turn = True
        for word in text.split():
            print(word, end=" ", flush=True)
            if sys.stdin.isatty():
                if cut_in and typed_already():
                    print("-", end="", flush=True)
                    break
                if not cut_in:
                    time.sleep(1 / SPEAKING_RATE)

    def warned(self, text):
        super().warned(text)
        print(f"\n  [{text}]", flush=True)

    def show_troubles(self):
        for line in self.troubles.news() if self.troubles else ():
            print(f"  [the app: {line}]", flush=True)

    def _turn(self, fetch, *what):
        self.said_in_turn = False
        heard = super()._turn(fetch, *what)
        print(flush=True)
        self.show_troubles()
        return heard

    def press_each(self, keys):
        """Press keys one after the other, also where the line takes only one at a time."""
        while keys and not self.ended:
            if not self.listens_to("dtmf"):
                print("  (the line doesn't listen to keys now)")
                return
            at_once = int(self.gather.get("numDigits", len(keys)))
            self.press(keys[:at_once])
            keys = keys[at_once:]


def typed_already(seconds=1 / SPEAKING_RATE):
    """Whether a line has been typed that nobody has read yet, or is typed within these seconds."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def converse(phone):
    """Let the person at the terminal talk, until one side hangs up."""
    phone.call()
    while not phone.ended:
        # Who presses Enter while the line talks cuts in, and has not stayed silent yet.
        cuts_in = sys.stdin.isatty() and typed_already(0)
        try:
            words = input("> ").strip()
        except EOFError:
            words = "/bye"
        command = words.split()[0] if words.startswith("/") else ""
        if command == "/bye":
            break
        if command == "/help":
            print(HELP)
        elif command and command == words and not command[1:].strip(KEYS) and command[1:]:
            phone.press_each(command[1:])
        elif command:
            keys = " ".join(KEYS)
            print(f"  (there is no {words}: the keys are {keys}, and /help shows the rest)")
        elif words:
            phone.say(words)
        elif not cuts_in:
            print("  (you stay silent)")
            phone.stay_silent()
    phone.hang_up()
    phone.show_troubles()
    print(f"\nThe call has ended: {phone.ended}.")


# --- The program ----------------------------------------------------------------------------------


def heed_signals(what):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, what)


def leave_once(number, _):
    """Leave at the first signal. Those that follow are ignored: they would break that off."""
    heed_signals(signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(1)


def settings_for_the_app(token, pretend, number):
    """The environment for an app that is started here.

    Args:
        token: this shell's TWILIO_AUTH_TOKEN, or None.
        pretend: the pretend Claude that is to answer, or None.
        number: that of the caller. Nobody else calls this app, so it needn't warn of strangers.
    """
    settings = dict(os.environ)
    # A database of its own, whatever this shell has set for another one.
    for elsewhere in ("DATABASE_URL", "PUBLIC_URL", "PORT"):
        settings.pop(elsewhere, None)
    if number == NUMBER:
        settings.setdefault("ALLOWED_CALLERS", number)
    if not token:
        settings.pop("TWILIO_AUTH_TOKEN", None)  # or an empty one would be used
    if pretend:
        from tests.claude import KEY

        settings.pop("ANTHROPIC_AUTH_TOKEN", None)  # the SDK would send this shell's as well
        settings.update(ANTHROPIC_API_KEY=KEY, ANTHROPIC_BASE_URL=pretend.url)
    return settings


def pretend_claude():
    from tests.claude import Claude, Teacher

    return Claude(default=Teacher(tell=print))


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.phone", description="Call the line.")
    parser.add_argument("url", nargs="?", help="the address of a running app; without it, one is started")
    parser.add_argument("--number", default=NUMBER, help="the number to call from (default: %(default)s)")
    to_speak = "speak and hear in the browser, not in this terminal"
    parser.add_argument("--browser", action="store_true", help=to_speak)
    to_pretend = "bring a pretend Claude along, as without a key: no network is needed"
    parser.add_argument("--pretend", action="store_true", help=to_pretend)
    options = parser.parse_args()
    if options.url and urlsplit(options.url).scheme not in ("http", "https"):
        parser.error("the address must begin with http:// or https://")
    if options.url and options.pretend:
        parser.error("--pretend is for an app that is started here: leave the address out")
    if not options.url and not pathlib.Path("app.py").exists():
        print(
            f"There is no app.py in this folder ({os.getcwd()}). Start the telephone in the folder"
            " of the app that it is to call, or give it the address of a running one.",
            file=sys.stderr,
        )
        return 1
    token = os.environ.get("TWILIO_AUTH_TOKEN") or None
    heed_signals(leave_once)  # so that the app is ended on all ways out
    if not options.browser:
        print(HELP)
    url, troubles, phone = options.url, None, None
    with contextlib.ExitStack() as stack:
        try:
            if not url:
                print("Starting the app ...", flush=True)
                pretend = options.pretend or not os.environ.get("ANTHROPIC_API_KEY")
                claude = stack.enter_context(pretend_claude()) if pretend else None
                if pretend and not options.pretend:
                    print("ANTHROPIC_API_KEY is not set, so a pretend Claude answers.")
                with no_interruption():
                    app = App(settings_for_the_app(token, claude, options.number), folder=os.getcwd())
                    stack.push(app)  # before the start, which can be interrupted too
                # Runs first of all on the way out: nothing may interrupt the end of the app.
                stack.callback(heed_signals, signal.SIG_IGN)
                url, token = app.start().url, app.token
                troubles = Troubles(app.log_path)
            if options.browser:
                from tests.browser import serve

                serve(url, token, number=options.number, troubles=troubles)
                return 0
            phone = TerminalPhone(url, token, number=options.number, troubles=troubles)
            print(f"Calling {url}\n")
            phone.show_troubles()
            converse(phone)
        except KeyboardInterrupt:
            print("\nHung up.")
            if phone:
                phone.hang_up()
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    return 1 if phone and phone.ended.startswith("Twilio error") else 0


if __name__ == "__main__":
    from tests.phone import main  # browser.py imports this module by its name: one is enough

    sys.exit(main())
