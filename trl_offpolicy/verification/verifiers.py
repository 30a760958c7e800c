r"""
Verifiers for what is not mathematics; each has the four ways of `MathVerifier`: `verify`, `explain`, a reward, `with`.

    NumericVerifier(rel_tol=0.01).verify(["It takes \\boxed{5.1 km}"], ["5.1e3 m"])             # [Verdict.CORRECT]
    all_of(JsonSchemaVerifier(schema), JudgeVerifier(sampler)).verify(completions, answers)

Underneath: pint reads units, jsonschema validates, a [`Sampler`] judges. What a completion states is found as for
mathematics (last box, "answer is", a single line). A user's function of (completions, answers) fits wherever one of
these does.
"""

import functools
import json
import math
import re
import string
import unicodedata

from ..answers.extraction import NO_ANSWER, Unparsable, stated_text, without_thinking
from ..answers.normalization import MAGNITUDES, normalize, number
from ..data import prompts
from ..data.rows import Verdict
from ..sampling.sampler import FAILED, Request, SamplingParams, as_sampler, attempt_seed, needs
from .drawing import Asked, Drawing
from .verifier import GoldAtFault, Judgement, Verifier, as_verifier, explain_with


class _StatedVerifier(Verifier):
    """Compares what each completion states, by `judge(stated, answer)` with the row's `columns` behind them."""

    def judge(self, stated: str, answer) -> Judgement:
        raise NotImplementedError

    def _explain(self, completions: list[str], answers: list, **columns: list) -> list[Judgement]:
        stated = [stated_text(completion) for completion in completions]
        return [
            self.judge(text, *row) if text else Judgement(Verdict.UNPARSABLE, NO_ANSWER)
            for text, *row in zip(stated, answers, *columns.values(), strict=True)
        ]


def _unwrapped(text: str) -> str:
    r"""`\\text{(B)} 12` without the command around its words."""
    return re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r" \1 ", text).replace("\\ ", " ")


# What is said of a choice that is not the one: `A is incorrect`, `A - no, B`.
_DENIED = r"[\s.:,;\u2013\u2014-]*(?:\b(?:is|are|was|would be)\b\s*)?(?:\b(?:not|no|never|wrong|incorrect|false|impossible|ruled|excluded|eliminated)\b|\w{1,6}n['\u2019]t\b)"


class MultipleChoiceVerifier(_StatedVerifier):
    """
    One letter: `B`, `(B)`, `B. 12`, `\\text{(B)}`, `option B`, `B, because A fails`. Several letters are wrong,
    whichever they are.

    A letter counts where the statement names it as its choice: at its beginning, behind "option", in brackets. Letters
    of other words (`Vitamin A`, the pronoun I, a formula) are no choice. Where the row has a column `choices`, its
    labels are the letters there are, and a statement that is the text of one choice names that choice.

    Args:
        letters (`str`, *optional*, defaults to `"ABCDEFGHIJ"`): The choices of rows without a column `choices`, which
            is a list of texts, `{"label": [...], "text": [...]}` or `{label: text}`. A gold answer is a letter, or
            there the text or index (an `int`) of one.
    """

    columns = ("choices", "answer")  # a row's own answer tells an index, which is a number, from a text

    def __init__(self, letters: str = "ABCDEFGHIJ"):
        self.letters = letters.upper()

    def _labelled(self, choices) -> dict[str, str]:
        """Each label with the text of its choice, folded; without texts where the row does not have them."""
        if choices is None:
            return dict.fromkeys(self.letters, "")
        if isinstance(choices, dict) and {"label", "text"} <= choices.keys():
            if len(choices["label"]) != len(choices["text"]):
                raise ValueError(
                    f"`choices` has {len(choices['label'])} labels and {len(choices['text'])} texts: {choices!r:.200}."
                )
            choices = dict(zip(choices["label"], choices["text"], strict=True))
        elif not isinstance(choices, dict):
            choices = dict(zip(string.ascii_uppercase, choices, strict=False))
        return {str(label).upper(): folded(str(text)) for label, text in choices.items()}

    @staticmethod
    def _chosen(text: str, labelled: dict[str, str]) -> list[str]:
        same = [label for label, choice in labelled.items() if choice and choice == folded(text)]
        if same:
            return (
                [] if text.strip().upper() in {*labelled} - {*same} else same
            )  # a letter that is another choice's text
        text, one = _unwrapped(text).strip(" *$.{}[]"), f"[{re.escape(''.join(labelled))}]"
        text = text.upper() if len(text) == 1 or re.fullmatch(r"\(\w\)", text) else text
        text = re.sub(
            r"^(?:the )?(?:correct )?(?:option|choice|letter|answer)s?\s*(?=\W?[A-Z0-9]\b)", "", text, flags=re.I
        )
        mark = rf"(?:\(({one})\)|({one})\)?(?![\w'\u2019]))"
        # Several at the beginning: `B, C`, `(C)(D)`, `A and B`, `A; C`; what stands behind the last one explains, as all
        # of `A fails` does in `B; A fails`.
        joined = rf"(?:[,;]?\s*(?:\band\b|\bor\b)|,|/|&|(?=\()|;(?=\s*{mark}\s*(?:[,;.]|$)))"
        if listed := re.match(rf"{mark}(?:\s*{joined}\s*{mark})*", text):
            rest = text[listed.end() :]
            if re.match(_DENIED, rest, re.I):
                return []
            explained = re.match(
                r"\s*(?:[.:,;]|(?:-{1,3}|[\u2013\u2014])(?=\s)|\\|\(|(?:is|are|because|since|as)\b|$)", rest
            )
            if explained or text[listed.end() - 1] == ")":
                first = re.findall(one, listed[0])
                # `A. 3, C. 5` and `(A) 3, (C) 5` mark two in one way; in `B. It is not A.` nothing follows the second,
                # and `(B) 3, (C) is too large` says something of it.
                begin, end = re.escape(text[0]) if text[0] == "(" else "", ")" if listed[0][-1] == ")" else rest[:1]
                another = (
                    rf"(?:[,;\n]|\band|\bor)\s*{begin}({one}){re.escape(end)}(?!\s*(?:is|are|fails?)\b|{_DENIED})\s+\S"
                )
                also = re.findall(another, rest) if end and end in ".):" else []
                return list(dict.fromkeys(first + also))
        named = re.findall(
            rf"(?<!but )(?<!except )(?<!not )\(({one})\)|\b(?:option|choice|letter)\s+({one})\b(?!{_DENIED})", text
        )
        return list(dict.fromkeys(a or b for a, b in named))

    def judge(self, stated: str, answer, choices=None, given=None) -> Judgement:
        labelled = self._labelled(choices)
        answer = given if isinstance(given, int) and str(given) == answer else answer
        if isinstance(answer, int) and 0 <= answer < len(labelled) and str(answer) not in labelled:
            answer = list(labelled)[answer]
        gold, chosen = self._chosen(str(answer), labelled), self._chosen(stated, labelled)
        if len(gold) != 1:
            return GoldAtFault(
                Verdict.UNPARSABLE, f"the gold answer {answer!r:.100} is not one of {', '.join(labelled)}"
            )
        if not chosen:
            return Judgement(Verdict.UNPARSABLE, NO_ANSWER)
        return Judgement(Verdict.CORRECT) if chosen == gold else Judgement(Verdict.WRONG, f"chose {', '.join(chosen)}")


def _composed(text: str) -> str:
    """
    A text in Unicode's compatibility form (NFKC), but for what is another value there (`x²` is not `x2`); spaces are
    collapsed.
    """
    text = unicodedata.normalize("NFC", _unwrapped(text))
    kept = ("<super>", "<sub>", "<fraction>", "<circle>")
    text = "".join(
        c if unicodedata.decomposition(c).startswith(kept) else unicodedata.normalize("NFKC", c) for c in text
    )
    return " ".join(unicodedata.normalize("NFC", text).split())


def folded(text: str) -> str:
    """A text without case, its spaces collapsed and in one of Unicode's ways to write it; no character is removed."""
    return _composed(text).casefold()


class ExactMatchVerifier(_StatedVerifier):
    """
    The same text as the answer, or as one of a list of answers; case, spaces and Unicode's ways to write a character
    do not count.

    An answer that is a number, not a text, is compared as it is written: 1.0 and 1 are both `1` and `1.0`.

    Args:
        ignore_case (`bool`, *optional*, defaults to `True`): `Paris` is `paris`.
        ignore_punctuation (`bool`, *optional*, defaults to `False`): `C++` is `C`, and -5 is 5: for words only, as in
            SQuAD.
        ignore_articles (`bool`, *optional*, defaults to `False`): `the Eiffel Tower` is `Eiffel Tower`.
    """

    def __init__(self, ignore_case: bool = True, ignore_punctuation: bool = False, ignore_articles: bool = False):
        self.ignore_case, self.ignore_punctuation, self.ignore_articles = (
            ignore_case,
            ignore_punctuation,
            ignore_articles,
        )

    def normalized(self, text: str) -> str:
        text = folded(text) if self.ignore_case else _composed(text)
        if self.ignore_punctuation:
            text = text.translate(str.maketrans("", "", string.punctuation))
        if self.ignore_articles:
            text = re.sub(r"\b(?:a|an|the)\b", " ", text, flags=re.I)
        return " ".join(text.split())

    @staticmethod
    def _spellings(answer) -> list[str]:
        if isinstance(answer, (int, float)) and not isinstance(answer, bool) and answer == answer // 1:
            return [str(int(answer)), str(float(answer))]
        return [str(answer)]

    def judge(self, stated: str, answer) -> Judgement:
        answers = answer if isinstance(answer, list) else [answer]
        golds = {self.normalized(text) for a in answers if a is not None and a == a for text in self._spellings(a)} - {
            ""
        }
        if not golds:
            return GoldAtFault(Verdict.UNPARSABLE, "the gold answer is empty")
        if self.normalized(stated) in golds:
            return Judgement(Verdict.CORRECT)
        return Judgement(Verdict.WRONG, f"states {stated!r:.120}, the gold answer is {answer!r:.120}")


@functools.cache
def _units():
    """pint's units and three currencies; here, not in the verifier, since they cannot be pickled."""
    import pint

    units = pint.UnitRegistry()
    for currency in ("USD = [usd] = dollar", "EUR = [eur] = euro", "GBP = [gbp]"):
        units.define(currency)
    return units


class NumericVerifier(_StatedVerifier):
    """
    Numbers within a tolerance, in any unit that pint can convert; `%`, thousands separators, "million" and money are
    read.

    Args:
        rel_tol (`float`, *optional*, defaults to `1e-2`): Allowed difference as a share of the gold value.
        abs_tol (`float`, *optional*, defaults to `0.0`): Allowed difference in the gold answer's unit.
        require_unit (`bool`, *optional*, defaults to `False`): A number without a unit is wrong where the gold answer
            has one.
    """

    _SCALES = {**MAGNITUDES, "k": 1e3, "%": 0.01, "percent": 0.01}
    _QUANTITY = re.compile(
        r"(?P<value>[-+−]?\s*(?:10\s*\^\s*[-+]?\d+|\\frac\{[^{}]*\}\{[^{}]*\}|\d+ \d+/\d+|(?:\d[\d,]*)?\.?\d+(?:/\d+|\s*\\frac\{\d+\}\{\d+\})?(?:[eE][-+]?\d+)?"
        r"(?:\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*[-+]?\d+)?))"
        rf"\s*(?P<scale>(?:{'|'.join(MAGNITUDES)}|k|percent)\b|%)?\s*(?P<unit>.*)",
        re.S,
    )

    _MONEY_SCALES = {"K": "thousand", "M": "million", "mn": "million", "B": "billion", "bn": "billion"}

    # LaTeX of numbers and units in plain spelling, pint's; plain exponents first, or `\mathrm{s^{-1}}` would be one
    # brace in another
    _LATEX = [
        (re.compile(pattern), replacement)
        for pattern, replacement in (
            (r"(?<=\d)(?:\{,\}|\\[,; ]|~| )(?=\d{3}(?!\d))", ","),
            (r"\\[dtc]?frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
            (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
            (r"\^\s*\{\s*([-+−]?\d+)\s*\}", r"^\1"),
            (r"\\(?:text|mathrm|operatorname)\s*\{([^{}]*)\}", r" \1"),
            (r"\^\s*\{?\s*\\circ\s*\}?\s*|\\degree\s*", "°"),
            (r"\\mu(?![A-Za-z])\s*", "µ"),
            (r"\\Omega(?![A-Za-z])", "Ω"),
            (r"(?<=[A-Za-z\d])\s*(?:\\cdot(?![A-Za-z])|·|⋅)\s*(?=[A-Za-zµΩ])", "*"),
            (r"\\?[$€£]|~|\\\s|\\[,;:!]", " "),
        )
    ]

    def __init__(self, rel_tol: float = 1e-2, abs_tol: float = 0.0, require_unit: bool = False):
        if rel_tol < 0 or abs_tol < 0:
            raise ValueError(f"You passed rel_tol={rel_tol}, abs_tol={abs_tol}; a tolerance cannot be negative.")
        self.rel_tol, self.abs_tol, self.require_unit = rel_tol, abs_tol, require_unit
        needs("pint", "units", "NumericVerifier")  # raised here rather than at the first answer

    def quantity(self, text: str):
        """
        A pint quantity, or `None` where there is no number. The unit alone is given to pint: it evaluates arithmetic.
        """
        text = text.replace("\\%", "%")
        # One `$` is money, two are the delimiters of a formula.
        money = re.search(r"[$€£]", text.strip().removeprefix("$").removesuffix("$") if text.count("$") == 2 else text)
        if money or re.search(r"\b(?:USD|EUR|GBP|dollars?|euros?)\b", text):  # without a currency, 300K is kelvin
            text = re.sub(r"(?<=\d)\s?([KMB]|mn|bn)\b", lambda m: f" {self._MONEY_SCALES[m[1]]}", text)
        for pattern, replacement in self._LATEX:
            text = pattern.sub(replacement, text)
        text = text.strip().rstrip(" .")
        match = self._QUANTITY.fullmatch(text.rpartition("=")[2].strip()) if text.count("=") < 3 else None
        try:
            exact = number(normalize(re.sub(r"\^\s*([-+]?\d+)", r"^{\1}", match["value"]))) if match else None
            value = exact and float(exact[0]) * self._SCALES.get(match["scale"] or "", 1.0)
        except (Unparsable, OverflowError):  # 10^400 is no float
            return None
        if value is None:
            return None
        unit = match["unit"].strip() or {"$": "USD", "€": "EUR", "£": "GBP"}.get(money[0] if money else "", "")
        if unit in ("pi", "e", "i") or len(unit) > 40 or re.search(r"[^\w\s/*^{}().$€£°µ-]|\d{2}", unit):
            return None
        try:
            return _units().Quantity(value, _units().parse_units(unit.replace("^{", "^").strip("{}").replace("}", "")))
        except Exception:  # pint raises half a dozen types, and tokenizer errors, for what is no unit
            return None

    def judge(self, stated: str, answer) -> Judgement:
        gold, found = self.quantity(str(answer)), self.quantity(stated)
        if gold is None:
            return GoldAtFault(Verdict.UNPARSABLE, f"the gold answer {answer!r:.100} is no number with a known unit")
        if found is None:
            return Judgement(Verdict.UNPARSABLE, NO_ANSWER)
        if found.unitless and not gold.unitless and not self.require_unit or gold.unitless:
            found, gold = found.magnitude, gold.magnitude  # only one of them says its unit
        elif found.dimensionality != gold.dimensionality:
            return Judgement(Verdict.WRONG, f"{found.units} cannot be compared with {gold.units}")
        else:
            found, gold = found.to(gold.units).magnitude, gold.magnitude
        near = abs(found - gold) <= max(self.rel_tol * abs(gold), self.abs_tol) * (1 + 1e-12)
        return (
            Judgement(Verdict.CORRECT) if near else Judgement(Verdict.WRONG, f"{found:g} where {gold:g} was asked for")
        )


def _each_key_once(pairs: list[tuple[str, object]]) -> dict:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"an object has a key twice: {[key for key, _ in pairs]!r:.200}")
    return found


def _no_constant(name: str):
    raise ValueError(f"{name} is Python's, and no JSON")


# A fence ends a block at the end of a line: one within a text of the JSON does not.
_JSON_BLOCK = re.compile(r"(```|~~~)(?:json)?[ \t]*\n(.*?)\1[ \t]*(?=\n|\Z)", re.S | re.I)


class JsonSchemaVerifier(Verifier):
    """
    The JSON of a completion without its thinking (the last fenced block, else all of it): valid under a schema, and
    equal to the answer.

    Args:
        schema (`dict`, *optional*): JSON Schema. Without one, only equality counts; an answer of `None` asks for
            validity only.

    Raises:
        ValueError: `schema` is no JSON Schema.
    """

    stated = False

    def __init__(self, schema: dict | None = None):
        jsonschema = needs("jsonschema", "json", "JsonSchemaVerifier")
        self.schema, self.validator, self._same = schema, None, jsonschema.Draft202012Validator
        if schema is not None:
            try:
                validator = jsonschema.validators.validator_for(schema)
                validator.check_schema(schema)
            except (jsonschema.SchemaError, TypeError) as error:
                why = getattr(error, "message", error)
                raise ValueError(f"You passed schema={schema!r:.200}, which is no JSON Schema: {why}.") from error
            self.validator = validator(schema)

    def __reduce__(self):
        return JsonSchemaVerifier, (self.schema,)  # a validator cannot be pickled

    def _explain(self, completions: list[str], answers: list, **_) -> list[Judgement]:
        return [self._judge(c, a) for c, a in zip(completions, answers, strict=True)]

    def _judge(self, completion: str, answer) -> Judgement:
        try:
            text = without_thinking(completion).replace("\r\n", "\n")
            blocks = [m[2] for m in _JSON_BLOCK.finditer(text)]
            value = json.loads(
                blocks[-1] if blocks else text, object_pairs_hook=_each_key_once, parse_constant=_no_constant
            )
        except Unparsable as error:
            return Judgement(Verdict.UNPARSABLE, str(error))
        except (ValueError, RecursionError) as error:
            return Judgement(Verdict.UNPARSABLE, f"{NO_ANSWER}: it is not JSON: {error}")
        if answer is None and self.validator is None:
            return GoldAtFault(Verdict.UNPARSABLE, "there is neither a schema nor an answer to compare with")
        violation = next(iter(self.validator.iter_errors(value)), None) if self.validator else None
        if violation is not None:
            return Judgement(Verdict.WRONG, f"{violation.json_path}: {violation.message}"[:300])
        try:
            gold = json.loads(answer) if isinstance(answer, str) else answer
        except ValueError as error:
            return GoldAtFault(Verdict.UNPARSABLE, f"the gold answer is not JSON: {error}"[:300])
        # JSON's equality, not Python's: 1 is 1.0, but not true
        if answer is not None and not self._same({"const": gold}).is_valid(value):
            return Judgement(Verdict.WRONG, "not the value asked for")
        return Judgement(Verdict.CORRECT)


JUDGE_PROMPT = """\
Does the response below reach the reference answer? Judge the final answer only, not the style or the way there.

Reference answer:
{answer}

Response:
{completion}

Reply with one word, YES or NO."""


class JudgeVerifier(Verifier):
    """
    A language model's YES or NO, through any [`~trl_offpolicy.sampling.Sampler`]; the judge needs a sampler of its
    own.

    A sampler gives the log-prob of the token it drew, not of both words. So one token is drawn at a time, and the mass
    seen on words that mean YES, that mean NO, and on others bounds P(YES) / (P(YES) + P(NO)) from both sides; it is
    drawn again (at most `num_draws` times) until the bounds agree on `threshold`. Most often one draw settles it, and
    the draw itself never decides.

    Args:
        sampler ([`~trl_offpolicy.sampling.Sampler`]): The judge.
        yes, no (`str`, *optional*, default to `"YES"`, `"NO"`): The two words, each one token of the judge; case does
            not matter.
        threshold (`float`, *optional*, defaults to `0.5`): Smallest share of YES that is `correct`.
        num_draws (`int`, *optional*, defaults to `8`): What is still open after as many is `unparsable`.
        prompt (`str`, *optional*): With `{completion}` and `{answer}`.
    """

    def __init__(
        self,
        sampler,
        threshold: float = 0.5,
        num_draws: int = 8,
        prompt: str = JUDGE_PROMPT,
        yes: str = "YES",
        no: str = "NO",
        seed: int = 0,
    ):
        if not 0 < threshold < 1 or num_draws < 1:
            raise ValueError(
                f"You passed threshold={threshold}, num_draws={num_draws}; it must be in (0, 1), and at least 1."
            )
        prompts.check(prompt, "prompt", "completion", "answer")
        self.sampler, self.threshold, self.num_draws, self.prompt = as_sampler(sampler), threshold, num_draws, prompt
        self.yes, self.no, self.seed = yes.upper(), no.upper(), seed

    def _explain(self, completions: list[str], answers: list, **_) -> list[Judgement]:
        results: list[Judgement | None] = [None] * len(completions)
        seen: list[dict] = [{} for _ in completions]  # token → (word, probability)
        waiting, draws = list(range(len(completions)))[::-1], [0] * len(completions)

        def ask() -> Asked | None:
            if not waiting:
                return None
            index = waiting.pop()
            text = prompts.fill(self.prompt, completion=completions[index], answer=str(answers[index]))
            seed, params = (
                attempt_seed(self.seed, text, "judge", draws[index]),
                SamplingParams(max_completion_length=1),
            )
            return Asked(index, Request(str(index), [{"role": "user", "content": text}], seed, params), self.sampler)

        with Drawing(None, self.sampler) as drawing:
            while drawing.submit(iter(ask, None)):
                for (index, completion, *_), _ in drawing.judged():
                    draws[index] += 1
                    if completion.finish_reason in FAILED:
                        results[index] = Judgement(Verdict.ERROR, completion.error or "the judge failed")
                        continue
                    if not completion.log_probs:
                        raise ValueError(f"{self.sampler.name} returns no log-probs, which a judge needs.")
                    word = completion.text.strip().strip(".*\"'").upper()
                    seen[index][completion.completion_ids[0]] = word, math.exp(completion.log_probs[0])
                    results[index] = self._decide(list(seen[index].values()))
                    if results[index] is None and draws[index] < self.num_draws:
                        waiting.append(index)
        return [
            r or Judgement(Verdict.UNPARSABLE, f"{self.sampler.name} does not settle on {self.yes} or {self.no}")
            for r in results
        ]

    def _decide(self, seen: list[tuple[str, float]]) -> Judgement | None:
        yes, no = (sum(p for word, p in seen if word == which) for which in (self.yes, self.no))
        unseen = max(0.0, 1.0 - sum(p for _, p in seen))
        if yes + no == 0:
            return None
        low, high = yes / (yes + no + unseen), (yes + unseen) / (yes + no + unseen)
        reason = f"{self.sampler.name}: P(YES) in [{low:.3f}, {high:.3f}]"
        if low < self.threshold <= high:
            return None
        return Judgement(Verdict.CORRECT if low >= self.threshold else Verdict.WRONG, reason)

    def close(self) -> None:
        self.sampler.close()


class _Combined(Verifier):
    def __init__(self, name: str, verifiers: tuple, settles: Verdict):
        if not verifiers:
            raise ValueError(f"{name}() needs at least one verifier.")
        self.name, self.verifiers, self.settles = name, tuple(map(as_verifier, verifiers)), settles
        self.columns = tuple(dict.fromkeys(name for v in self.verifiers for name in v.columns))

    @property
    def __name__(self) -> str:
        return f"{self.name}({', '.join(v.__name__ for v in self.verifiers)})"

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.verifiers))})"

    def _explain(self, completions: list[str], answers: list, **columns: list) -> list[Judgement]:
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(completions))]
        results: list[Judgement | None] = [None] * len(completions)
        for verifier in self.verifiers:  # each is asked only what the verifiers before it left open
            still = [i for i, r in enumerate(results) if r is None or r[0] is not self.settles]
            judgements = explain_with(
                verifier, [completions[i] for i in still], [answers[i] for i in still], [rows[i] for i in still]
            )
            for i, result in zip(still, judgements, strict=True):
                # a verdict that decides nothing is kept over one that was decided
                if (
                    results[i] is None
                    or result[0] is self.settles
                    or results[i][0] in (Verdict.CORRECT, Verdict.WRONG)
                ):
                    results[i] = result
        return results

    def close(self) -> None:
        for verifier in self.verifiers:
            verifier.close()


def all_of(*verifiers) -> Verifier:
    """`correct` if all say so, `wrong` if any does, else the first verdict that told neither."""
    return _Combined("all_of", verifiers, Verdict.WRONG)


def any_of(*verifiers) -> Verifier:
    """`correct` if any says so, `wrong` if all do, else the first verdict that told neither."""
    return _Combined("any_of", verifiers, Verdict.CORRECT)
