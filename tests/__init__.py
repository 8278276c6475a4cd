"""The tests are phone calls, and beside them stand the programs that they call with.

Programs, each of which also runs on its own:

    python -m tests.phone    a telephone, with a pretend Twilio behind it: calls the line
                             (with --browser it is a page: browser.py, .html, .css and .js)
    python -m tests.claude   a pretend Claude: answers the line as Anthropic's API does
    python -m tests.bench    measures how long callers wait, and what a turn costs

In steps/ are the sixteen programs of the README's tutorial, in sse/ are streams as gateways send them.

Tests, all of which ``python -m pytest`` runs:

    conftest.py              the stage: the apps, the phones and the pretend Claudes that the tests share
    test_call.py             a call as the caller hears it, and what Claude is sent
    test_trouble.py          Claude fails, in every way it can
    test_hard_to_kill.py     processes die, disks fill up, callers hang up
    test_who_may_call.py     only Twilio gets in, and only for those who may call
    test_tools.py            what Claude can do: tools, also one's own, and a look into the web
    test_languages.py        a call in more than one language
    test_hand_over.py        a call is handed over to a person
    test_memory.py           what the line remembers of earlier calls, and for how long
    test_pin.py              a lock before everything else
    test_limits.py           the limit of a day, and what a caller has really heard
    test_connect.py          ``flask connect`` and ``flask ring``
    test_readme.py           the README keeps its word
    test_postgres.py         the same line on two machines, with a Postgres (tests/postgres.py starts one)
    test_unnoticed.py        what could break without anybody noticing
    test_attacks.py          strangers, disks and servers that mean harm, or seem to
    test_owner.py            what the owner reads at the start, and in the log
    test_phone.py            the telephone is as strict as Twilio
    test_claude.py           the pretend Claude is as strict as Anthropic's API
    test_browser.py          the telephone in the browser
    test_gateways.py         gateways between the app and Claude, and proxies
    test_disks.py            disks on which SQLite's WAL mode doesn't work
    test_extras.py           each extra can be removed, and a missing one stops the start
"""
