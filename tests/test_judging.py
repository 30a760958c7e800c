"""Verdicts beside the sampling: nothing is lost or mixed up, and the verifier is called for many at a time, or at once."""

import pickle
import random
import threading
from pathlib import Path

import pytest
from scripted import ScriptedSampler, rows, verify

from trl_offpolicy import DataRewriter, RewriteConfig, evaluate
from trl_offpolicy.data.rows import Verdict
from trl_offpolicy.sampling.sampler import Completion, Sampler, SamplerError, as_sampler
from trl_offpolicy.verification import verdict_queue as judging
from trl_offpolicy.verification.verdict_queue import VerdictQueue, judge
from trl_offpolicy.verification.verifier import as_verifier, describe
from trl_offpolicy.verification.verifiers import JudgeVerifier, all_of


class Recording:
    """Right if the text is the answer; remembers how many it was asked about at a time, and can be made to wait."""

    def __init__(self):
        self.sizes, self.go, self.closed = [], threading.Event(), False
        self.go.set()

    def verify(self, completions, answers):
        self.sizes.append(len(completions))
        self.go.wait()
        return [Verdict.CORRECT if c == a else Verdict.WRONG for c, a in zip(completions, answers, strict=True)]

    def close(self):
        self.closed = True
        self.go.set()


def completions(num):
    rng = random.Random(0)
    reasons = rng.choices(["stop", "length", "error", "refused"], [16, 2, 1, 1], k=num)
    return [Completion(f"r{i}", str(i % 3), [1], [-0.1], reason) for i, reason in enumerate(reasons)]


def whole(num):
    return [Completion(f"r{i}", str(i % 3), [1], [-0.1], "stop") for i in range(num)]


@pytest.fixture
def patient(monkeypatch):
    """Nothing is handed over merely because time has passed."""
    monkeypatch.setattr(judging, "HOLD", 600.0)


@pytest.mark.parametrize("seed", range(5))
def test_everything_comes_out_once_in_order_and_with_its_own_verdict(patient, seed):
    rng, drawn, judged = random.Random(seed), completions(300), []
    with VerdictQueue(as_verifier(Recording()), 16) as verdicts:
        for i, completion in enumerate(drawn):
            verdicts.put(i, completion, "1")
            if rng.random() < 0.5:
                judged += verdicts.take(hurry=rng.random() < 0.5, wait=rng.random() < 0.1)
            assert len(judged) + len(verdicts) == i + 1
        while verdicts:
            judged += verdicts.take(wait=True)
    assert [j.item for j in judged] == list(range(300)) and [j.completion for j in judged] == drawn
    assert [(j.verdict, j.reason) for j in judged] == judge(Recording(), drawn, ["1"] * 300)


def test_the_verifier_is_called_for_many_unless_there_is_hurry(patient):
    verifier = Recording()
    with VerdictQueue(as_verifier(verifier), 16) as verdicts:
        for i, completion in enumerate(whole(judging.BATCH)):
            assert (
                verdicts.take() == [] and verifier.sizes == []
            )  # the engine has enough to do: it can wait for the others
            verdicts.put(i, completion, "1")
        assert len(verdicts.take(wait=True)) == judging.BATCH
        verdicts.put("last", whole(1)[0], "1")
        while not (judged := verdicts.take(hurry=True)):
            pass
        assert judged[0].item == "last" and verifier.sizes == [judging.BATCH, 1]


def test_a_backlog_is_handed_over_in_parts(patient):
    verifier = Recording()
    verifier.go.clear()
    with VerdictQueue(as_verifier(verifier), 16) as verdicts:
        for i, completion in enumerate(whole(100)):
            verdicts.put(i, completion, "1")
        assert verdicts.take() == [] and len(verdicts) == 100
        verifier.go.set()
        judged = []
        while verdicts:
            judged += verdicts.take(wait=True)
    assert len(judged) == 100 and verifier.sizes == [32, 32, 32, 4]


def test_a_slow_verifier_holds_the_engine_back(patient, tmp_path, monkeypatch):
    """However many requests wait at the engine, no more is drawn than is lost with a killed process and soon drawn again."""
    verifier, drawn, take = Recording(), [], VerdictQueue.take

    def taking(self, hurry=False, wait=False):
        if wait:  # the engine stands still until there is a verdict
            drawn.append(sampler.sampled)
            verifier.go.set()
        return take(self, hurry, wait)

    monkeypatch.setattr(VerdictQueue, "take", taking)
    for name in ("rewrite", "evaluate"):
        sampler = ScriptedSampler(capacity=1000, p_self=1.0)
        sampler.slots = 40
        drawn.clear()
        verifier.go.clear()
        if name == "rewrite":
            args = RewriteConfig(str(tmp_path), num_generations=2)
            assert len(DataRewriter("", args, sampler=sampler, verifier=verifier).rewrite(rows(400))) == 400
        else:
            table = [{"problem": row["problem"], "answer": str(i % 50)} for i, row in enumerate(rows(400))]
            result = evaluate("", {"a": table}, sampler=sampler, verifier=verifier, num_generations=1)
            assert "avg@1" in result["a"] and sampler.sampled == 400
        assert 80 <= drawn[0] < 80 + 8  # a poll hands over eight at most


def test_what_was_drawn_before_the_engine_failed_is_in_the_journal(patient, tmp_path, monkeypatch):
    """Though none of it has its verdict when the engine fails."""

    class Failing(ScriptedSampler):
        def poll(self):
            if self.sampled:
                raise SamplerError("no server answers")
            return super().poll()

    verifier, take = Recording(), VerdictQueue.take

    def taking(self, hurry=False, wait=False):
        if wait:
            verifier.go.set()
        return take(self, hurry, wait)

    monkeypatch.setattr(VerdictQueue, "take", taking)
    for name in ("rewrite", "evaluate"):
        sampler = Failing(capacity=50, order_seed=1)
        verifier.go.clear()
        with pytest.raises(SamplerError, match="no server answers"):
            if name == "rewrite":
                args = RewriteConfig(str(tmp_path / name))
                DataRewriter("", args, sampler=sampler, verifier=verifier).rewrite(rows(50))
            else:
                table = [{"problem": row["problem"], "answer": "1"} for row in rows(50)]
                evaluate("", {"a": table}, sampler=sampler, verifier=verifier, output_dir=str(tmp_path / name))
        journal = (tmp_path / name / "journal.jsonl").read_text().splitlines()
        assert sampler.sampled == len(journal) - 1 > 1  # the first line is the configuration


def test_a_few_are_not_held_for_ever(monkeypatch):
    monkeypatch.setattr(judging, "HOLD", 0.01)
    with VerdictQueue(as_verifier(Recording()), 16) as verdicts:
        verdicts.put(0, whole(1)[0], "0")
        while not (judged := verdicts.take()):
            pass
        assert judged[0].verdict == Verdict.CORRECT


def test_what_the_verifier_raises_is_raised(patient):
    class Broken(Recording):
        def verify(self, completions, answers):
            raise OSError("no such machine")

    verifier = Broken()
    with pytest.raises(OSError, match="no such machine"), VerdictQueue(as_verifier(verifier), 16) as verdicts:
        verdicts.put(0, whole(1)[0], "0")
        verdicts.take(wait=True)
    assert verifier.closed


def test_leaving_by_an_exception_does_not_wait_for_a_slow_verifier(patient):
    verifier = Recording()
    verifier.go.clear()  # until it is closed
    with pytest.raises(KeyboardInterrupt), VerdictQueue(as_verifier(verifier), 16) as verdicts:
        verdicts.put(0, whole(1)[0], "0")
        verdicts.take(hurry=True)
        while not verifier.sizes:
            pass
        raise KeyboardInterrupt
    assert verifier.closed and not verdicts._thread.is_alive()


def drawn_by(what, sampler, tmp_path):
    """A rewrite, an evaluation or a judge that draws with this sampler."""
    if what == "rewrite":
        DataRewriter("", RewriteConfig(str(tmp_path)), sampler=sampler, verifier=Recording()).rewrite(rows(20))
    elif what == "evaluate":
        table = [{"problem": row["problem"], "answer": "1"} for row in rows(20)]
        evaluate("", {"a": table}, sampler=sampler, verifier=Recording())
    else:
        JudgeVerifier(sampler, prompt="gold:1 {completion} {answer}").verify(["x", "y", "z"], ["1", "1", "1"])


def test_there_is_a_journal_at_every_moment_while_it_is_judged_anew(tmp_path, monkeypatch):
    """A kill at the last step leaves the one that was there, and the next run goes on from it."""
    journal, replace = tmp_path / "journal.jsonl", Path.replace

    def killed(self, target):
        if target == journal:
            raise KeyboardInterrupt
        return replace(self, target)

    drawn_by("rewrite", ScriptedSampler(), tmp_path)
    before = journal.read_bytes()
    args = RewriteConfig(str(tmp_path), rejudge=True)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", killed)
        DataRewriter("", args, sampler=ScriptedSampler(), verifier=verify).rewrite(rows(20))
    assert journal.read_bytes() == before == (tmp_path / "journal.jsonl.1").read_bytes()
    DataRewriter("", args, sampler=ScriptedSampler(), verifier=verify).rewrite(rows(20))
    assert journal.read_bytes() != before


@pytest.mark.parametrize("what", ["rewrite", "evaluate", "judge"])
@pytest.mark.parametrize(
    "returns, said",
    [
        (lambda completions: [], "the sampler has requests under way but returned none of them"),
        (lambda completions: completions * 2, "which it was not asked for, or twice"),
    ],
)
def test_an_engine_that_loses_or_invents_completions_is_an_error_wherever_it_draws(tmp_path, what, returns, said):
    class Faulty(ScriptedSampler):
        aborted = ()

        def poll(self):
            return returns(super().poll())

        def abort(self, request_id):
            self.aborted = (*self.aborted, request_id)
            super().abort(request_id)

    sampler = Faulty(capacity=9)
    with pytest.raises(RuntimeError, match=said):
        drawn_by(what, sampler, tmp_path)
    assert not sampler.pending and len(sampler.aborted) == len(set(sampler.aborted)) > 0


def test_a_users_own_engine_has_the_defaults_for_what_it_lacks():
    class Own:
        name, revision, capacity = "mine", "1", 7

        def submit(self, request):
            self.request = request

    own = Own()
    sampler = as_sampler(own)
    assert as_sampler(sampler) is sampler and isinstance(sampler, Sampler)
    assert (sampler.name, sampler.capacity, sampler.slots) == ("mine", 7, 7)
    assert sampler.drawn_tokens is sampler.processing_class is None and not sampler.stop_token_ids
    sampler.submit("a request")
    assert own.request == "a request"
    own.drawn_tokens, own.slots = 5, 3
    assert (as_sampler(own).drawn_tokens, as_sampler(own).slots) == (5, 3)
    other = pickle.loads(pickle.dumps(as_sampler(ScriptedSampler(capacity=3))))
    assert (other.name, other.slots) == ("scripted", 3)


def test_verifiers_of_a_users_own_are_described_alike_in_every_process():
    """Else a run could not be resumed: its journal names another verifier."""
    assert describe(verify) == describe(as_verifier(verify)) == "verify"
    assert describe(as_verifier(Recording())) == "Recording"
    assert repr(all_of(verify, Recording())) == "all_of(verify, Recording)"
    assert "0x" not in describe(all_of(verify, Recording()))


def test_judges_of_other_models_are_other_verifiers():
    """Else their accuracies would be compared as if one had judged, and a run resumed with the other."""
    first, second = (ScriptedSampler(), ScriptedSampler())
    second.name = "another model"
    judges = [JudgeVerifier(first), JudgeVerifier(second), JudgeVerifier(first, yes="TRUE", no="FALSE")]
    assert describe(judges[0]) == "judge_verifier(sampler='scripted')" == describe(JudgeVerifier(as_sampler(first)))
    assert len({describe(each) for each in judges} | {describe(all_of(each)) for each in judges}) == 6


@pytest.mark.parametrize(
    "log_probs, reason, said",
    [
        ([], "error", "not one of the first 100 requests succeeded"),
        ([float("nan")], "stop", "logits that are not numbers"),
    ],
)
def test_a_judge_that_cannot_judge_stops_the_run(log_probs, reason, said):
    class Broken(ScriptedSampler):
        def completion(self, request):
            return Completion(request.id, "YES", [1] * len(log_probs), log_probs, reason, "no GPU")

    with pytest.raises(SamplerError, match=said):
        JudgeVerifier(Broken()).verify(["x"] * 120, ["1"] * 120)
    if reason == "error":  # a few failures are no reason to
        assert JudgeVerifier(Broken()).explain(["x"] * 9, ["1"] * 9) == [("error", "no GPU")] * 9
