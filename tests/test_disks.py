"""Disks that can't share memory, as WSL's /mnt/c: there SQLite's WAL mode seems to work, and then doesn't."""

import contextlib
import pathlib
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import cannot_run

# A file can't be mapped into memory for writing that others see.
NO_SHARED_MEMORY = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/mman.h>

static void *map(const char *name, void *at, size_t size, int protection, int flags, int file, off_t offset) {
    void *(*real)(void *, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, name);
    if (file >= 0 && flags & MAP_SHARED && protection & PROT_WRITE) {
        errno = ENODEV;
        return MAP_FAILED;
    }
    return real(at, size, protection, flags, file, offset);
}
void *mmap(void *a, size_t b, int c, int d, int e, off_t f) { return map("mmap", a, b, c, d, e, f); }
void *mmap64(void *a, size_t b, int c, int d, int e, off_t f) { return map("mmap64", a, b, c, d, e, f); }
"""


@pytest.fixture(scope="module")
def no_shared_memory(tmp_path_factory):
    """A library that makes every disk one of these."""
    compiler = shutil.which("cc")
    if not (compiler and sys.platform == "linux"):
        cannot_run("needs Linux, and a compiler for C")
    path = tmp_path_factory.mktemp("disk") / "no_shared_memory.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-xc", "-", "-o", path, "-ldl"], input=NO_SHARED_MEMORY,
                   text=True, check=True)
    return str(path)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_calls_are_carried_on_a_disk_without_shared_memory(stage, no_shared_memory, workers):
    with stage.other_app(LD_PRELOAD=no_shared_memory, WEB_CONCURRENCY=workers) as app:

        def call(number):
            phone = stage.phone(app)
            phone.call()
            for turn in range(3):
                assert phone.say(f"Turn {turn} of {number}.") == f"You said: Turn {turn} of {number}."
            phone.hang_up()
            return phone.warnings

        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(call, range(4))) == [[]] * 4
        assert "the database failed" not in app.log() and "Traceback" not in app.log()
        with contextlib.closing(sqlite3.connect(app.database)) as database:
            assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert not [path for path in pathlib.Path(app.scratch).iterdir() if path.name.startswith("tmp")]


def test_elsewhere_the_file_is_in_wal_mode(stage):
    with stage.other_app() as app:
        phone = stage.phone(app)
        phone.call()
        phone.say("Hello?")
        with contextlib.closing(sqlite3.connect(app.database)) as database:
            assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
