"""HAND_OVER_TO: Claude can put the caller through to a person, at the number in this setting.

The person who answers hears first what the call is about, and presses a key to take it. A voicemail
presses no key. If nobody takes the call, the caller goes on talking with Claude.
"""

import logging
import os
import re
from dataclasses import dataclass

import anthropic
from flask import request
from twilio.twiml.voice_response import VoiceResponse

from app import (
    ENDINGS,
    GOODBYE,
    NOT_THE_CALLER,
    NUMBER,
    TWIML,
    Phrase,
    goodbye,
    number_in_url,
    plain_number,
    read_settings,
    say_and_listen,
    setting,
    twilio,
    url,
    who_calls,
)
from conversation import TOOLS, Ending, speakable
from store import StoreError

log = logging.getLogger("voice-claude")

HANDING_OVER = Phrase("I'll put you through now. One moment.")
NOBODY_TOOK_IT = Phrase("Nobody could take your call just now."
                        " Is there anything else I can do for you?")
A_CALLER = Phrase("A caller from Voice Claude:")
PRESS_ANY_KEY = Phrase("Press any key to take the call.")
RING = 20  # seconds, after which nobody comes
LONGEST_REASON = 300  # characters: 20 seconds of listening


@dataclass(frozen=True)
class Settings:
    hand_over_to: str = setting("", NUMBER, "a number like +15551234567", clean=plain_number)


@anthropic.beta_tool
def hand_over(reason: str) -> str:
    """Put the caller through to a person. Use it when the caller asks for one, or needs one, and
    say that you put them through in the same reply, before you use it.

    Args:
        reason: what that person is told first: who is calling and what for, in a sentence.
    """
    return Ending(f"hand_over: {speakable(reason)[:LONGEST_REASON]}")


def activate(line) -> None:
    number = read_settings(Settings, os.environ).hand_over_to

    def dial(text: str, heard: bool, turn: int):
        """Say something, and dial the person. /hand_over says what that person hears first."""
        # The call to the person comes from our number, or without a callerId from the caller's. If
        # neither is a number, Twilio would end the call (error 13214).
        both = {request.values.get("To", ""), request.values.get("From", "")}
        ours = next((each for each in both - {who_calls()} if re.fullmatch(NUMBER, each)), None)
        if not ours and not re.fullmatch(NUMBER, who_calls()):
            log.warning("call %s: no number to hand it over from", request.values["CallSid"])
            return say_and_listen(text, NOBODY_TOOK_IT)
        response = VoiceResponse()
        response.verbs += line.speak(text if heard else HANDING_OVER)
        # The caller hears it ring, as the call isn't bridged before somebody answers.
        dialled = response.dial(action=url("handed_over"), method="POST", timeout=RING,
                                caller_id=ours, answer_on_bridge=True)
        ask = url("take_call", call_sid=request.values["CallSid"], turn=turn)
        dialled.number(number, url=ask, method="POST")
        return str(response), TWIML

    @twilio.post("/hand_over")
    def take_call():
        """Someone has answered: a person, who presses a key and is put through, or a voicemail."""
        response = VoiceResponse()
        if "Digits" not in request.values:
            try:
                rows = line.store.sql("SELECT stop FROM turns WHERE call_sid = ? AND turn = ?",
                                      request.args.get("call_sid"), number_in_url("turn"))
            except StoreError as error:
                log.error("the database failed: %s", error)
                rows = []
            kind, _, reason = (rows and rows[0]["stop"] or "").partition(": ")
            if kind != "hand_over":
                return goodbye()  # the caller is gone
            says = line.speak(A_CALLER, reason, PRESS_ANY_KEY)
            gather = response.gather(input="dtmf", num_digits=1, finish_on_key="", timeout=10,
                                     action=url("take_call"), method="POST")
            gather.verbs += says
            response.hangup()
        return str(response), TWIML  # a key was pressed: nothing more, and Twilio puts them through

    @twilio.post("/handed_over")
    def handed_over():
        """The person has hung up, or nobody took the call, and the caller is still there."""
        status, bridged = request.values.get("DialCallStatus"), request.values.get("DialBridged")
        log.info("call %s handed over: %s", request.values["CallSid"], status)
        return goodbye(GOODBYE) if bridged == "true" else say_and_listen(NOBODY_TOOK_IT)

    ENDINGS["hand_over"] = dial
    NOT_THE_CALLER.add("twilio.take_call")
    TOOLS.append(lambda: None if who_calls() == number else hand_over)  # not for that person
    line.history = with_a_note(line.history)


def with_a_note(history):
    """``history``, in which Claude is told that nobody took the call."""
    def noted(call_sid: str, turns: list[dict]) -> list[dict]:
        turns = history(call_sid, turns)
        for turn, later in zip(turns, turns[1:]):
            if str(turn["stop"]).startswith("hand_over") and (
                    later["call_sid"] == turn["call_sid"]):
                later["words"] = f"[Nobody took the call.] {later['words']}"
        return turns

    return noted
