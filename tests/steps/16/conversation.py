import logging
import re
import threading
import time
from datetime import datetime  # new
from zoneinfo import ZoneInfo  # new

import anthropic

import store

claude = anthropic.Anthropic(timeout=60, max_retries=0)
PROMPT = "You're on the phone, and read aloud: a sentence or two, no lists, no markdown."

class HangUp(BaseException):
    """Not an Exception: whatever takes errors lets it through."""

@anthropic.beta_tool
def hang_up() -> str:
    """End the call. Use it when the caller says goodbye; say your own goodbye before."""
    raise HangUp

@anthropic.beta_tool
def clock(time_zone: str) -> str:  # new
    """Tell the date, the weekday and the time of day.

    Args:
        time_zone: where, as an IANA name like Europe/Berlin or Asia/Tokyo.
    """  # new
    now = datetime.now(ZoneInfo(time_zone))  # new
    return now.strftime("%A, %d %B %Y, %H:%M")  # new

TOOLS = {tool.name: tool for tool in [hang_up, clock]}  # new

def caller_said(call_sid, words, delivery):
    turn, is_new = store.begin(call_sid, words, delivery)
    if is_new:
        threading.Thread(target=write, args=[call_sid, turn]).start()
    return turn

def reply(turn, heard):
    for _ in range(60):  # 6 seconds: Twilio waits for 15
        reply, stop = store.turn_so_far(turn)
        if stop or len(reply) > heard:
            break
        time.sleep(0.1)
    store.say_from(turn, heard)
    return reply[heard:], stop

def forget(call_sid):
    store.forget(call_sid)

def write(call_sid, turn):
    stop = "failed"
    try:
        for sentence in ask(messages(call_sid)):  # new
            if not store.grow(turn, sentence + " "):
                return  # the caller has gone on, or hung up: nobody waits for this reply
        stop = "end_turn"
    except HangUp:
        stop = "hang_up"
    except Exception as error:  # any error: a caller is waiting, so the reply has to end
        logging.error("%r", error)
    store.grow(turn, "", stop)

def ask(said, rounds=6):  # new
    text = ""
    with claude.messages.stream(
        model="claude-haiku-5-5",
        max_tokens=2000, output_config={"effort": "low"}, system=PROMPT,
        tools=[tool.to_dict() for tool in TOOLS.values()],
        messages=said,  # new
    ) as stream:
        for piece in stream.text_stream:
            *sentences, text = re.split(r"(?<=[.!?])\s+", text + piece)
            yield from sentences
        message = stream.get_final_message()
    if text:
        yield text
    results = [result_of(block) for block in message.content if block.type == "tool_use"]  # new
    if results and rounds > 1:  # new
        said.append({"role": "assistant", "content": message.content})  # new
        said.append({"role": "user", "content": results})  # new
        yield from ask(said, rounds - 1)  # new

def result_of(use):  # new
    result = {"type": "tool_result", "tool_use_id": use.id}  # new
    try:
        return {**result, "content": TOOLS[use.name].call(use.input)}  # new
    except Exception as error:  # Claude is told, and can talk about it  # new
        return {**result, "content": f"That failed: {error!r}", "is_error": True}  # new

def messages(call_sid):
    said = []
    for words, reply in store.turns(call_sid):
        said.append({"role": "user", "content": words})
        if reply:
            said.append({"role": "assistant", "content": reply.strip()})
    return said
