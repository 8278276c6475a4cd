"""The README keeps its word: the steps run and say what it promises, and what it quotes, lists and names is the code's.

Its conversations are replayed by the telephone, with Claude's part scripted from them. These lines are understood:

    Line: what is heard
    You: what the caller says
    (You say nothing.)  (Someone else calls.)  (The line hangs up.)
    (Claude is sent 3 messages.)  (Claude is sent the prompt and 1 message.)

Where a line of the README is to blame, the failure names it.
"""

import ast
import contextlib
import re
import subprocess
import textwrap
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

import conversation
from tests.claude import KEY, Claude, Reply
from tests.phone import ROOT, App, Phone

README = (ROOT / "README.md").read_text()
COMMAND = (ROOT / "Procfile").read_text().strip().removeprefix("web: ")
CODE = {name: (ROOT / name).read_text() for name in ("app.py", "conversation.py", "store.py")}
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
QUOTATION = re.compile(r"From\s`([^`]+)`:$")
QUOTATIONS = [block for block in BLOCKS if QUOTATION.search(block.before)]
STEPS = [block for block in BLOCKS if block.language == "python" and block not in QUOTATIONS]
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


# --- The apps, started all at the same time ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apps(tmp_path_factory, request):
    """A function that gives (app, its pretend Claude): the "real" one, the real one with "no key", or a step's."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2 + len(STEPS)) as pool:

        def start(folder, **environ):
            claude = stack.enter_context(Claude())
            app = App({"ANTHROPIC_BASE_URL": claude.url, **environ}, folder=folder)
            stack.push(app)
            stack.callback(app.kill)  # nobody is on the line any more, so nothing has to end gracefully
            return pool.submit(app.start), claude

        started = {
            "real": start(ROOT, ANTHROPIC_API_KEY=KEY, TWILIO_AUTH_TOKEN=TOKEN),
            "no key": start(ROOT, TWILIO_AUTH_TOKEN=TOKEN),
            "no token": start(ROOT, TWILIO_AUTH_TOKEN=""),
        }
        for step in STEPS:
            folder = tmp_path_factory.mktemp("step")
            (folder / "app.py").write_text(step.text)
            started[step.heading] = start(folder, ANTHROPIC_API_KEY=KEY)

        request.getfixturevalue("app_module")  # it imports the SDK, and so do they: now is the time

        def app_and_claude(which):
            starting, claude = started[which]
            return starting.result(), claude

        yield app_and_claude


def app_of(conversation):
    """Which app a conversation is with."""
    if conversation.heading in [step.heading for step in STEPS]:
        return conversation.heading
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


def script(claude, lines):
    """Have the pretend Claude say what the line says in answer to the caller."""
    replies = {}
    for position, line in enumerate(lines):
        if line.startswith("You: "):
            rest = iter([*lines[position + 1 :], "", ""])
            reply = next(line for line in rest if line.startswith("Line: ")).removeprefix("Line: ")
            hangs_up = next(rest) == "(The line hangs up.)"
            replies.setdefault(line.removeprefix("You: "), []).append(Reply(reply, hang_up=hangs_up))
    for words, in_turn in replies.items():
        claude.when(words, *in_turn)


def what_was_sent(request):
    """A request to Claude, in the README's words."""
    prompt = "the prompt and " if request.body.get("system") else ""
    count = len(request.messages)
    return f"(Claude is sent {prompt}{count} message{'s' if count > 1 else ''}.)"


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=str)
def test_the_line_says_what_the_readme_promises(conversation, apps):
    app, claude = apps(app_of(conversation))
    lines = conversation.text.splitlines()
    script(claude, lines)
    phone = Phone(app.url, TOKEN)
    heard = phone.call()
    for number, line in enumerate(lines, conversation.line + 1):
        where = f"README.md, line {number}"
        who, _, words = line.partition(": ")
        if who == "You":
            heard = phone.say(words)
        elif who == "Line":
            assert heard == words, f"{where}\n{app.log()}"
        elif line == "(You say nothing.)":
            heard = phone.stay_silent()
        elif line == "(Someone else calls.)":
            phone = Phone(app.url, TOKEN)
            heard = phone.call()
        elif line == "(The line hangs up.)":
            assert phone.ended == "hangup", where
        else:
            assert what_was_sent(claude.requests[-1]) == line, where
    assert (phone.ended is not None) == (lines[-1] == "(The line hangs up.)"), conversation


def test_the_first_sentence_is_said_while_the_second_is_written(apps):
    app, claude = apps("real")
    promised = only("xml")
    words = re.findall('"([^"]+)"', promised.before)[-1]
    (reply,) = re.findall(rf"(?m)^You: .*{re.escape(words)}\nLine: (.*)$", CONVERSATIONS[0].text)
    claude.when(words, Reply(reply, pace=20))
    phone = Phone(app.url, TOKEN)
    phone.call()
    assert phone.say(words) == reply
    first_answer = phone.documents[1].decode()
    assert without_layout(first_answer) == without_layout(promised.text), promised


def without_layout(xml):
    return ElementTree.canonicalize(xml, strip_text=True)


# --- The steps --------------------------------------------------------------------------------------------------------


def test_each_of_the_six_steps_is_followed_by_what_is_heard():
    assert [step.heading[0] for step in STEPS] == list("123456")
    for step in STEPS:
        assert BLOCKS[BLOCKS.index(step) + 1] in CONVERSATIONS, step


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_step_fits_on_a_page(step):
    lines = step.text.splitlines()
    assert len(lines) <= 40, step
    assert max(map(len, lines)) <= 120, step


@pytest.mark.parametrize("before, step", [*zip(STEPS, STEPS[1:])], ids=lambda step: step.heading)
def test_the_new_lines_are_marked_and_no_others(before, step):
    mark = "  # new"
    known = {line.removesuffix(mark) for line in before.text.splitlines()}
    for number, line in enumerate(step.text.splitlines(), step.line + 1):
        is_new = line.removesuffix(mark) not in known
        assert line.endswith(mark) == is_new, f"README.md, line {number}"


# --- What is quoted from the code, and named --------------------------------------------------------------------------


@pytest.mark.parametrize("quotation", QUOTATIONS, ids=str)
def test_a_quotation_stands_in_its_file(quotation):
    (name,) = QUOTATION.findall(quotation.before)
    indented = [textwrap.indent(quotation.text, " " * spaces) for spaces in range(0, 40, 4)]
    assert any("\n" + text in "\n" + CODE[name] for text in indented), quotation


def test_each_file_is_quoted():
    assert {QUOTATION.search(quotation.before)[1] for quotation in QUOTATIONS} == set(CODE)


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
    (seconds,) = re.findall(r"has waited\sfor (\d+)\sseconds", PROSE)
    assert float(seconds) == conversation.PATIENCE


def routes(app_module):
    return {rule.rule for rule in app_module.app.url_map.iter_rules()} - {"/static/<path:filename>"}


def test_the_diagram_shows_the_routes_and_everyone_in_it(app_module):
    diagram = only("mermaid")
    assert diagram.text.startswith("sequenceDiagram\n"), diagram
    assert set(re.findall(r"POST (/[\w/]*)", diagram.text)) == routes(app_module) - {"/healthz"}, diagram
    arrows = re.findall(r"(?m)^ +([\w.]+?)--?>>([\w.]+): ", diagram.text)
    declared = re.findall(r"(?m)^ +(?:actor|participant) ([\w.]+)", diagram.text)
    assert {who for arrow in arrows for who in arrow} == set(declared), diagram


def test_the_three_urls_are_those_of_the_app(app_module):
    rows = table("Twilio's name for it")
    assert len(rows) == 3
    for row in rows:
        name, url, _ = row.cells
        assert url.strip("`").removeprefix("https://…") in routes(app_module), row
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
    assert [row.cells[0].strip("`") for row in table("flag")] == re.findall(r"--[\w-]+(?: \d+)?", COMMAND)


def test_every_flask_command_exists(app_module):
    commands = app_module.app.cli.commands
    used = set(re.findall(r"(?:`|bin/)flask (\w+)", README)) - {"run"}  # which is Flask's own
    assert used <= set(commands)
    for command in used:
        assert "--number" in [option for parameter in commands[command].params for option in parameter.opts]


# --- Settings ---------------------------------------------------------------------------------------------------------

SETTINGS = {row.cells[0].strip("`"): row for row in table("name")}


class EmptyEnvironment(Mapping):
    """It has nothing, and remembers what it was asked for."""

    def __init__(self):
        self.names = set()

    def __getitem__(self, name):
        self.names.add(name)
        raise KeyError(name)

    def __iter__(self):
        return iter(())

    def __len__(self):
        return 0


def test_the_settings_are_those_that_the_code_reads(app_module):
    environ = EmptyEnvironment()
    app_module.Settings(environ)
    elsewhere = re.findall(r"""os\.(?:environ(?:\.get\(|\[)|getenv\()["'](\w+)""", "".join(CODE.values()))
    assert environ.names | set(elsewhere) == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_default_is_the_one_in_the_code(name, app_module):
    row = SETTINGS[name]
    default = row.cells[1]
    unset = vars(app_module.Settings({}))
    if default == "none":
        assert not unset.get(name.lower()), row
    elif default.startswith("in `"):
        (file,) = code_in(default)
        assert unset[name.lower()] in strings_in(CODE[file]), row
    else:
        assert vars(app_module.Settings({name: default.strip("`")})) == unset, row


# --- When a call goes wrong -------------------------------------------------------------------------------------------

TROUBLE = table("the caller hears")
ERRORS = [row for row in TROUBLE if re.search(r"Error \d", row.cells[1])]


@pytest.mark.parametrize("row", TROUBLE, ids=str)
def test_what_is_heard_and_logged_stands_in_the_code(row):
    heard, logged, _ = row.cells
    phrases = re.findall('"([^"]+)"', heard) + ([] if row in ERRORS else code_in(logged))
    strings = [text for source in CODE.values() for text in strings_in(source)]
    for phrase in phrases:
        for piece in phrase.split("…"):
            assert any(piece.strip() in text for text in strings), f"{row}: {piece}"


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
