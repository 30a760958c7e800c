"""What the journal promises: nothing written is lost, a torn end is cut, what was damaged is said, another configuration is refused."""

import json
import random
import re
import subprocess
import zlib
from dataclasses import replace

import pytest

from trl_offpolicy.runs.journal import Journal, read_attempts, read_entries, read_header


def attempts(number):
    """Entries as a rewrite journals them, no two alike."""
    rng = random.Random(3)
    return [
        {
            "id": f"{rng.getrandbits(64):016x}", "stage": rng.choice(["self", "guided"]), "attempt": i, "verdict": rng.choice(["correct", "wrong"]),
            "finish_reason": "stop", "num_tokens": 3, "log_prob": -0.5, "reason": "", "text": f'J*"{rng.random()}\n\\boxed{{{i}}} ü',
            "completion_ids": [rng.randrange(100) for _ in range(3)], "behavior_log_probs": [-0.5, -0.25, -0.75],
        }
        for i in range(number)
    ]  # fmt: skip


def written(path, entries, config):
    journal = Journal(path, config)
    offsets = [journal.append(entry) for entry in entries]
    journal.close()
    return offsets


def without_checksums(path):
    """The file as it was written before there were any."""
    path.write_bytes(re.sub(rb',"crc32":"[0-9a-f]{8}"}\n', b"}\n", path.read_bytes()))


def test_round_trip_and_offsets(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {"seed": 1, "stages": ("self",)})
    entries = [{"id": f"p{i}", "text": "ü\n\ud800" * i} for i in range(5)]
    offsets = [journal.append(e) for e in entries]
    journal.close()
    again = Journal(path, {"seed": 1, "stages": ["self"]})
    assert list(again.entries()) == list(zip(offsets, entries, strict=True))
    assert [again.read(o) for o in offsets] == entries


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_torn_last_line_is_cut_off(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {})
    journal.append({"id": "kept"})
    journal.append({"id": "torn", "text": "x" * 60})
    journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path, {})
    assert [e["id"] for _, e in again.entries()] == ["kept"]
    offset = again.append({"id": "next"})
    assert [e["id"] for _, e in again.entries()] == ["kept", "next"] and again.read(offset) == {"id": "next"}


def test_a_line_that_is_being_written_is_not_read_in_two_parts(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path, attempts(3), {})
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    reading = read_entries(path)
    found = [next(reading)[1]]
    path.write_bytes(whole)
    assert [*found, *(entry for _, entry in reading)] == attempts(3)[:2]


def test_torn_header_starts_afresh(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"config":{"se')
    journal = Journal(path, {"seed": 1})
    assert list(journal.entries()) == []
    journal.close()
    Journal(path, {"seed": 1}).close()


def test_other_configuration_names_field_and_ways_out(tmp_path):
    Journal(tmp_path / "journal.jsonl", {"seed": 1, "temperature": 1.0}).close()
    with pytest.raises(
        ValueError, match="`temperature` was 1.0 there and is 0.7 now.*another `output_dir`.*--overwrite"
    ):
        Journal(tmp_path / "journal.jsonl", {"seed": 1, "temperature": 0.7})


def test_every_line_ends_with_the_checksum_of_the_rest(tmp_path):
    path, entries = tmp_path / "journal.jsonl", attempts(5)
    written(path, entries, {"seed": 1})
    for line, entry in zip(path.read_bytes().splitlines(), [{"config": {"seed": 1}}, *entries], strict=True):
        content, checksum = line.rsplit(b',"crc32":"', 1)
        assert json.loads(line) == {**entry, "crc32": f"{zlib.crc32(content):08x}"} and checksum.endswith(b'"}')


# Lines as they were written before there was `Attempt`: all that may be left out is there, is left out, and is empty.
LINES = [
    b'{"id":"9f86d081884c7d65","stage":"self","attempt":0,"verdict":"wrong","finish_reason":"length","num_tokens":2,"log_prob":-0.25,"reason":"","text":"\\u00fc","completion_ids":[5,0],"behavior_log_probs":[-0.5,0.0],"crc32":"d759c6fa"}',
    b'{"id":"9f86d081884c7d65-2","stage":"guided","attempt":3,"verdict":"correct","finish_reason":"stop","num_tokens":2,"log_prob":-0.25,"reference":7,"rejected":"stub","reason":"has 2 words","crc32":"72f7fd43"}',
    b'{"id":"9f86d081884c7d65","stage":"self","attempt":0,"verdict":"error","finish_reason":"error","num_tokens":0,"log_prob":null,"reason":"no server","text":"","completion_ids":[],"behavior_log_probs":[],"crc32":"11b650f4"}',
]


def test_a_finished_runs_journal_that_is_empty_now_is_said(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.touch()
    Journal(path, {"stages": ["self"]}).close()  # a run that was killed at once: nothing is lost
    (tmp_path / "metrics.json").write_text("{}")
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match="its attempts are lost"):
        Journal(path, {"stages": ["self"]}).close()


def test_an_attempt_is_its_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, {"stages": ["self", "guided"]}).close()
    header = path.read_bytes()
    path.write_bytes(b"".join([header, *(line + b"\n" for line in LINES)]))
    found = list(read_attempts(path))
    assert [(a.id, a.reference, a.rejected, a.reason, a.completion_ids) for a in found] == [
        ("9f86d081884c7d65", 0, "", "", [5, 0]),
        ("9f86d081884c7d65-2", 7, "stub", "has 2 words", None),
        ("9f86d081884c7d65", 0, "", "no server", []),
    ]
    again = tmp_path / "again.jsonl"
    assert len(written(again, [a.entry() for a in found], {"stages": ["self", "guided"]})) == 3
    assert again.read_bytes() == path.read_bytes()
    (head,) = read_attempts(path, {"9f86d081884c7d65-2"}, texts=False)
    assert head == replace(found[1], reason=None)


@pytest.mark.parametrize("how", ["hole", "bit", "zeros"])
@pytest.mark.parametrize("texts", [True, False])
def test_a_damaged_file_gives_no_other_entry(tmp_path, how, texts):
    """What is read back is what was written, less what was in lines that have gone; else the error names the line, and removing it helps."""
    path, entries, config = tmp_path / "journal.jsonl", attempts(6), {"stages": ["self", "guided"]}
    written(path, entries, config)
    whole, rng, told = path.read_bytes(), random.Random(how), 0
    heads = [entry if texts else dict(list(entry.items())[:7]) for entry in entries]
    for _ in range(100):
        start = rng.randrange(len(whole))
        end = rng.randint(start + 1, len(whole))
        if how == "hole":
            data = whole[:start] + whole[end:]
        elif how == "zeros":
            data = whole[:start] + bytes(end - start) + whole[end:]
        else:
            data = bytearray(whole)
            data[start] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        found = None
        while found is None:  # a newline that was flipped, or made, damages two lines
            try:
                found = [entry for _, entry in read_entries(path, texts)]
                assert found == [] or read_header(path) == config
            except ValueError as error:
                told += 1
                (number,) = re.findall(rf"Line (\d+) of {re.escape(str(path))} was changed or damaged", str(error))
                if number == "1":
                    found = []
                else:
                    left = [line for n, line in enumerate(path.read_bytes().splitlines(True), 1) if n != int(number)]
                    path.write_bytes(b"".join(left))
        assert found == [entry for entry in heads if entry in found]  # each once, in order, and no other
    assert told > 60


def test_a_damaged_configuration_is_said_and_can_be_overwritten(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path, attempts(2), {"seed": 1})
    whole, others = path.read_bytes(), path.read_bytes().split(b"\n", 1)[1]
    for data in (whole.replace(b'"seed":1', b'"seed":3'), others, b'{"config":[]}\n', b"[]\n"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="Line 1 of .*configuration of all attempts: put a copy.*--overwrite"):
            Journal(path, {"seed": 3})
    journal = Journal(path, {"seed": 1}, overwrite=True)
    assert journal.overwritten and list(journal.entries()) == []


def test_the_remedy_is_a_command_that_works(tmp_path):
    path = tmp_path / "my run" / "journal.jsonl"
    path.parent.mkdir()
    entries = attempts(3)
    written(path, entries, {})
    path.write_bytes(path.read_bytes().replace(b'"attempt":1', b'"attempt":7'))
    with pytest.raises(ValueError) as error:
        list(read_entries(path))
    subprocess.run(str(error.value).rsplit(": ", 1)[1], shell=True, check=True)
    assert [entry for _, entry in read_entries(path)] == [entries[0], entries[2]]


def test_journals_without_checksums_are_read_and_continued(tmp_path):
    path, entries, config = tmp_path / "journal.jsonl", attempts(600), {"seed": 1, "stages": ["self", "guided"]}
    written(path, entries[:300], config)
    without_checksums(path)
    assert [entry for _, entry in read_entries(path)] == entries[:300]
    written(path, entries[300:], config)
    journal = Journal(path, config)
    assert [entry for _, entry in journal.entries()] == entries
    assert [journal.read(offset) for offset, _ in journal.entries(texts=False)] == entries
    journal.close()
    lines = path.read_bytes().splitlines(True)
    # What has lost its checksum is none of the old ones.
    path.write_bytes(b"".join([*lines[:400], lines[400][:-22] + b"}\n", *lines[401:]]))
    with pytest.raises(ValueError, match=f"Line 401 of {path} was changed .* .its checksum is"):
        list(read_entries(path, texts=False))


@pytest.mark.parametrize(
    ("written_as", "found", "why"),
    [
        (b'"verdict"', b'"verdick"', "it has no verdict"),
        (b'"stage":"guided"', b'"stage":"guidee"', "`stage` is 'guidee'"),
        (b'"attempt":1,', b'"attempt":-1,', "`attempt` is -1"),
        (b'"correct"', b'"corsect"', "`verdict` is 'corsect'"),
        (b'"id":"', b'"id":"g', "`id` is 'g"),
        (b'"num_tokens":3', b'"num_tokens":"3"', "`num_tokens` is '3'"),
        (b'"stop"', b'"stoq"', "`finish_reason` is 'stoq'"),
        (b'"log_prob":-0.5', b'"log_prob":[]', "`log_prob` is"),
        (b'{"id"', b'[{"id"', "Expecting|delimiter"),
    ],
)
def test_a_line_without_a_checksum_must_be_an_attempt(tmp_path, written_as, found, why):
    path = tmp_path / "journal.jsonl"
    written(path, attempts(20), {"stages": ["self", "guided"]})
    without_checksums(path)
    lines = path.read_bytes().splitlines(True)
    number = next(n for n, line in enumerate(lines) if n and written_as in line)
    lines[number] = lines[number].replace(written_as, found)
    path.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=f"Line {number + 1} of {path} was changed or damaged .*({why})"):
        list(read_entries(path, texts=False))


def test_two_journals_in_one_file_are_said(tmp_path):
    """Each line has its checksum, but a second configuration is no attempt."""
    path = tmp_path / "j.jsonl"
    journal = Journal(path, {"seed": 1})
    journal.close()
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match=rf"Line 2 of {path} .*it has no id"):
        list(read_entries(path))


def test_what_is_read_back_is_what_was_asked_for(tmp_path):
    path, entries = tmp_path / "journal.jsonl", attempts(3)
    first, second, third = written(path, entries, {})
    journal = Journal(path, {})
    key = {name: entries[1][name] for name in ("id", "stage", "attempt")}
    assert journal.read(second, key, ["text"]) == entries[1]
    with pytest.raises(ValueError, match=f"Line 4 of {path} .*`id` is '{entries[2]['id']}', not '{entries[1]['id']}'"):
        journal.read(third, key)
    with pytest.raises(ValueError, match=f"Line 2 of {path} .*it has no tokens"):
        journal.read(first, {}, ["text", "tokens"])
    journal.close()
    journal = Journal(path, {})
    path.write_bytes(path.read_bytes().replace(b"boxed{1}", b"boxed{8}"))  # since it was opened
    with pytest.raises(ValueError, match=f"Line 3 of {path} .*checksum"):
        journal.read(second, key)


def test_overwrite_empties_another_configuration_but_resumes_its_own(tmp_path):
    path = tmp_path / "journal.jsonl"
    first = Journal(path, {"seed": 1})
    first.append({"id": "a"})
    first.close()
    second = Journal(path, {"seed": 2}, overwrite=True)
    assert list(second.entries()) == []
    second.append({"id": "b"})
    second.close()
    assert [e["id"] for _, e in Journal(path, {"seed": 2}, overwrite=True).entries()] == ["b"]


def test_two_writers_are_one_too_many(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", {})
    with pytest.raises(ValueError, match="Another process is writing"):
        Journal(tmp_path / "journal.jsonl", {})
    journal.close()
    Journal(tmp_path / "journal.jsonl", {}).close()
