"""The quickstart's world: running-total word problems with two ways of writing them down, and a second task family.

A row of the first family (everything is generated from a seed, nothing is downloaded):

    problem   A jar holds 13 coins. A adds 4. B makes it 3 times as many. How many coins?
    own       13\nA+4=17\nB*3=51\n\\boxed{51}                               (how the policy writes)
    expert    We begin with 13 coins. Once A adds 4, the jar holds 17. ... So the answer is \\boxed{51}.

The second family (units, weekdays, positions, counting) is never fine-tuned on: it shows what is forgotten.
"""

import random


ITEMS = ["coins", "beads", "stamps", "shells", "cards", "nuts"]
PLACES = ["jar", "box", "bag", "tin"]
LABELS = "ABCDEFGH"
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
UNITS = [
    ("m", "cm", 100),
    ("km", "m", 1000),
    ("h", "min", 60),
    ("min", "s", 60),
    ("kg", "g", 1000),
    ("weeks", "days", 7),
]
GUIDED_PROMPT = "{problem}\nReference: {solution}\nSolve it again in your own way."


def _apply(value, op, operand):
    return value + operand if op == "+" else value - operand if op == "-" else value * operand


def _draw_op(rng, value, p_times, p_hard):
    """One operation: operands of 2..9 and a total of 1..99, or (hard) operands of up to 99 and a total of up to 999."""
    hard = rng.random() < p_hard
    top = 999 if hard or value > 99 else 99
    low, high = (11, 99) if hard else (2, 9)
    if rng.random() < p_times and value * 2 <= top:
        return "*", rng.randint(2, min(9, top // value))
    if (rng.random() < 0.5 and value > low) or value + low > top:
        return "-", rng.randint(low, min(high, value - 1))
    return "+", rng.randint(low, min(high, top - value))


def _clause(label, op, operand):
    if op == "*":
        return f"{label} makes it {operand} times as many"
    return f"{label} {'adds' if op == '+' else 'takes'} {operand}"


def running_total(rng: random.Random, num_ops: int, p_times: float = 0.3, p_hard: float = 0.3) -> dict:
    """One problem: `problem`, `answer`, and the same solution in the policy's `own` and the `expert`'s style."""
    item, place = rng.choice(ITEMS), rng.choice(PLACES)
    start = value = rng.randint(3, 60)
    steps = []
    for label in LABELS[:num_ops]:
        op, operand = _draw_op(rng, value, p_times, p_hard)
        value = _apply(value, op, operand)
        steps.append((label, op, operand, value))
    clauses = [_clause(label, op, operand) for label, op, operand, _ in steps]
    problem = f"A {place} holds {start} {item}. " + " ".join(c + "." for c in clauses) + f" How many {item}?"
    own = "\n".join([str(start)] + [f"{label}{op}{operand}={result}" for label, op, operand, result in steps])
    return {
        "problem": problem,
        "answer": str(value),
        "own": own + f"\n\\boxed{{{value}}}",
        "expert": _expert(rng, item, place, start, clauses, steps, value),
        "num_ops": num_ops,
    }


def _expert(rng, item, place, start, clauses, steps, value):
    """Prose; now and then two operations share a sentence that states only the second result."""
    sentences = [rng.choice([f"We begin with {start} {item}.", f"At first the {place} holds {start} {item}."])]
    i = 0
    while i < len(steps):
        merged = i + 1 < len(steps) and rng.random() < 0.15
        what = f"{clauses[i]} and {clauses[i + 1]}" if merged else clauses[i]
        i += 2 if merged else 1
        result = steps[i - 1][3]
        sentences.append(
            rng.choice([f"Once {what}, the {place} holds {result}.", f"Then {what}, which gives {result} {item}.",
                        f"Next, {what}, so there are {result}."])
        )  # fmt: skip
    return " ".join(sentences) + f" So the answer is \\boxed{{{value}}}."


def second_family(rng: random.Random) -> dict:
    """One problem of the family that fine-tuning never sees: `problem`, `answer`, `own`."""
    kind = rng.choice(["units", "weekday", "position", "count"])
    if kind == "units":
        big, small, factor = rng.choice(UNITS)
        k = rng.randint(2, 12)
        problem, answer = f"How many {small} are {k} {big}?", str(k * factor)
        own = f"{k}*{factor}={answer}"
    elif kind == "weekday":
        day, k = rng.randrange(7), rng.randint(1, 9)
        answer = WEEKDAYS[(day + k) % 7]
        problem, own = f"Today is {WEEKDAYS[day]}. Which day is it in {k} days?", f"{WEEKDAYS[day]}+{k}"
    elif kind == "position":
        words = rng.sample(ITEMS, 5)
        k = rng.randrange(5)
        problem, answer = f"Which word is number {k + 1}: {' '.join(words)}?", words[k]
        own = " ".join(f"{i + 1}{w}" for i, w in enumerate(words[: k + 1]))
    else:
        words = [rng.choice(ITEMS[:3]) for _ in range(rng.randint(3, 7))]
        word = rng.choice(words)
        answer = str(words.count(word))
        problem = f"How often does {word} occur: {' '.join(words)}?"
        own = " ".join(f"{w}{words[: i + 1].count(word)}" for i, w in enumerate(words))
    return {"problem": problem, "answer": answer, "own": f"{own}\n\\boxed{{{answer}}}", "kind": kind}


def problems(
    num_rows: int, seed: int, num_ops=(1, 2, 3, 4, 5, 6), p_times: float = 0.3, p_hard: float = 0.3
) -> list[dict]:
    """`num_rows` distinct running-total problems; `num_ops` is cycled through, so every length has the same share."""
    rng, rows, seen = random.Random(seed), [], set()
    while len(rows) < num_rows:
        row = running_total(rng, num_ops[len(rows) % len(num_ops)], p_times, p_hard)
        if row["problem"] not in seen:
            seen.add(row["problem"])
            rows.append(row)
    return rows


def demonstrations(rows: list[dict]) -> list[dict]:
    """Rows as a TRL user has them: conversational `prompt` and the expert's `completion`, gold in `answer`."""
    return [
        {
            "prompt": [{"role": "user", "content": row["problem"]}],
            "completion": [{"role": "assistant", "content": row["expert"]}],
            "answer": row["answer"],
            "num_ops": row["num_ops"],
        }
        for row in rows
    ]
