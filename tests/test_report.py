"""A report of real runs: what it shows is what the files say, nothing in it is executed, nothing is fetched."""

import json
import re
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import POLICY
from markdown_it import MarkdownIt
from scripted import ScriptedSampler, rows, verify

from trl_offpolicy import DataRewriter, RewriteConfig, evaluate, measure_policy_gap
from trl_offpolicy.reporting.page import Page
from trl_offpolicy.reporting.report import _sources, _values_and_errors, find_runs, write_report
from trl_offpolicy.reporting.tables import markdown, number, plain


EVIL = "<script>alert(1)</script> & | <img src=x onerror=alert(2)>"


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def runs(tmp_path, tokenizer, tiny_model):
    """A rewrite, two evaluations, a gap and a training's state, as the commands write them."""
    data = [{**row, "solution": f"{EVIL} {row['solution']}"} for row in rows(40)]
    args = RewriteConfig(
        str(tmp_path / "runs" / "rewrite"), num_generations=2, guided_prompt="only you can see {problem} {solution}"
    )
    rewritten = DataRewriter(None, args, sampler=ScriptedSampler(), verifier=verify).rewrite(data)
    kept = [{**row, "completion_ids": [], "behavior_log_probs": []} for row in rewritten]
    measure_policy_gap(tiny_model, kept, tokenizer, output_dir=str(tmp_path / "runs" / "gap"))
    benchmark = {"a": [{"problem": r["problem"], "answer": i % 50} for i, r in enumerate(rows(20))]}
    for name, p in (("base", 0.2), ("tuned", 0.7)):
        options = {
            "output_dir": str(tmp_path / "runs" / name),
            "baseline": str(tmp_path / "runs" / "base") if p > 0.5 else None,
        }
        evaluate(None, benchmark, num_generations=4, sampler=ScriptedSampler(p_self=p), verifier=verify, **options)
    for step in (5, 10):
        checkpoint = tmp_path / "runs" / "train" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        history = [{"step": i, "loss": 1 / i, "nll": 1.5 / i, "ess": 0.9, "ess/self": 0.8} for i in range(1, step + 1)]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    return tmp_path / "runs"


def test_the_page_shows_what_the_files_say(runs, tmp_path):
    path = write_report([str(runs)], str(tmp_path / "report"))
    page, markdown = path.read_text(), (tmp_path / "report" / "report.md").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    text = "".join(reader.text)
    counts = json.loads((runs / "rewrite" / "metrics.json").read_text())["yield"]
    results = json.loads((runs / "tuned" / "results.json").read_text())["benchmarks"]["a"]
    gap = json.loads((runs / "gap" / "policy_gap.json").read_text())["total"]
    for shown in (
        f"{counts['self'] / 40:.1%}", f"{results['avg@4']:.1%}", f"{results['vs_baseline']['difference']:+.1%}",
        f"{gap['before']['sequence_log_prob']:.2f} → {gap['after']['sequence_log_prob']:.2f}",
    ):  # fmt: skip
        assert shown in text and shown in markdown
    assert re.search(r"train</td><td>10</td><td>0.1<", page)  # the last checkpoint's
    (tmp_path / "unfinished").mkdir()
    with pytest.warns(UserWarning, match="unfinished', where there is nothing to report"):
        write_report([str(runs / "gap"), str(tmp_path / "unfinished")], str(tmp_path / "report"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report([str(runs / "train" / "checkpoint-5"), str(runs / "base")], str(tmp_path / "report"))
    assert page.count("<details") == 20 and page.count("<details open") == sum(
        counts[source] > 0 for source in ("self", "guided", "expert")
    )
    for figure in re.findall(r"\]\((figures/[^)]*)\)", markdown):
        assert (tmp_path / "report" / figure).read_text().startswith("<?xml")


def test_nothing_is_executed_or_fetched(runs, tmp_path):
    page = write_report([str(runs)], str(tmp_path / "report"), title=EVIL).read_text()
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags and "link" not in reader.tags
    assert {name for name, _ in reader.attributes}.isdisjoint({"onerror", "onload"})
    assert all(value.startswith("data:image/svg+xml") for name, value in reader.attributes if name in ("src", "href"))
    assert "alert(1)" in "".join(reader.text) and "url(" not in page
    markdown = (tmp_path / "report" / "report.md").read_text()
    rendered = Reader()
    rendered.feed(MarkdownIt("gfm-like", {"linkify": False}).render(markdown))
    assert rendered.tags.count("h1") == 1 and rendered.tags.count("table") >= 4
    assert {"script", "a", "em", "s", "code"} & set(rendered.tags) == {"code"}  # those are the texts
    assert all(value.startswith("figures/") for name, value in rendered.attributes if name in ("src", "href"))
    assert EVIL in "".join(rendered.text)


@pytest.mark.parametrize(
    "text",
    [
        EVIL,
        "a_b _c_ **d** `e` [f](g) ![h](i) ~~j~~ $k$ \\l &lt; m",
        "# n",
        "> n",
        "[a]: /b",
        "<http://c>",
        "<!-- d",
        "p < 0.1 [e][f] <g/> &#60;",
        "1 &lt 2",
        "12. o",
        "3) o",
        "- p",
        "+ q",
        "a\n\n# r\n| s | t |",
        "___",
        "\\\\",
    ],
)
def test_markdown_shows_a_text_as_it_is(text):
    """Against a Markdown parser: in a paragraph, in bold and in a table cell."""
    shown = " ".join(text.split())
    for written in (f"{plain(text)}\n", f"**{plain(text)}**\n", markdown((["x", text], [[text, "y"]]))):
        page = Reader()
        page.feed(MarkdownIt("gfm-like", {"linkify": False}).render(written))
        assert shown in "".join(page.text)
        assert set(page.tags) <= {"p", "strong", "table", "thead", "tbody", "tr", "th", "td"}


def test_figures_have_room_for_long_names_and_show_no_interval_where_none_is_known():
    """`error`: matplotlib warns where the names have left nothing for the bars."""
    names = [f"runs/some-directory-with-a-long-name/a-rewrite-of-all-the-data-{i}" for i in range(5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _sources(names, [{"self": 3, "guided": 1}] * 5).startswith(b"<?xml")
    values, (below, above) = _values_and_errors([{"x": 0.5, "x_ci95": None}, {"x": 0.5, "x_ci95": [0.25, 0.625]}], "x")
    assert values == [0.5, 0.5] and np.isnan([below[0], above[0]]).all() and (below[1], above[1]) == (0.25, 0.125)


def test_runs_whose_names_differ_only_in_signs_have_figures_of_their_own(tmp_path):
    page = Page("t", tmp_path)
    page.figures([("gap-a-b", "first", b"1"), ("gap-a-b", "second", b"2")])
    files = [re.search(r"\(.*/(.*)\)", line)[1] for line in page.text]
    assert [(tmp_path / file).read_text() for file in files] == ["1", "2"]


def test_a_run_within_one_of_its_own_name_is_no_other(tmp_path):
    for run in ("a", "a/b", "a/a"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "policy_gap.json").write_text('{"total": 1}')
    assert set(find_runs([tmp_path / "a"])["gaps"]) == {".", "a", "b"}
    assert set(find_runs([tmp_path / "a" / "b", tmp_path / "a" / "a"])["gaps"]) == {"a", "b"}
    (tmp_path / "a" / "a" / "policy_gap.json").unlink()
    assert set(find_runs([tmp_path / "a"])["gaps"]) == {"a", "b"}


def test_what_rounds_to_zero_has_no_minus():
    assert number(-1e-9, ".4f", [-2e-9, -0.5]) == "0.0000 [0.0000, -0.5000]"
    assert number(-1e-9, "+.1%", [-0.02, 1e-9]) == "+0.0% [-2.0%, +0.0%]" and number(-3.0, ".3g") == "-3"


def test_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        write_report([str(tmp_path)], str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="no directory"):
        write_report([str(tmp_path / "absent")], str(tmp_path / "out"))


def test_command_lines_of_gap_and_report(tmp_path, command):
    from datasets import Dataset

    row = {
        "prompt": [{"role": "user", "content": "2+2?"}], "completion": [{"role": "assistant", "content": "4"}], "solution": "It is 4.",
        "id": "1", "source": "self", "answer": "4", "completion_ids": [20, 2], "behavior_log_probs": [-1.0, -1.0],
    }  # fmt: skip
    Dataset.from_list([row] * 3).to_parquet(tmp_path / "rows.parquet")
    for argv in (
        ["gap", "--model_name_or_path", POLICY, "--dataset_name", tmp_path / "rows.parquet", "--output_dir", tmp_path / "gap"],
        ["report", tmp_path / "gap", "--output_dir", tmp_path / "report"],
    ):  # fmt: skip
        result = command(*argv)
        assert result.returncode == 0, result.stderr
    assert "policy gap" in (tmp_path / "report" / "report.html").read_text().lower()


def test_files_of_other_programs_and_torn_ones(tmp_path):
    """The first are no runs, the second end the report with their path."""
    run = tmp_path / "gap"
    run.mkdir()
    (run / "results.json").write_text("[1, 2]")
    (run / "metrics.json").write_text('"yield"')
    (run / "base").mkdir()
    (run / "base" / "results.json").write_text('{"settings": {}, "benchmarks": ["a"]}')  # what reproduce.py found
    with pytest.raises(ValueError, match="nothing to report"):
        write_report([str(tmp_path)], str(tmp_path / "report"))
    (run / "metrics.json").write_text('{"yield": {"self": 1')
    with pytest.raises(ValueError, match=re.escape(f"{run / 'metrics.json'} is not whole JSON")):
        write_report([str(tmp_path)], str(tmp_path / "report"))
