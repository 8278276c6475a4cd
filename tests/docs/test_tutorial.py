"""The tutorial keeps its word: its programs run and say what it promises, and it prints what they contain."""

import contextlib
import io
import re
import shutil
import tokenize
from xml.etree import ElementTree

import pytest

from tests.claude import KEY, Claude, Reply, Tool
from tests.pages import Page, call, code_in, replay
from tests.phone import ROOT
from tests.stage import ForkedApp, wait_until

PAGE = Page("docs/tutorial/README.md")
PROGRAMS = ROOT / "docs/tutorial"
FOLDERS = [PROGRAMS / str(number) for number in range(1, 17)]
STEPS = [block for block in PAGE.blocks if block.language == "python" and block.heading[0].isdigit()]
CONVERSATIONS = [block for block in PAGE.conversations() if block.heading[0].isdigit()]
CODE = {name: (ROOT / name).read_text() for name in ("app.py", "conversation.py", "store.py")}
MARK = "  # new"

# --- What is printed ------------------------------------------------------------------------------


def number_of(block):
    """The number of a block's step: a string, as it stands in the heading."""
    return block.heading.partition(".")[0]


def files_of(folder):
    """The lines of each file of a step, without the marks, by the file's name."""
    return {
        path.name: [line.removesuffix(MARK) for line in path.read_text().splitlines()]
        for path in folder.glob("*.py")
    }


def lines_in_strings(source):
    """The numbers of the lines that end in a string: there, a mark would be a part of it."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    strings = [token for token in tokens if token.type == tokenize.STRING]
    return {number for token in strings for number in range(token.start[0], token.end[0])}


def test_each_step_is_followed_by_a_conversation():
    assert [number_of(step) for step in STEPS] == [folder.name for folder in FOLDERS]
    assert {path for path in PROGRAMS.iterdir() if path.is_dir() and path.name.isdigit()} == set(FOLDERS)
    for step in STEPS:
        following = (block for block in PAGE.blocks if block.line > step.line)
        assert next(block for block in following if block.language != "xml") in CONVERSATIONS, step


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_step_fits_on_a_page(folder):
    for name, lines in files_of(folder).items():
        assert len(lines) <= 125, f"{folder.name}/{name}"
        assert max(map(len, lines)) <= 93, f"{folder.name}/{name}: with the mark, 100 columns"


@pytest.mark.parametrize("folder", FOLDERS[1:], ids=lambda folder: folder.name)
def test_the_new_lines_are_marked_and_no_others(folder):
    before = files_of(FOLDERS[FOLDERS.index(folder) - 1])
    known = {line.strip() for lines in before.values() for line in lines}
    new = 0
    for path in folder.glob("*.py"):
        source = path.read_text()
        unmarked = lines_in_strings(source)
        for number, line in enumerate(source.splitlines(), 1):
            is_new = line.removesuffix(MARK).strip() not in known  # a line that is only indented isn't
            new += is_new
            marked = is_new and number not in unmarked
            assert line.endswith(MARK) == marked, f"{path}, line {number}"
    assert new <= 40, folder


@pytest.mark.parametrize("step", STEPS[:4], ids=str)
def test_the_first_steps_are_printed_in_full(step):
    assert step.text == (FOLDERS[STEPS.index(step)] / "app.py").read_text()


@pytest.mark.parametrize("step", STEPS[4:], ids=str)
def test_the_printed_pieces_of_the_other_steps_stand_in_their_files(step):
    folder, name, piece, printed = FOLDERS[STEPS.index(step)], "app.py", [], 0
    for number, line in enumerate([*step.text.splitlines(), "    ..."], step.line + 1):
        file = re.fullmatch(r"# (\w+\.py)", line)
        if line == "    ..." or file:
            text, where = "\n".join(piece), f"{step.page}, before line {number}"
            assert f"\n{text}\n" in "\n" + (folder / name).read_text(), where
            name, piece = file[1] if file else name, []
        else:
            piece.append(line)
            printed += line.endswith(MARK)
    # The rest are imports and the like, of which there is nothing to say.
    new = sum(path.read_text().count(f"{MARK}\n") for path in folder.glob("*.py"))
    assert printed >= new / 3, step


# --- Calls ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts a step's program, once; it returns that, and its pretend Claude."""
    with contextlib.ExitStack() as stack:
        started = {}

        def start(number):
            if number not in started:
                folder = shutil.copytree(PROGRAMS / number, tmp_path_factory.mktemp("steps") / number)
                claude = stack.enter_context(Claude())
                environ = {"ANTHROPIC_API_KEY": KEY, "ANTHROPIC_BASE_URL": claude.url, "TWILIO_AUTH_TOKEN": "a-token"}
                app = stack.enter_context(ForkedApp(environ, folder=folder))
                app.database = folder / "calls.db"
                stack.callback(app.kill)  # nobody is on the phone any more, so nothing has to end gracefully
                started[number] = app, claude
            return started[number]

        yield start


def marks(conversation):
    """A conversation in which the program waits for Claude for six seconds is for the slow group."""
    return [pytest.mark.slow] if "(Claude takes its time.)" in conversation.text else []


@pytest.mark.parametrize("conversation", [pytest.param(one, marks=marks(one), id=str(one)) for one in CONVERSATIONS])
def test_the_caller_hears_what_the_tutorial_promises(conversation, start):
    replay(conversation, *start(number_of(conversation)))


@pytest.mark.slow
def test_the_first_sentence_is_said_while_the_second_is_written(start):
    promised = PAGE.only("xml")
    app, claude = start(number_of(promised))
    (conversation,) = (one for one in CONVERSATIONS if number_of(one) == number_of(promised))
    words = re.findall('"([^"]+)"', promised.before)[-1]
    (reply,) = re.findall(rf"(?m)^You: {re.escape(words)}\nLine: (.*)$", conversation.text)
    claude.when(words, Reply(reply, pace=40))
    phone = call(app)
    phone.call()
    assert phone.say(words) == reply
    first_answer = re.sub(r"turn=\d+", "turn=1", phone.documents[1].decode())
    assert without_layout(first_answer) == without_layout(promised.text), promised
    three = "This is number one. This is number two. And three."
    claude.when("Count to three.", Reply(three, pace=40))
    assert phone.say("Count to three.") == three


@pytest.mark.parametrize("number", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("14", "15")), "16"])
def test_a_reply_that_nobody_waits_for_stops_growing(number, start):
    """Its stream is closed after the caller has gone on, and after the caller has hung up."""
    app, claude = start(number)
    phone = call(app)
    phone.call()
    for words, go_on in [("Tell me.", lambda: phone.say("Hello?")), ("Go on.", phone.hang_up)]:
        claude.when(words, Reply("This is a sentence. " * 400, pace=100))
        begun = {"CallSid": phone.call_sid, "SpeechResult": words}
        assert phone.request("POST", "/talking", begun).status == 200
        go_on()
        (request,) = claude.asked(words)
        wait_until(lambda request=request: request.finished)
        assert request.tokens_sent < 1600, "it was read to its end"
    assert "You said: Hello?" in [text for text, *_ in phone.said]


def test_a_tool_that_fails_does_not_end_the_call(start):
    app, claude = start("16")
    words = "What time is it in Atlantis?"
    blocks = [Tool("clock", {"time_zone": zone}) for zone in ("Atlantis", "Asia/Tokyo")]
    claude.when(words, Reply("Let me see.", blocks=blocks, then=Reply("It has no time.")))
    phone = call(app)
    phone.call()
    assert phone.say(words) == "Let me see. It has no time."
    results = claude.asked(words)[-1].results
    assert [failed for _, failed in results] == [True, False]


def without_layout(xml):
    return ElementTree.canonicalize(xml, strip_text=True)


# --- The way to the real code ---------------------------------------------------------------------


def sections():
    """The sections of the real files, as the table at the end of the tutorial names them."""
    for name, source in CODE.items():
        banners = re.findall(r"(?m)^ *# --- (.+?)(?: -+)?$", source)
        yield from [f"`{name}`: {banner}" for banner in banners]


def test_the_real_code_has_all_functions_of_the_last_step():
    for name, source in CODE.items():
        functions = re.findall(r"(?m)^ *def (\w+)", (FOLDERS[-1] / name).read_text())
        assert functions and set(functions) <= set(re.findall(r"(?m)^ *def (\w+)", source)), name


def test_each_section_of_the_real_files_is_explained():
    rows = PAGE.table("section")
    assert [row.cells[0] for row in rows] == [*sections()]
    for row in rows:
        (name,) = code_in(row.cells[0])
        for code in code_in(row.cells[2]):
            assert code.startswith("<") or code in CODE[name], f"{row}: {code}"
        for step in re.findall(r"\d+", row.cells[1]):
            assert 1 <= int(step) <= len(STEPS), row
