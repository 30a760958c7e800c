"""inspect-ai asks what `evaluate` asks, and the same completions get the same verdicts."""

import inspect_ai
import pytest

from trl_offpolicy.evaluation.benchmarks import BENCHMARKS, read_questions
from trl_offpolicy.evaluation.evaluate import evaluate
from trl_offpolicy.sampling.sampler import Completion


ROWS = [{"problem": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(1, 7)]
# What is said to each: right, right in another form, wrong, no answer, cut, and one that the verifier cannot judge.
SAID = [
    ("so \\boxed{2}", "stop"), ("\\boxed{\\frac{8}{2}}", "unknown"), ("\\boxed{7}", "stop"), ("who knows", "stop"), ("\\boxed{10}", "max_tokens"),
    ("\\boxed{slow}", "stop"),
]  # fmt: skip


class Slow:
    """MathVerifier, but for a time-out at one text."""

    def __init__(self):
        from trl_offpolicy import MathVerifier

        self.inner = MathVerifier(num_workers=1)

    def verify(self, completions, answers):
        verdicts = self.inner.verify(completions, answers)
        return ["timeout" if "slow" in c else v for c, v in zip(completions, verdicts, strict=True)]


class Scripted:
    name, revision, processing_class, capacity = "scripted", "1", None, 8

    def __init__(self):
        self.asked, self.done = {}, []

    def submit(self, request):
        said, reason = SAID[len(self.asked)]
        self.asked[request.id] = request.prompt
        self.done.append(Completion(request.id, said, [], [], "length" if reason == "max_tokens" else "stop"))

    def poll(self):
        done, self.done = self.done, []
        return done

    def abort(self, request_id):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_the_same_completions_have_the_same_verdicts(tmp_path, system_prompt):
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from trl_offpolicy.evaluation.inspect_tasks import task_of
    from trl_offpolicy.verification.verifier import as_verifier

    ours, sampler = Slow(), Scripted()
    expected = evaluate(
        None, {"sums": ROWS}, num_generations=1, sampler=sampler, verifier=ours, system_prompt=system_prompt
    )["sums"]
    outputs = [ModelOutput.from_content("mock", said, stop_reason=reason) for said, reason in SAID]
    for output in outputs:
        output.usage = ModelUsage()  # else it would be counted with a tokenizer from the network
    task = task_of("sums", ROWS, system_prompt=system_prompt, verifier=as_verifier(ours))
    (log,) = inspect_ai.eval(
        task,
        model=get_model("mockllm/model", custom_outputs=outputs),
        max_samples=1,
        log_dir=str(tmp_path),
        display="none",
    )
    assert log.status == "success", log.error
    samples = sorted(log.samples, key=lambda sample: expected["problem_ids"].index(sample.id))
    verdicts = [sample.scores["verified"].metadata["verdict"] for sample in samples]
    assert verdicts == ["correct", "correct", "wrong", "unparsable", "unparsable", "timeout"]
    assert [v == "correct" for v in verdicts[:5]] == [bool(n) for n in expected["num_correct"][:5]]
    assert expected["num_judged"] == [1, 1, 1, 1, 1, 0]
    values = {metric.name: metric.value for metric in log.results.scores[0].metrics.values()}
    assert values["accuracy"] == pytest.approx(expected["avg@1"]) and log.results.scores[0].unscored_samples == 1
    asked = [[{"role": m.role, "content": m.text} for m in sample.input] for sample in samples]
    assert asked == list(sampler.asked.values())
    assert asked == [q.prompt for q in read_questions("sums", ROWS, "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.", system_prompt)]  # fmt: skip
    ours.inner.close()


def test_a_verifier_is_given_the_columns_that_it_names(tmp_path):
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from trl_offpolicy.evaluation.inspect_tasks import task_of
    from trl_offpolicy.verification.verifiers import MultipleChoiceVerifier

    rows = [{"problem": "The capital of France?", "answer": "Paris", "choices": ["Rome", "Paris"]}]
    output = ModelOutput.from_content("mock", "The answer is B.")
    output.usage = ModelUsage()
    model = get_model("mockllm/model", custom_outputs=[output])
    task = task_of("capitals", rows, verifier=MultipleChoiceVerifier())
    (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path), display="none")
    assert log.samples[0].scores["verified"].metadata["verdict"] == "correct"


def test_no_seed_is_sent_and_a_gold_answer_that_cannot_be_read_is_not_scored(tmp_path):
    """inspect-ai sends a task's seed in every epoch, with which a server draws the same sample again."""
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    from trl_offpolicy.evaluation.inspect_tasks import task_of

    rows = [{"problem": "What is 2 plus 2?", "answer": "4"}, {"problem": "See the figure.", "answer": "\\frac{1}{"}]
    sent = []

    def answer(messages, tools, choice, config):
        sent.append(config)
        output = ModelOutput.from_content("mock", "\\boxed{4}")
        output.usage = ModelUsage()
        return output

    model = get_model("mockllm/model", custom_outputs=answer)
    (log,) = inspect_ai.eval(task_of("sums", rows), model=model, epochs=2, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    assert len(sent) == 4 and all(config.seed is None and config.temperature == 1.0 for config in sent)
    values = {metric.name: metric.value for metric in log.results.scores[0].metrics.values()}
    assert values["accuracy"] == 1.0
    assert [s.scores["verified"].value == 1.0 for s in log.samples] == [s.target == "4" for s in log.samples]


def test_every_benchmark_is_a_task_that_inspect_finds(tmp_path):
    from inspect_ai._util.registry import registry_lookup

    from trl_offpolicy.evaluation import inspect_tasks

    for name in [*BENCHMARKS, "benchmark"]:
        assert registry_lookup("task", f"trl_offpolicy/{name}") or registry_lookup("task", name), name
    with pytest.raises(ValueError, match="are plain texts, which inspect-ai would ask as messages"):
        inspect_tasks.task_of("plain", [{"prompt": "1+1=", "answer": "2"}])
