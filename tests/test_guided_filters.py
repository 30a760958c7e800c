"""Which guided attempts are kept, what references and demonstrations are made into, and where a rejection is told."""

import json
import random
import re
from fractions import Fraction

import pytest
from scripted import SHOWN, ScriptedSampler, config, rewrite, verify

from trl_offpolicy import RewriteConfig
from trl_offpolicy.data import prompts
from trl_offpolicy.data.demonstrations import clean_reference, in_asked_form
from trl_offpolicy.data.formats import demonstration, guided_prompt, read_row
from trl_offpolicy.data.rows import REJECTIONS, Rejection
from trl_offpolicy.rewriting.dataset_card import edited_card
from trl_offpolicy.rewriting.guided_filters import false_step, reject_guided
from trl_offpolicy.rewriting.push import _attempt_files
from trl_offpolicy.rewriting.rewrite_config import GUIDED_FILTERS
from trl_offpolicy.runs.journal import read_entries, read_header
from trl_offpolicy.runs.run_counts import summary
from trl_offpolicy.runs.run_directory import RunDirectory
from trl_offpolicy.sampling.sampler import Completion


GSM8K = {
    "question": "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did Natalia sell altogether in April and May?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72",
}
FINE = (
    "In May she sold half of 48, which is 24. Together with April that makes 48 + 24 = 72.\nThe answer is \\boxed{72}."
)
PROBLEM = read_row(GSM8K, 0, "answer", prompts.SOLVE_PROMPT)
OFF = {**GUIDED_FILTERS}


def args(**kwargs):
    return RewriteConfig("unused", **kwargs)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (FINE, None),
        (f"The teacher's solution states that 24 were sold in May. {FINE}", Rejection.MENTION),
        (f"Laut Musterlösung sind es 24. {FINE}", Rejection.MENTION),
        (f"根据参考答案，五月卖出24个。{FINE}", Rejection.MENTION),
        (f"Selon la solution du professeur, 24. {FINE}", Rejection.MENTION),
        (f"Согласно решению учителя, 24. {FINE}", Rejection.MENTION),
        (FINE.replace("= 72", "= <<48+24=72>>72"), Rejection.CALCULATOR),
        ("It was \\boxed{72}.", Rejection.STUB),
        (
            "The problem asks how many clips there were altogether. We have worked that out: the answer is \\boxed{72}.",
            Rejection.STUB,
        ),
        (FINE.replace("\\boxed{72}", "72"), Rejection.FORM),
        (clean_reference(GSM8K["answer"]) + "\n\\boxed{72}", Rejection.COPY),
        (FINE.replace("48 + 24", "48 + 25"), None),  # an arithmetic check is asked for
    ],
)
def test_what_is_not_kept(text, why):
    found = reject_guided(text, PROBLEM, args())
    assert (found and found[0]) == why
    assert reject_guided(text, PROBLEM, args(**OFF)) is None  # each has its flag


def test_settings_of_the_filters():
    text = FINE.replace("48 + 24", "48 + 25")
    assert reject_guided(text, PROBLEM, args(check_arithmetic=True)) == (Rejection.ARITHMETIC, "says '48 + 25 = 72'")
    for phrases in (["together with", "(?:never)"], ["(?s)together.with", r"(e).*\1"]):
        assert reject_guided(FINE, PROBLEM, args(mention_phrases=phrases))[0] == Rejection.MENTION
    # A problem that has a teacher in it is no leak, nor is a row whose prompt asks for no box one without it.
    tale = read_row(
        {"problem": "A teacher has 2 pens, buys 3. How many?", "solution": "The teacher has 5: \\boxed{5}"},
        0,
        "answer",
        "{problem}",
    )
    assert reject_guided("The teacher has 2 and 3, so the answer is 5.", tale, args()) is None
    assert reject_guided("The teacher's solution says 2 and 3, so the answer is 5.", tale, args())[0] == "mention"
    with pytest.raises(ValueError, match=re.escape("'(' in mention_phrases, which is no regular expression")):
        args(mention_phrases=["("])
    with pytest.raises(ValueError, match="max_guided_copy=80; it is a share"):
        args(max_guided_copy=80)
    with pytest.raises(ValueError, match="expert_format='box'"):
        args(expert_format="box")


def test_references_are_cleaned_before_they_are_shown():
    (turn,) = guided_prompt(PROBLEM)
    assert "<<" not in turn["content"] and "####" not in turn["content"] and "48+24 = 72 clips" in turn["content"]
    (turn,) = guided_prompt(PROBLEM, clean=False)
    assert GSM8K["answer"] in turn["content"]
    for same in ("#### 72", "cout << a; x = 3 >> 1", "## Step\n#### Step 2\nWe add.", "A\n##### 7"):
        assert clean_reference(same) == same


@pytest.mark.parametrize(
    ("given", "answer", "expected"),
    [
        (GSM8K["answer"], "72", "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\nThe final answer is \\boxed{72}."),
        ("It is a lot.\n#### 1,080", "1080", "It is a lot.\nThe final answer is \\boxed{1,080}."),
        ("#### 5", "5", "The final answer is \\boxed{5}."),
        ("Thus $x = \\boxed{\\frac12}$, as asked.", "\\frac12", None),  # MATH, NuminaMath
        ("We add. The final answer is 12.", "12", "We add. The final answer is 12.\nThe final answer is \\boxed{12}."),
        ("We add. The final answer is 12.", "13", None),  # whose mistake is not ours to say
        ("We add, and have 12 of them.", None, None),
        ("Open\n#### {5", "5", None),
    ],
)  # fmt: skip
def test_demonstrations_in_the_form_that_is_asked_for(given, answer, expected):
    assert in_asked_form(given, answer) == (given if expected is None else expected)


def test_false_steps_against_exact_arithmetic():
    rng = random.Random(0)
    for _ in range(300):
        numbers, signs = [rng.randint(1, 99) for _ in range(4)], rng.choices("+-*", k=3)
        text = "".join(f"{n}{s}" for n, s in zip(numbers, [*signs, ""], strict=True))
        value = eval(text)  # noqa: S307
        spaced = re.sub(r"([-+*])", r" \1 ", text).replace("*", rng.choice(["*", "\\times", "×", "x"]))
        assert false_step(f"So ${spaced} = {value}$ dollars.") is None, spaced
        assert false_step(f"So {spaced} = {value + rng.choice([-1, 1])} dollars."), spaced
        a, b, digits = *numbers[:2], rng.randint(0, 3)
        rounded = round(Fraction(a, b), digits)
        assert false_step(f"{a}/{b} = {float(rounded):.{digits}f}") is None
        assert false_step(f"{a}/{b} = {float(rounded) + 2:.4f}") or a <= b
    for read in (
        "1,000 + 200 = 1,300",
        "Total: $5 * 3 = $16.",
        "4+3 = 7*2 = 15",
        "3\\times4 = 13",
        "x = 2 + 2 = 5",
        "**3 + 4 = 8**",
        "20 / 4 = 6 pens",
    ):
        assert false_step(read), read
    for other in (
        "2x + 5 = 9", "x - 5 = 3", "(1 + 2) * 4 = 12", "2^3 + 1 = 9", "50% * 20 = 10", "7 + 8 = 3 (mod 12)", "7 + 8 = 3 \\pmod{12}", "10:30 + 2 = 12:30",
        "60 x 2/3 = 40", "25 / 1/3 = 75", "Week 1 + Week 2 = 35 + 35 = 70", "1/3 + 1/6 = 1/2", "10/3 = 3.33", "7/2 = 3", "5 / 0 = 3", "3 = 4", "2 + 3 = 5x", "4 + 3 = 7.",
    ):  # fmt: skip
        assert false_step(other) is None, other


class Retelling(ScriptedSampler):
    """Never right on its own; its retellings are right, every second one in a form that is not kept."""

    FORMS = (
        "The teacher's solution gives it: \\boxed{{{0}}}",
        "It is {0} \\boxed{{{0}}}",
        "We add 1 to get it. Now we have: \\boxed{{{0}}}",
    )

    def completion(self, request):
        self.sampled += 1
        text = request.prompt[-1]["content"]
        gold = int(text.split("gold:")[1].split()[0])
        told = random.Random(request.seed).choice(self.FORMS).format(gold if SHOWN in text else "no")
        return Completion(request.id, told, [1, 2], [-0.5, -0.5], "stop")


def data(count=30):
    solution = "one must look at it for long and then <<{0}+0={0}>> it is seen to be that many\n#### {0}"
    return [{"problem": f"problem {i} gold:{i} ?", "solution": solution.format(i), "row": i} for i in range(count)]


KEPT = "We add 1"


@pytest.mark.parametrize("selection", ["first", "random"])
def test_a_rejected_attempt_counts_as_drawn_and_its_reason_is_told(tmp_path, capsys, selection):
    rewritten, metrics = rewrite(tmp_path, data(), sampler=Retelling(), selection=selection, min_guided_length=0.4)
    entries = [entry for _, entry in read_entries(tmp_path / "run" / "journal.jsonl")]
    for row, given in zip(rewritten, data(), strict=True):
        guided = sorted(
            (e["attempt"], e.get("rejected")) for e in entries if e["id"] == row["id"] and e["stage"] == "guided"
        )
        kept = [k for k, rejected in guided if rejected is None]
        if kept:
            assert row["source"] == "guided" and row["completion"][0]["content"].startswith(KEPT)
            assert (row["num_sampled"], row["num_correct"]) == (
                (kept[0] + 1, 1) if selection == "first" else (4, len(kept))
            )
        else:
            assert row["source"] == "expert" and row["completion"][0]["content"].endswith(f"\\boxed{{{row['row']}}}.")
            assert (row["num_sampled"], row["num_correct"]) == (0, 0)
        assert (row["self_sampled"], row["self_correct"]) == (4, 0)
        assert demonstration(row) == given["solution"]
    assert {"guided", "expert"} == set(rewritten["source"])
    assert {e["verdict"] for e in entries if "rejected" in e} == {"correct"}  # what the verifier said stays
    counted = {why: metrics["rejected"][why] for why in ("mention", "stub")}
    assert (
        all(counted.values())
        and metrics["stages"]["guided"]["sampled"] == sum(counted.values()) + metrics["stages"]["guided"]["correct"]
    )
    assert metrics["expert_format"] == {
        "boxed": (experts := rewritten["source"].count("expert")),
        "marks_removed": experts,
        "not_as_asked": 0,
    }
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {why: last[f"rejected/{why}"] for why in counted} == counted
    shown = f"{counted['mention']:,} mention, {counted['stub']:,} stub"
    assert f"rejected: {shown}" in capsys.readouterr().err
    said = "\n".join(summary(metrics, 50))
    assert (
        f"{counted['mention']} mention the reference, {counted['stub']} are stubs" in said
        and f"{experts} final answers put into" in said
    )
    # The card counts from the journal, in which speculation may have drawn some more.
    run = RunDirectory(tmp_path / "run")
    told = {what: sum(e.get("rejected") == why for e in entries) for why, what in REJECTIONS.items()}
    card = edited_card(None, run, "me/out", {}, {}).text
    assert (
        all(f"{n} {what}" in card for what, n in told.items() if n)
        and f"{experts} have had their final answer put into it" in card
    )
    (attempts,) = _attempt_files(run, str(tmp_path))
    import pyarrow.parquet as pq

    assert pq.read_table(attempts)["rejected"].to_pylist() == [e.get("rejected") for e in entries]
    # A resume knows them from the journal, and draws nothing.
    again = Retelling()
    resumed, resumed_metrics = rewrite(tmp_path, data(), sampler=again, selection=selection, min_guided_length=0.4)
    assert again.sampled == 0 and resumed.to_list() == rewritten.to_list()
    assert {k: v for k, v in resumed_metrics.items() if k not in ("seconds", "speculation")} == {
        k: v for k, v in metrics.items() if k not in ("seconds", "speculation")
    }


def test_journals_from_before_there_were_filters(tmp_path):
    """They are continued without filters, and refused by the name of each filter otherwise."""
    off = {**OFF, "expert_format": "keep"}
    rewritten, _ = rewrite(tmp_path, data(5), sampler=Retelling(), **off)
    assert set(rewritten["source"]) == {"guided"} and not set(OFF) & set(
        read_header(tmp_path / "run" / "journal.jsonl")
    )
    again = Retelling()
    rewrite(tmp_path, data(5), sampler=again, **off)
    assert again.sampled == 0
    with pytest.raises(ValueError, match="`reject_mentions` was None there and is True now"):
        rewrite(tmp_path, data(5), sampler=Retelling())
    # Nothing of them concerns a run without the stage `guided`.
    assert config(tmp_path, stages=["self"]).identity() == config(tmp_path, stages=["self"], **OFF).identity()


def test_self_numbers_of_every_row(tmp_path):
    from scripted import rows

    def numbers(found):
        return [(row["self_sampled"], row["self_correct"]) for row in found]

    rewritten, _ = rewrite(tmp_path / "a", rows(60), verifier=verify)
    alone, _ = rewrite(tmp_path / "b", rows(60), verifier=verify, stages=["self"])
    assert numbers(rewritten) == numbers(alone)
    for row in rewritten:
        assert row["self_correct"] == (row["source"] == "self")
        assert row["self_sampled"] == (row["num_sampled"] if row["source"] == "self" else 4)
    guided, _ = rewrite(tmp_path / "c", rows(60), verifier=verify, stages=["guided"])
    assert set(numbers(guided)) == {(0, 0)}
    again, _ = rewrite(tmp_path / "d", rewritten.to_list(), verifier=verify)
    assert [row["input_self_sampled"] for row in again] == rewritten["self_sampled"]
