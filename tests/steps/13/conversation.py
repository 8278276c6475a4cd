import logging
import re  # new
import threading
import time

import anthropic

import store

claude = anthropic.Anthropic(timeout=60, max_retries=0)
PROMPT = "You're on the phone, and read aloud: a sentence or two, no lists, no markdown."

def caller_said(call_sid, words):
    turn = store.begin(call_sid, words)
    threading.Thread(target=write, args=[call_sid, turn]).start()
    return turn

def reply(turn, heard):  # new
    for _ in range(60):  # 6 seconds: Twilio waits for 15
        reply, stop = store.turn_so_far(turn)
        if stop or len(reply) > heard:  # new
            break
        time.sleep(0.1)
    return reply[heard:], stop  # new

def forget(call_sid):
    store.forget(call_sid)

def write(call_sid, turn):
    stop = "failed"
    try:
        for sentence in ask(call_sid):  # new
            store.grow(turn, sentence + " ")  # new
        stop = "end_turn"
    except Exception as error:  # any error: a caller is waiting, so the reply has to end
        logging.error("%r", error)
    store.grow(turn, "", stop)

def ask(call_sid):
    text = ""  # new
    with claude.messages.stream(  # new
        model="claude-haiku-5-5",
        max_tokens=2000, output_config={"effort": "low"}, system=PROMPT,
        messages=messages(call_sid),
    ) as stream:  # new
        for piece in stream.text_stream:  # new
            *sentences, text = re.split(r"(?<=[.!?])\s+", text + piece)  # new
            yield from sentences  # new
    if text:  # new
        yield text  # new

def messages(call_sid):
    said = []
    for words, reply in store.turns(call_sid):
        said.append({"role": "user", "content": words})
        if reply:
            said.append({"role": "assistant", "content": reply.strip()})
    return said
