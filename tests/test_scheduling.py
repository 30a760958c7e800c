"""Ordered speculation against the naive loop, in every window, with late engines and kill -9; selection; memory; the numbers shown."""

import json
import random
import re
import signal
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from scripted import ScriptedSampler, config, naive, rewrite, rewrite_rows, rows, verify
from wandb_file import wandb_records

from trl_offpolicy import DataRewriter
from trl_offpolicy.data.formats import read_rows
from trl_offpolicy.data.rows import Rejection, Verdict
from trl_offpolicy.rewriting.scheduler import Speculation
from trl_offpolicy.runs.journal import Journal
from trl_offpolicy.runs.run_counts import RunCounts, cut_advice, summary
from trl_offpolicy.runs.run_log import RunLog
from trl_offpolicy.runs.run_memory import RunMemory
from trl_offpolicy.sampling.sampler import Completion, SamplerError, attempt_seed


@pytest.fixture(autouse=True)
def speculate_wherever_a_slot_is_free(request, monkeypatch):
    """Else it would depend on how fast this machine is at the moment; rows must be the same whatever is decided."""
    if "measured" not in request.fixturenames:
        monkeypatch.setattr(Speculation, "most", lambda self, needed: self.slots)


@pytest.fixture
def measured():
    """For tests of `Speculation` itself."""


class Submitted(ScriptedSampler):
    """Remembers what it was asked for and what it was told to forget."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.submitted, self.aborted = [], []

    def submit(self, request):
        self.submitted.append(request.id)
        super().submit(request)

    def abort(self, request_id):
        self.aborted.append(request_id)
        super().abort(request_id)


class Late(Submitted):
    """Returns what it was told to forget all the same, sooner or later."""

    def abort(self, request_id):
        self.aborted.append(request_id)


def same(rewritten, data, args):
    expected = naive(data, args, ScriptedSampler())
    got = [
        (r["id"], r["source"], r["completion"][0]["content"], r["num_sampled"], r["num_correct"]) for r in rewritten
    ]
    for row, (row_id, source, texts, *numbers) in zip(got, expected, strict=True):
        text = texts if source == "expert" else texts[0]
        assert row == (row_id, source, text, *numbers)


@pytest.mark.parametrize("sampler", [Submitted, Late])
@pytest.mark.parametrize("capacity", [1, 2, 5, 16, 61, 1000])
@pytest.mark.parametrize("width", [1, 3, 4])
def test_rows_are_those_of_one_attempt_after_another(tmp_path, sampler, capacity, width):
    data = rows(25)
    engine = sampler(capacity=capacity, order_seed=capacity + width)
    rewritten, metrics = rewrite(tmp_path, data, sampler=engine, max_concurrent_attempts=width)
    same(rewritten, data, config(tmp_path))
    needed, beyond = metrics["sampling"]["sampled"], metrics["speculation"]
    assert len(engine.submitted) == len(set(engine.submitted)) == needed + beyond["unused"] + beyond["aborted"]
    if width == 1:
        assert len(engine.submitted) == needed
    elif capacity == 1000:
        assert len(engine.submitted) > needed


@pytest.mark.parametrize("capacity, slots", [(8, None), (40, 5)])
def test_speculation_waits_until_no_other_problem_is_left_and_a_slot_is_free(tmp_path, capacity, slots):
    class Watching(Submitted):
        """Notes which requests come before the verdict on the attempt before them is in the journal."""

        speculative = []

        def submit(self, request):
            row_id, stage, attempt = request.id.split("/")
            before = f'"id":"{row_id}","stage":"{stage}","attempt":{int(attempt) - 1},'
            if int(attempt) and before not in (tmp_path / "run" / "journal.jsonl").read_text():
                self.speculative.append(len(self.submitted))
                assert len(self.pending) < (slots or capacity)
            super().submit(request)

    engine = Watching(capacity=capacity)
    if slots:
        engine.slots = slots
    rewrite(tmp_path, rows(60), sampler=engine)
    first_attempts = [i for i, name in enumerate(engine.submitted) if name.endswith("self/0")]
    assert len(first_attempts) == 60 and engine.speculative and min(engine.speculative) > max(first_attempts)


def test_an_engine_that_invents_a_completion_is_an_error(tmp_path):
    class Twice(ScriptedSampler):
        def poll(self):
            return [c for c in super().poll() for _ in range(2)]

    with pytest.raises(RuntimeError, match="not asked for, or twice"):
        rewrite(tmp_path, rows(5), sampler=Twice())


class Failing(ScriptedSampler):
    """Attempt 1 of each first stage comes to nothing."""

    def __init__(self, finish_reason, **kwargs):
        super().__init__(**kwargs)
        self.finish_reason = finish_reason

    def completion(self, request):
        whole = super().completion(request)
        return Completion(request.id, "", [], [], self.finish_reason, "no") if request.id.endswith("self/1") else whole


@pytest.mark.parametrize("finish_reason", ["refused", "error"])
@pytest.mark.parametrize("selection", ["first", "random"])
def test_refusals_end_a_stage_and_errors_cost_an_attempt(tmp_path, selection, finish_reason):
    """Whatever is in flight, and a resume with an engine that is well again gives what one gave that was never ill."""
    runs = [
        rewrite(tmp_path / str(capacity), rows(40), Failing(finish_reason, capacity=capacity), selection=selection)
        for capacity in (1, 2, 3, 7, 500)
    ]
    for rewritten, metrics in runs[1:]:
        assert rewritten.to_list() == runs[0][0].to_list() and metrics["verdicts"] == runs[0][1]["verdicts"]
    assert metrics["verdicts"]["error"] > 0 and metrics["failed"] >= metrics["verdicts"]["error"]
    of_self = [n for n, s in zip(rewritten["num_sampled"], rewritten["source"], strict=True) if s == "self"]
    if finish_reason == "refused":
        assert set(of_self) == {1}  # 0 counts, and nothing after 1 does
    else:
        assert set(of_self) == ({3} if selection == "random" else {1, 2, 3})  # of K = 4
    whole, whole_metrics = rewrite(tmp_path / "well", rows(40), selection=selection)
    resumed, resumed_metrics = rewrite(tmp_path / "1", rows(40), selection=selection)
    assert resumed.to_list() == whole.to_list() and resumed_metrics["sampling"] == whole_metrics["sampling"]
    assert resumed_metrics["failed"] == 0


def test_an_engine_that_fails_at_everything_ends_the_run(tmp_path):
    """Demonstrations are not kept because of it, and nothing that failed is known afterwards."""

    class Dead(ScriptedSampler):
        def __init__(self, finish_reason):
            super().__init__(capacity=4)
            self.finish_reason = finish_reason

        def completion(self, request):
            self.sampled += 1
            return Completion(request.id, "", [], [], self.finish_reason, "out of memory")

    for finish_reason, num_rows, most in [("error", 300, 110), ("error", 3, 48), ("refused", 3, 12)]:
        sampler, directory = Dead(finish_reason), tmp_path / f"{finish_reason}{num_rows}"
        kind = SamplerError if finish_reason == "error" else ValueError  # what is refused once is refused again
        with pytest.raises(kind, match="not one of .* the last one: out of memory"):
            rewrite(directory, rows(num_rows), sampler)
        assert sampler.sampled <= most and not (directory / "run" / "dataset").exists()
        whole, _ = rewrite(tmp_path / f"well{num_rows}", rows(num_rows))
        assert rewrite(directory, rows(num_rows))[0].to_list() == whole.to_list()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_engine_can_be_used_again_after_an_exception(tmp_path, error):
    sampler, judged = ScriptedSampler(), []

    def interrupted(completions, answers):
        judged.append(1)
        if len(judged) == 3:
            raise error
        return verify(completions, answers)

    def run(verifier):
        return DataRewriter("scripted", config(tmp_path), sampler=sampler, verifier=verifier).rewrite(rows(60))

    interrupted.__name__ = "verify"
    with pytest.raises(error):
        run(interrupted)
    assert sampler.pending == []
    whole, _ = rewrite(tmp_path / "whole", rows(60))
    assert run(verify).to_list() == whole.to_list()


def test_log_probs_that_are_no_numbers_end_the_run(tmp_path):
    class Diverged(ScriptedSampler):
        def completion(self, request):
            c = super().completion(request)
            return Completion(c.id, c.text, c.completion_ids, [float("nan")] * len(c.log_probs), c.finish_reason)

    with pytest.raises(SamplerError, match="drawn from logits that are not numbers"):
        rewrite(tmp_path, rows(5), Diverged())


def rewrite_speculating(*args, **kwargs):
    Speculation.most = lambda self, needed: self.slots
    rewrite_rows(*args, **kwargs)


def test_killed_while_it_speculates(tmp_path, process):
    """kill -9 with more slots than problems, so the journal holds attempts beyond ones that are missing; other windows resume it."""
    options = {"num_generations": 8, "max_completion_length": 50}
    undisturbed, metrics = rewrite(
        tmp_path / "a", rows(12), sampler=ScriptedSampler(p_self=0.15, capacity=1), **options
    )
    gaps, run = 0, tmp_path / "b" / "run"
    for trial in range(5):
        sampler = {
            "p_self": 0.15,
            "capacity": (40, 200, 3)[trial % 3],
            "order_seed": trial,
            "kill_after": 12 + 2 * trial,
        }
        child = process(rewrite_speculating, run, 12, sampler, **options)
        child.join(60)
        assert child.exitcode == -signal.SIGKILL, child.log.read_text()
        drawn = {(e["id"], e["stage"], e["attempt"]) for _, e in entries(run / "journal.jsonl")}
        gaps += sum(k > 0 and (i, s, k - 1) not in drawn for i, s, k in drawn)
    sampler = Submitted(p_self=0.15, capacity=200)
    resumed, resumed_metrics = rewrite(tmp_path / "b", rows(12), sampler=sampler, **options)
    assert gaps and resumed.to_list() == undisturbed.to_list()
    assert resumed_metrics["sampling"] == metrics["sampling"] and resumed_metrics["verdicts"] == metrics["verdicts"]
    assert not {f"{i}/{s}/{k}" for i, s, k in drawn} & set(sampler.submitted)  # nothing is drawn twice


def entries(path):
    lines = path.read_text().splitlines()
    return [(0, json.loads(line)) for line in lines[1:] if line.endswith("}")]


# ---- selection ----


class Timed(ScriptedSampler):
    """Attempts take as long as they are: 1 to 20 tokens, equally often; a long one is right more often."""

    def __init__(self, capacity):
        super().__init__(capacity=capacity)
        self.clock, self.pending = 0, {}

    def submit(self, request):
        length, _ = self.draw(request.seed)
        self.pending[request.id] = (self.clock + length, request)

    @staticmethod
    def draw(seed):
        rng = random.Random(seed)
        length = rng.randint(1, 20)
        return length, rng.random() < 0.2 + 0.02 * length

    def poll(self):
        self.clock = min(at for at, _ in self.pending.values())
        done = [request for at, request in self.pending.values() if at == self.clock]
        return [self.completion(self.pending.pop(r.id)[1]) for r in done]

    def completion(self, request):
        length, right = self.draw(request.seed)
        gold = request.prompt[-1]["content"].split("gold:")[1].split()[0] if right else "x"
        return Completion(request.id, f"\\boxed{{{gold}}}", [7] * length, [-1.0 / length] * length, "stop")

    def abort(self, request_id):
        del self.pending[request_id]


def chi_square(lengths):
    """Pearson's statistic against the lengths of one correct attempt: P(length | correct) is as 0.2 + 0.02 length."""
    weights = [0.2 + 0.02 * length for length in range(1, 21)]
    expected = [len(lengths) * w / sum(weights) for w in weights]
    counts = Counter(lengths)
    return sum((counts[i + 1] - e) ** 2 / e for i, e in enumerate(expected))


@pytest.mark.slow
def test_the_first_correct_is_distributed_as_a_random_correct_one_and_the_first_finished_is_not(tmp_path):
    """
    3,000 problems with all K = 8 attempts in flight at once. At 99.9 % confidence (chi-square, 19 degrees of freedom: 43.8; all seeds
    fixed) the lengths of the kept rows do not differ from those of a random correct attempt, for `first` and for `random`. Keeping
    what finishes first, with the same attempts and the same clock, would favour the short ones beyond any doubt.
    """
    data = Dataset.from_list(rows(3000))
    options = {"stages": ["self"], "num_generations": 8, "max_concurrent_attempts": 8}
    for selection in ("first", "random"):
        rewritten, metrics = rewrite(tmp_path / selection, data, Timed(24_000), selection=selection, **options)
        kept = [len(ids) for ids in rewritten["completion_ids"] if ids]
        assert chi_square(kept) < 43.8, selection
        if selection == "first":
            assert metrics["speculation"]["aborted"] > 1000  # it did speculate
    args, finished_first = config(tmp_path, **options), []
    for problem in read_rows(data, solve_prompt=args.solve_prompt):
        attempts = [Timed.draw(attempt_seed(args.seed, problem.id, "self", k)) for k in range(8)]
        finished_first += sorted(length for length, right in attempts if right)[:1]
    assert len(finished_first) == len(kept) and chi_square(finished_first) > 1000


def test_max_log_prob_keeps_the_likeliest_per_token(tmp_path):
    data, options = rows(40), {"stages": ["self"], "num_generations": 6}
    runs = [
        rewrite(tmp_path / str(capacity), data, Timed(capacity), selection="max_log_prob", **options)
        for capacity in (1, 9, 500)
    ]
    assert runs[0][0].to_list() == runs[1][0].to_list() == runs[2][0].to_list()
    for row, problem in zip(runs[0][0], read_rows(data), strict=True):
        attempts = [Timed.draw(attempt_seed(42, problem.id, "self", k)) for k in range(6)]
        right = [length for length, correct in attempts if correct]  # mean log-prob -1 / length: the longest
        assert (row["num_sampled"], row["num_correct"]) == ((6, len(right)) if right else (0, 0))
        assert len(row["completion_ids"]) == max(right, default=0)
    # A resumed run chooses by what the journal says.
    again, _ = rewrite(tmp_path / "1", data, Timed(1), selection="max_log_prob", **options)
    assert again.to_list() == runs[0][0].to_list()


def test_max_log_prob_without_log_probs_is_an_error(tmp_path):
    class Silent(ScriptedSampler):
        def completion(self, request):
            c = super().completion(request)
            return Completion(c.id, c.text, c.completion_ids, [], c.finish_reason)

    with pytest.raises(ValueError, match="selection='max_log_prob', but scripted returned no log-probs"):
        rewrite(tmp_path, rows(20), Silent(), selection="max_log_prob", stages=["self"])
    rewritten, _ = rewrite(tmp_path / "other", rows(20), Silent())
    assert "self" in rewritten["source"] and not any(rewritten["behavior_log_probs"])


# ---- journal and memory ----


def test_keep_rejected_false_drops_what_no_row_needs(tmp_path):
    kept, _ = rewrite(tmp_path / "a", rows(60))
    lean, _ = rewrite(tmp_path / "b", rows(60), keep_rejected=False)
    assert lean.to_list() == kept.to_list()
    for _, entry in entries(tmp_path / "b" / "run" / "journal.jsonl"):
        assert ("text" in entry) == ("completion_ids" in entry) == (entry["verdict"] == "correct")
    sizes = [(tmp_path / x / "run" / "journal.jsonl").stat().st_size for x in "ab"]
    assert sizes[1] < 0.8 * sizes[0]
    again, _ = rewrite(tmp_path / "a", rows(60), keep_rejected=False)  # may change between a run and its resume
    assert again.to_list() == kept.to_list()


def test_rows_are_checked_once_and_again_when_they_change(tmp_path, monkeypatch):
    from trl_offpolicy.runs import run_memory

    checks, number_copies = [], run_memory.number_copies
    monkeypatch.setattr(run_memory, "number_copies", lambda ids: checks.append(len(ids)) or number_copies(ids))
    for num_rows, name in ((30, "a"), (40, "b")):
        Dataset.from_list(rows(num_rows)).to_parquet(tmp_path / f"{name}.parquet")
    a, b = (Dataset.from_parquet(str(tmp_path / f"{x}.parquet"), cache_dir=str(tmp_path / "cache")) for x in "ab")
    first, _ = rewrite(tmp_path, a)
    again, _ = rewrite(tmp_path, a)
    assert checks == [30] and again.to_list() == first.to_list()
    grown, _ = rewrite(tmp_path, b)
    assert checks == [30, 40] and len(grown) == 40
    fewer, _ = rewrite(tmp_path, b.select(range(7)))
    assert checks == [30, 40, 7] and fewer.to_list() == grown.to_list()[:7]


def test_known_attempts_equal_the_journal(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", {})
    rng, expected, num_known = random.Random(0), {}, 0
    for _ in range(500):
        row_id = f"{rng.choice([1, 2**63, 2**64 - 1]):016x}" + rng.choice(["", "-2", "-13"])
        stage, attempt = rng.choice(["self", "guided"]), rng.randrange(40)
        entry = {
            "id": row_id, "stage": stage, "attempt": attempt, "verdict": rng.choice(list(Verdict)),
            "finish_reason": rng.choice(["stop", "length", "error", "refused"]), "num_tokens": rng.randrange(100_000),
            "log_prob": rng.choice([-0.25, -1e-6]),
        }  # fmt: skip
        if stage == "guided":
            entry["reference"] = rng.choice([7, 7, 8])
            entry |= rng.choice([{}, {"initial_log_prob": -3.0, "initial_tokens": 4}])
            if rejected := rng.choice(["", *Rejection]):
                entry["rejected"] = rejected
        entry |= {"reason": 'a "reason": {', "text": "x"}
        values = [entry[k] for k in ("verdict", "finish_reason", "num_tokens")]
        mean = entry["log_prob"] if stage == "self" else -0.75 if "initial_tokens" in entry else None
        result = (journal.append(entry), *values, mean, entry.get("rejected", ""), 0)
        if entry["finish_reason"] in ("stop", "length"):  # what failed is not known
            num_known += 1
            if entry.get("reference") != 8:  # nor is what had another reference
                expected.setdefault(row_id, {}).setdefault(stage, {})[attempt] = result
    assert [e for _, e in journal.entries(texts=False)] == [
        {k: e[k] for k in list(e)[: list(e).index("reason")]} for _, e in journal.entries()
    ]
    first = (int(next(iter(expected))[:16], 16), 99, 7)
    keys = [(int(row_id[:16], 16), int(row_id[17:] or 1), 7) for row_id in expected]
    memory = RunMemory(np.array([*keys, (255, 1, 7), first], RunMemory._KEY), "", [], [])
    memory.recall(journal.entries(texts=False), ["self", "guided"])
    assert memory.ids(0, len(keys)) == list(expected) and memory.ids(len(keys), 1) == [f"{255:016x}"]
    told = [
        {
            s: {k: r._replace(initial_mean=None) if r.initial_mean != r.initial_mean else r for k, r in of.items()}
            for s, of in found.items()
        }
        for found in memory.known(0, 100)
    ]
    assert memory.num_known == num_known and told == [*expected.values(), {}, {}]
    assert str(memory.known(2, 3)) == str(memory.known(0, 100)[2:5]) and len(memory.select(slice(2, 5))) == 3


def test_lines_taken_out_of_the_journal_are_drawn_again(tmp_path):
    """Among rows that are settled and not read again, also beyond the first few hundred."""
    whole, metrics = rewrite(tmp_path, rows(600))
    journal = tmp_path / "run" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    gone = set(random.Random(0).sample(range(1, len(lines)), 60))
    journal.write_bytes(b"".join(line for i, line in enumerate(lines) if i not in gone))
    sampler = ScriptedSampler()
    again, again_metrics = rewrite(tmp_path, rows(600), sampler)
    assert again.to_list() == whole.to_list() and 30 < sampler.sampled < 120
    assert again_metrics["sampling"] == metrics["sampling"]


@pytest.mark.slow
def test_memory_grows_by_a_few_dozen_bytes_a_row(tmp_path):
    """Traced peaks of 2,000 and 5,000 rows, of a first run and of one resumed from its journal; `benchmarks/scale.py` does a million."""

    def peak(num_rows):
        file = tmp_path / f"{num_rows}.parquet"
        Dataset.from_list(rows(num_rows)).to_parquet(file)
        data = Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
        peaks = []
        for _ in range(2):
            tracemalloc.start()
            rewrite(tmp_path / str(num_rows), data, ScriptedSampler(capacity=8))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return peaks

    rewrite(tmp_path, rows(10))  # whatever is imported or cached once
    small, large = peak(2000), peak(5000)
    fresh, resumed = ((b - a) / 3000 for a, b in zip(small, large, strict=True))
    limit = 150  # a row as a dict has more than 500; buffers that come and go move a peak by 300 kB either way
    assert fresh < limit, fresh
    assert resumed < limit + 3.2 * 2 * 45, resumed  # 3.2 attempts a row in the journal; twice, while they are sorted


# ---- the numbers shown ----


def test_status_line_counts_what_happened(tmp_path):
    """The last line of metrics.jsonl against a recount of the journal."""
    rewritten, metrics = rewrite(tmp_path, rows(50), ScriptedSampler(capacity=100))
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    drawn = [e for _, e in entries(tmp_path / "run" / "journal.jsonl")]
    assert line["rows"] == line["total"] == 50 and {s: line[s] for s in ("self", "guided", "expert")} == Counter(
        rewritten["source"]
    )
    assert line["sampled"] + line["unused"] == len(drawn)
    assert line["tokens"] + line["unused_tokens"] == sum(e["num_tokens"] for e in drawn)
    needed = {}  # by (id, stage): up to the first correct one
    for e in sorted(drawn, key=lambda e: e["attempt"]):
        stage = needed.setdefault((e["id"], e["stage"]), [])
        if not any(x["verdict"] == "correct" for x in stage):
            stage.append(e)
    for stage in ("self", "guided"):
        mine = [e for (_, s), es in needed.items() if s == stage for e in es]
        accepted = sum(e["verdict"] == "correct" for e in mine)
        assert line[f"acceptance/{stage}"] == pytest.approx(accepted / len(mine), abs=1e-4)
        cut = sum(e["finish_reason"] == "length" for e in mine)
        assert line[f"truncated/{stage}"] == pytest.approx(cut / len(mine), abs=1e-4)
        kept = Counter(rewritten["source"])[stage]
        found = {k: v for k, v in metrics["stages"][stage].items() if k not in ("copied", "ngrams")}
        assert found == {"sampled": len(mine), "correct": accepted, "truncated": cut, "rows": kept}
    assert {k for k in line if "/" in k} == {
        f"{x}/{s}" for x in ("acceptance", "truncated") for s in ("self", "guided")
    }
    mine = [e for es in needed.values() for e in es]
    assert line["truncated"] == sum(e["finish_reason"] == "length" for e in mine)
    fixed_k = 4 * len(needed) * sum(e["num_tokens"] for e in mine) / len(mine)
    assert line["tokens_saved"] == round(fixed_k - sum(e["num_tokens"] for e in drawn))
    assert line["sampling"] == line["verifying"] == 0 and line["eta_seconds"] == 0 and line["tokens_per_second"] > 0


def test_eta_and_rate_leave_out_what_the_journal_knew():
    counts = RunCounts(["self", "guided"], 50)
    counts.rows.update(self=60, expert=20)
    counts.undrawn_rows, counts.fixed_k = 40, 320
    counts.stages["self"].sampled, counts.stages["guided"].sampled = 70, 30
    counts.stages["self"].tokens, counts.stages["guided"].tokens = 2000, 1000
    line = counts.status(total=200, seconds=10.0, sampling=3, verifying=2, drawn=500)
    assert line["eta_seconds"] == 30.0 and line["tokens_per_second"] == 50.0  # 40 rows in 10 s, 120 to go
    # With tokens: 50 attempts of 20 are left, of which 40 tokens are drawn; of late there were 60 a second.
    counts.engine.update(finished=23, finished_tokens=460)
    later = counts.status(total=200, seconds=10.0, sampling=3, drawn=500, rate=60.0, left=50.0)
    assert later["eta_seconds"] == (50 * 20 - 40) / 60
    # Three that have drawn 400 tokens by now are no shorter than that on average.
    later = counts.status(total=200, seconds=10.0, sampling=3, drawn=460 + 1200, rate=60.0, left=3.0)
    assert later["eta_seconds"] == 0.0 and counts.status(total=200, seconds=10.0, drawn=500)["eta_seconds"] is None
    assert line["tokens_saved"] == 320 * 30 - 3000 and (line["sampling"], line["verifying"]) == (3, 2)
    assert RunCounts(["self"], 50).status(10, 1.0)["eta_seconds"] is None


def test_attempts_left_are_those_that_a_run_draws(tmp_path, monkeypatch):
    """What is expected after a third of 600 rows against what was drawn from then on, one attempt at a time."""
    expected, update = [], RunLog.update

    def noted(self, sampling, verifying, left):
        if self.counts.rows.total() >= 200 and not expected:
            expected.append((left(), self.counts.engine["finished"] - verifying))
        update(self, sampling, verifying, left)

    monkeypatch.setattr(RunLog, "update", noted)
    _, metrics = rewrite(tmp_path, rows(600), ScriptedSampler(capacity=8), max_concurrent_attempts=1)
    ((left, drawn),) = expected
    assert left == pytest.approx(metrics["sampling"]["sampled"] - drawn, rel=0.1)


class Slow(ScriptedSampler):
    """Draws its tokens one by one, and hands nothing over before the status line has shown so."""

    drawn_tokens = 0

    def __init__(self, metrics, **kwargs):
        super().__init__(**kwargs)
        self.metrics, self.seen = metrics, []

    def poll(self):
        deadline = time.monotonic() + 30
        while not self.seen and time.monotonic() < deadline:
            self.drawn_tokens += 1
            lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
            self.seen = [line for line in map(json.loads, lines) if line["tokens_per_second"] > 0]
        self.drawn_tokens += 100
        return super().poll()


def test_the_status_line_moves_while_nothing_is_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RunLog, "TICK", 0.01)
    monkeypatch.setattr(RunLog.__init__, "__defaults__", (None, 0.01))  # a line of the file as often
    sampler = Slow(tmp_path / "run" / "metrics.jsonl")
    rewrite(tmp_path, rows(5), sampler)
    assert sampler.seen and sampler.seen[0]["rows"] == 0 and sampler.seen[0]["sampling"] == 16
    line = json.loads(sampler.metrics.read_text().splitlines()[-1])
    assert line["tokens"] + line["unused_tokens"] + line["aborted_tokens"] == sampler.drawn_tokens  # no token is lost
    shown = capsys.readouterr().err
    assert (
        "tok/s" in shown and " 0/5 [" in shown and f"{sampler.seen[0]['drawn']:,} tokens" in shown
    )  # what moves where no row is done


class Counting(Submitted):
    """Draws half of an attempt before it is told to forget it, and says so."""

    drawn = 0

    def completion(self, request):
        c = super().completion(request)
        self.drawn += len(c.completion_ids)
        return c

    def abort(self, request_id):
        (request,) = [r for r in self.pending if r.id == request_id]
        self.drawn += request.seed % 7
        super().abort(request_id)
        return request.seed % 7


def test_every_token_that_the_engine_drew_is_counted(tmp_path):
    """Those of aborted attempts too, also after a resume by another process, which finds them in `metrics.jsonl`."""
    sampler = Counting(capacity=200)
    _, metrics = rewrite(tmp_path, rows(60), sampler)
    told = metrics["speculation"]
    assert told["aborted"] and told["aborted_tokens"] > 0
    assert metrics["sampling"]["tokens"] + told["unused_tokens"] + told["aborted_tokens"] == sampler.drawn
    _, again = rewrite(tmp_path, rows(60), Counting())
    assert again["speculation"] == told
    stopped = Counting(capacity=200)
    stopped.poll = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        rewrite(tmp_path / "stopped", rows(60), stopped)


# ---- how far to speculate ----


def settled(rate, needed, slots=256, seconds=2000):
    """How many are in flight at the end on an engine that draws `rate(n)` tokens a second with n of them, `needed` being needed."""
    speculation, drawn = Speculation(slots), 0.0
    for second in range(seconds):
        in_flight = max(needed, min(speculation.most(needed), 4 * needed))  # no row has more than four
        drawn += rate(min(in_flight, slots))
        speculation.note(in_flight, round(drawn), float(second))
    return max(needed, min(speculation.most(needed), 4 * needed)), speculation


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("needed", [1, 5, 50, 1000])
def test_speculation_goes_as_far_as_tokens_per_second_rise(needed):
    assert settled(lambda n: 100.0, needed)[0] == needed  # cores that are full with one
    assert settled(lambda n: 100.0 * n, needed)[0] == max(needed, min(256, 4 * needed))
    knee = settled(lambda n: 100.0 * min(n, 8), needed)[0]  # rises up to 8, and no further
    assert knee == {1: 4, 5: 10}.get(needed, needed)


@pytest.mark.usefixtures("measured")
def test_speculation_begins_when_a_rate_is_known():
    speculation = Speculation(64)
    assert [speculation.most(n) for n in (0, 1, 50, 1000)] == [1, 1, 50, 64]
    speculation.note(10, 0, 0.0)
    speculation.note(10, 100, 1.0)
    assert speculation.most(10) == 10  # ten tokens of each
    speculation.note(10, 1000, 10.0)
    assert speculation.most(10) == 20 and speculation.most(40) == 40


class Long(ScriptedSampler):
    """Attempts have exponential lengths of mean 100 and are cut at 50 tokens, as the configuration of the tests says."""

    limit, mean = 50, 100

    def completion(self, request):
        c = super().completion(request)
        length = max(1, round(random.Random(request.seed).expovariate(1 / self.mean)))
        ids = [1] * min(length, self.limit)
        return Completion(c.id, c.text, ids, [-0.5] * len(ids), "length" if length > self.limit else "stop")


def test_a_run_that_cuts_much_says_what_to_raise_and_to_what(tmp_path, capsys):
    """Of exponential lengths with mean 100, one in twenty is longer than -100 ln 0.05 = 300."""
    rewriter = DataRewriter("scripted", config(tmp_path), sampler=Long(), verifier=verify)
    rewriter.rewrite(rows(300))
    metrics = rewriter.metrics
    assert metrics["stages"]["self"]["truncated"] > 300
    advice = cut_advice(metrics["sampling"], 50)
    told = re.fullmatch(
        r"([\d,]+) of ([\d,]+) attempts \(6\d%\) were cut at max_completion_length = 50, .* 5% would be cut at (\d+): .*",
        advice,
    )
    assert told[2] == f"{metrics['sampling']['sampled']:,}" and 256 <= int(told[3]) <= 384
    assert re.findall(r"--max_completion_length (\d+)", advice) == [told[3]]
    shown = capsys.readouterr().err
    assert shown.count("were cut at max_completion_length = 50") == 1 and "% cut" in shown
    early = rewriter.advice  # of fewer attempts, or of all, and then not to be said again
    assert early in shown and advice in [early, *summary(metrics, 50, early)]
    assert advice not in summary(metrics, 50, advice) and advice in summary(metrics, 50)
    _, metrics = rewrite(tmp_path / "short", rows(50))
    assert cut_advice(metrics["sampling"], 50) is None  # one in twenty
    blind = cut_advice({"sampled": 48, "truncated": 47, "late_ends": 0, "late_tokens": 47 * 25}, 50)
    assert "--max_completion_length 200 " in blind and "cannot be told" in blind


def test_wandb_offline_run_holds_the_lines(tmp_path, monkeypatch):
    """A real W&B file, written offline and read back: the values of metrics.jsonl."""
    import wandb

    wandb.teardown()  # it reads its environment once
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    rewrite(tmp_path, rows(30), report_to="wandb")
    assert wandb.run is None  # finished
    wandb.teardown()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    logged = {}
    for record in wandb_records(file):
        logged.update({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {k: logged[k] for k in line} == line


@pytest.mark.parametrize("kwargs", [{"report_to": "tensorboard"}, {"max_concurrent_attempts": 0}])
def test_config_errors(tmp_path, kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}"):
        config(tmp_path, **kwargs)
