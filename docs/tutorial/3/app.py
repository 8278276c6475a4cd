from flask import Flask, request  # new
from twilio.twiml.voice_response import VoiceResponse

app = Flask(__name__)

@app.post("/")
def call_comes_in():
    return say_and_listen("Hello, this is Claude speaking!")

@app.post("/talking")
def talking():
    words = request.form.get("SpeechResult", "")  # new
    return say_and_listen(f"You said: {words}")  # new

def say_and_listen(text):
    response = VoiceResponse()
    response.gather(input="speech", action="/talking", speech_timeout="auto").say(text)
    return str(response), {"Content-Type": "text/xml"}
