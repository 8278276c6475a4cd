"""The tests are phone calls. The programs that make them stand apart from them.

Programs, each of which also runs on its own:

    python -m tests.phone    a telephone with a pretend Twilio behind it: calls the line
                             (with --browser it is a page: browser.py, .html, .css and .js)
    python -m tests.claude   a pretend Claude: answers the app as Anthropic's API does
    python -m tests.bench    measures how long callers wait, and what a turn costs
    python -m tests.deploy   replaces the app while four people talk with it

What the tests share:

    conftest.py     options and fixtures
    stage.py        the apps, the phones and the helpers that more than one file uses
    faster.py       the app with shorter waits: the only thing that tests change in it
    forked.py       starts programs quickly
    own_tools.py    tools that a learner might write
    pages.py        reads the documents and replays their conversations
    account.py      an owner at a terminal, and a pretend Twilio account
    chromium.py     a browser without a window; it also takes the picture in the README
    postgres.py     a Postgres server of the tests' own

The tests:

    core/       the phone line: a call, trouble with Claude, the store, processes, access, the log ...
    extras/     one file for each optional feature, which is deleted along with it
    programs/   the telephone is as strict as Twilio, and the pretend Claude as Anthropic's API
    docs/       the documents keep their word

``python -m pytest`` runs the quick ones. ``python -m pytest --all`` also runs those marked as slow, which kill
processes, fill disks, wait in real time, and need a Postgres, a browser and a compiler.
"""
