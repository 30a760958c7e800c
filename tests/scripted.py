"""
Rewrites by a sampler that stands in for a model: what it says depends on the request's seed alone, never on order or time.
"""

import os
import random
import re
import signal

from trl_offpolicy import DataRewriter, RewriteConfig
from trl_offpolicy.data import prompts
from trl_offpolicy.data.formats import read_rows
from trl_offpolicy.data.rows import Verdict
from trl_offpolicy.runs.journal import Journal
from trl_offpolicy.sampling.sampler import Completion, Request, SamplingParams, attempt_seed


SHOWN = "only you can see"  # what the default guided prompt says and no other does


class ScriptedSampler:
    """Right with probability `p_self` or `p_guided`; hands requests back in a random order, a few at a time."""

    name, revision = "scripted", "1"

    def __init__(self, p_self=0.3, p_guided=0.4, capacity=16, order_seed=0, kill_after=None):
        self.p_self, self.p_guided, self.capacity = p_self, p_guided, capacity
        self.order, self.pending, self.sampled = random.Random(order_seed), [], 0
        if kill_after is not None:
            kill_after_attempts(kill_after)

    def submit(self, request):
        self.pending.append(request)

    def poll(self):
        self.order.shuffle(self.pending)
        count = self.order.randint(1, 8)
        take, self.pending = self.pending[:count], self.pending[count:]
        return [self.completion(r) for r in take]

    def completion(self, request):
        self.sampled += 1
        rng = random.Random(request.seed)
        text = request.prompt[-1]["content"]
        gold = int(text.split("gold:")[1].split()[0])
        p = self.p_guided if SHOWN in text else self.p_self
        answer = gold if rng.random() < p else gold + rng.randint(1, 9)
        reason = "length" if rng.random() < 0.05 else "stop"
        ids = [rng.randrange(100) for _ in range(rng.randint(1, 5))]
        return Completion(request.id, f"try {rng.random()} \\boxed{{{answer}}}", ids, [-0.5] * len(ids), reason)

    def abort(self, request_id):
        self.pending = [r for r in self.pending if r.id != request_id]

    def close(self):
        pass


def kill_after_attempts(number):
    """kill -9 of this process as soon as it has journaled so many more attempts."""
    append, left = Journal.append, [number]

    def counting(self, entry):
        offset = append(self, entry)
        left[0] -= "config" not in entry
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return offset

    Journal.append = counting


def rewrite_rows(run, num_rows, sampler, **kwargs):
    """A rewrite of `rows(num_rows)` by a scripted sampler with these options, for a process of its own that may be killed."""
    args = RewriteConfig(str(run), **{"num_generations": 4, "max_completion_length": 50, **kwargs})
    DataRewriter("scripted", args, sampler=ScriptedSampler(**sampler), verifier=verify).rewrite(rows(num_rows))


def rows(num_rows):
    """Problems that tell the scripted sampler their gold answer."""
    return [
        {"problem": f"problem {i} gold:{i % 50} ?", "solution": f"demonstration {i}: \\boxed{{{i % 50}}}", "row": i}
        for i in range(num_rows)
    ]


def verify(completions, answers):
    """The simplest verifier a user could pass: a plain function."""
    return ["correct" if c.endswith(f"\\boxed{{{a}}}") else "wrong" for c, a in zip(completions, answers, strict=True)]


def config(tmp_path, **kwargs):
    return RewriteConfig(str(tmp_path / "run"), **{"num_generations": 4, "max_completion_length": 50, **kwargs})


def rewrite(tmp_path, data, sampler=None, verifier=verify, **kwargs):
    rewriter = DataRewriter(
        "scripted", config(tmp_path, **kwargs), sampler=sampler or ScriptedSampler(), verifier=verifier
    )
    return rewriter.rewrite(data), rewriter.metrics


def naive(data, args, sampler):
    """One problem after another, one attempt after another: the definition."""
    results = []
    for problem in read_rows(data, solve_prompt=args.solve_prompt):
        outcome = ("expert", problem.demonstration, 0, 0)
        for stage in args.stages:
            prompt = problem.prompt
            if stage == "guided":
                text = prompts.fill(args.guided_prompt, problem=problem.problem, solution=problem.demonstration)
                prompt = [{"role": "user", "content": text}]
            correct = []
            for k in range(args.num_generations):
                seed = attempt_seed(args.seed, problem.id, stage, k)
                completion = sampler.completion(Request("", prompt, seed, SamplingParams()))
                if completion.finish_reason == "stop" and completion.text.endswith(f"\\boxed{{{problem.answer}}}"):
                    correct.append((k, completion.text))
                    if args.selection == "first":
                        break
            if correct:
                sampled = correct[0][0] + 1 if args.selection == "first" else args.num_generations
                outcome = (stage, [text for _, text in correct], sampled, len(correct))
                break
        results.append((problem.id, *outcome))
    return results


class OtherVerifier:
    """Takes what is near enough for some texts, refuses what is right in others, and cannot compare with multiples of seven."""

    def verify(self, completions, answers):
        said = [
            int(re.search(r"\\boxed{(\d+)}$", text)[1]) - int(answer)
            for text, answer in zip(completions, answers, strict=True)
        ]
        return [
            "correct" if off in (0, 1, 2)[len(text) % 2 :] else "wrong"
            for off, text in zip(said, completions, strict=True)
        ]

    def check_answers(self, answers):
        return [Verdict.CORRECT if int(answer) % 7 else Verdict.UNPARSABLE for answer in answers]
