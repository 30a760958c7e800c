"""`MathVerifier` against math-verify called in a plain loop, and against your own labelled rows.

    python benchmarks/verification.py speed        --rows outputs.jsonl      # verifications per second and core, interleaved
    python benchmarks/verification.py accuracy     --rows cases.jsonl outputs.jsonl
    python benchmarks/verification.py formats      --rows math500.jsonl      # the same golds in formats of every day, and other golds
    python benchmarks/verification.py kinds        --rows cases.jsonl        # false positives and negatives by kind
    python benchmarks/verification.py golds        --rows math_train.jsonl gsm8k_test.jsonl
    python benchmarks/verification.py pathological --rows outputs.jsonl --timeout 1

`speed`, `accuracy`, `kinds` and `pathological` read JSON lines with `gold`, `prediction`, `label` (accuracy, kinds) and `kind` (kinds);
`golds` and `formats` read `answer` and, if there is one, `solution`. Without `--rows` they take the small files of `tests/data`.
"""

import argparse
import json
import logging
import random
import resource
import signal
import time
from collections import Counter
from pathlib import Path

from math_verify import parse
from math_verify import verify as math_verify

from trl_offpolicy import MathVerifier
from trl_offpolicy.verification.worker import Worker


DATA = Path(__file__).parents[1] / "tests" / "data"


def read(paths: list[str]) -> list[dict]:
    return [json.loads(line) for path in paths for line in Path(path).open(encoding="utf-8")]


def plain(gold: str, prediction: str) -> bool:
    """What math-verify's README does, the gold in `$…$` unless it has its own; its alarms time it out."""
    gold = gold if "$" in gold or "\\boxed" in gold else f"${gold}$"
    return math_verify(parse(gold), parse(prediction))


def pathological(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(prediction, gold) pairs that hang, swell or crash naive verifiers; which ones depends on `seed` alone."""
    rng = random.Random(seed)
    big = lambda low, high: rng.randint(low, high)  # noqa: E731
    families = [
        lambda: ("^{".join(str(big(2, 99)) for _ in range(big(3, 9))), "5"),
        lambda: ("9" + "^{9" * (n := big(3, 40)) + "}" * n, f"{big(1, 9)}"),
        lambda: (f"{big(10**6, 10**9)}!", "5"),
        lambda: ("(" * (n := big(2, 6)) + f"{big(5, 20)}!" + ")!" * n, "5"),
        lambda: (f"\\binom{{{big(10**8, 10**10)}}}{{{big(10**7, 10**8)}}}", "7"),
        lambda: (str(big(1, 9)) * big(20_000, 100_000), "5"),
        lambda: ("{" * (n := big(1000, 50_000)) + "5" + "}" * n, "5"),
        lambda: ("\\left(" * (n := big(200, 2000)) + "x" + "\\right)" * n, "x"),
        lambda: ("\\frac{1}{1+" * (n := big(50, 400)) + "x" + "}" * n, "x"),
        lambda: ("\\{" + ",".join(str(big(0, 10**6)) for _ in range(big(200, 20_000))) + "\\}", "\\{1,2\\}"),
        lambda: (f"\\sum_{{k=1}}^{{{big(10**6, 10**9)}}} \\frac{{1}}{{k^{big(1, 3)}}}", "5"),
        lambda: (f"\\prod_{{k=1}}^{{{big(10**5, 10**8)}}} (k^2+1)", "5"),
        lambda: (f"\\int_0^{big(1, 9)} \\sin(x^{{x^{{x}}}})\\cos(e^{{x}}) dx", "1"),
        lambda: (f"(a+b+c+d+e+f)^{{{big(50, 500)}}}", f"(f+e+d+c+b+a)^{{{big(50, 500)}}}"),
        lambda: ("+".join(f"\\sqrt{{{p}}}" for p in (2, 3, 5, 7, 11, 13, 17, 19)) + f"\\pm {big(1, 9)}" * big(2, 14), "0"),
        lambda: (f"x^{{{big(10**6, 10**12)}}}-1", "x"),
        lambda: (f"{rng.random()} \\times 10^{{{big(10**6, 10**12)}}}", "1.5"),
        lambda: (f"\\begin{{pmatrix}}1&1\\\\1&0\\end{{pmatrix}}^{{{big(10**5, 10**8)}}}", "1"),
        lambda: ("".join(chr(big(0x80, 0x2FFFF)) for _ in range(big(10, 20_000)) if True), "5"),
        lambda: ("\x00" * big(1, 10_000) + "5", "5"),
        lambda: ("\\" * big(100, 100_000), "5"),
        lambda: ("$" * big(100, 100_000), "5"),
        lambda: ("-" * big(100, 30_000) + "1", "5"),
        lambda: (" ".join("1" * big(1, 5) for _ in range(big(100, 5000))), "5"),
        lambda: ("(0,1)" + "".join(f"\\cup({2 * i},{2 * i + 1})" for i in range(1, big(20, 300))), "(0,1)"),
        lambda: ("x" + "".join(f"+x_{{{i}}}" for i in range(big(50, 600))), "x"),
        lambda: ("\\boxed{" * big(10, 3000), "5"),
    ]  # fmt: skip
    pairs = []
    for index in range(count):
        answer, gold = families[index % len(families)]()
        pairs.append((f"The answer is $\\boxed{{{answer}}}$.", gold))
    return pairs


def speed(arguments) -> None:
    rows = read(arguments.rows or [DATA / "real_outputs.jsonl"])
    random.Random(0).shuffle(rows)
    rows = rows[: arguments.max_rows]
    golds, predictions = [r["gold"] for r in rows], [r["prediction"] for r in rows]
    times: dict[str, list[float]] = {"MathVerifier, 1 worker": [], "math-verify in a loop": []}
    agree = 0
    with MathVerifier(num_workers=1) as verifier:
        verifier.verify(["\\boxed{x+1}"], ["1+x"])  # started, and sympy imported
        for _ in range(arguments.rounds):
            began = time.perf_counter()
            ours = verifier.verify(predictions, golds)
            times["MathVerifier, 1 worker"].append(time.perf_counter() - began)
            began = time.perf_counter()
            theirs = [plain(g, p) for g, p in zip(golds, predictions, strict=True)]
            times["math-verify in a loop"].append(time.perf_counter() - began)
            agree = sum((o == "correct") == t for o, t in zip(ours, theirs, strict=True))
    print(
        f"{len(rows)} verifications, {arguments.rounds} rounds in turn; {agree} verdicts agree\n{'':26}per second and core"
    )
    for name, seconds in times.items():
        rates = [len(rows) / s for s in seconds]
        print(f"{name:26}" + "".join(f"{rate:9.0f}" for rate in rates))
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    print(f"{'ratio':26}" + "".join(f"{ratio:9.1f}" for ratio in ratios))


# An answer as models write it, in what surrounds it.
FORMATS = {
    "`\\boxed{g}`": "We add.\n\nThus it is $\\boxed{{{g}}}$.",
    "a box, then \"(The final answer is rounded …)\"": "So $\\boxed{{{g}}}$.\n\n(The final answer is rounded to 2 decimal places.)",
    "a box, then an echo of the instruction": "So $\\boxed{{{g}}}$. As requested, the final answer is in \\boxed{{}}.",
    "`**Answer:**`, newline, `\\[ g \\]`": "We add.\n\n**Answer:**\n\\[ {g} \\]",
    "under `### Final Answer`": "We add.\n\n### Final Answer\n\n\\[\n{g}\n\\]\n\nLet me know if you have questions!",
    "a heading `#### Step 1`, then `Answer: $g$`": "#### Step 1\n\nWe add.\n\n#### Step 2: conclude\n\nAnswer: ${g}$",
    "`<answer>` g `</answer>`": "<think>\nMaybe \\boxed{{17}}?\n</think>\n<answer>\n{g}\n</answer>",
    "`<answer>$g$</answer>`": "<think>\nWe add.\n</think>\n<answer>${g}$</answer>",
    "`Answer: $g$`, then \"… the result is consistent …\"": "Answer: ${g}$\n\nSubstituting shows that the result is consistent with the condition.",
    "`Answer: $g$`, then a verification with 20": "Answer: ${g}$\n\nVerification: for n = 3 there are 17 pairs, so the result is 20.",
    "`Answer: $g$`, then an alternative": "**Answer:** ${g}$\n\nAlternatively, if order mattered, the answer would be $1234567$.",
    "答案：`$g$`": "所以，答案：`${g}$`",
    "`最终答案是：` and display": "最终答案是：\n\n$${g}$$",
    "`Réponse : $g$`": "Donc.\n\nRéponse : ${g}$",
    "`Die Antwort lautet $g$.`": "Die Antwort lautet ${g}$.",
    "`**Respuesta final:** $g$`": "**Respuesta final:** ${g}$",
    "`Ответ: $g$`": "Складываем.\n\nОтвет: ${g}$",
    "`答えは $g$ です。`": "答えは ${g}$ です。",
    "`정답: $g$`": "정답: ${g}$",
    "`Answer: g` without `$`": "We add.\n\nAnswer: {g}",
    "`the final answer is g.` without `$`": "Therefore, the final answer is {g}.",
    "`**Final Answer:** **$g$**`": "**Final Answer:** **${g}$**",
    "a sentence under the phrase": "**Final Answer:** The requested quantity is ${g}$.",
    "a last line `#### g`": "We add.\n#### {g}",
    "a code fence behind the phrase": "Answer:\n```\n{g}\n```",
    "`Therefore, the value is $g$.`": "We add.\n\nTherefore, the value is ${g}$.",
    "gpt-oss's channels": "<|channel|>analysis<|message|>\\boxed{{3}}?<|end|><|start|>assistant<|channel|>final<|message|>The answer is ${g}$.<|return|>",
    "`[THINK]` … `[/THINK]`": "[THINK]Perhaps the answer is 3.[/THINK]Answer: ${g}$</s>",
}  # fmt: skip


def formats(arguments) -> None:
    """Per format, the share of gold answers that are called correct, and how many other rows' answers are."""
    answers = [r["answer"] for path in arguments.rows or [DATA / "math_50.jsonl"] for r in read([path])]
    others = [(a, b) for a, b in zip(answers, random.Random(0).sample(answers, len(answers)), strict=True) if a != b]
    print("| format | MathVerifier | other answers | math-verify |\n|---|--:|--:|--:|")
    with MathVerifier(timeout=arguments.timeout) as verifier:
        same = [
            v == "correct" for v in verifier.verify([f"\\boxed{{{a}}}" for _, a in others], [b for b, _ in others])
        ]
        others = [pair for pair, equal in zip(others, same, strict=True) if not equal]  # 0.5 beside \\frac12
        for name, form in FORMATS.items():
            right = verifier.verify([form.format(g=a) for a in answers], answers).count("correct")
            wrong = verifier.verify([form.format(g=b) for _, b in others], [a for a, _ in others]).count("correct")
            peer = [plain(a, form.format(g=a)) for a in answers] if arguments.peer else []
            peer = f"{100 * sum(peer) / len(peer):.1f}" if peer else "–"
            print(f"| {name} | {100 * right / len(answers):.1f} | {wrong} | {peer} |", flush=True)


def kinds(arguments) -> None:
    """Per kind of case: how many, and the false positives and negatives of both."""
    rows = [r for path in arguments.rows or [DATA / "verifier_cases_2026_11.jsonl"] for r in read([path])]
    with MathVerifier(timeout=arguments.timeout) as verifier:
        ours = [v == "correct" for v in verifier.verify([r["prediction"] for r in rows], [r["gold"] for r in rows])]
    peer = [plain(r["gold"], r["prediction"]) for r in rows] if arguments.peer else ours
    counts = {}
    for row, *said in zip(rows, ours, peer, strict=True):
        for kind in (row["kind"], "all"):
            count = counts.setdefault(kind, Counter())
            count["n"] += 1
            for who, verdict in enumerate(said):
                count[f"{who}{'FP' if verdict else 'FN'}"] += verdict != row["label"]
    print("| kind | n | MathVerifier FP/FN | math-verify FP/FN |\n|---|--:|--:|--:|")
    for kind, count in sorted(counts.items(), key=lambda item: (item[0] != "all", -item[1]["n"], item[0])):
        print(f"| {kind} | {count['n']} | {count['0FP']}/{count['0FN']} | {count['1FP']}/{count['1FN']} |")


def accuracy(arguments) -> None:
    print(f"{'':28}{'n':>6}{'accuracy':>10}{'FP':>4}{'FN':>4}   verdicts that are neither correct nor wrong")
    for path in arguments.rows or [DATA / "verifier_cases_public.jsonl", DATA / "real_outputs.jsonl"]:
        rows = read([path])
        with MathVerifier(timeout=arguments.timeout) as verifier:
            told = verifier.explain([r["prediction"] for r in rows], [r["gold"] for r in rows])
        ours = [verdict == "correct" for verdict, _ in told]
        rest = Counter(str(v) for v, _ in told if v not in ("correct", "wrong"))
        verdicts = [("MathVerifier", ours, dict(rest))]
        if arguments.peer:
            verdicts.append(("math-verify", [plain(r["gold"], r["prediction"]) for r in rows], ""))
        print(Path(path).name)
        for name, said, note in verdicts:
            false = [r for r, s in zip(rows, said, strict=True) if s != r["label"]]
            positives = sum(not r["label"] for r in false)
            share = 1 - len(false) / len(rows)
            print(f"  {name:26}{len(rows):6}{share:10.4f}{positives:4}{len(false) - positives:4}   {note}")
        for row, said, (verdict, reason) in zip(rows, ours, told, strict=True):
            if said != row["label"]:
                print(
                    f"    {row.get('id', '')} label={row['label']} {verdict} {reason}: gold {row['gold'][-80:]!r}, … {row['prediction'][-120:]!r}"
                )


def golds(arguments) -> None:
    """Each gold answer through the gate, against itself, its solution against it, and against another row's answer."""
    for path in arguments.rows or [DATA / "gsm8k_50.jsonl", DATA / "math_50.jsonl"]:
        rows = read([path])
        answers = [r["answer"] or "" for r in rows]
        shuffled = random.Random(0).sample(answers, len(answers))
        solved = [i for i, r in enumerate(rows) if r.get("solution")]
        with MathVerifier(timeout=arguments.timeout) as verifier:
            gate = verifier.check_answers(answers)
            itself = verifier.explain([f"\\boxed{{{a}}}" for a in answers], answers)
            solution = verifier.explain([rows[i]["solution"] for i in solved], [answers[i] for i in solved])
            pairs = [(a, b) for a, b in zip(answers, shuffled, strict=True) if a != b]
            other = verifier.explain([f"\\boxed{{{b}}}" for _, b in pairs], [a for a, _ in pairs])
        print(Path(path).name, len(rows))
        print("  comparable golds ", dict(Counter(map(str, gate))))
        print("  gold on itself   ", dict(Counter(str(v) for v, _ in itself)))
        print("  solution on gold ", dict(Counter(str(v) for v, _ in solution)))
        print("  another's gold   ", dict(Counter(str(v) for v, _ in other)))
        for answer, verdict, (self_verdict, _) in zip(answers, gate, itself, strict=True):
            if verdict != "correct" or self_verdict != "correct":
                print(f"    {verdict} / {self_verdict}: {answer!r}")
        for (answer, given), (verdict, reason) in zip(pairs, other, strict=True):
            if verdict in ("correct", "timeout", "error"):
                print(f"    shuffled: {verdict} {reason}: {answer!r} and {given!r}")
        if arguments.solutions:
            for i, (verdict, reason) in zip(solved, solution, strict=True):
                if verdict != "correct":
                    print(f"    solution: {verdict} {reason}: gold {answers[i]!r}, … {rows[i]['solution'][-100:]!r}")


def _measured(pairs: list[tuple[str, str]], timeout: float, bad: set[int] = frozenset()) -> tuple[list, float]:
    """Results of one batch, and how many of those that are not `bad` a worker does in a second of its time.

    Its time is that between two answers, with what a kill before it cost; answers that came together with a bad one's are left out.
    """
    spent, done = 0.0, 0
    results_of = Worker.results

    def timed(worker, readable):
        nonlocal spent, done
        told, now = results_of(worker, readable), time.perf_counter()
        if told and not bad & {index for index, _ in told}:
            spent, done = spent + now - worker.answered, done + len(told)
        if told or not worker.reading:
            worker.answered = now
        return told

    with MathVerifier(timeout=timeout) as verifier:
        verifier.verify(["1"] * 8, ["1"] * 8)
        for worker in verifier._workers:
            worker.answered = time.perf_counter()
        Worker.results = timed
        try:
            results = verifier.explain([p for p, _ in pairs], [g for _, g in pairs])
        finally:
            Worker.results = results_of
    return results, done / spent


def hostile(arguments) -> None:
    normal = [(r["prediction"], r["gold"]) for r in read(arguments.rows or [DATA / "real_outputs.jsonl"])]
    normal = (normal * arguments.repeat)[: arguments.max_rows * arguments.repeat]
    bad = [(r["prediction"], r["gold"]) for r in read(arguments.pathological)] if arguments.pathological else []
    bad += pathological(arguments.count - len(bad))
    mixed = normal + bad
    order = random.Random(0).sample(range(len(mixed)), len(mixed))

    slowest, late = 0.0, 0
    with MathVerifier(timeout=arguments.timeout, num_workers=1) as verifier:
        verifier.verify(["1"], ["1"])
        for prediction, gold in bad:
            began = time.perf_counter()
            verifier.explain([prediction], [gold])
            seconds = time.perf_counter() - began
            slowest, late = max(slowest, seconds), late + (seconds > 2 * arguments.timeout)
    print(
        f"{len(bad)} pathological inputs one by one, timeout {arguments.timeout:g} s: slowest {slowest:.2f} s, {late} beyond 2 x"
    )
    expected, before = _measured(normal, arguments.timeout)
    hostile_places = {place for place, i in enumerate(order) if i >= len(normal)}
    shuffled, beside = _measured([mixed[i] for i in order], arguments.timeout, hostile_places)
    told = dict(zip(order, shuffled, strict=True))
    alone = (before + _measured(normal, arguments.timeout)[1]) / 2
    same = sum(told[i] == e for i, e in enumerate(expected))
    print(f"mixed with {len(normal)} normal ones: {len(told)} of {len(mixed)} verdicts; {same} normal ones as without")
    print(f"  pathological: {dict(Counter(str(told[i][0]) for i in range(len(normal), len(mixed))))}")
    print(f"  largest worker: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB resident")
    print(
        f"  normal ones per second of a worker: {alone:.0f} alone, {beside:.0f} in the mixture: {beside / alone:.2f} x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {
        "speed": speed,
        "accuracy": accuracy,
        "formats": formats,
        "kinds": kinds,
        "golds": golds,
        "pathological": hostile,
    }
    parser.add_argument("command", choices=list(commands))
    parser.add_argument("--rows", nargs="+", help="JSONL files")
    parser.add_argument("--max_rows", type=int, default=500, help="of speed and pathological")
    parser.add_argument("--rounds", type=int, default=3, help="of speed")
    parser.add_argument("--timeout", type=float, default=4.0, help="CPU seconds of one verification")
    parser.add_argument("--no_peer", dest="peer", action="store_false", help="accuracy without math-verify")
    parser.add_argument("--solutions", action="store_true", help="golds: list the solutions that do not match")
    parser.add_argument("--count", type=int, default=500, help="pathological inputs")
    parser.add_argument("--pathological", nargs="+", help="JSONL files with more of them")
    parser.add_argument("--repeat", type=int, default=20, help="of the normal rows beside the pathological ones")
    arguments = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    commands[arguments.command](arguments)


if __name__ == "__main__":
    main()
