"""The README keeps its word: the steps run and say what it promises, and what it quotes, lists and names is the code's.

Its conversations are replayed by the telephone, with Claude's part scripted from them. These lines are understood:

    Line: what is heard
    You: what the caller says
    (You say nothing.)  (Someone else calls.)  (The line hangs up.)
    (Claude is sent 3 messages.)  (Claude is sent the prompt and 1 message.)
    (Claude fails.)  (Claude writes nothing.)  (Claude takes its time.)
    (Claude says "..." and uses the tool clock.)
    (A stranger asks for a reply, and gets 403.)  (You hang up, and all is forgotten.)
    (You cut in, and Twilio delivers your words twice.)

All conversations begin with the first test, in threads, since most of their time is waiting.

Where a line of the README is to blame, the failure names it.
"""

import ast
import contextlib
import importlib
import io
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import tokenize
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import NamedTuple
from xml.etree import ElementTree
from zoneinfo import ZoneInfo

import pytest
from werkzeug.serving import make_server

import conversation
from tests.claude import KEY, Claude, Reply, Tool
from tests.conftest import PROCESSES, names_of_settings, wait_until
from tests.conftest import read as read_settings_from
from tests.phone import ROOT, App, Phone

README = (ROOT / "README.md").read_text()
COMMAND = (ROOT / "Procfile").read_text().strip().removeprefix("web: ")
CODE = {name: (ROOT / name).read_text() for name in ("app.py", "conversation.py", "store.py")}
EXTRAS = {path.name: path.read_text() for path in (ROOT / "extras").glob("*.py")}
TOKEN = "a-token"

# --- Reading the README -----------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """What stands between two fences."""

    line: int
    language: str
    heading: str
    before: str  # the prose above it, since the last heading or block
    text: str

    def __repr__(self):
        return f"README.md, line {self.line}"


class Row(NamedTuple):
    """A row of a table."""

    line: int
    heading: str
    cells: list

    def __repr__(self):
        return f"README.md, line {self.line}"


def read():
    """Its blocks and rows."""
    blocks, rows, heading, before, fence = [], [], "", "", None
    for number, line in enumerate(README.splitlines(), 1):
        if line.startswith("```"):
            if fence is None:
                fence, inside = (number, line[3:]), ""
            else:
                blocks.append(Block(*fence, heading, before.strip(), inside))
                fence, before = None, ""
        elif fence:
            inside += line + "\n"
        elif line.startswith("#"):
            heading, before = line.lstrip("# "), ""
        elif line.startswith("|"):
            rows.append(Row(number, heading, line.strip("| ").split(" | ")))
        else:
            before += line + "\n"
    return blocks, rows


BLOCKS, ROWS = read()
STEPS = [block for block in BLOCKS if block.language == "python" and block.heading[0].isdigit()]
CONVERSATIONS = [block for block in BLOCKS if block.text.startswith(("Line:", "You:", "("))]
PROSE = re.sub(r"(?ms)^```.*?^```$", "", README)


def only(language):
    """The one block in this language."""
    (block,) = (block for block in BLOCKS if block.language == language)
    return block


def table(first):
    """The rows of the table whose first column has this name."""
    head = next(row for row in ROWS if row.cells[0] == first)
    lines = {row.line: row for row in ROWS}
    rows, line = [], head.line + 2
    while line in lines:
        rows.append(lines[line])
        line += 1
    return rows


def code_in(text):
    return re.findall(r"`([^`]+)`", text)


def strings_in(source):
    """The strings of a program, as they are when it runs."""
    nodes = ast.walk(ast.parse(source))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


# --- The steps ------------------------------------------------------------------------------------

FOLDERS = [ROOT / "tests/steps" / str(number) for number in range(1, 17)]
MARK = "  # new"


def number_of(block):
    """Which step's block this is: a string, as it stands in the heading."""
    return block.heading.partition(".")[0]


def files_of(folder):
    """The lines of each file of a step, without the marks, by the file's name."""
    return {
        path.name: [line.removesuffix(MARK) for line in path.read_text().splitlines()]
        for path in folder.glob("*.py")
    }


def in_a_string(source):
    """The numbers of the lines that end in a string: there, a mark would be a part of it."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    strings = [token for token in tokens if token.type == tokenize.STRING]
    return {number for token in strings for number in range(token.start[0], token.end[0])}


def test_each_step_is_followed_by_what_is_heard():
    assert [number_of(step) for step in STEPS] == [folder.name for folder in FOLDERS]
    assert set((ROOT / "tests/steps").iterdir()) == set(FOLDERS)
    for step in STEPS:
        following = (block for block in BLOCKS if block.line > step.line)
        assert next(block for block in following if block.language != "xml") in CONVERSATIONS, step


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_step_fits_on_a_page(folder):
    for name, lines in files_of(folder).items():
        assert len(lines) <= 120, f"{folder.name}/{name}"
        assert max(map(len, lines)) <= 93, f"{folder.name}/{name}: with the mark, 100 columns"


@pytest.mark.parametrize("folder", FOLDERS[1:], ids=lambda folder: folder.name)
def test_the_new_lines_are_marked_and_no_others(folder):
    before = files_of(FOLDERS[FOLDERS.index(folder) - 1])
    known = {line for lines in before.values() for line in lines}
    new = 0
    for path in folder.glob("*.py"):
        source = path.read_text()
        unmarked = in_a_string(source)
        for number, line in enumerate(source.splitlines(), 1):
            is_new = line.removesuffix(MARK) not in known
            new += is_new
            marked = is_new and number not in unmarked
            assert line.endswith(MARK) == marked, f"{path}, line {number}"
    assert new <= 25, folder


@pytest.mark.parametrize("step", STEPS[:4], ids=str)
def test_the_first_steps_are_printed_in_full(step):
    assert step.text == (FOLDERS[STEPS.index(step)] / "app.py").read_text()


@pytest.mark.parametrize("step", STEPS[4:], ids=str)
def test_of_the_other_steps_each_piece_that_is_printed_stands_in_its_file(step):
    folder, name, piece, printed = FOLDERS[STEPS.index(step)], "app.py", [], 0
    for number, line in enumerate([*step.text.splitlines(), "    ..."], step.line + 1):
        file = re.fullmatch(r"# (\w+\.py)", line)
        if line == "    ..." or file:
            text, where = "\n".join(piece), f"README.md, before line {number}"
            assert f"\n{text}\n" in "\n" + (folder / name).read_text(), where
            name, piece = file[1] if file else name, []
        else:
            piece.append(line)
            printed += line.endswith(MARK)
    # The rest are imports and the like, of which there is nothing to say.
    new = sum(path.read_text().count(f"{MARK}\n") for path in folder.glob("*.py"))
    assert printed >= new / 3, step


# --- The apps, and the conversations with them, started all at the same time ----------------------


class StepsApp:
    """A step's app, under Flask's own server, in a process that had all the libraries already.

    Under gunicorn the sixteen would take as many seconds.
    """

    def __init__(self, folder, claude):
        self.folder, self.database = folder, folder / "calls.db"
        # Bound from now on, so that nobody else takes the port before the app listens.
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        environ = {
            "ANTHROPIC_API_KEY": KEY, "ANTHROPIC_BASE_URL": claude.url, "TWILIO_AUTH_TOKEN": TOKEN
        }
        arguments = str(folder), self.listening, environ
        self.process = PROCESSES.Process(target=serve, args=arguments, daemon=True)

    def start(self):
        """Start it, and wait until it answers."""
        self.process.start()
        ready = self.folder / "ready"
        wait_until(lambda: ready.exists() or not self.process.is_alive())
        assert self.process.is_alive(), self.log()
        return self

    def log(self):
        return (self.folder / "log").read_text()

    def stop(self):
        if self.process.pid:
            self.process.kill()
            self.process.join()
        self.listening.close()


def serve(folder, listening, environ):
    """Run the app in this folder, for ever."""
    with open(f"{folder}/log", "wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(environ)
    os.chdir(folder)
    for name in ("app", "conversation", "store"):
        sys.modules.pop(name, None)  # those of the real line
    sys.path.insert(0, folder)
    app = importlib.import_module("app").app
    host, port = listening.getsockname()
    server = make_server(host, port, app, threaded=True, fd=listening.fileno())
    open("ready", "w").close()
    server.serve_forever()


@pytest.fixture(scope="module")
def apps(tmp_path_factory, request):
    """A function that gives (app, its pretend Claude): the "real" one, the real one with "no key", or a step's."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(4 + len(STEPS)) as pool:

        def start(**environ):
            claude = stack.enter_context(Claude())
            app = App({"ANTHROPIC_BASE_URL": claude.url, **environ})
            stack.push(app)
            stack.callback(app.kill)  # nobody is on the line any more, so nothing has to end gracefully
            return pool.submit(app.start), claude

        started = {
            "real": start(ANTHROPIC_API_KEY=KEY, TWILIO_AUTH_TOKEN=TOKEN),
            "no key": start(TWILIO_AUTH_TOKEN=TOKEN),
            "no token": start(TWILIO_AUTH_TOKEN=""),
        }
        for folder in FOLDERS:
            copy = shutil.copytree(folder, tmp_path_factory.mktemp("steps") / folder.name)
            claude = stack.enter_context(Claude())
            app = StepsApp(copy, claude)
            stack.callback(app.stop)
            started[folder.name] = pool.submit(app.start), claude

        def app_and_claude(which):
            starting, claude = started[which]
            return starting.result(), claude

        yield app_and_claude


@pytest.fixture(scope="module", autouse=True)
def replays(apps):
    """The conversations, which begin now: futures, by the line of the README where they stand."""
    with ThreadPoolExecutor(len(CONVERSATIONS)) as pool:
        yield {one.line: pool.submit(replay, one, apps) for one in CONVERSATIONS}


def app_of(conversation):
    """Which app a conversation is with."""
    if number_of(conversation).isdecimal():
        return number_of(conversation)
    return "no key" if "no key" in conversation.text else "real"


@pytest.fixture(scope="module")
def app_module():
    """``app.py``, as it is without settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SETTINGS:
            patch.delenv(name, raising=False)
        import app
    return app


# --- The conversations ------------------------------------------------------------------------------------------------


ONLY_IN_THE_SCRIPT = ["(Claude fails.)", "(Claude writes nothing.)", "(Claude takes its time.)"]


def script(claude, phone, lines):
    """Have the pretend Claude say what the line says in answer to the caller."""
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
            keep_silent_until_a_moment_was_asked_for(claude, phone, text)
            continue
        elif tool := re.search(r'\(Claude says "(.+)" and uses the tool (\w+)\.\)', before):
            then = Reply(reply.text.removeprefix(tool[1]).strip())
            reply = Reply(tool[1], blocks=[Tool(tool[2], {"time_zone": "Asia/Tokyo"})], then=then)
        replies.setdefault(words, []).append(reply)
    for words, in_turn in replies.items():
        claude.when(words, *in_turn)


def keep_silent_until_a_moment_was_asked_for(claude, phone, text):
    asked_for = threading.Event()
    phone.on_hearing = lambda heard: asked_for.set() if heard == "One moment." else None

    def answer(words):
        asked_for.wait(60)
        return Reply(text)

    claude.default = answer


def what_was_sent(request):
    """A request to Claude, in the README's words."""
    prompt = "the prompt and " if request.body.get("system") else ""
    count = len(request.messages)
    cut_off = any(text.endswith("[cut off]") for _, text in request.messages)
    with_its_own = ", with its own cut off" if cut_off else ""
    return f"(Claude is sent {prompt}{count} message{'s' if count > 1 else ''}{with_its_own}.)"


def kept(app, call_sid):
    """How many turns of this call a step keeps."""
    with contextlib.closing(sqlite3.connect(app.database)) as database:
        count = "SELECT COUNT(*) FROM turns WHERE call_sid = ?"
        return database.execute(count, [call_sid]).fetchone()[0]


def replay(conversation, apps):
    app, claude = apps(app_of(conversation))
    lines = conversation.text.splitlines()
    phone = Phone(app.url, TOKEN)
    script(claude, phone, lines)
    heard, deliveries = phone.call(), 1
    for number, line in enumerate(lines, conversation.line + 1):
        where = f"README.md, line {number}\n{app.log()}"
        who, _, words = line.partition(": ")
        if who == "You":
            said = {"CallSid": phone.call_sid, "SpeechResult": words}
            for _ in range(deliveries - 1):
                assert phone.request("POST", "/talking", said, "one token").status == 200, where
            heard = phone.say(words, token="one token" if deliveries > 1 else None)
            assert deliveries == 1 or len(claude.asked(words)) == 1, where
        elif who == "Line":
            # How often the line asks for a moment depends on how busy this machine is.
            assert re.sub(r"(One moment\. )+", "One moment. ", heard) == words, where
        elif line == "(You say nothing.)":
            heard = phone.stay_silent()
        elif line == "(Someone else calls.)":
            phone = Phone(app.url, TOKEN)
            heard = phone.call()
        elif line == "(The line hangs up.)":
            assert phone.ended == "hangup", where
        elif line == "(You hang up, and all is forgotten.)":
            assert kept(app, phone.call_sid) == 1, where
            phone.hang_up()
            assert kept(app, phone.call_sid) == 0, where
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
            assert what_was_sent(claude.requests[-1]) == line, f"{where}\n{app.log()}"
    over = lines[-1] in ("(The line hangs up.)", "(You hang up, and all is forgotten.)")
    assert (phone.ended is not None) == over, conversation
    assert phone.warnings == [], conversation


def test_the_first_sentence_is_said_while_the_second_is_written(apps, replays):
    promised = only("xml")
    app, claude = apps(app_of(promised))
    (conversation,) = (one for one in CONVERSATIONS if app_of(one) == app_of(promised))
    replays[conversation.line].result()  # or that would still be talking
    words = re.findall('"([^"]+)"', promised.before)[-1]
    (reply,) = re.findall(rf"(?m)^You: {re.escape(words)}\nLine: (.*)$", conversation.text)
    claude.when(words, Reply(reply, pace=20))
    phone = Phone(app.url, TOKEN)
    phone.call()
    assert phone.say(words) == reply
    first_answer = re.sub(r"turn=\d+", "turn=1", phone.documents[1].decode())
    assert without_layout(first_answer) == without_layout(promised.text), promised
    three = "This is number one. This is number two. And three."
    claude.when("Count to three.", Reply(three, pace=16))
    assert phone.say("Count to three.") == three


@pytest.mark.parametrize("number", ["14", "15", "16"])
def test_a_reply_that_nobody_waits_for_stops_growing(number, apps):
    """Its stream is closed: when the caller has gone on, and when the caller has hung up."""
    app, claude = apps(number)
    phone = Phone(app.url, TOKEN)
    phone.call()
    for words, go_on in [("Tell me.", lambda: phone.say("Hello?")), ("Go on.", phone.hang_up)]:
        claude.when(words, Reply("This is a sentence. " * 200, pace=40))
        begun = {"CallSid": phone.call_sid, "SpeechResult": words}
        assert phone.request("POST", "/talking", begun).status == 200
        go_on()
        (request,) = claude.asked(words)
        wait_until(lambda request=request: request.finished)
        assert request.tokens_sent < 800, "it was read to its end"
    assert "You said: Hello?" in [text for text, *_ in phone.said]


def test_a_tool_that_fails_is_no_dead_line(apps):
    app, claude = apps("16")
    words = "What time is it in Atlantis?"
    blocks = [Tool("clock", {"time_zone": zone}) for zone in ("Atlantis", "Asia/Tokyo")]
    claude.when(words, Reply("Let me see.", blocks=blocks, then=Reply("It has no time.")))
    phone = Phone(app.url, TOKEN)
    phone.call()
    assert phone.say(words) == "Let me see. It has no time."
    results = claude.asked(words)[-1].results
    assert [failed for _, failed in results] == [True, False]


def without_layout(xml):
    return ElementTree.canonicalize(xml, strip_text=True)


# --- What is named from the code ------------------------------------------------------------------


def sections():
    """The sections of the real files, as the table of the tutorial names them."""
    for name, source in CODE.items():
        banners = re.findall(r"(?m)^# --- (.+?) -+$", source)
        yield from [f"`{name}`: {banner}" for banner in banners] or [f"`{name}`"]


def test_each_section_of_the_files_grew_from_somewhere():
    rows = table("section")
    assert [row.cells[0] for row in rows] == [*sections()]
    for row in rows:
        (name,) = code_in(row.cells[0])
        for code in code_in(row.cells[2]):
            assert code.startswith("<") or code in CODE[name], f"{row}: {code}"
        for step in re.findall(r"\d+", row.cells[1]):
            assert 1 <= int(step) <= len(STEPS), row


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"`([\w./-]+\.(?:py|txt|md|toml)|Procfile|Dockerfile)`", PROSE))
    to_be_written = set(re.findall(r"\bas\s`([^`]+)`", PROSE))
    assert {name for name in named - to_be_written if not (ROOT / name).exists()} == set()


def test_every_link_within_the_readme_leads_somewhere():
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"(?m)^#+ (.*)", README)}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_what_became_of_the_durable_object_stands_in_the_code():
    for row in table("there"):
        for code in code_in(" ".join(row.cells[1:])):
            assert code in CODE or any(code in source for source in CODE.values()), f"{row}: {code}"


def test_how_long_the_webhook_waits():
    (seconds,) = re.findall(r"looks at the row for (\d+)\sseconds", PROSE)
    assert float(seconds) == conversation.PATIENCE


def routes(app_module):
    return {rule.rule for rule in app_module.app.url_map.iter_rules()} - {"/static/<path:filename>"}


def test_the_diagram_shows_the_routes_and_everyone_in_it(app_module):
    diagram = only("mermaid")
    assert diagram.text.startswith("sequenceDiagram\n"), diagram
    assert set(re.findall(r"POST (/[\w/]*)", diagram.text)) == routes(app_module) - {"/healthz", "/hand_over", "/listening"}, diagram
    arrows = re.findall(r"(?m)^ +([\w.]+?)--?>>([\w.]+): ", diagram.text)
    declared = re.findall(r"(?m)^ +(?:actor|participant) ([\w.]+)", diagram.text)
    assert {who for arrow in arrows for who in arrow} == set(declared), diagram


def test_the_three_urls_are_those_of_the_app(app_module):
    rows = table("Twilio's name for it")
    assert len(rows) == 3
    for row in rows:
        name, url, _ = row.cells
        path, hash_sign, retries = url.strip("`").removeprefix("https://…").partition("#")
        assert path in routes(app_module) and hash_sign + retries == "#" + app_module.RETRIES, row
        assert name in CODE["app.py"], f"{row}: the app's own page calls it something else"


# --- Commands ---------------------------------------------------------------------------------------------------------


def test_the_two_commands_are_the_ones_that_are_kept():
    """``.ci/run`` runs the second one in a clean copy; the first differs from it only in what it starts."""
    telephone, tests = (block for block in BLOCKS if "pip install -qr" in block.text)
    assert tests.text.strip() in (ROOT / ".ci/run").read_text().splitlines(), tests
    assert telephone.text == tests.text.replace("-m pytest", "-m tests.phone"), telephone


def test_the_app_is_started_as_in_the_procfile_everywhere():
    assert set(re.findall(r"gunicorn app:app[^`\n]*", README)) == {COMMAND}
    (command_of_the_procfile,) = re.findall(r"\$\((.*)\)", only("dockerfile").text)
    found = subprocess.run(["sh", "-c", command_of_the_procfile], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == COMMAND
    assert COMMAND == "gunicorn app:app"
    served = (ROOT / "gunicorn.conf.py").read_text()
    for row in table("setting"):
        assert f"\n{row.cells[0].strip('`')} " in served, row


def test_every_flask_command_exists(app_module):
    commands = app_module.app.cli.commands
    used = set(re.findall(r"(?:`|bin/)flask (\w+)", README)) - {"run"}  # which is Flask's own
    assert used <= set(commands)
    for command in used - {"calls"}:
        assert "--number" in [option for parameter in commands[command].params for option in parameter.opts]


# --- Settings ---------------------------------------------------------------------------------------------------------

SETTINGS = {row.cells[0].strip("`"): row for row in table("name")}


def test_the_settings_are_those_that_the_code_reads():
    assert set(names_of_settings()) == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_default_is_the_one_in_the_code(name):
    row = SETTINGS[name]
    default = row.cells[1]
    unset = vars(read_settings_from({}))
    if default == "none":
        assert not unset.get(name.lower()), row
    elif default.startswith("in `"):
        (file,) = code_in(default)
        assert unset[name.lower()] in strings_in(CODE[file]), row
    else:
        assert str(unset[name.lower()]) == default.strip("`"), row


# --- When a call goes wrong -------------------------------------------------------------------------------------------

TROUBLE = table("the caller hears")
ERRORS = [row for row in TROUBLE if re.search(r"Error \d", row.cells[1])]


@pytest.mark.parametrize("row", TROUBLE, ids=str)
def test_what_is_heard_and_logged_stands_in_the_code(row):
    heard, logged, _ = row.cells
    real = row in ERRORS or "APIConnectionError" in logged or "OperationalError" in logged  # these are compared with what is really logged
    phrases = re.findall('"([^"]+)"', heard) + ([] if real else code_in(logged))
    strings = [text for source in [*CODE.values(), *EXTRAS.values()] for text in strings_in(source)]
    for phrase in phrases:
        for piece in phrase.split("…"):
            assert any(piece.strip() in " ".join(text.split()) for text in strings), f"{row}: {piece}"


@pytest.mark.parametrize("row", ERRORS, ids=str)
def test_what_an_error_of_claude_s_sounds_and_looks_like(row, apps):
    app, claude = apps("real")
    heard, logged, _ = row.cells
    status = int(re.search(r"\d+", logged)[0])
    words = f"This will be answered with {status}."
    claude.when(words, Reply(status=status, retry_after="60"))
    phone = Phone(app.url, TOKEN)
    phone.call()
    assert phone.say(words).startswith(heard.strip('"')), row
    until = time.monotonic() + 5  # the turn is logged when it is over, which is just after the caller has heard
    while f"{phone.call_sid} turn 1: first sentence" not in app.log() and time.monotonic() < until:
        time.sleep(0.02)
    (turn,) = re.findall(f".*{phone.call_sid} turn 1: first sentence.*", app.log())
    assert logged.strip("`") in turn, row


@pytest.mark.parametrize(
    "logged, which, token, headers",
    [("wrong signature", "real", "another token", {}), ("set TWILIO_AUTH_TOKEN", "no token", TOKEN, {})],
)
def test_who_is_refused_hears_twilio_s_error(logged, which, token, headers, apps):
    app, _ = apps(which)
    (row,) = (row for row in TROUBLE if logged in row.cells[1])
    assert row.cells[0].strip('"') in Phone(app.url, token, headers=headers).call(), row
    for piece in row.cells[1].strip("`").split("…"):
        assert piece in app.log(), row


# --- The conversations, which began with the first test -------------------------------------------


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=str)
def test_the_line_says_what_the_readme_promises(conversation, replays):
    replays[conversation.line].result()
