"""What the journal promises: nothing written is lost, a torn end is cut, another configuration is refused."""

import pytest

from trl_offpolicy.journal import Journal


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


def test_damaged_middle_is_an_error(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, {}).close()
    with path.open("a") as file:
        file.write('{"id": \n{"id": "b"}\n')
    with pytest.raises(ValueError, match="Line 2 of .* is not JSON"):
        list(Journal(path, {}).entries())


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
