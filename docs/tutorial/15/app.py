import logging
import os

from flask import Flask, request
from twilio.request_validator import RequestValidator
from twilio.twiml.voice_response import VoiceResponse
from werkzeug.middleware.proxy_fix import ProxyFix

import store
from conversation import Conversation

app = Flask(__name__)
app.wsgi_app = ProxyFix(app.wsgi_app, x_for=0, x_proto=1, x_host=1)
validator = RequestValidator(os.environ["TWILIO_AUTH_TOKEN"])
ARE_YOU_THERE = ["Are you still there?", "I'm listening, whenever you're ready."]
SORRY = "Sorry, something went wrong at my end. Could you say that again?"
NO_ANSWER = "I don't know what to say to that. Could you put it another way?"

@app.before_request
def only_twilio():
    signature = request.headers.get("X-Twilio-Signature", "")
    if not validator.validate(request.url, request.form, signature):
        return "Only Twilio may ask.", 403

@app.post("/")
def call_comes_in():
    return say_and_listen("Hello, this is Claude speaking!")

@app.post("/talking")
def talking():
    call, words = Conversation(request.form["CallSid"]), request.form.get("SpeechResult", "")
    turn, heard = (request.args.get(name, 0, type=int) for name in ("turn", "heard"))
    if not turn and not words:
        return are_you_there(request.args.get("silences", 1, type=int))
    if not turn:
        turn = call.caller_said(words, request.headers.get("I-Twilio-Idempotency-Token"))
    text, stop = call.reply(turn, heard)
    if not stop:
        return say_and_come_back(turn, heard, text)
    store.give(call.call_sid, turn, heard)
    if stop == "hang_up":  # new
        return goodbye(text if text or heard else "Goodbye!")  # new
    if stop == "trouble":
        text += SORRY
    elif not text and not heard:
        text = NO_ANSWER
    return say_and_listen(text)

@app.post("/status_callback")
def status_callback():
    store.end(request.form["CallSid"])
    return "", 204

@app.errorhandler(Exception)
def apologise(error):
    logging.error("%r", error)
    return say_and_listen(SORRY)

def say_and_come_back(turn, heard, text):
    response = VoiceResponse()
    response.say(text or "One moment.")
    response.redirect(f"/talking?heard={heard + len(text)}&turn={turn}")
    return str(response), {"Content-Type": "text/xml"}

def are_you_there(silences):
    if silences <= len(ARE_YOU_THERE):
        return say_and_listen(ARE_YOU_THERE[silences - 1], silences)
    return goodbye("I can't hear anyone, so I'll hang up now. Goodbye!")  # new

def goodbye(text):  # new
    response = VoiceResponse()
    if text:
        response.say(text)  # new
    response.hangup()
    return str(response), {"Content-Type": "text/xml"}

def say_and_listen(text, silences=0):
    response = VoiceResponse()
    gather = response.gather(input="speech", action="/talking", speech_timeout="auto")
    if text:
        gather.say(text)
    response.redirect(f"/talking?silences={silences + 1}")
    return str(response), {"Content-Type": "text/xml"}
