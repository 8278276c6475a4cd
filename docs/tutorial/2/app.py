from flask import Flask
from twilio.twiml.voice_response import VoiceResponse

app = Flask(__name__)

@app.post("/")
def call_comes_in():
    return say_and_listen("Hello, this is Claude speaking!")  # new

@app.post("/talking")  # new
def talking():  # new
    return say_and_listen("I heard you!")  # new

def say_and_listen(text):  # new
    response = VoiceResponse()
    response.gather(input="speech", action="/talking", speech_timeout="auto").say(text)  # new
    return str(response), {"Content-Type": "text/xml"}
