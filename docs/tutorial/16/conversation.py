import logging
import re
import threading
from dataclasses import dataclass
from datetime import datetime  # new
from zoneinfo import ZoneInfo  # new

import anthropic

import store

claude = anthropic.Anthropic(timeout=60, max_retries=0)
SYSTEM_PROMPT = "You're on the phone. Say a sentence or two, no lists, no markdown."

class Ending(str):
    """A tool returns this to end the reply."""

@anthropic.beta_tool
def hang_up() -> str:
    """End the call. Use it when the caller says goodbye, after your own goodbye."""
    return Ending("hang_up")

@anthropic.beta_tool
def clock(time_zone: str) -> str:  # new
    """Tell the date, the weekday and the time of day.

    Args:
        time_zone: where, as an IANA name like Europe/Berlin or Asia/Tokyo.
    """  # new
    now = datetime.now(ZoneInfo(time_zone))  # new
    return now.strftime("%A, %d %B %Y, %H:%M")  # new

TOOLS = [hang_up, clock]  # new

@dataclass
class Conversation:
    call_sid: str

    def caller_said(self, words, delivery):
        turn, row_id = store.turn(self.call_sid, delivery, words)
        if row_id:
            threading.Thread(target=Writer(self.call_sid, turn, row_id).write).start()
        return turn

    def reply(self, turn, heard):
        text, stop = store.wait(self.call_sid, turn, heard)
        return text[heard:], stop

class CallerGone(Exception):
    """The caller has gone on or hung up: nobody waits for this reply."""

@dataclass
class Writer:
    call_sid: str
    turn: int
    row_id: int
    unfinished: str = ""  # the beginning of a sentence

    def write(self):
        stop = "trouble"
        try:
            stop = self.answer() or "end_turn"
        except CallerGone:
            return
        except Exception as error:  # any error: a caller is waiting, so the reply must end
            logging.error("%r", error)
            self.unfinished = ""
        store.grow(self.row_id, self.unfinished, stop)

    def answer(self):
        messages = as_messages(store.turns(self.call_sid))  # new
        for _ in range(6):  # at most 6 rounds of tools, so the loop ends  # new
            message = self.read_answer(messages)  # new
            uses = [block for block in message.content if block.type == "tool_use"]  # new
            if not uses:  # new
                break
            self.keep(self.unfinished)  # new
            self.unfinished = ""
            messages.append({"role": "assistant", "content": message.content})  # new
            results = []  # new
            for block in uses:  # new
                result, failed = self.use(block.name, block.input)  # new
                if isinstance(result, Ending):  # new
                    return result  # new
                results.append({"type": "tool_result", "tool_use_id": block.id,  # new
                                "content": result, "is_error": failed})  # new
            messages.append({"role": "user", "content": results})  # new

    def read_answer(self, messages):  # new
        with claude.messages.stream(
            model="claude-haiku-5-5",
            max_tokens=2000, output_config={"effort": "low"}, system=SYSTEM_PROMPT,
            tools=[tool.to_dict() for tool in TOOLS],
            messages=messages,  # new
        ) as stream:
            for text in stream.text_stream:
                self.add(text)
            message = stream.get_final_message()
        return message  # new

    def use(self, name, tool_input):
        tools = {tool.name: tool for tool in TOOLS}
        try:
            return tools[name].call(tool_input), False  # new
        except Exception as error:  # Claude is told, and can talk about it  # new
            return f"{type(error).__name__}: {error}", True  # new

    def add(self, text):
        *sentences, self.unfinished = re.split(r"(?<=[.!?])\s+", self.unfinished + text)
        for sentence in sentences:
            self.keep(sentence)

    def keep(self, text):
        if text and not store.grow(self.row_id, text + " "):
            raise CallerGone

def as_messages(turns):
    messages = []
    for words, reply in turns:
        messages.append({"role": "user", "content": words})
        if reply:
            messages.append({"role": "assistant", "content": reply.strip()})
    return messages
