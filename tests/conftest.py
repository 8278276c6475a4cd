"""Pytest's options and the fixtures. What they give is explained in stage.py."""

import contextlib
from multiprocessing import forkserver

import pytest

from tests import forked  # noqa: F401  (which says what to load)
from tests.claude import Claude
from tests.stage import ROOT, Stage, report_of_calls


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests, too: they need Postgres, Chromium and gcc")
    parser.addoption("--postgres", action="store_true", help="keep all calls in a Postgres, on two machines")


def pytest_configure(config):
    forkserver.ensure_running()  # it loads the large libraries while pytest collects the tests
    config.addinivalue_line("markers", "slow: takes long or needs other programs, so it runs with --all only")
    config.addinivalue_line("markers", "needs(*extras): runs only while these files are in extras/")


def pytest_collection_modifyitems(config, items):
    """Leave out the slow tests, and those whose extras were removed."""

    def wanted(item):
        extras = [name for marker in item.iter_markers("needs") for name in marker.args]
        there = all((ROOT / "extras" / f"{name}.py").exists() for name in extras)
        return there and (config.getoption("all") or not item.get_closest_marker("slow"))

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


def pytest_runtest_setup(item):
    Stage.calls.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Show in a failure what the caller heard, and the app's log."""
    report = yield
    if report.failed:
        report.sections += report_of_calls()
    return report


@pytest.fixture(scope="session")
def stage(pytestconfig):
    with contextlib.ExitStack() as stack:
        claude = stack.enter_context(Claude())
        if pytestconfig.getoption("postgres"):
            from tests.postgres import Server, StageWithPostgres

            stage = StageWithPostgres(claude, stack.enter_context(Server()))
        else:
            stage = Stage(claude)
        yield stage
        stage.end()


@pytest.fixture
def claude(stage):
    return stage.claude


@pytest.fixture
def logged(stage):
    """A function that returns what the shared app has printed since this test began."""
    before = len(stage.app.log())
    return lambda: stage.app.log()[before:]


@pytest.fixture
def phone(stage):
    """A phone, and after the test a look at what Twilio would have complained about."""
    phone = stage.phone()
    yield phone
    if not phone.ended:
        phone.hang_up()
    assert phone.warnings == []


@pytest.fixture
def strict_phone(stage, app):
    """A phone for the ``app`` of the test file, and after the test also a look at the requests that Claude refused."""
    phone, refused = stage.phone(app), len(stage.claude.refused)
    yield phone
    if not phone.ended:
        phone.hang_up()
    assert phone.warnings == [] and stage.claude.refused[refused:] == []


@pytest.fixture
def two_processes(app, other_process, phone):
    """A phone whose requests go to two processes in turns."""

    def next_process(heard):
        phone.url = other_process.url if phone.url == app.url else app.url

    phone.on_hearing = next_process
    return phone
