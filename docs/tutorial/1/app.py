from flask import Flask
from twilio.twiml.voice_response import VoiceResponse

app = Flask(__name__)

@app.post("/")
def call_comes_in():
    response = VoiceResponse()
    response.say("Hello, this is Claude speaking!")
    return str(response), {"Content-Type": "text/xml"}
