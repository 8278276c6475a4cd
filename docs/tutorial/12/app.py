import logging
import os

from flask import Flask, request
from twilio.request_validator import RequestValidator
from twilio.twiml.voice_response import VoiceResponse
from werkzeug.middleware.proxy_fix import ProxyFix

import store  # new
from conversation import Conversation  # new

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
    call, words = Conversation(request.form["CallSid"]), request.form.get("SpeechResult", "")  # new
    turn = request.args.get("turn", type=int)
    if not turn and not words:
        return are_you_there(request.args.get("silences", 1, type=int))
    if not turn:
        turn = call.caller_said(words)  # new
    text, stop = call.reply(turn)  # new
    if not stop:
        return say_and_come_back(turn)
    return say_and_listen(text or (SORRY if stop == "trouble" else NO_ANSWER))  # new

@app.post("/status_callback")
def status_callback():
    store.end(request.form["CallSid"])  # new
    return "", 204

@app.errorhandler(Exception)
def apologise(error):
    logging.error("%r", error)
    return say_and_listen(SORRY)

def say_and_come_back(turn):
    response = VoiceResponse()
    response.say("One moment.")
    response.redirect(f"/talking?turn={turn}")
    return str(response), {"Content-Type": "text/xml"}

def are_you_there(silences):
    if silences <= len(ARE_YOU_THERE):
        return say_and_listen(ARE_YOU_THERE[silences - 1], silences)
    response = VoiceResponse()
    response.say("I can't hear anyone, so I'll hang up now. Goodbye!")
    response.hangup()
    return str(response), {"Content-Type": "text/xml"}

def say_and_listen(text, silences=0):
    response = VoiceResponse()
    response.gather(input="speech", action="/talking", speech_timeout="auto").say(text)
    response.redirect(f"/talking?silences={silences + 1}")
    return str(response), {"Content-Type": "text/xml"}
