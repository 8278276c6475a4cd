"""The documents keep their word: calls, names, defaults, commands, log lines and links are those of the code."""

import re
import subprocess

import pytest

import conversation
from extras import EXTRAS as EXTRAS_LIST
from tests.claude import KEY, Claude, Reply
from tests.pages import Page, call, code_in, replay, strings_in
from tests.phone import ROOT
from tests.stage import ForkedApp, names_of_settings, read_all_settings, turn_is_logged

README, DEPLOYING, TROUBLE_PAGE, WORKERS, TUTORIAL = (Page(path) for path in (
    "README.md", "docs/deploying.md", "docs/trouble.md", "docs/from-workers.md", "docs/tutorial/README.md"))
PAGES = [Page(str(path.relative_to(ROOT))) for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]]
CODE = {name: (ROOT / name).read_text() for name in ("app.py", "conversation.py", "store.py")}
SHIPPED = [
    "postgres", "pin", "memory", "after_call", "languages", "hand_over", "web_search", "think_ahead", "commands", "errand"]
EXTRAS = {path.name: path.read_text() for path in (ROOT / "extras").glob("*.py")}


@pytest.fixture(scope="module")
def claude():
    """A Claude of its own, as the conversations are scripted by what the caller says."""
    with Claude() as claude:
        yield claude


@pytest.fixture(scope="module")
def app(claude):
    with ForkedApp({"ANTHROPIC_API_KEY": KEY, "ANTHROPIC_BASE_URL": claude.url}) as app:
        yield app


@pytest.fixture(scope="module")
def app_module():
    """``app.py``, as it is without settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name in names_of_settings():
            patch.delenv(name, raising=False)
        import app
    return app


def test_the_readme_is_short():
    assert len(README.text.splitlines()) <= 220


def test_the_caller_hears_what_the_readme_promises(app, claude):
    (conversation,) = README.conversations()
    replay(conversation, app, claude)


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (ROOT / page.path).parent / path if path else ROOT / page.path
        assert target.exists(), f"{page.path}: {link}"
        if anchor:
            assert anchor in Page(str(target.resolve().relative_to(ROOT))).anchors(), f"{page.path}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path)
def test_every_file_that_is_named_exists(page):
    named = set(re.findall(r"`([\w./-]+\.(?:py|txt|md)|Procfile)`", page.prose))
    own = {"extras/open_hours.py", "tests/extras/test_open_hours.py", "tests/test_my_tools.py"}  # the reader writes these
    folders = [ROOT, (ROOT / page.path).parent, ROOT / "docs/tutorial/16"]
    assert {name for name in named - own if not any((folder / name).exists() for folder in folders)} == set()


def test_the_counterparts_of_the_durable_object_stand_in_the_code():
    for row in WORKERS.table("there"):
        for code in code_in(" ".join(row.cells[1:])):
            assert code in CODE or any(code in source for source in CODE.values()), f"{row}: {code}"


def test_the_webhook_waits_as_long_as_the_tutorial_says():
    (seconds,) = re.findall(r"looks at the row\s+for (\d+)\sseconds", TUTORIAL.prose)
    assert float(seconds) == conversation.PATIENCE


def routes(app_module):
    return {rule.rule for rule in app_module.app.url_map.iter_rules()} - {"/static/<path:filename>"}


def test_the_diagram_shows_the_routes_and_everyone_in_it(app_module):
    diagram = README.only("mermaid")
    assert diagram.text.startswith("sequenceDiagram\n"), diagram
    shown = set(re.findall(r"POST (/[\w/]*)", diagram.text))
    assert {"/", "/talking", "/status_callback"} <= shown <= routes(app_module), diagram
    arrows = re.findall(r"(?m)^ +([\w.]+?)--?>>([\w.]+): ", diagram.text)
    declared = re.findall(r"(?m)^ +(?:actor|participant) ([\w.]+)", diagram.text)
    assert {name for arrow in arrows for name in arrow} == set(declared), diagram


def test_the_three_urls_are_those_of_the_app(app_module):
    rows = DEPLOYING.table("Twilio's name for it")
    assert len(rows) == 3
    for row in rows:
        name, url, _ = row.cells
        path, hash_sign, retries = url.strip("`").removeprefix("https://…").partition("#")
        assert path in routes(app_module) and hash_sign + retries == "#" + app_module.RETRIES, row
        assert name in CODE["app.py"], f"{row}: the app's own page calls it something else"


# --- Commands -------------------------------------------------------------------------------------


def test_the_two_commands_are_the_ones_that_are_tested():
    """``.ci/run`` and the workflow run the second one. The first differs from it only in the module that it starts."""
    telephone, tests = (block for block in README.blocks if "pip install -qr" in block.text)
    assert tests.text.strip() in (ROOT / ".ci/run").read_text().splitlines(), tests
    assert telephone.text == tests.text.replace("-m pytest", "-m tests.phone"), telephone
    workflow = (ROOT / ".github/workflows/tests.yml").read_text()
    assert f"- run: {tests.text.strip()}\n" in workflow and "- run: .ci/run\n" in workflow


def test_the_app_is_started_as_in_the_procfile_everywhere():
    assert (ROOT / "Procfile").read_text().strip() == "web: gunicorn app:app"
    commands = {found for page in PAGES for found in re.findall(r"gunicorn app:app[^`\n]*", page.text)}
    assert commands == {"gunicorn app:app"}
    (command_of_the_procfile,) = re.findall(r"\$\((.*)\)", DEPLOYING.only("dockerfile").text)
    found = subprocess.run(["sh", "-c", command_of_the_procfile], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == "gunicorn app:app"


def test_the_example_of_a_log_line_looks_like_a_real_one(app, claude):
    (example,) = re.findall(r"(?m)^INFO call .*$", DEPLOYING.text)
    phone = call(app)
    phone.call()
    phone.say("Is this logged?")

    def shape(line):
        return re.sub(r"CA\w+|req_\w+|\d+", "...", line)

    assert shape(turn_is_logged(app, phone)) == shape(example)


@pytest.mark.needs("commands")
def test_every_flask_command_exists(app_module):
    commands = app_module.app.cli.commands
    used = {name for page in PAGES for name in re.findall(r"(?:`|bin/)flask (\w+)", page.text)}
    assert used - {"run"} <= set(commands)  # "run" is Flask's own
    used -= {"run"}
    for command in used - {"calls"}:
        assert "--number" in [option for parameter in commands[command].params for option in parameter.opts]


# --- Settings -------------------------------------------------------------------------------------

SETTINGS = {row.cells[0].strip("`"): row for row in README.table("name")}
FEATURES = README.table("setting")


def test_every_setting_of_the_core_is_listed():
    import app

    core = {name.upper() for name in app.Settings.__dataclass_fields__}
    assert core <= set(SETTINGS) <= core | {"TWILIO_ACCOUNT_SID"}


@pytest.mark.parametrize("row", FEATURES, ids=str)
def test_a_feature_is_switched_on_as_the_readme_says(row):
    setting, _, file = row.cells
    name, _, value = setting.strip("`").partition("=")
    if (ROOT / file.strip("`")).exists():  # it isn't if somebody has removed the feature
        assert name in EXTRAS_LIST[file.strip("`").removeprefix("extras/").removesuffix(".py")], row
        read_all_settings({name: value})


def test_every_feature_is_listed():
    assert {f"extras/{name}.py" for name in SHIPPED} == set(re.findall(r"`(extras/\w+\.py)`", README.prose))


@pytest.mark.parametrize("name", sorted(set(SETTINGS) & set(names_of_settings())))
def test_a_default_is_the_one_in_the_code(name):
    row = SETTINGS[name]
    default = row.cells[1]
    unset = vars(read_all_settings({}))
    if default == "none":
        assert not unset.get(name.lower()), row
    elif default.startswith("in `"):
        (file,) = code_in(default)
        assert unset[name.lower()] in strings_in(CODE[file]), row
    else:
        assert str(unset[name.lower()]) == default.strip("`"), row


# --- When a call goes wrong -----------------------------------------------------------------------

TROUBLE = TROUBLE_PAGE.table("the caller hears")
ERRORS = [row for row in TROUBLE if re.search(r"Error \d", row.cells[1])]
STRINGS = [" ".join(text.split()) for source in [*CODE.values(), *EXTRAS.values()] for text in strings_in(source)]


@pytest.mark.parametrize("row", TROUBLE, ids=str)
def test_the_words_and_log_lines_stand_in_the_code(row):
    heard, logged, _ = row.cells
    # These name errors of libraries; other tests compare them with the log.
    real = row in ERRORS or "APIConnectionError" in logged or "OperationalError" in logged
    phrases = re.findall('"([^"]+)"', heard) + ([] if real else code_in(logged))
    for phrase in phrases:
        for piece in phrase.split("…"):
            assert any(piece.strip() in text for text in STRINGS), f"{row}: {piece}"


@pytest.mark.parametrize("row", ERRORS, ids=str)
def test_an_error_of_claudes_sounds_and_looks_as_it_says(row, app, claude):
    heard, logged, _ = row.cells
    status = int(re.search(r"\d+", logged)[0])
    words = f"This will be answered with {status}."
    claude.when(words, Reply(status=status, retry_after="60"))
    phone = call(app)
    phone.call()
    assert phone.say(words).startswith(heard.strip('"')), row
    assert logged.strip("`") in turn_is_logged(app, phone), row


def test_a_wrong_signature_sounds_and_looks_as_it_says(app):
    (row,) = (row for row in TROUBLE if "wrong signature" in row.cells[1])
    phone = call(app)
    phone.token = "another token"
    assert row.cells[0].strip('"') in phone.call(), row
    for piece in row.cells[1].strip("`").split("…"):
        assert piece in app.log(), row


def test_a_missing_token_sounds_and_looks_as_it_says():
    (row,) = (row for row in TROUBLE if "set TWILIO_AUTH_TOKEN" in row.cells[1])
    with ForkedApp({"TWILIO_AUTH_TOKEN": ""}) as app:
        assert row.cells[0].strip('"') in call(app).call(), row
        for piece in row.cells[1].strip("`").split("…"):
            assert piece in app.log(), row
