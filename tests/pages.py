"""Reads the project's Markdown pages, for the tests that compare them with the code.

A failure names the page and the line. Conversations on a page look like this, and are replayed by ``replay``:

    Line: what is heard
    You: what the caller says
    (You say nothing.)  (Someone else calls.)  (The line hangs up.)
    (Claude is sent 3 messages.)  (Claude is sent the prompt and 1 message.)
    (Claude fails.)  (Claude writes nothing.)  (Claude takes its time.)
    (Claude says "..." and uses the tool clock.)
    (A stranger asks for a reply, and gets 403.)  (You hang up, and the app deletes your words.)
    (You cut in, and Twilio delivers your words twice.)
"""

import ast
import re
import threading
from datetime import datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from tests.claude import Reply, Tool
from tests.phone import ROOT, Phone
from tests.stage import Stage, open_database


class Block(NamedTuple):
    """The text between two fences, with the prose above it."""

    page: str
    line: int
    language: str
    heading: str
    before: str  # the prose since the last heading or block
    text: str

    def __repr__(self):
        return f"{self.page}, line {self.line}"


class Row(NamedTuple):
    """A row of a table."""

    page: str
    line: int
    heading: str
    cells: list

    def __repr__(self):
        return f"{self.page}, line {self.line}"


class Page:
    """A page of the documents, by its path in the project."""

    def __init__(self, path):
        self.path = path
        self.text = (ROOT / path).read_text()
        self.prose = re.sub(r"(?ms)^```.*?^```$", "", self.text)
        self.blocks, self.rows, heading, before, fence = [], [], "", "", None
        for number, line in enumerate(self.text.splitlines(), 1):
            if line.startswith("```"):
                if fence is None:
                    fence, inside = (number, line[3:]), ""
                else:
                    self.blocks.append(Block(path, *fence, heading, before.strip(), inside))
                    fence, before = None, ""
            elif fence:
                inside += line + "\n"
            elif line.startswith("#"):
                heading, before = line.lstrip("# "), ""
            elif line.startswith("|"):
                self.rows.append(Row(path, number, heading, line.strip("| ").split(" | ")))
            else:
                before += line + "\n"

    def only(self, language):
        """The one block in this language."""
        (block,) = (block for block in self.blocks if block.language == language)
        return block

    def table(self, first):
        """The rows of the table whose first column has this name."""
        head = next(row for row in self.rows if row.cells[0] == first)
        lines = {row.line: row for row in self.rows}
        rows, line = [], head.line + 2
        while line in lines:
            rows.append(lines[line])
            line += 1
        return rows

    def conversations(self):
        """The blocks that are conversations."""
        return [block for block in self.blocks if block.text.startswith(("Line:", "You:", "("))]

    def anchors(self):
        """What a link to a heading of this page may name."""
        headings = re.findall(r"(?m)^#+ (.*)", self.text)
        return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_in(text):
    """The pieces of a text between backticks."""
    return re.findall(r"`([^`]+)`", text)


def strings_in(source):
    """The strings of a program, as they are when it runs."""
    nodes = ast.walk(ast.parse(source))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


# --- Replaying a conversation ---------------------------------------------------------------------

ONLY_IN_THE_SCRIPT = ["(Claude fails.)", "(Claude writes nothing.)", "(Claude takes its time.)"]


def script(claude, phone, lines):
    """Have the pretend Claude write the replies that stand in a conversation."""
    replies = {}
    for position, line in enumerate(lines):
        if not line.startswith("You: "):
            continue
        rest = lines[position + 1 :] + [""]
        spoken = next(number for number, line in enumerate(rest) if line.startswith("Line: "))
        words, reply = line.removeprefix("You: "), Reply(rest[spoken].removeprefix("Line: "))
        reply.hang_up = rest[spoken + 1] == "(The line hangs up.)"
        before = " ".join(rest[:spoken])
        if "(Claude fails.)" in before:
            reply = Reply(status=529)
        elif "(Claude writes nothing.)" in before:
            reply = Reply("")
        elif "(Claude takes its time.)" in before:
            text = reply.text.removeprefix("One moment. ")
            write_nothing_until_a_moment_was_asked_for(claude, phone, text)
            continue
        elif tool := re.search(r'\(Claude says "(.+)" and uses the tool (\w+)\.\)', before):
            then = Reply(reply.text.removeprefix(tool[1]).strip())
            reply = Reply(tool[1], blocks=[Tool(tool[2], {"time_zone": "Asia/Tokyo"})], then=then)
        replies.setdefault(words, []).append(reply)
    for words, in_turn in replies.items():
        claude.when(words, *in_turn)


def write_nothing_until_a_moment_was_asked_for(claude, phone, text):
    asked_for = threading.Event()
    phone.on_hearing = lambda heard: asked_for.set() if heard == "One moment." else None

    def answer(words):
        asked_for.wait(60)
        return Reply(text)

    claude.default = answer


def request_in_words(request):
    """A request to Claude, as a page describes it."""
    prompt = "the prompt and " if request.body.get("system") else ""
    count = len(request.messages)
    cut_off = any(text.endswith("[The caller cut in here.]") for _, text in request.messages)
    cut = ", one of them cut off" if cut_off else ""
    return f"(Claude is sent {prompt}{count} message{'s' if count > 1 else ''}{cut}.)"


def count_turns(app, call_sid):
    """How many turns of this call the app has stored."""
    with open_database(app.database) as database:
        return database.execute("SELECT COUNT(*) FROM turns WHERE call_sid = ?", [call_sid]).fetchone()[0]


def call(app):
    """A phone for this app, which sees no proxy."""
    phone = Phone(app.url, app.token)
    Stage.calls.append((phone, app, len(app.log())))
    return phone


def replay(conversation, app, claude):
    """Have a conversation with the app, with Claude's part taken from the page; compare what is heard."""
    lines = conversation.text.splitlines()
    phone = call(app)
    script(claude, phone, lines)
    heard, deliveries = phone.call(), 1
    for number, line in enumerate(lines, conversation.line + 1):
        where = f"{conversation.page}, line {number}"
        speaker, _, words = line.partition(": ")
        if speaker == "You":
            said = {"CallSid": phone.call_sid, "SpeechResult": words}
            for _ in range(deliveries - 1):
                assert phone.request("POST", "/talking", said, "one token").status == 200, where
            heard = phone.say(words, token="one token" if deliveries > 1 else None)
            assert deliveries == 1 or len(claude.asked(words)) == 1, where
        elif speaker == "Line":
            # On a busy machine the caller may be asked for a moment more than once, or here already.
            assert re.sub(r"(One moment\. )+", "One moment. ", heard) == words, where
        elif line == "(You say nothing.)":
            heard = phone.stay_silent()
        elif line == "(Someone else calls.)":
            phone = call(app)
            heard = phone.call()
        elif line == "(The line hangs up.)":
            assert phone.ended == "hangup", where
        elif line == "(You hang up, and the app deletes your words.)":
            assert count_turns(app, phone.call_sid) == 1, where
            phone.hang_up()
            assert count_turns(app, phone.call_sid) == 0, where
        elif line == "(You cut in, and Twilio delivers your words twice.)":
            deliveries = 2
        elif line == "(A stranger asks for a reply, and gets 403.)":
            before = len(claude.requests)
            for stranger in (Phone(app.url), Phone(app.url, "another token")):
                asked = {"CallSid": phone.call_sid, "SpeechResult": "Hello?"}
                assert stranger.request("POST", "/talking", asked).status == 403, where
            assert len(claude.requests) == before, where
        elif line.startswith("(Claude says "):
            ((result, failed),) = claude.requests[-1].results
            now = datetime.now(ZoneInfo("Asia/Tokyo"))
            days = [f"{now:%A}", f"{now - timedelta(hours=1):%A}"]  # midnight may have passed
            assert result.partition(",")[0] in days and not failed, where
        elif line not in ONLY_IN_THE_SCRIPT:
            assert request_in_words(claude.requests[-1]) == line, where
    over = lines[-1] in ("(The line hangs up.)", "(You hang up, and the app deletes your words.)")
    assert (phone.ended is not None) == over, conversation
    assert phone.warnings == [], conversation
