"""PIN: a lock on the line. Nothing of a call goes on before the caller has keyed in the PIN.

A caller has three tries. The URL carries their count, so the caller can't change it, and no failure
begins it anew. The table ``pins`` remembers for the time of the call that the PIN was right.
"""

import hmac
import logging
import os
import time
from dataclasses import dataclass

from flask import g, request
from twilio.twiml.voice_response import VoiceResponse

from app import (
    GOODBYE,
    NOT_THE_CALLER,
    TWIML,
    Phrase,
    goodbye,
    number_in_url,
    read_settings,
    setting,
    twilio,
    url,
)
from store import Store

log = logging.getLogger("voice-claude")

KEY_IN = Phrase("Please key in your PIN, and then the pound key.")
WRONG_PIN = Phrase("That was not the right PIN.")
TRIES = 3


@dataclass(frozen=True)
class Settings:
    pin: str = setting("", r"\d{6,12}", "6 to 12 digits")


def activate(line) -> None:
    pin = read_settings(Settings, os.environ).pin
    Store.extra_tables["pins"] = "keyed_at DOUBLE PRECISION NOT NULL, UNIQUE (call_sid)"
    line.locked = True

    @twilio.url_defaults
    def carry_tries(endpoint, values) -> None:
        """Also where the database fails, and the answer is an apology."""
        if g.get("tries"):
            values.setdefault("tries", g.tries)

    @twilio.before_request
    def only_with_pin():
        if request.endpoint in NOT_THE_CALLER:
            return None
        call_sid, tries = request.values["CallSid"], number_in_url("tries")
        g.tries = tries
        if line.store.sql("SELECT 1 FROM pins WHERE call_sid = ?", call_sid):
            g.tries = 0
            return None
        if request.endpoint == "twilio.call_comes_in" and tries:
            keyed = request.form.get("Digits", "")
            if hmac.compare_digest(keyed.encode(), pin.encode()):
                with line.store.transaction() as database:
                    line.store.begin(call_sid)
                    database.execute("INSERT INTO pins (call_sid, keyed_at) VALUES (?, ?)"
                                     " ON CONFLICT (call_sid) DO NOTHING", [call_sid, time.time()])
                g.tries = 0
                return None
            log.warning("call %s: PIN wrong or missing, %d of %d", call_sid, tries, TRIES)
        g.stranger = True
        return goodbye(WRONG_PIN, GOODBYE) if tries >= TRIES else ask_for_pin(tries)

    def ask_for_pin(tries: int):
        response, again = VoiceResponse(), url("call_comes_in", tries=tries + 1)
        was_keyed = tries and request.endpoint == "twilio.call_comes_in"
        says = line.speak(WRONG_PIN, KEY_IN) if was_keyed else line.speak(KEY_IN)
        # No num_digits: that would tell a stranger how long the PIN is.
        gather = response.gather(input="dtmf", action=again, method="POST", timeout=8)
        gather.verbs += says
        response.redirect(again, method="POST")
        return str(response), TWIML
