"""A pretend Claude: a real HTTP server on loopback that speaks the Messages API, streaming included.

The app reaches it through the real SDK, by ``ANTHROPIC_BASE_URL``. It refuses what Anthropic's API refuses (an empty
message, a prefill, ``temperature``, an effort for a model that has none), it answers what a test scripted for the
caller's words, and it remembers what it was sent:

    with Claude() as claude:
        claude.when("Tell me a joke.", Reply("Knock knock.", first_token=0.5, pace=60))
        ...
        claude.requests[-1].messages

``python -m tests.claude`` runs it on its own, for the benchmark.
"""

import argparse
import itertools
import json
import re
import select
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-ant-pretend"
MODELS = {"claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-5", "claude-haiku-4-5", "claude-sonnet-4-5"}
WITHOUT_EFFORT = {"claude-haiku-4-5", "claude-sonnet-4-5"}
EFFORTS = {"low", "medium", "high", "xhigh", "max"}
ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "api_error",
    529: "overloaded_error",
}


@dataclass
class Reply:
    """What the pretend Claude does when it is asked.

    Args:
        text: what it says.
        first_token: seconds before the first token; headers go out at the same time, as nothing earlier is promised.
        pace: tokens a second after that; None sends them as fast as the socket takes them.
        stop: the ``stop_reason``.
        hang_up: calls the tool ``hang_up`` after the text.
        thinking: begins with a thinking block, as the 5.x models do.
        status: an HTTP error instead of a reply.
        retry_after: the ``retry-after`` header of that error, in seconds.
        error: an ``error`` event of this type after the text, in a stream that began well.
        ending: after the text, "cut" the connection, "close" it cleanly without the closing events, "stall", or "ping"
            once a second for ever.
        body: answers 200 with these bytes and nothing else.
    """

    text: str = ""
    first_token: float = 0.0
    pace: float | None = None
    stop: str = "end_turn"
    hang_up: bool = False
    thinking: bool = False
    status: int = 200
    retry_after: str | None = None
    error: str | None = None
    ending: str | None = None
    body: bytes | None = None


@dataclass
class Request:
    """One request that was received, and how its answer ended."""

    body: dict
    headers: dict
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
        return words_of(self.body["messages"][-1])


def words_of(message):
    """The words of a message, whether its content is a string or a list of blocks."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(block.get("text", "") for block in content)


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
    if messages[-1]["role"] != "user":
        return 400, "messages: this model does not support assistant message prefill"
    if not all(words_of(message).strip() for message in messages):
        return 400, "messages: text content blocks must contain non-whitespace text"
    return None


class Claude(ThreadingHTTPServer):
    """The pretend Claude. Use it as a context manager, or call ``start`` and ``stop``."""

    daemon_threads = True
    request_queue_size = 256  # the default of 5 loses connections when many callers speak at once

    def __init__(self, port=0, default=None):
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests = []
        self.default = default or (lambda words: Reply(f"You said: {words}"))
        self._script = {}
        self.counter = itertools.count(1)

    def when(self, words, *replies):
        """When the caller's last words are these, answer so: one reply after the other, the last one for ever."""
        self._script[words] = list(replies)

    def reply_to(self, words):
        replies = self._script.get(words)
        if not replies:
            return self.default(words)
        return replies.pop(0) if len(replies) > 1 else replies[0]

    def asked(self, words):
        """The requests whose last message is these words, oldest first."""
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

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.split("?")[0] != "/v1/messages":
            return self.fail(404, "not found")
        body = json.loads(raw)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.number = next(self.server.counter)
        wrong = complaint(body, headers)
        if wrong:
            return self.fail(*wrong)
        self.asked = Request(body, headers)
        self.server.requests.append(self.asked)
        reply = self.server.reply_to(self.asked.words)
        try:
            time.sleep(reply.first_token) if body.get("stream") else self.wait_for_the_whole(reply)
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
        content = [{"type": "thinking", "thinking": "", "signature": "s"}] if reply.thinking else []
        content += [{"type": "text", "text": reply.text}] if reply.text else []
        content += [{"type": "tool_use", "id": "toolu_1", "name": "hang_up", "input": {}}] if reply.hang_up else []
        return {
            "id": f"msg_{self.number}",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": content,
            "stop_reason": "tool_use" if reply.hang_up else reply.stop,
            "stop_sequence": None,
            "usage": {"input_tokens": len(json.dumps(body)) // 4, "output_tokens": len(tokens(reply.text))},
        }

    def stream(self, reply, body):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.send_header("request-id", f"req_pretend_{self.number}")
        self.end_headers()
        message = self.message(reply, body)
        start = {**message, "content": [], "stop_reason": None, "usage": {**message["usage"], "output_tokens": 1}}
        self.event("message_start", message=start)
        self.event("ping")
        index = 0
        for block in message["content"]:
            opened = {**block, "text": ""} if block["type"] == "text" else block
            self.event("content_block_start", index=index, content_block=opened)
            if block["type"] == "text":
                self.speak(reply, index)
                if reply.ending or reply.error:
                    return self.break_off(reply)
            elif block["type"] == "tool_use":
                self.event("content_block_delta", index=index, delta={"type": "input_json_delta", "partial_json": "{}"})
            self.event("content_block_stop", index=index)
            index += 1
        if reply.ending or reply.error:
            return self.break_off(reply)
        delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
        if reply.stop == "refusal":
            delta["stop_details"] = {"type": "refusal", "category": "cyber", "explanation": None}
        self.event("message_delta", delta=delta, usage={"output_tokens": message["usage"]["output_tokens"]})
        self.event("message_stop")
        self.wfile.write(b"0\r\n\r\n")

    def speak(self, reply, index):
        """Send the text token by token, at the stated pace, on a clock that doesn't drift."""
        began = time.monotonic()
        so_far = ""
        for number, token in enumerate(tokens(reply.text)):
            if reply.pace:
                time.sleep(max(0.0, began + number / reply.pace - time.monotonic()))
            self.event("content_block_delta", index=index, delta={"type": "text_delta", "text": token})
            self.asked.tokens_sent += 1
            so_far += token
            if self.asked.first_sentence_at is None and re.search(r"[.!?。](\s|$)", so_far):
                self.asked.first_sentence_at = time.monotonic()

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
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not a close
            self.connection.close()
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def event(self, kind, **fields):
        data = f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


def tokens(text):
    """The text in pieces of four characters, about what a token is."""
    return re.findall(r"(?s).{1,4}", text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--first-token", type=float, default=0.5, help="seconds to the first token")
    parser.add_argument("--pace", type=float, default=60, help="tokens a second")
    parser.add_argument("--text", default="You are very welcome here. " * 4)
    options = parser.parse_args()
    reply = Reply(options.text, options.first_token, options.pace)
    with Claude(options.port, default=lambda words: reply) as claude:
        print(claude.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
