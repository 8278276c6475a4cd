import logging
import re
import threading
from dataclasses import dataclass

import anthropic

import store

claude = anthropic.Anthropic(timeout=60, max_retries=0)
SYSTEM_PROMPT = "You're on the phone. Say a sentence or two, no lists, no markdown."

class Ending(str):  # new
    """A tool returns this to end the reply."""  # new

@anthropic.beta_tool  # new
def hang_up() -> str:  # new
    """End the call. Use it when the caller says goodbye, after your own goodbye."""  # new
    return Ending("hang_up")  # new

TOOLS = [hang_up]  # new

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
            stop = self.answer() or "end_turn"  # new
        except CallerGone:
            return
        except Exception as error:  # any error: a caller is waiting, so the reply must end
            logging.error("%r", error)
            self.unfinished = ""
        store.grow(self.row_id, self.unfinished, stop)

    def answer(self):
        with claude.messages.stream(
            model="claude-haiku-5-5",
            max_tokens=2000, output_config={"effort": "low"}, system=SYSTEM_PROMPT,
            tools=[tool.to_dict() for tool in TOOLS],  # new
            messages=as_messages(store.turns(self.call_sid)),
        ) as stream:
            for text in stream.text_stream:
                self.add(text)
            message = stream.get_final_message()  # new
        for block in message.content:  # new
            if block.type == "tool_use":  # new
                return self.use(block.name, block.input)  # new

    def use(self, name, tool_input):  # new
        tools = {tool.name: tool for tool in TOOLS}  # new
        return tools[name].call(tool_input)  # new

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
