"""Every input format is read, every bad row is named, ids depend on content only."""

import hashlib
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from trl_offpolicy.answers.extraction import final_answer
from trl_offpolicy.data import prompts
from trl_offpolicy.data.formats import carried_columns, demonstration, find_format, output_features, read_rows
from trl_offpolicy.data.loading import load_rows
from trl_offpolicy.data.rows import content_id, number_copies


DATA = Path(__file__).parent / "data"
USER = [{"role": "user", "content": "1+1?"}]
ASSISTANT = [{"role": "assistant", "content": "so \\boxed{2}"}]


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{\\sqrt{a_{3}}}.", "\\sqrt{a_{3}}"),
        ("\\fbox{x}", "x"),
        ("\\boxed 9$", "9"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{1} and \\boxed{2", None),
        ("no box", None),
        ("", None),
    ],
)
def test_boxed_answers(text, box):
    assert final_answer(text) == box


def test_final_answer_of_gsm8k():
    assert final_answer("48/2 = 24\n#### 1,234") == "1234"
    assert final_answer("#### 10 apples") == "10 apples" and final_answer("#### (2, 3)") == "(2, 3)"
    assert final_answer("nothing here") is None
    assert final_answer("#### Step 1: Count\n2+2 = 4\n#### Step 2\nDone.") is None  # Markdown headings


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER, "completion": ASSISTANT},
        {"prompt": USER, "completion": "so \\boxed{2}"},
        {"prompt": "1+1?", "completion": "so \\boxed{2}"},
        {"messages": USER + ASSISTANT},
        {"problem": "1+1?", "solution": "so \\boxed{2}"},
        {"question": "1+1?", "answer": "so \\boxed{2}"},
        {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "so \\boxed{2}"}]},
        {"conversations": USER + ASSISTANT},
        {"instruction": "1+1?", "input": "", "output": "so \\boxed{2}"},
    ],
)
def test_every_format_is_the_same_problem(row):
    (problem,) = read_rows([row])
    prompt = row["prompt"] if isinstance(row.get("prompt"), str) else USER  # a plain text stays one
    assert (problem.prompt, problem.demonstration, problem.answer) == (prompt, "so \\boxed{2}", "2")
    assert problem.problem == "1+1?" and problem.id == content_id(USER, "2")
    (written,) = output_row_columns(row)
    assert demonstration(written) == "so \\boxed{2}"


def output_row_columns(row):
    """The input's columns under the names that they have in an output row."""
    return [{new: row[old] for old, new in carried_columns(list(row)).items()}]


def test_alpaca_input_stands_below_the_instruction():
    row = {"instruction": "Add.", "input": "1+1", "output": "so \\boxed{2}"}
    (problem,) = read_rows([row], solve_prompt="Q: {problem}")
    assert problem.prompt == [{"role": "user", "content": "Q: Add.\n\n1+1"}]


def test_problems_with_gold_answers_alone():
    (problem,) = read_rows([{"problem": "1+1?", "answer": " 2 "}])
    assert (problem.prompt, problem.demonstration, problem.answer) == (USER, None, "2")
    assert find_format(["prompt", "gold"], "gold") == ("prompt", None)
    assert find_format(["problem", "answer", "solution"], "answer") == ("problem", "solution")
    with pytest.raises(
        ValueError,
        match=r"1 of 1 rows .0; counted from 0. have neither a demonstration nor a gold answer: `answer` is None",
    ):
        list(read_rows([{"problem": "1+1?", "answer": None}]))
    with pytest.raises(ValueError, match="a problem and its demonstration"):
        find_format(["problem", "answer"])  # whoever needs demonstrations


def test_prompt_template_and_system_turn():
    (problem,) = read_rows([{"question": "1+1?", "answer": "#### 2"}], solve_prompt="Solve {problem} in \\boxed{}")
    assert problem.prompt == [{"role": "user", "content": "Solve 1+1? in \\boxed{}"}]
    system = [{"role": "system", "content": "Be brief."}]
    (problem,) = read_rows([{"messages": system + USER + ASSISTANT}])
    assert problem.prompt == system + USER and problem.problem == "1+1?"


def test_fill_leaves_braces_and_inserted_placeholders_alone():
    filled = prompts.fill("{problem} \\frac{1}{2} {solution}", problem="{solution}", solution="S")
    assert filled == "{solution} \\frac{1}{2} S"


def test_missing_column_names_the_columns_found():
    with pytest.raises(ValueError, match="\\['mine', 'output'\\].*prompt \\+ completion.*--column_mapping"):
        find_format(["mine", "output"])


@pytest.mark.parametrize("empty", [None, "", "  ", []])
def test_row_without_demonstration_is_named(empty):
    good = {"prompt": USER, "completion": ASSISTANT}
    with pytest.raises(ValueError, match=r"1 of 2 rows .1; counted from 0. have no demonstration.*--skip_incomplete"):
        list(read_rows([good, {"prompt": USER, "completion": empty}]))


def test_row_without_problem_is_named():
    with pytest.raises(ValueError, match="counted from 0. have no problem"):
        list(read_rows([{"problem": " ", "solution": "\\boxed{1}"}]))
    with pytest.raises(ValueError, match="counted from 0. have no demonstration"):
        list(read_rows([{"messages": USER}]))


@pytest.mark.parametrize("beside", [{"tool_calls": [{"type": "function"}]}, {"reasoning_content": "2 and 2"}])
def test_what_stands_beside_a_content_is_not_dropped_in_silence(beside):
    (asked,), (said,), null = USER, ASSISTANT, dict.fromkeys(beside)
    for row in (
        {"messages": [asked, {**said, **beside}]},
        {"prompt": [asked, {**said, **beside}, asked], "completion": ASSISTANT},
    ):
        with pytest.raises(ValueError, match=f"Row 0.*has messages with {next(iter(beside))}, .* would be lost"):
            list(read_rows([row]))
    assert len(list(read_rows([{"messages": [{**asked, **null}, {**said, **null}]}]))) == 1  # as Parquet fills it in


def test_content_id_is_the_hash_of_the_plain_json():
    prompt = [{"role": "system", "content": 'a "b"\\\n\ud800'}, {"role": "user", "content": "ü€ 2+2?"}]
    for turns, answer in ((prompt, "4"), (prompt[1:], None), ([], "\\frac{1}{2}")):
        content = json.dumps([[[m["role"], m["content"]] for m in turns], answer or ""]).encode()
        assert content_id(turns, answer) == hashlib.blake2b(content, digest_size=8).hexdigest()


def test_duplicates_get_ids_of_their_own():
    row = {"prompt": USER, "completion": ASSISTANT}
    other = {"prompt": USER, "completion": ASSISTANT, "answer": "other"}
    rows = [row, other, row, row, other]
    first, second = [p.id for p in read_rows(rows[:2])]
    copies = number_copies([int(p.id, 16) for p in read_rows(rows)])
    ids = [p.id for p in read_rows(rows, copies=copies)]
    assert ids == [first, second, f"{first}-2", f"{first}-3", f"{second}-2"] and len(number_copies([])) == 0


def test_nothing_of_the_input_is_lost():
    columns = ["id", "source", "question", "answer", "level"]
    assert carried_columns(columns) == {
        "id": "input_id", "source": "input_source", "question": "question", "answer": "input_answer", "level": "level",
    }  # fmt: skip
    row = {"id": "gsm8k/1", "source": "web", "question": "1+1?", "answer": "one and one\n#### 2", "level": 3}
    (problem,) = read_rows([row])
    assert problem.row == row
    for columns, answer_column, carried in [
        (["problem", "solution", "answer", "gold"], "gold", {"answer": "input_answer"}),
        (["problem", "solution", "answer", "gold"], "answer", {}),
        (["problem", "solution", "prompt"], "answer", {"prompt": "input_prompt"}),
        (["messages", "prompt"], "answer", {"messages": "input_messages", "prompt": "input_prompt"}),
        (["prompt", "completion"], "answer", {"completion": "input_completion"}),
        (["prompt", "completion", "input_completion"], "answer", {"completion": "input_completion", "input_completion": "input_input_completion"}),
    ]:  # fmt: skip
        same = {"prompt"} if columns[0] == "prompt" else {"answer"} if answer_column == "answer" else set()
        expected = {c: carried.get(c, c) for c in columns if c not in same}
        assert carried_columns(columns, answer_column) == expected
    with pytest.raises(ValueError, match="answer_column='anwser', but the dataset has the columns"):
        list(read_rows([{"problem": "1+1?", "solution": "2", "answer": "2"}], "anwser"))
    with pytest.raises(ValueError, match=r"Row 0: `answer` is \['2'\]; a gold answer is one text"):
        list(read_rows([{"problem": "1+1?", "solution": "2", "answer": ["2"]}]))
    features = output_features(Dataset.from_list([row]).features, row)
    assert features["level"].dtype == "int64" and features["completion_ids"].feature.dtype == "int32"


@pytest.mark.parametrize("name", ["gsm8k_50", "math_50"])
def test_gold_answers_of_real_rows(name):
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").open()]
    for row, problem in zip(rows, read_rows(rows), strict=True):
        assert problem.answer == row["answer"]
    for row, problem in zip(rows, read_rows([{k: r[k] for k in ("problem", "solution")} for r in rows]), strict=True):
        assert problem.answer.replace(" ", "") == row["answer"].replace(" ", "")  # the same from the solution alone


def test_texts_are_what_the_file_holds(tmp_path, monkeypatch):
    """Dates, numbers and words for nothing stay the texts that they are, nested ones too, in whatever form the file has."""
    dated = [
        {
            "answer": "2015-03-01",
            "n": i,
            "meta": {"at": "2015-03-01T10:00:00Z", "tags": ["2015-03-01", "x"], "x": [1.5]},
        }
        for i in range(40)
    ]
    # as many types as JSON has, in one column; objects with other keys in each row; what no number of 64 bits is
    mixed = [
        {"answer": 7, "tools": [{"name": "a", "at": "2015-03-01"}], "d": {"a": "2015-03-01"}},
        {"answer": "2015-03-01", "tools": [{"k": {"v": 1}}, {}], "d": {"b": 2}},
        {"answer": None, "tools": [], "d": None},
        {"answer": 12345678901234567890123, "tools": [{"name": None}], "d": {}},
    ]
    texts = ["7", "2015-03-01", None, "12345678901234567890123"]
    big = [{"answer": 12345678901234567890123, "n": 0.5}, {"answer": 7, "n": 1.0}]
    odd = [{"answer": 2**53 + 1, "n": 0.1234567890123456}, {"answer": 1.5, "n": -0.5}]  # no float is 2**53 + 1
    for batch in (8 << 20, 500):  # all at once, and a few lines at a time
        monkeypatch.setattr("trl_offpolicy.data.text_files.BATCH", batch)
        for name, rows, expected in [
            ("dated", dated, dated),
            ("mixed", mixed, [{**row, "answer": text} for row, text in zip(mixed, texts, strict=True)]),
            ("big", big, [{**row, "answer": str(row["answer"])} for row in big]),
            ("odd", odd, [{**row, "answer": str(row["answer"])} for row in odd]),
        ]:
            lines, whole = tmp_path / f"{name}{batch}.jsonl", tmp_path / f"{name}{batch}.json"
            lines.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, rows)).encode())
            whole.write_text(json.dumps(rows, indent=1))
            for file in (lines, whole):
                assert load_rows(str(file)).to_list() == expected, file
                assert list(load_rows(str(file), streaming=True)) == expected, file
    file = tmp_path / "cells.csv"
    file.write_text(
        'problem,answer,level\na,7,1\nb,,2\nc,007,NA\nd,NA,4\ne,None,5\nf,null,6\ng,"x,\ny",7\nh,2015-03-01,8\n'
    )
    expected = ["7", None, "007", "NA", "None", "null", "x,\ny", "2015-03-01"]
    for rows in (load_rows(str(file)), load_rows(str(file), streaming=True)):
        assert [row["answer"] for row in rows] == expected
        assert [row["level"] for row in rows] == list("12") + ["NA"] + list("45678")
    folder = tmp_path / "folder"  # files by split, as on the Hub
    folder.mkdir()
    for split, rows in (("train", dated), ("test", dated[:3])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert load_rows(str(folder), dataset_split=split).to_list() == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("torn.jsonl", '{"a": 1}\n\n{"a":', "torn.jsonl: line 3 is not JSON"),
        ("half.jsonl", '{"a": "\\ud83d"}', "half.jsonl: the column 'a' holds half a surrogate pair"),
        ("bytes.jsonl", b'{"a": "\xff"}', "bytes.jsonl: line 1 is not JSON"),
        ("value.jsonl", '{"a": 1}\n3\n', "value.jsonl: line 2 is 3, but a row is an object"),
        ("list.json", '[{"a": 1}', "list.json: is not JSON"),
        (
            "deep.jsonl",
            '{"a": 1}\n{"a": ' + "[" * 10**5 + "]" * 10**5 + "}",
            "deep.jsonl: line 2 is not JSON .*recursion",
        ),
        ("nested.jsonl", '{"a": ' + "[" * 700 + "]" * 700 + "}", "nested.jsonl cannot be read: .*[Rr]ecursion"),
        ("cells.csv", "a,b\n1,2\n1,2,3\n", "cells.csv.*line 3, saw 3"),
        (
            "comma.csv",
            "a,b\n1,2,\n3,4,\n",
            "comma.csv: the first row below the header has 3 fields, but the header has 2",
        ),
        ("other.csv", "a;b\n1,5;2\n", "other.csv: the first row below the header has 2 fields, but the header has 1"),
        ("bytes.csv", b"a,b\n\xff,2\n", "bytes.csv: .*utf-8"),
        ("none.json", " [ ]\n", "none.json holds no rows"),
        ("header.csv", "a,b\n", "header.csv holds no rows"),
        ("script/script.py", "1", "script' cannot be loaded: Dataset scripts"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(tmp_path, name, content, message):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            load_rows(str(file if file.suffix != ".py" else file.parent), streaming=streaming)


def test_a_column_that_changes_its_type_late_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_offpolicy.data.text_files.BATCH", 50)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"n": i if i < 20 else "x"}) for i in range(30)))
    with pytest.raises(ValueError, match="a.jsonl: from line .* on, values have other types than before"):
        load_rows(str(tmp_path / "a.jsonl"))
    numbers = [*[1.5] * 20, 2**53 + 1, 0.5]  # as a float it would be 2**53
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"n": n}) for n in numbers))
    with pytest.raises(ValueError, match="b.jsonl: from line .* on, 'n' is no longer a float"):
        load_rows(str(tmp_path / "b.jsonl"))
    Dataset.from_dict({"a": ["x"]}).select([]).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="that file has no rows"):
        load_rows(str(tmp_path / "none.parquet"))


def test_load_rows_from_every_place(tmp_path):
    rows = Dataset.from_list([{"problem": "1+1?", "solution": "\\boxed{2}"}] * 3)
    rows.to_json(tmp_path / "a.jsonl")
    rows.to_parquet(tmp_path / "a.parquet")
    rows.to_csv(tmp_path / "a.csv")
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "dict")
    (tmp_path / "folder").mkdir()
    rows.to_parquet(tmp_path / "folder" / "train-00000-of-00001.parquet")
    for name in ("a.jsonl", "a.parquet", "a.csv", "saved", "dict", "folder"):
        assert load_rows(str(tmp_path / name)).to_list() == rows.to_list(), name
        stream = load_rows(str(tmp_path / name), streaming=True)
        assert isinstance(stream, IterableDataset) and list(stream) == rows.to_list(), name
        with pytest.raises(ValueError, match="test"):  # not the training rows again
            load_rows(str(tmp_path / name), dataset_split="test")
    with pytest.raises(ValueError, match="a file has no splits. Give it as the split 'train'"):
        load_rows(str(tmp_path / "a.csv"), dataset_split="test")
    with pytest.raises(ValueError, match="\\['train'\\]"):
        load_rows(str(tmp_path / "dict"), dataset_split="test")
    rows.to_json(tmp_path / "odd[1].jsonl")
    assert load_rows(str(tmp_path / "odd[1].jsonl"), dataset_split="train[1:]").to_list() == rows.to_list()[1:]
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        load_rows(str(tmp_path / "empty.jsonl"))
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(ValueError, match="must end in"):
        load_rows(str(tmp_path / "a.xlsx"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_rows(str(tmp_path / "missing.jsonl"))
