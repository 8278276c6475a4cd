"""One caller's conversation with Claude.

    call = Conversation(call_sid, line)
    turn = call.caller_said("Hello?", delivery, spoke_at)  # Claude begins to write, in a thread
    text, stop = call.reply(turn)                          # the reply so far

A Conversation keeps nothing in memory: the reply is a row in the store, to which a Writer appends
whole sentences in its own thread. So any process can go on where another one stopped. The webhook
doesn't call Claude itself, because Twilio waits only 15 seconds and Claude may need longer.
"""

import contextlib
import inspect
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import anthropic
import httpx2

from store import SIGN_OF_LIFE, StoreError, what_was_heard

log = logging.getLogger("voice-claude")

# --- The conversation -----------------------------------------------------------------------------
PATIENCE = 6.0  # seconds until "One moment.": Twilio waits 8 for one try, and 15 for all tries
TIMEOUT = 30.0  # seconds for the next sentence: "One moment." has come 4 times by then
STALLED = 10.0  # seconds without a sign of life, after which a reply's process counts as dead
MOST_WAITS = 9  # waits in a row without new text; then the reply counts as stalled


@dataclass
class Conversation:
    """The conversation between one caller and Claude, as the webhooks use it. If the database
    fails, its methods raise StoreError."""
    call_sid: str
    line: "Line"

    def caller_said(self, words: str, delivery: str | None, spoke_at: float) -> int:
        """Let Claude begin to write a reply, unless this webhook was delivered before. Returns the
        number of the turn. Arguments and exceptions are those of ``Store.turn``."""
        limits = self.line.settings.max_turns, self.line.settings.max_turns_a_day
        turn, row_id = self.line.store.turn(self.call_sid, delivery, words, spoke_at, *limits)
        if row_id is not None:
            # Not a daemon: a process that has to stop completes its replies first.
            threading.Thread(target=Writer(self.line, self.call_sid, turn, row_id).write).start()
        return turn

    def reply(self, turn: int, heard: int = 0, waited: int = 0) -> tuple[str, str | None]:
        """Wait, at most PATIENCE, until a reply ends or has more than ``heard`` characters, which
        Twilio has. ``waited``: how often in a row there was no new text. Returns the new text,
        and how the reply ended (``stop``), which is None if more may come."""
        until, store = time.monotonic() + PATIENCE, self.line.store
        while row := store.wait(self.call_sid, turn, heard):  # it returns after a second at most
            if row["stop"] or len(row["reply"]) > heard or time.monotonic() >= until:
                return row["reply"][heard:], row["stop"]
            if time.time() > row["touched"] + STALLED or waited >= MOST_WAITS:
                store.grow(row["id"], "", stop="stalled")  # the next round returns it
        return "", "lost"  # there is no such turn: the disk was wiped


# --- What Claude can do ---------------------------------------------------------------------------
# A tool is a function with @anthropic.beta_tool, listed in TOOLS. Claude gets a tool's name,
# docstring and arguments, decides when to use it, and is told what it returns or raises.
running = threading.local()  # in a tool's thread: ``running.writer`` is the Writer that uses it


class Ending(str):
    """If a tool returns this, it is the reply's ``stop``."""


@anthropic.beta_tool
def hang_up() -> str:
    """End the phone call. Use it once the caller has said goodbye or asks to end the call, and say
    your own goodbye in the same reply, before you use it."""
    return Ending("hang_up")


@anthropic.beta_tool
def clock(time_zone: str = "") -> str:
    """Tell today's date, the weekday and the time. You don't know them otherwise.

    Args:
        time_zone: where, as an IANA time zone like Europe/Berlin. Without it: where the app runs.
    """
    zone = ZoneInfo(time_zone) if time_zone else None
    return datetime.now().astimezone(zone).strftime("%A, %d %B %Y, %H:%M %Z")


# An entry may also be a plain function that returns a tool, or None to leave it out.
TOOLS: list = [hang_up, clock]

# --- The writing of a reply -----------------------------------------------------------------------
MAX_TOKENS = 2000  # per answer: ten minutes of talk; not less, since thinking counts, too
MOST_CHARACTERS = 10 * MAX_TOKENS  # of one answer, if a server never stops; a token usually has 5
MOST_ROUNDS = 6  # of tool use in one reply: enough for any task, but no endless loop
TOOL_TIMEOUT = 20.0  # seconds for one tool: the caller hears "One moment." in the meantime
# If the caller is gone, a reply stops, at the earliest 1 s after a sentence: a tool may follow.
NOTICED = TIMEOUT - SIGN_OF_LIFE
BATCH, READ = 0.25, 0.02  # seconds to let tokens pile up, and to read them: this halves the CPU use


class CallerGone(Exception):
    """Nobody needs this reply any more: the caller hung up or spoke again."""


# Claude, the network or the store failed, an answer makes no sense, or the caller is gone. All
# other errors are bugs.
EXPECTED = (anthropic.AnthropicError, httpx2.HTTPError, EOFError, OSError, ValueError, StoreError,
            CallerGone)


class Writer:
    """Writes Claude's reply to one turn, in a thread of its own. The text is in the store."""

    unfinished = mark = ""  # an incomplete sentence; an extra's mark for the next sentence
    kept = written = tokens_in = tokens_out = 0  # stored sentences; characters of this answer
    first_ms, request_id, trouble = None, None, ""  # trouble: why the end could not be stored

    def __init__(self, line: "Line", call_sid: str, turn: int, row_id: int):
        self.line, self.call_sid, self.row_id = line, call_sid, row_id
        self.name = f"call {call_sid} turn {turn}"  # for the log
        offered = [tool() if inspect.isfunction(tool) else tool for tool in TOOLS]
        self.tools = {getattr(tool, "name", "") or tool["name"]: tool for tool in offered if tool}
        self.began, self.deadline = time.monotonic(), time.monotonic() + TIMEOUT

    def write(self) -> None:
        """Write the reply to its end. The row and the log say how it went."""
        try:
            stop = self.answer() or "no stop_reason"  # an empty one would never end the reply
            stop.encode()  # raises a ValueError if the store couldn't hold it, like "\ud800"
        except Exception as error:  # whatever it is, somebody waits, so the reply has to end
            stop = describe(error)
            if isinstance(error, StoreError):
                self.unfinished = ""  # or it may be stored twice
            if not isinstance(error, EXPECTED):
                log.exception("%s", self.name)
        for _ in range(2):  # tries to store the last sentence, and how the reply ended
            try:
                with contextlib.suppress(CallerGone):  # the row has its ``stop``
                    self.keep(self.unfinished, stop)
                break
            except StoreError as error:
                self.trouble = f", and the database failed: {error}"
                time.sleep(1.0)  # the disk may work again a moment later
        self.line.store.growing.discard(self.row_id)
        log.info("%s: first sentence %s ms, end %.0f ms, tokens %d in %d out, %s, request %s",
                 self.name, self.first_ms, 1000 * (time.monotonic() - self.began), self.tokens_in,
                 self.tokens_out, stop.partition(":")[0] + self.trouble, self.request_id)

    def answer(self) -> str:
        """Let Claude write, and use the tools it asks for, until the reply is complete. Returns how
        it ended."""
        turns = self.line.store.turns(self.call_sid, self.row_id)
        messages = as_messages(self.line.history(self.call_sid, turns))
        for choice in [anthropic.omit] * MOST_ROUNDS + [{"type": "none"}]:  # in the end, no tools
            before, (blocks, stop) = self.kept, self.ask(messages, choice)
            if stop not in ("tool_use", "pause_turn"):
                break
            # Claude's blocks go back unchanged, except for empty texts, which the API refuses.
            blocks = [finish_block(block) for block in blocks if block.get("text", "words").strip()]
            messages.append({"role": "assistant", "content": blocks})
            results: list[dict] = []
            for block in [each for each in blocks if each["type"] == "tool_use"]:
                result, failed = self.use(block["name"], block["input"])
                if isinstance(result, Ending):
                    return result
                results.append({"type": "tool_result", "tool_use_id": block["id"],
                                "content": result, "is_error": failed})
            messages += [{"role": "user", "content": results}] if results else []
        no_words = stop == "end_turn" and self.kept == before and not speakable(self.unfinished)
        return "end_turn without words" if no_words else stop

    def ask(self, messages: list, tool_choice: Any, attempt: int = 0) -> tuple[list[dict], str]:
        """Ask Claude. If that fails within PATIENCE, with no new sentence, ask again."""
        until, kept = time.monotonic() + PATIENCE, self.kept
        while True:
            try:
                return self.read_answer(messages, tool_choice)
            except EXPECTED as error:
                self.request_id = getattr(error, "request_id", None) or self.request_id
                pause, how = self.line.pause_after(self, error, attempt), describe(error)
                if pause is None or self.kept > kept or time.monotonic() + pause > until or (
                        self.row_id not in self.line.store.growing):
                    raise
            log.info("%s: %s, request %s, asking again", self.name, how, self.request_id)
            time.sleep(pause)
            self.unfinished, attempt = "", attempt + 1

    def read_answer(self, messages: list, tool_choice: Any) -> tuple[list[dict], str]:
        """Send Claude one request, and let the reply grow as the answer comes. Returns the blocks
        of the answer, and its ``stop_reason``."""
        tools = [tool if isinstance(tool, dict) else tool.to_dict() for tool in self.tools.values()]
        blocks, stop, self.written = {}, "", 0
        with self.line.claude.messages.with_streaming_response.create(
                tools=tools, tool_choice=tool_choice, messages=messages, **self.line.request
        ) as response:
            self.request_id, body = response.request_id, response.http_response.iter_bytes()
            # Raw events: typed ones take 50% more CPU, and hide the pings.
            stream: Any = SimpleNamespace(iter_bytes=lambda: self.pieces(body))
            for raw in anthropic.Stream.raw_events(stream):
                event: Any = raw.json() if raw.data.strip() else {}
                kind = event.get("type", raw.event)
                if kind == "message_start":
                    counts = event["message"].get("usage") or {}  # cached tokens count, too
                    self.tokens_in += sum(n or 0 for name, n in counts.items() if "input" in name)
                elif kind == "content_block_start":
                    block = blocks[event["index"]] = event["content_block"]
                    self.deadline = time.monotonic() + TIMEOUT  # a web search may take long
                    if block["type"].endswith("tool_use") and self.unfinished:
                        self.keep(self.unfinished)  # the caller hears it while the tool runs
                        self.unfinished = ""
                    self.add(block.get("text", ""))
                elif kind == "content_block_delta":
                    grow_block(blocks[event["index"]], event["delta"])
                    self.add(event["delta"].get("text", ""))  # thinking and input have no text
                elif kind == "message_delta":
                    stop = stop or event["delta"].get("stop_reason")
                    self.tokens_out += (event.get("usage") or {}).get("output_tokens") or 0
                elif kind == "message_stop":
                    drain(response.http_response, body)
                    break
                elif kind == "error":
                    raise anthropic.APIStatusError("", response=response.http_response, body=event)
        if not stop:
            raise EOFError("the stream ended before the reply did")
        return list(blocks.values()), stop

    def pieces(self, body: Iterator[bytes]) -> Iterator[bytes]:
        """The body of a response, piece by piece, for as long as somebody needs the reply."""
        store, kept, until = self.line.store, self.kept, 0.0
        for piece in body:
            if time.monotonic() > self.deadline - NOTICED and self.row_id not in store.growing:
                raise CallerGone
            if time.monotonic() > self.deadline or self.written > MOST_CHARACTERS:
                raise TimeoutError  # no sentence has ended in time, or the answer is too long
            yield piece
            if self.kept > kept and time.monotonic() > until and self.row_id not in store.awaited:
                time.sleep(BATCH)  # a sentence is there, and nobody waits for more
                until = time.monotonic() + READ

    def add(self, text: str) -> None:
        """Take in what Claude wrote, and keep the sentences that are complete."""
        self.unfinished, self.written = self.unfinished + text, self.written + len(text)
        if end := end_of_sentences(self.unfinished):
            self.keep(self.unfinished[:end])
            self.unfinished, self.deadline = self.unfinished[end:], time.monotonic() + TIMEOUT

    def keep(self, text: str, stop: str | None = None) -> None:
        """Append the words of a text to the reply; with ``stop``, the reply ends there. Raises
        CallerGone and StoreError."""
        words, tokens = speakable(text), (self.tokens_in, self.tokens_out)
        text = self.mark + words + " " * bool(words)
        if (words or stop) and not self.line.store.grow(self.row_id, text, stop, *tokens):
            raise CallerGone
        if words:
            self.kept, self.mark, now = self.kept + 1, "", time.monotonic()
            self.first_ms = self.first_ms or round(1000 * (now - self.began))

    def use(self, name: str, tool_input: dict) -> tuple[str, bool]:
        """Use a tool. Returns what it says, and whether that is an error."""
        began, results = time.monotonic(), []

        def call() -> None:
            running.writer = self
            try:
                result = self.tools[name].call(tool_input)
                results.append((result if isinstance(result, str) else str(result), "ok"))
            except BaseException as error:  # tell Claude instead of failing
                results.append((f"{type(error).__name__}: {error}", type(error).__name__))

        thread = threading.Thread(target=call, daemon=True)  # it may run for ever
        thread.start()
        while thread.is_alive() and time.monotonic() < began + TOOL_TIMEOUT:
            thread.join(SIGN_OF_LIFE)
            if self.row_id not in self.line.store.growing:
                raise CallerGone
        ended = time.monotonic()
        self.deadline = ended + TIMEOUT
        result, how = results[0] if results else ("too slow", "too slow")
        log.info("%s: tool %s %d ms, %s", self.name, name, 1000 * (ended - began), how)
        return result, how != "ok"


def drain(response: httpx2.Response, body: Iterator[bytes]) -> None:
    """Read a response to its end, for at most 0.2 s, so that its connection can be used again."""
    connection = response.extensions["network_stream"].get_extra_info("socket")
    timer = threading.Timer(0.2, connection.shutdown, [socket.SHUT_RDWR])
    timer.start()
    with contextlib.suppress(httpx2.HTTPError, OSError):
        list(body)
    timer.cancel()


def grow_block(block: dict, delta: dict) -> None:
    """Add an event's delta to a block of Claude's message."""
    for name in {"text", "thinking", "signature", "partial_json"} & delta.keys():
        block[name] = block.get(name, "") + delta[name]
    if "citation" in delta:
        block["citations"] = [*(block.get("citations") or []), delta["citation"]]


def finish_block(block: dict) -> dict:
    """Turn the input of a tool, which came in pieces of JSON, into an object."""
    if block["type"].endswith("tool_use"):
        text = block.pop("partial_json", "") or json.dumps(block.get("input", {}))
        block["input"] = {"not JSON": text}  # tools refuse it, and Claude is told so
        with contextlib.suppress(ValueError):
            block["input"] = json.loads(text)
    return block


# --- What Claude is sent --------------------------------------------------------------------------
# In turns 41 to 60, Claude is sent the turns since 21; in turns 61 to 80, those since 41.
# In between, the messages only grow at their end, as prompt caching needs.
HISTORY_STEP = 20  # turns: Claude always sees the last five minutes


def recent(call_sid: str, turns: list[dict]) -> list[dict]:
    """The turns of a call that are recent enough to be sent."""
    return turns[-HISTORY_STEP - 1 - (len(turns) - 1) % HISTORY_STEP:]


def as_messages(turns: list[dict]) -> list[dict]:
    """Turns as messages to Claude. None of them is empty, and the last one is the caller's."""
    messages = []
    for turn, said, rest in what_was_heard(turns):
        if turn["stop"] == "refusal":
            continue  # or Claude would go on refusing what comes after it
        messages.append({"role": "user", "content": turn["words"]})
        if reply := (said + "[The caller cut in here.]" * bool(rest)).strip():
            messages.append({"role": "assistant", "content": reply})
    return messages


# --- The way to Claude ----------------------------------------------------------------------------
# Errors that another try won't fix: https://docs.claude.com/en/api/errors
OUR_FAULT = ("invalid_request_error", "authentication_error", "permission_error", "not_found_error",
             "request_too_large", "billing_error")


def pause_after(writer: Writer, error: Exception, attempt: int) -> float | None:
    """How many seconds to wait before Claude is asked again; None if that won't help."""
    pause = 0.5 * 2**attempt  # as in the SDK, which begins with 0.5; four tries fit into PATIENCE
    if isinstance(error, anthropic.APIStatusError):
        # An error in the middle of a stream comes with status 200; only its type says what it is.
        if error.type in OUR_FAULT or (
                400 <= error.status_code < 500 and error.status_code not in (408, 409, 429)):
            return None
        with contextlib.suppress(ValueError):
            return max(pause, float(error.response.headers.get("retry-after", "")))
    return None if isinstance(error, CallerGone | StoreError) else pause


def describe(error: BaseException) -> str:
    """An error and its cause for the log, without their messages, which may quote the caller."""
    if isinstance(error, anthropic.APIStatusError):
        return f"{type(error).__name__} {error.status_code} {error.type}"
    cause, is_network = error, isinstance(error, anthropic.APIConnectionError | httpx2.HTTPError)
    while is_network and (earlier := cause.__cause__ or cause.__context__):
        cause = earlier
    return type(error).__name__ + f" ({type(cause).__name__})" * is_network


class Line:
    """What all calls share. Extras may replace ``speak``, ``history`` and ``pause_after``."""

    def __init__(self, settings: Any, speak: Callable):
        self.settings, effort = settings, {"effort": settings.claude_effort}
        key = settings.anthropic_api_key or settings.anthropic_auth_token
        # A new connection costs 100 ms. The SDK closes an idle one after 5 s, too early
        # for the next turn; 120 s are enough.
        limits = httpx2.Limits(max_keepalive_connections=100, keepalive_expiry=120)
        self.claude: Any = anthropic.Anthropic(
            api_key=key, base_url=settings.anthropic_base_url,
            http_client=anthropic.DefaultHttpxClient(limits=limits),
            timeout=httpx2.Timeout(TIMEOUT, connect=5.0),  # PATIENCE allows a second try
            max_retries=0,  # the SDK's own retries wait for as long as a ``retry-after`` says
        ) if key else None
        self.request = dict(  # what all requests to Claude have in common
            model=settings.claude_model, max_tokens=MAX_TOKENS, system=settings.system_prompt,
            output_config=effort if settings.claude_effort != "none" else anthropic.omit,
            cache_control={"type": "ephemeral"}, stream=True)
        self.speak, self.history, self.pause_after = speak, recent, pause_after
        self.store: Any = None  # a store.Store, set at the end of app.py
        self.locked = False  # whether an extra, like the PIN, keeps strangers out
        self.extras: list[str] = []  # the active ones, for the log


# --- Sentences, and text that can be spoken -------------------------------------------------------
# The end of a sentence: a ".", "!" or "?", any closing quotes or brackets, and white space; "。"
# and the like, with or without a space; or "\n". Not after "Mr.", nor after an initial.
SENTENCE_END = re.compile(
    r"""(?<!\b[A-Z])(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bMrs)(?<!\be\.g)(?<!\bi\.e)
    [.!?…][.!?…"'”’)\]*_]{0,9}(?=\s) | [。！？।؟] | \n""", re.VERBOSE)
MARKUP = r"(?s)<(function_calls|invoke|thinking|antml:\w+)\b.*?(</\1>|\Z)"  # may leak into the text
NO_END_IN = re.compile(MARKUP + r"|\[[^\[\]]{0,300}(?:\Z|\](?:\([^()]{0,300}(?:\)|\Z))?)")  # links
SHORTEST_SENTENCE = 12  # characters, like "Well, hello.": a second of talk, while Claude writes on
LONGEST_SENTENCE = 300  # 20 seconds of talk; then the cut is made between two words


def end_of_sentences(text: str) -> int:
    """Where the last complete sentence of a text ends; 0 if there is none yet."""
    text = NO_END_IN.sub(lambda found: "_" * len(found[0]) * (found.end() < len(text)), text)
    end = max((sentence.end() for sentence in SENTENCE_END.finditer(text)), default=0)
    if len(text) - end > LONGEST_SENTENCE:
        between_words = text.rfind(" ", end + SHORTEST_SENTENCE)
        end = len(text) if between_words == -1 else between_words + 1
    return end if end >= SHORTEST_SENTENCE else 0


# Patterns that nobody can speak, and replacements, applied in this order, all in linear time.
UNSPEAKABLE = [
    (MARKUP, ""),
    (r"(?m)^[ \t]*(?:```+|~~~+)[ \t]*(?:[\w+#.-]+[ \t]*)?$", ""),  # a code fence; the code stays
    (r"(?m)^[ \t]*[-=*_|:][-=*_|: \t]{2,}$", ""),  # a horizontal line, also in a table
    (r"!?\[([^\[\]]*)\]\((?:[^()]|\([^()]{0,99}\)){0,999}\)", r"\1"),  # a link: its words stay
    (r"https?://(?:www\.)?([^\s/<>()\[\]]+)(?:/[^\s<>()\[\]]*[\w/])?", r"\1"),  # a URL: its host
    (r"</?(?:a|b|br|code|div|em|h[1-6]|i|li|ol|p|pre|span|strong|su[bp]|u|ul)\b[^<>]*>", " "),
    (r"(?m)^[ \t]*(?:#{1,6}|>+|[-*+•])[ \t]+", ""),  # before a heading, a quote, a list's item
    (r"(?m)^[ \t]*\||\|[ \t]*$", ""),  # the edges of a table, then its inner borders
    (r"(?<![ \t])[ \t]*\|[ \t]*", ", "),
    (r"(?<=\d)[ \t]*\*[ \t]*(?=\d)", " × "),  # 2 * 3 is a product,
    (r"(?<=\d)[ \t]*\*\*[ \t]*(?=\d)", " ^ "),  # and 2**3 a power; other stars are emphasis
    (r"[*`]|~~|(?<!\w)_+|(?<!_)_+(?!\w)|\\(?=[^\w\s]|_)", ""),
    # arrows, boxes and emoji, with joiners and colours; not °, ≤ and others that voices can say
    ("[\u2190-\u21ff\u2300-\u245f\u2500-\u27bf\u2900-\u297f\u2b00-\u2bff\U0001f000-\U0001faff]"
     "\u200d?", " "),
    ("[\u20e3\ufe0f\U000e0000-\U000e007f]\u200d?", ""),
    # XML can't hold control characters (https://www.w3.org/TR/xml/#charsets): Twilio would end the
    # call with error 12100. Only extras may use U+E000 to U+F8FF, for marks.
    ("[^\t\n\r\u0020-\ud7ff\uf900-\ufffd\U00010000-\U0010ffff]", ""),
    (r"(?<=\w)[ \t]*\n\s*", ". "),  # "\n" without a full stop still ends a thought
    (r"\s+", " ")]


def speakable(text: str) -> str:
    """The words of a text, without markdown, links, emoji and the like."""
    for pattern, replacement in UNSPEAKABLE:
        text = re.sub(pattern, replacement, text)
    return text.strip()
