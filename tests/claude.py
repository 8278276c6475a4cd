"""A pretend Claude: a real HTTP server on loopback that speaks the Messages API, with streaming.

The app reaches it through the real SDK, by ``ANTHROPIC_BASE_URL``. It refuses what Anthropic's API
refuses (an empty message, a prefill, ``temperature``, an effort for a model that has none, a tool
without its result), it answers what a test scripted for the caller's words, and it remembers what
it was sent:

    with Claude() as claude:
        claude.when("Tell me a joke.", Reply("Knock knock.", first_token=0.5, pace=60))
        ...
        claude.requests[-1].messages

A reply that uses tools says in ``then`` how Claude goes on, once it was sent their results. A reply
may use several tools, think before, and search the web; and ``then`` may use tools again:

    claude.when("What time is it in Tokyo and Aden?", Reply(
        "Let me see.",
        blocks=[
            Tool("clock", {"time_zone": "Asia/Tokyo"}), Tool("clock", {"time_zone": "Asia/Aden"})
        ],
        then=Reply("It is nine in Tokyo, and three in Aden."),
    ))
    claude.when("Who won yesterday?", Reply(
        "Let me look that up.",
        blocks=[Search("who won yesterday", seconds=2), "The blue team won, ", Cited("by one.")],
    ))
    ...
    first, second = claude.asked("What time is it in Tokyo and Aden?")  # one request a round
    second.results  # [("09:00", False), ("03:00", False)]: each tool's words, and if it failed

``python -m tests.claude`` runs it on its own, for the benchmark. With ``--teach`` it has a little
wit, and prints what each request held: for those who learn to build such a line, and have no key.
"""

import argparse
import itertools
import json
import re
import select
import socket
import threading
import time
import zoneinfo
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-ant-pretend"
MODELS = {
    "claude-haiku-5-5",
    "claude-sonnet-5-5",
    "claude-opus-5-5",
    "claude-haiku-4-5",
    "claude-sonnet-4-5",
}
WITHOUT_EFFORT = {"claude-haiku-4-5", "claude-sonnet-4-5"}
EFFORTS = {"low", "medium", "high", "xhigh", "max"}
ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "api_error",
    529: "overloaded_error",
}
THOUGHTS = "The caller must never hear this. It is only a thought. I had better keep it to myself."


@dataclass
class Thinking:
    """A block of thoughts, with the signature by which the API knows them again."""

    text: str = THOUGHTS


@dataclass
class Tool:
    """A block that uses a tool of the app's. Its input is streamed in small pieces of JSON.

    Args:
        name: the tool.
        input: what it is given.
        json: the pieces of JSON themselves, where they are to be something else than that input.
    """

    name: str
    input: dict = field(default_factory=dict)
    json: str | None = None

    def whole_input(self):
        """The input as it is when it comes back; where its JSON is broken, any object may be."""
        if self.json is None:
            return self.input
        try:
            return json.loads(self.json)
        except ValueError:
            return Anything()


class Anything(dict):
    """Equal to any object."""

    def __eq__(self, other):
        return isinstance(other, dict)


@dataclass
class Search:
    """Two blocks: a search of the web, which Anthropic makes in mid-stream, and what it has found.

    Args:
        query: what is searched for.
        seconds: how long that takes; nothing is sent meanwhile but a ping.
        error: why it failed, like "too_many_requests"; None if it didn't.
    """

    query: str
    seconds: float = 0.0
    error: str | None = None


@dataclass
class Cited:
    """A block of text that comes from a page on the web, and names it."""

    text: str
    url: str = "https://www.example.com/news"


@dataclass
class Reply:
    """What the pretend Claude does when it is asked.

    Args:
        text: what it says.
        first_token: seconds before the first token; headers go out at the same time, as nothing
            earlier is promised.
        pace: tokens a second after that; None sends them as fast as the socket takes them.
        stop: the ``stop_reason``.
        hang_up: calls the tool ``hang_up`` at the end.
        thinking: begins with a thinking block, as the 5.x models do.
        blocks: what comes after the text: ``Tool``, ``Search``, ``Thinking``, ``Cited``, or a
            string for one more block of text. Without tools in the request nothing of ``Tool`` is
            sent, and without web search nothing of ``Search``.
        then: the Reply to the request that comes with the tools' results, or that sends back a
            turn which ended with ``pause_turn``; or a function that takes this Request and returns
            a Reply. Without it Claude repeats what the tools said.
        status: an HTTP error instead of a reply.
        retry_after: the ``retry-after`` header of that error, in seconds.
        error: an ``error`` event of this type after the last block, in a stream that began well.
        ending: after the last block, "cut" the connection, "close" it cleanly without the closing
            events, "stall", or "ping" once a second for ever. Or "reset" the connection before
            there is any answer.
        after: after the complete stream, what some gateways do: "error" sends an error event, "hold"
            leaves the connection open for 20 seconds, "ping" sends pings meanwhile.
        body: answers 200 with these bytes and nothing else.
    """

    text: str = ""
    first_token: float = 0.0
    pace: float | None = None
    stop: str = "end_turn"
    hang_up: bool = False
    thinking: bool = False
    blocks: list = field(default_factory=list)
    then: object = None
    status: int = 200
    retry_after: str | None = None
    error: str | None = None
    ending: str | None = None
    after: str | None = None
    body: bytes | None = None


class HeldBack(Reply):
    """A reply that begins when the test says ``begin.set()``, and not before."""

    def __init__(self, *arguments, **more):
        self.begin = threading.Event()
        super().__init__(*arguments, **more)

    @property
    def first_token(self):
        self.begin.wait(60)
        return 0.0

    @first_token.setter
    def first_token(self, _):
        pass


@dataclass
class Request:
    """One request that was received, and how its answer ended."""

    body: dict
    headers: dict
    connection: int = 0  # which connection it came over: the same number again is the same one
    at: float = field(default_factory=time.monotonic)
    first_sentence_at: float | None = None
    tokens_sent: int = 0
    closed_by_caller: float | None = None
    finished: float | None = None

    @property
    def messages(self):
        """What was said so far, as (role, words) pairs."""
        return [(message["role"], words_of(message)) for message in self.body["messages"]]

    @property
    def words(self):
        """What the caller said last, also where the last message holds the results of tools."""
        for message in reversed(self.body["messages"]):
            if message["role"] == "user" and not tool_results(message):
                return words_of(message)
        return ""

    @property
    def results(self):
        """What the tools said, as (words, whether it is an error); none in the first round."""
        results = tool_results(self.body["messages"][-1])
        return [(words_of(result), bool(result.get("is_error"))) for result in results]

    @property
    def is_translation(self):
        """Whether the line wants its own words in another language."""
        return not self.body.get("stream") and self.system.startswith("Translate")

    @property
    def system(self):
        """The words of the system prompt."""
        return words_of({"content": self.body.get("system")})

    @property
    def phrases(self):
        """What is to be translated."""
        return list(json.loads(self.words))

    @property
    def language(self):
        """The tag of the language to translate into."""
        return re.search(r"\b[a-z]{2,3}-[A-Z]{2}\b", self.system).group()


def words_of(message):
    """The words of a message, whether its content is a string or a list of blocks."""
    return "".join(block.get("text", "") for block in blocks_of(message))


def blocks_of(message):
    """The content of a message, or of a tool's result, as a list of blocks."""
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def tool_results(message):
    return [block for block in blocks_of(message) if block.get("type") == "tool_result"]


def complaint(body, headers):
    """What Anthropic's API would refuse in this request, as (status, message), or None."""
    if headers.get("authorization") != f"Bearer {KEY}":
        return 401, "invalid bearer token"
    if "anthropic-version" not in headers:
        return 400, "anthropic-version: header is required"
    if body.get("model") not in MODELS:
        return 404, f"model: {body.get('model')}"
    for gone in ("temperature", "top_p", "top_k"):
        if gone in body:
            return 400, f"{gone}: not supported by this model"
    if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
        return 400, "max_tokens: must be at least 1"
    effort = body.get("output_config", {}).get("effort")
    if effort is not None and (body["model"] in WITHOUT_EFFORT or effort not in EFFORTS):
        return 400, "output_config.effort: not supported by this model"
    messages = body.get("messages")
    if not messages:
        return 400, "messages: at least one message is required"
    if messages[0]["role"] != "user":
        return 400, "messages: first message must use the user role"
    for block in (block for message in messages for block in blocks_of(message)):
        if block.get("type") == "text" and not block["text"].strip():
            return 400, "messages: text content blocks must contain non-whitespace text"
    if not all(blocks_of(message) for message in messages):
        return 400, "messages: all messages must have non-empty content"
    return None


def complaint_about_tools(body, searches):
    """What the API would refuse in ``tools``, or None."""
    names = []
    for number, tool in enumerate(body.get("tools", [])):
        if not isinstance(tool, dict):
            return f"tools.{number}: should be an object"
        names.append(tool.get("name"))
        kind = tool.get("type", "custom")
        if kind.startswith("web_search_"):
            wrong = complaint_about_search(tool)
            if wrong or not searches:
                wrong = wrong or "web_search is not enabled for this organization"
                return f"tools.{number}.{kind}: {wrong}"
            continue
        schema = tool.get("input_schema")
        if kind != "custom":
            return f"tools.{number}: Input tag {kind!r} does not match any of the expected tags"
        if not re.fullmatch(r"[a-zA-Z0-9_-]{1,128}", tool.get("name") or ""):
            return f"tools.{number}.custom.name: String should match a pattern"
        if not isinstance(schema, dict) or schema.get("type") != "object":
            return f"tools.{number}.custom.input_schema.type: Input should be 'object'"
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict) or not isinstance(required, list):
            return f"tools.{number}.custom.input_schema: JSON schema is invalid"
        if not isinstance(tool.get("description", ""), str):
            return f"tools.{number}.custom.description: Input should be a valid string"
        known = "type name description input_schema cache_control strict input_examples"
        if extra := set(tool) - set(known.split()):
            return f"tools.{number}.custom.{min(extra)}: Extra inputs are not permitted"
    if len(names) > len(set(names)):
        return "tools: Tool names must be unique."
    choice = body.get("tool_choice", {"type": "auto"})
    if not isinstance(choice, dict) or choice.get("type") not in ("auto", "any", "tool", "none"):
        return "tool_choice: Input should be an object with a type"
    return None


def complaint_about_search(tool):
    """What is wrong with this web search tool, or None."""
    known = "type name max_uses user_location allowed_domains blocked_domains cache_control"
    if tool["type"] != "web_search_20250305":
        known += " allowed_callers"
    if extra := set(tool) - set(known.split()):
        return f"{min(extra)}: Extra inputs are not permitted"
    if tool.get("name") != "web_search":
        return "name: Input should be 'web_search'"
    uses = tool.get("max_uses")
    if uses is not None and (type(uses) is not int or uses < 1):
        return "max_uses: Input should be greater than 0"
    where = tool.get("user_location")
    if where is None:
        return None
    if not isinstance(where, dict) or where.get("type") != "approximate":
        return "user_location.type: Input should be 'approximate'"
    for name, value in where.items():
        if name not in ("type", "city", "region", "country", "timezone"):
            return f"user_location.{name}: Extra inputs are not permitted"
        if value is not None and not (isinstance(value, str) and 1 <= len(value) <= 255):
            return f"user_location.{name}: String should have between 1 and 255 characters"
    if not re.fullmatch(r"[A-Z]{2}", where.get("country") or "US"):
        return "user_location.country: String should be an ISO country code of 2 letters"
    return None


def joined(messages):
    """The messages as (role, blocks) pairs; those of one role in a row are one, as for the API."""
    pairs = []
    for message in messages:
        if not pairs or pairs[-1][0] != message["role"]:
            pairs.append((message["role"], []))
        pairs[-1][1].extend(blocks_of(message))
    return pairs


def plain(blocks):
    """Blocks without what may be added to them, or left out of them."""
    return [
        {
            name: value
            for name, value in block.items()
            if name != "cache_control" and value not in (None, [])
        }
        for block in blocks
    ]


def complaint_about_rounds(body, sent):
    """What the API would refuse in a turn with tools, or None.

    Args:
        sent: the messages in which this Claude used a tool: (what it was asked, its blocks) by the
            identifier of each tool that they use.
    """
    pairs = joined(body["messages"])
    for number, (role, blocks) in enumerate(pairs):
        here = f"messages.{number}"
        kinds = [block.get("type") for block in blocks]
        used = pairs[number - 1][1] if number else []
        before = {block["id"] for block in used if block.get("type") == "tool_use"}
        results = [
            block.get("tool_use_id") for block in blocks if block.get("type") == "tool_result"
        ]
        if {"tool_use", "tool_result", "server_tool_use"} & set(kinds) and not body.get("tools"):
            return f"{here}: requests with `tool_use` or `tool_result` blocks must define tools"
        if role == "user" and (missing := before - set(results)):
            return (
                f"{here}: `tool_use` ids without `tool_result` blocks immediately after: {missing}"
            )
        if unexpected := [one for one in results if role != "user" or one not in before]:
            return f"{here}: unexpected `tool_use_id` found in `tool_result` blocks: {unexpected}"
        if len(results) > len(set(results)):
            return f"{here}: each tool_use must have a single result"
        if kinds[: len(results)] != ["tool_result"] * len(results):
            return f"{here}: `tool_result` blocks must come before anything else"
        for result in (block for block in blocks if block.get("type") == "tool_result"):
            if result.get("is_error") and not words_of(result).strip():
                return f"{here}: content cannot be empty if `is_error` is true"
            if any(
                block.get("type") != "text" or not block["text"].strip()
                for block in blocks_of(result)
            ):
                return f"{here}: text content blocks must contain non-whitespace text"
        for block in blocks:
            if (
                block.get("type") == "thinking"
                and role == "assistant"
                and not block.get("signature")
            ):
                return f"{here}: thinking.signature: Field required"
            if block.get("type") not in ("tool_use", "server_tool_use") or block["id"] not in sent:
                continue
            asked, written = sent[block["id"]]
            begin = blocks.index(block) - [one.get("id") for one in written].index(block["id"])
            if begin < 0 or plain(blocks[begin : begin + len(written)]) != plain(written):
                return (
                    f"{here}: blocks of the assistant's cannot be modified: send them as they were"
                )
            earlier = [*pairs[:number], (role, blocks[:begin])] if begin else pairs[:number]
            if [(role, plain(blocks)) for role, blocks in earlier] != asked:
                return f"{here}: what stands before these blocks is not what it was"
    if pairs[-1][0] == "assistant":
        paused = [sent[block["id"]][1] for block in pairs[-1][1] if block.get("id") in sent]
        if not paused or plain(pairs[-1][1])[-len(paused[-1]) :] != plain(paused[-1]):
            return "messages: this model does not support assistant message prefill"
        if any(block["type"] == "tool_use" for block in paused[-1]):
            return "messages: `tool_use` ids without `tool_result` blocks immediately after"
    return None


class Claude(ThreadingHTTPServer):
    """The pretend Claude. Use it as a context manager.

    Args:
        port: where it listens; 0 takes a free one.
        default: what answers the words that nobody has scripted: a function that takes the words
            and returns a Reply, or a ``Teacher``.

    Attributes:
        requests: what it was sent, and took.
        refused: what it refused, as (status, message) pairs.
        searches: whether the key may search the web; set it to False, and a request that wants to
            is refused.
        translations: the requests for a translation of the line's own words; they aren't in
            ``requests``. Such a request isn't streamed, and its system prompt begins with
            "Translate".
        translate: how they are answered: a function of (phrases, language), a list of English
            phrases and a tag like "de-DE", that returns the Reply, or the translations by phrase.
    """

    daemon_threads = True
    request_queue_size = 256  # the default of 5 loses connections when many callers speak at once

    def __init__(self, port=0, default=None):
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests = []
        self.refused = []
        self.searches = True
        self.translations, self.translate = [], translated
        self.default = default or (lambda words: Reply(f"You said: {words}"))
        self._script = {}
        self.counter = itertools.count(1)
        self.connections = itertools.count(1)
        # Where tools were used, by their identifiers: what was asked, with the blocks; the Reply.
        self.sent, self.rounds = {}, {}

    def when(self, words, *replies):
        """When the caller's last words are these, answer so.

        Args:
            replies: one for each time that they are said; the last one for ever.
        """
        self._script[words] = list(replies)

    def reply_to(self, words, request=None):
        replies = self._script.get(words)
        if not replies:
            return self.default(request if isinstance(self.default, Teacher) else words)
        return replies.pop(0) if len(replies) > 1 else replies[0]

    def complaint(self, body):
        """What the API would refuse in a request about tools, or None."""
        return complaint_about_tools(body, self.searches) or complaint_about_rounds(body, self.sent)

    def answer_to(self, request):
        """The Reply to a request: the scripted one, or how that goes on after tools or a pause."""
        if request.is_translation:
            reply = self.translate(request.phrases, request.language)
            return reply if isinstance(reply, Reply) else Reply(json.dumps(reply))
        last = request.body["messages"][-1]
        if last["role"] == "user" and not tool_results(last):
            return self.reply_to(request.words, request)
        names = [block.get("tool_use_id") or block.get("id") for block in blocks_of(last)]
        before = next((self.rounds[name] for name in reversed(names) if name in self.rounds), None)
        if before is None or before.then is None:
            return Reply("The tools say: " + " ".join(words for words, _ in request.results))
        return before.then(request) if callable(before.then) else before.then

    def asked(self, words):
        """The requests in which these were the caller's last words, of every round, in order."""
        return [request for request in self.requests if request.words == words]

    def handle_error(self, request, client_address):
        pass  # a caller that hung up is part of the game

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.connection_number = next(self.server.connections)

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.split("?")[0] != "/v1/messages":
            return self.fail(404, "not found")
        body = json.loads(raw)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.number = next(self.server.counter)
        wrong = complaint(body, headers)
        if not wrong and (why := self.server.complaint(body)):
            wrong = 400, why
        if isinstance(self.server.default, Teacher):
            refused = wrong and f"(Claude refuses this: {wrong[1]}.)"
            self.server.default.tell(refused or what_it_held(body))
        if wrong:
            self.server.refused.append(wrong)
            return self.fail(*wrong)
        self.asked = Request(body, headers, self.connection_number)
        kept = self.server.translations if self.asked.is_translation else self.server.requests
        kept.append(self.asked)
        reply = self.server.answer_to(self.asked)
        try:
            time.sleep(reply.first_token) if body.get("stream") else self.wait_for_the_whole(reply)
            if reply.ending == "reset":
                return self.reset()
            if reply.status != 200:
                return self.fail(reply.status, "pretend trouble", reply.retry_after)
            if reply.body is not None:
                return self.send(200, "text/html", reply.body)
            if body.get("stream"):
                self.stream(reply, body)
            else:
                self.send(200, "application/json", json.dumps(self.message(reply, body)).encode())
        except OSError:
            self.asked.closed_by_caller = time.monotonic()
            self.close_connection = True
        finally:
            self.asked.finished = time.monotonic()

    def wait_for_the_whole(self, reply):
        time.sleep(reply.first_token + (len(tokens(reply.text)) / reply.pace if reply.pace else 0))

    def send(self, status, content_type, body, headers=()):
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        self.send_header("request-id", f"req_pretend_{self.number}")
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status, message, retry_after=None):
        body = {"type": "error", "error": {"type": ERRORS[status], "message": message}}
        headers = [("retry-after", retry_after)] if retry_after else []
        self.send(status, "application/json", json.dumps(body).encode(), headers)

    def message(self, reply, body):
        content = self.content(reply, body)
        kinds = {block["type"] for block in content}
        stop = "tool_use" if "tool_use" in kinds and reply.stop == "end_turn" else reply.stop
        if stop == "pause_turn" and "server_tool_use" not in kinds:
            stop = "end_turn"
        if kinds & {"tool_use", "server_tool_use"}:
            asked = [(role, plain(blocks)) for role, blocks in joined(body["messages"])]
            for block in content:
                if block["type"] in ("tool_use", "server_tool_use"):
                    self.server.sent[block["id"]] = asked, content
                    self.server.rounds[block["id"]] = reply
        written = "".join(block.get("text", "") for block in content)
        return {
            "id": f"msg_{self.number}",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": content,
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": {
                "input_tokens": len(json.dumps(body)) // 4,
                "output_tokens": len(tokens(written)),
            },
        }

    def content(self, reply, body):
        """The blocks of a reply, as they are in the end; no two tools ever have one identifier."""
        able = bool(body.get("tools")) and body.get("tool_choice", {}).get("type") != "none"
        can_search = able and any(tool["name"] == "web_search" for tool in body["tools"])
        wanted = [*([Thinking()] if reply.thinking else []), reply.text, *reply.blocks]
        wanted += [Tool("hang_up")] if reply.hang_up else []
        content = []
        for position, block in enumerate(wanted):
            name = f"{self.number}_{position}"
            if isinstance(block, Thinking):
                signature = f"signature of {name}"
                content.append({"type": "thinking", "thinking": block.text, "signature": signature})
            elif isinstance(block, Tool) and able:
                tool = {"type": "tool_use", "id": f"toolu_{name}", "name": block.name}
                content.append({**tool, "input": block.whole_input()})
            elif isinstance(block, Search) and can_search:
                content += found(block, f"srvtoolu_{name}")
            elif isinstance(block, Cited):
                citation = {
                    "type": "web_search_result_location",
                    "url": block.url,
                    "title": "The news of today.",
                }
                citation.update(
                    cited_text="It was in the news.", encrypted_index=f"index of {name}"
                )
                content.append({"type": "text", "text": block.text, "citations": [citation]})
            elif isinstance(block, str) and block:
                content.append({"type": "text", "text": block})
        return content

    def stream(self, reply, body):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.send_header("request-id", f"req_pretend_{self.number}")
        self.end_headers()
        message = self.message(reply, body)
        start = {
            **message,
            "content": [],
            "stop_reason": None,
            "usage": {**message["usage"], "output_tokens": 1},
        }
        self.event("message_start", message=start)
        self.event("ping")
        waits = iter([block.seconds for block in reply.blocks if isinstance(block, Search)])
        pieces = iter([block.json for block in reply.blocks if isinstance(block, Tool)])
        for index, block in enumerate(message["content"]):
            if index:
                self.event("content_block_stop", index=index - 1)
            if block["type"] == "web_search_tool_result":
                self.event("ping")
                time.sleep(next(waits))
            self.event("content_block_start", index=index, content_block=opened(block))
            if block["type"] == "text":
                self.speak(block["text"], reply.pace, index)
                for citation in block.get("citations", []):
                    self.delta(index, "citations_delta", citation=citation)
            elif block["type"] == "thinking":
                for token in tokens(block["thinking"]):
                    self.delta(index, "thinking_delta", thinking=token)
                self.delta(index, "signature_delta", signature=block["signature"])
            elif block["type"] in ("tool_use", "server_tool_use"):
                own = next(pieces, None) if block["type"] == "tool_use" else None
                self.delta(index, "input_json_delta", partial_json="")
                for token in tokens(json.dumps(block["input"]) if own is None else own):
                    self.delta(index, "input_json_delta", partial_json=token)
        if reply.ending or reply.error:
            return self.break_off(reply)
        if message["content"]:
            self.event("content_block_stop", index=len(message["content"]) - 1)
        delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
        if reply.stop == "refusal":
            delta["stop_details"] = {"type": "refusal", "category": "cyber", "explanation": None}
        self.event(
            "message_delta", delta=delta, usage={"output_tokens": message["usage"]["output_tokens"]}
        )
        self.event("message_stop")
        if reply.after == "error":
            self.event("error", error={"type": "api_error", "message": "pretend trouble"})
        while reply.after in ("hold", "ping") and time.monotonic() < self.asked.at + 20:
            if reply.after == "ping":
                self.event("ping")
            time.sleep(0.5)
        self.wfile.write(b"0\r\n\r\n")

    def speak(self, text, pace, index):
        """Send the text token by token, at the stated pace, on a clock that doesn't drift."""
        began = time.monotonic()
        so_far = ""
        for number, token in enumerate(tokens(text)):
            if pace:
                time.sleep(max(0.0, began + number / pace - time.monotonic()))
            self.delta(index, "text_delta", text=token)
            self.asked.tokens_sent += 1
            so_far += token
            if self.asked.first_sentence_at is None and re.search(r"[.!?。](\s|$)", so_far):
                self.asked.first_sentence_at = time.monotonic()

    def delta(self, index, kind, **fields):
        self.event("content_block_delta", index=index, delta={"type": kind, **fields})

    def break_off(self, reply):
        if reply.error:
            self.event("error", error={"type": reply.error, "message": "pretend trouble"})
            self.wfile.write(b"0\r\n\r\n")
        elif reply.ending == "stall":
            # Until the caller closes, or longer than any patience.
            readable, _, _ = select.select([self.connection], [], [], 90)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                self.asked.closed_by_caller = time.monotonic()
            self.close_connection = True
        elif reply.ending == "ping":
            while time.monotonic() < self.asked.at + 90:  # longer than any patience
                self.event("ping")
                time.sleep(1)
        elif reply.ending == "cut":
            time.sleep(0.2)  # a reset also throws away what the app hasn't read yet
            self.reset()
        else:
            self.wfile.write(b"0\r\n\r\n")

    def reset(self):
        """End the connection so that the caller's end of it gets an error, instead of its end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()
        self.close_connection = True

    def event(self, kind, **fields):
        data = f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


def translated(phrases, language):
    """What this Claude makes of the line's own words, where a test says nothing else."""
    return {phrase: f"{language}: {phrase}" for phrase in phrases}


def opened(block):
    """How a block begins in the stream: what comes in pieces is still empty."""
    if block["type"] in ("tool_use", "server_tool_use"):
        return {**block, "input": {}}
    empty = {"text": "", "thinking": "", "signature": "", "citations": []}
    return {name: empty.get(name, value) for name, value in block.items()}


def found(search, name):
    """The two blocks of a web search: what was asked, and what came of it."""
    asked = {
        "type": "server_tool_use",
        "id": name,
        "name": "web_search",
        "input": {"query": search.query},
    }
    page = {
        "type": "web_search_result",
        "url": "https://www.example.com/news",
        "title": "The news of today.",
    }
    page.update(encrypted_content=f"what {name} has found", page_age="1 day ago")
    failed = {"type": "web_search_tool_result_error", "error_code": search.error}
    result = {
        "type": "web_search_tool_result",
        "tool_use_id": name,
        "content": failed if search.error else [page],
    }
    return [asked, result]


# --- A pretend Claude that teaches ----------------------------------------------------------------


class Teacher:
    """Answers without a script, with enough wit to show what the app does right or wrong.

    It takes up what was said, and knows nothing but what stands in the request: a name only from
    the messages, how to speak only from the prompt, and what it can do only from the tools.

        with Claude(default=Teacher(tell=print)) as claude:
            ...

    Args:
        tell: is given a line about each request: what it held, or why it was refused.
        first_token: seconds before the first token, as in a Reply.
        pace: tokens a second after that.
    """

    def __init__(self, tell=lambda line: None, first_token=0.5, pace=60):
        self.tell, self.first_token, self.pace = tell, first_token, pace

    def __call__(self, request):
        text, *uses = self.answer(request)
        tools = tools_of(request.body)
        used = [tools[name] for name in uses if name in tools]
        blocks = [Tool(tool["name"], input_for(tool, request.words)) for tool in used]
        if "web_search" in uses:
            found = Cited("I have found a page, and made its news up.")
            blocks = [Search(request.words, seconds=2), found]
        return Reply(text, self.first_token, self.pace, blocks=blocks, then=self.after_tools)

    def after_tools(self, request):
        """What is said once the tools have been used."""
        said = " ".join(f"That didn't work: {words}" if failed else words
                        for words, failed in request.results)
        return Reply(said, self.first_token, self.pace)

    def answer(self, request):
        """What is said to the caller's last words; then the tools that are used, by name."""
        words = request.words.strip()
        sentence = words if words.endswith((".", "!", "?")) else f"{words}."
        tools = [tool["name"] for tool in request.body.get("tools", [])]
        said = [text for role, text in request.messages if role == "user"]
        earlier = [text for role, text in request.messages if role == "assistant"]
        name = next(filter(None, map(name_in, reversed(said))), None)
        if re.search(r"(?i)\b(good ?bye|bye|hang up)\b", words):
            goodbye = f"Goodbye, {name}!" if name else "Goodbye!"
            if "hang_up" in tools:
                return goodbye, "hang_up"
            return (f"{goodbye} I can't hang up: I have no tool for that.",)
        cut_off = earlier and re.search(r"(.*)\[[^\]]*\bcut\b[^\]]*\]$", earlier[-1])
        if cut_off and re.search(r"(?i)^(stop|wait|hold on|what did you say)\b", words):
            return (f"You cut in. Of what I said I am sent only this: {cut_off[1]}",)
        if name_in(words):
            return (f"Hello {name}! What can I do for you?",)
        if re.search(r"(?i)\bmy name\b|\bwho am i\b", words):
            return (f"{name}. You told me a moment ago." if name else "You haven't told me yet.",)
        for tool in tools:
            calls_for = CALLS_FOR.get(tool, re.escape(tool.replace("_", " ")))
            if tool != "hang_up" and re.search(rf"(?i)\b({calls_for})\b", words):
                return "Let me see.", tool
        if re.search(rf"(?i)\b({CALLS_FOR['clock']})\b", words):
            return ("I can't know that: I have no clock.",)
        if not re.search("(?i)phone|aloud|markdown", prompt_of(request.body)):
            return (f"**You said:** {sentence}\n\n1. *First*, think about that.\n2. Then, do it.",)
        if re.fullmatch(r"(?i)(yes|no|please|yes,? please|go on|why|okay|ok)[.!?]*", words):
            answer = words.rstrip(".!?")
            if not earlier:
                return (f"{answer} to what? I was sent nothing else.",)
            return (f"{answer}, you say. Before that I said: {earlier[-1]}",)
        if about := re.search(
                r"(?i)\b(?:tell me|explain)\b.*\b(?:about|why|how) (.+?)[.!?]*$", words):
            return (
                f"There is much to say about {about[1]}. But I only pretend to be Claude, and know "
                "nothing of it. What I can do is go on talking for a while. Cut in when you have "
                "heard enough. So a longer answer sounds, one sentence after the other.",
            )
        if len(said) == 1:
            return (f"I heard: {sentence} These are the first words that I was sent.",)
        return (f"I heard: {sentence} You have spoken {len(said)} times so far.",)


# What the caller says when a tool is wanted. A tool that isn't here is wanted by its name.
CALLS_FOR = {
    "clock": "what time|the time|what day|what's the date|today",
    "hand_over": "put me through|a person|a human",
    "switch_language": "speak|switch",
    "forget_me": "forget (me|everything|what I said)",
    "web_search": "look .*up|search|news|who won|weather",
}


def name_in(words):
    """The name that a caller gives with these words, or None."""
    found = re.search(r"(?i:\bmy name(?: is|'s)|\bcall me) (?!what\b)([^\W\d]+)"
                      r"|\b(?:I am|I'm) ([A-Z]\w+)", words)
    return (found[1] or found[2]).capitalize() if found else None


def prompt_of(body):
    """The system prompt of a request; empty if there is none."""
    return words_of({"content": body.get("system")})


def tools_of(body):
    """The app's own tools in a request, by name."""
    return {tool["name"]: tool for tool in body.get("tools", []) if "input_schema" in tool}


def input_for(tool, words):
    """A tool's input, out of the caller's words: what it can't do without, and a time zone."""
    schema = tool["input_schema"]
    values = {}
    for name, kind in schema.get("properties", {}).items():
        if name not in schema.get("required", []) and not ("zone" in name and time_zone_in(words)):
            continue
        number = re.search(r"\d+", words)
        about = re.search(r"(?i)\b(?:in|of|for|about|on) (.+?)[.!?]*$", words)
        if "zone" in name:
            values[name] = time_zone_in(words) or "UTC"
        elif name == "language":
            values[name] = language_in(words, json.dumps(tool))
        elif kind.get("enum"):
            named = [one for one in kind["enum"] if str(one).lower() in words.lower()]
            values[name] = (named or kind["enum"])[0]
        elif kind.get("type") in ("integer", "number"):
            values[name] = int(number[0]) if number else 1
        elif kind.get("type") == "boolean":
            values[name] = True
        else:
            values[name] = about[1] if about else words
    return values


def time_zone_in(words):
    """The time zone of the city that is named, or None."""
    for zone in sorted(zoneinfo.available_timezones()):
        city = zone.rpartition("/")[2].replace("_", " ")
        if "/" in zone and re.search(rf"(?i)\b{re.escape(city)}\b", words):
            return zone
    return None


def language_in(words, known):
    """The language that is named: as the tool writes it, if it says how it writes languages."""
    codes = {"german": "de", "french": "fr", "spanish": "es", "italian": "it", "chinese": "zh"}
    code = next((code for name, code in codes.items() if name in words.lower()), "en")
    found = re.search(rf"\b{code}-[A-Z]{{2}}\b", known)
    return found[0] if found else code


def what_it_held(body):
    """A request in one line: the prompt's first words, how many messages, and the tools."""
    prompt = prompt_of(body).split()
    first_words = " ".join(prompt[:6]) + (" ..." if len(prompt) > 6 else "")
    count = len(body["messages"])
    sent = [f'the prompt "{first_words}"'] if prompt else []
    sent += [f"{count} message{'s' if count > 1 else ''}"]
    held = f"(Claude is sent {' and '.join(sent)}"
    if results := len(tool_results(body["messages"][-1])):
        held += f", the last one with what {results} tool{'s' if results > 1 else ''} said"
    if names := [tool["name"] for tool in body.get("tools", [])]:
        held += f"; tools: {', '.join(names)}"
    return held + ".)"


def tokens(text):
    """The text in pieces of four characters, about what a token is."""
    return re.findall(r"(?s).{1,4}", text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--first-token", type=float, default=0.5, help="seconds to the first token")
    parser.add_argument("--pace", type=float, default=60, help="tokens a second")
    parser.add_argument("--text", default="You are very welcome here. " * 4)
    parser.add_argument(
        "--teach", action="store_true", help="answer with wit, and print what each request held")
    options = parser.parse_args()
    reply = Reply(options.text, options.first_token, options.pace)
    teacher = Teacher(lambda line: print(line, flush=True), options.first_token, options.pace)
    with Claude(options.port, default=teacher if options.teach else lambda words: reply) as claude:
        print(claude.url, flush=True)
        while True:  # a Ctrl-C that comes just before one of these waits is noticed after it
            time.sleep(1)


if __name__ == "__main__":
    main()
