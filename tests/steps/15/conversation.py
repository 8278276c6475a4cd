import logging
import re
import threading
import time

import anthropic

import store

claude = anthropic.Anthropic(timeout=60, max_retries=0)
PROMPT = "You're on the phone, and read aloud: a sentence or two, no lists, no markdown."

class HangUp(BaseException):  # new
    """Not an Exception: whatever takes errors lets it through."""  # new

@anthropic.beta_tool  # new
def hang_up() -> str:  # new
    """End the call. Use it when the caller says goodbye; say your own goodbye before."""  # new
    raise HangUp  # new

TOOLS = {tool.name: tool for tool in [hang_up]}  # new

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
        for sentence in ask(call_sid):
            if not store.grow(turn, sentence + " "):
                return  # the caller has gone on, or hung up: nobody waits for this reply
        stop = "end_turn"
    except HangUp:  # new
        stop = "hang_up"  # new
    except Exception as error:  # any error: a caller is waiting, so the reply has to end
        logging.error("%r", error)
    store.grow(turn, "", stop)

def ask(call_sid):
    text = ""
    with claude.messages.stream(
        model="claude-haiku-5-5",
        max_tokens=2000, output_config={"effort": "low"}, system=PROMPT,
        tools=[tool.to_dict() for tool in TOOLS.values()],  # new
        messages=messages(call_sid),
    ) as stream:
        for piece in stream.text_stream:
            *sentences, text = re.split(r"(?<=[.!?])\s+", text + piece)
            yield from sentences
        message = stream.get_final_message()  # new
    if text:
        yield text
    for use in [block for block in message.content if block.type == "tool_use"]:  # new
        TOOLS[use.name].call(use.input)  # new

def messages(call_sid):
    said = []
    for words, reply in store.turns(call_sid):
        said.append({"role": "user", "content": words})
        if reply:
            said.append({"role": "assistant", "content": reply.strip()})
    return said
