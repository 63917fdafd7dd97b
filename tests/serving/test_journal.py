"""The journal: what it gives back after a restart, whatever moment the last life ended in, and how large it grows."""

import itertools
import math
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moe_jax.request import Request, SamplingParams, TokenEvent
from serving.epoch import Epoch
from serving.journal import Journal
from serving.ledger import Entry, Ledger

ROOT = Path(__file__).parents[2]


def new_entry(key=1, request_id="a", seed=2**64 - 1, **params):
    return Entry(key, Request(request_id, [1, 2**31 - 1, 3], SamplingParams(**params), eos_token_ids=[7]), seed)


def event(entry, reason=None, top=((4, -0.5), (5, -math.inf))):
    """The next token of an entry, taken."""
    index = len(entry.tokens)
    new = TokenEvent(entry.asked.request_id, index, 100 + index, -1 / (index + 3), top, reason)
    entry.append(new)
    return entry, new


def contents(entry):
    return entry.key, entry.asked, entry.seed, entry.events()


def test_state(tmp_path):
    journal = Journal(tmp_path / "j")
    assert journal.last_numbers == (0, 0, 0) and journal.last_epoch is None and journal.get("service") is None
    slots = np.arange(12, dtype=np.int32).reshape(2, 3, 2)
    for number in range(1, 150):
        journal.epoch(Epoch(number, 2, (2, 0), (9, 4), (1, 0), slots + number))
    journal.numbers(149, 9, 2)
    journal.put("service", {"address": "127.0.0.1:1", "pid": 12})
    journal.close()
    journal = Journal(tmp_path / "j")
    assert journal.last_numbers == (149, 9, 2) and journal.get("service") == {"address": "127.0.0.1:1", "pid": 12}
    epoch = journal.last_epoch
    assert epoch is not None and np.array_equal(epoch.slots, slots + 149) and epoch.slots.dtype == np.int32
    assert (epoch.number, epoch.generation) == (149, 2)
    assert (epoch.order, epoch.incarnations, epoch.nodes) == ((2, 0), (9, 4), (1, 0))
    assert journal._select("SELECT min(number), max(number) FROM epochs") == [(50, 149)]


def test_numbers_of_no_life_meet(tmp_path):
    first = []
    for _ in range(3):
        journal = Journal(tmp_path / "j")
        first.append(journal.first_number)
        journal.close()
    assert first[0] == 1 and min(b - a for a, b in itertools.pairwise(first)) >= 10**9 and first[2] < 2**53


def test_requests_come_back_as_they_were(tmp_path):
    journal = Journal(tmp_path / "j")
    one = new_entry(1, "one", temperature=0.7, stop=["x", "\N{SNOWMAN}"], stop_token_ids=[3], logprobs=2)
    two = new_entry(2, "two", seed=5)
    for entry in (one, two):
        journal.accept(entry)
    for _ in range(3):
        journal.tokens([event(one), event(two, top=())])
    journal.tokens([])
    journal.close()
    journal = Journal(tmp_path / "j")
    again = journal.unfinished
    assert [contents(e) for e in again] == [contents(one), contents(two)]
    # They go on, and the tokens of the next life follow those of the first.
    ledger = Ledger(lambda: 0, journal.first_number)
    ledger.restore(again)
    assert ledger.accept(again[0].asked) == (again[0], False)
    journal.tokens([event(again[0]), event(again[1], "stop")])
    journal.finish(again[1])
    journal.close()
    journal = Journal(tmp_path / "j")
    assert [e.tokens.tolist() for e in journal.unfinished] == [[100, 101, 102, 103]]


def test_not_a_number_comes_back(tmp_path):
    journal, entry = Journal(tmp_path / "j"), new_entry()
    journal.accept(entry)
    new = TokenEvent("a", 0, 1, math.nan)
    entry.append(new)
    journal.tokens([(entry, new)])
    journal.close()
    assert math.isnan(Journal(tmp_path / "j").unfinished[0].logprobs[0])


def test_ended_requests_are_kept_for_a_while():
    now = 1000.0
    journal = Journal(keep=3, keep_s=60, clock=lambda: now)
    for key in range(1, 6):
        entry = new_entry(key, f"r{key}")
        journal.accept(entry)
        assert journal.ended(f"r{key}") is None
        journal.tokens([event(entry), event(entry, "length" if key % 2 else None)])
        journal.finish(entry)
        kept = journal.ended(f"r{key}")
        assert kept is not None and kept.ended and contents(kept) == contents(entry)
    assert [journal.ended(f"r{key}") is not None for key in range(1, 6)] == [False, False, True, True, True]
    journal.accept(new_entry(10, "r5"))  # the id of one that has ended is free, for those who do not ask
    assert journal.ended("r5") is None
    now += 61
    cancelled = new_entry(11, "cancelled")
    journal.accept(cancelled)
    journal.tokens([event(cancelled)])
    cancelled.finish_reason = "abort"
    journal.finish(cancelled)
    assert journal._select("SELECT key FROM requests") == [(10,)] and not journal._select("SELECT key FROM outputs")


def test_a_last_token_is_an_end(tmp_path):
    journal, entry = Journal(tmp_path / "j"), new_entry()
    journal.accept(entry)
    journal.tokens([event(entry), event(entry, "length")])
    journal.close()
    journal = Journal(tmp_path / "j")
    kept = journal.ended("a")
    assert journal.unfinished == [] and kept is not None and contents(kept) == contents(entry)


def test_a_transaction_is_kept_whole_or_not_at_all(tmp_path):
    journal, entry = Journal(tmp_path / "j"), new_entry()
    with journal.transaction():
        journal.accept(entry)
        journal.tokens([event(entry)])
    with pytest.raises(KeyError), journal.transaction():
        journal.tokens([event(entry)])
        journal.put("x", 1)
        raise KeyError
    with pytest.raises(sqlite3.Error):
        journal.put("x", 1)
    journal = Journal(tmp_path / "j")
    assert len(journal.unfinished[0].tokens) == 1 and journal.get("x") is None


def test_one_process_at_a_time_and_nobody_elses_file(tmp_path):
    journal = Journal(tmp_path / "j")
    assert stat.S_IMODE((tmp_path / "j").stat().st_mode) == 0o600
    script = f"from serving.journal import Journal; Journal({str(tmp_path / 'j')!r})"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "in use by another process" in run.stderr
    journal.close()
    (tmp_path / "text").write_text("no database, and longer than a header of sqlite: " + "x" * 200)
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE t (x)")
    other.execute("PRAGMA user_version = 2")
    other.commit()
    for name in ("text", "other"):
        with pytest.raises(ValueError, match=f"{name}: found .*journal.*: move it away"):
            Journal(tmp_path / name)


@pytest.mark.parametrize("span", [1, 40, 600])
@pytest.mark.parametrize("seed", range(3))
def test_the_log_stays_short_and_loses_nothing(tmp_path, seed, span):
    rng, path = random.Random(seed), tmp_path / "j"
    journal, entries, keys = Journal(path, keep=4, span=span), [], itertools.count(1)
    for _ in range(3):
        for _ in range(rng.randrange(1, 200)):
            if not entries or (len(entries) < 70 and rng.random() < 0.2):
                entries.append(new_entry(key := next(keys), str(key), logprobs=rng.choice([None, 2])))
                journal.accept(entries[-1])
            some = rng.sample(entries, rng.randrange(len(entries) + 1))
            journal.tokens([event(entry, top=() if entry.key % 2 else ((1, -0.5),)) for entry in some])
            if rng.random() < 0.1:
                journal.finish(entries.pop(rng.randrange(len(entries))))
            rows = journal._select("SELECT count(*) FROM log")[0][0]
            assert rows <= span + 512 + 64 * 70 and len(journal._kept) <= 4
        journal.close()
        journal = Journal(path, keep=4, span=span)
        assert [contents(e) for e in journal.unfinished] == [contents(e) for e in entries]
        entries = journal.unfinished
    journal.close()


def test_the_file_stays_small(tmp_path):
    """While one request goes on for ever and others come and go."""
    journal = Journal(tmp_path / "j", keep=8, span=1000)
    forever, sizes = new_entry(), []
    journal.accept(forever)
    for key in range(2, 152):
        entry = new_entry(key, str(key))
        journal.accept(entry)
        with journal.transaction():
            for _ in range(50):
                journal.tokens([event(entry, top=()), event(forever, top=())])
        journal.finish(entry)
        sizes.append(sum(f.stat().st_size for f in tmp_path.iterdir()))
    assert journal._select("SELECT count(*) FROM log")[0][0] < 2000
    assert max(sizes[100:]) < 1.1 * max(sizes[:100]) + 8 * 12 * 50  # twelve bytes a token of the one
    journal.close()
    assert len(Journal(tmp_path / "j").unfinished[0].tokens) == 150 * 50


WRITER = """
import itertools, sys
sys.path[:0] = ["tests", "tests/serving"]
from test_journal import Journal, event, new_entry
journal, entries = Journal(sys.argv[1], span=200), []
for step in itertools.count(1):
    if step % 7 == 1:
        entries.append(new_entry(journal.first_number + step, f"{journal.first_number}-{step}"))
        journal.accept(entries[-1])
    journal.tokens([event(entry, top=()) for entry in entries[-3:]])
    journal.numbers(step, 0, 0)
    print(step, *(f"{entry.key}:{len(entry.tokens)}" for entry in entries[-3:]), flush=True)
"""


def test_killed_while_writing(tmp_path):
    """What the process said it had committed is there, wherever it was killed."""
    said: dict[int, int] = {}
    for turn in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "j")], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(0.05 + 0.03 * turn)
        os.kill(process.pid, signal.SIGKILL)
        lines += process.stdout.read().splitlines(keepends=True)
        process.stdout.close()
        process.wait()
        whole = [line.split() for line in lines if line.endswith("\n")]
        assert len(whole) > 10
        for _, *pairs in whole:
            said |= {int(key): int(count) for key, count in (pair.split(":") for pair in pairs)}
        journal = Journal(tmp_path / "j")
        assert journal.last_numbers[0] - int(whole[-1][0]) in (0, 1)
        found = {entry.key: entry.tokens.tolist() for entry in journal.unfinished}
        assert set(said) <= set(found)
        for key, tokens in found.items():
            assert tokens == list(range(100, 100 + len(tokens)))
            assert len(tokens) - said.get(key, len(tokens)) in (0, 1)
        said = {key: len(tokens) for key, tokens in found.items()}
        assert journal._select("PRAGMA integrity_check") == [("ok",)]
        journal.close()
