"""
The words around a value that take it back: what they are said of states no value. One table by language, for every
kind of statement.

The patterns are for text in which mathematics and Markdown are covered (`extraction.py`); the caller bounds the text
that they look at.
"""

import re


# Directly before a value: it is denied.
_DENIED = {
    "en": r"not|(?:is|was|does|do|ca|could|should|wo)n['’]t|cannot(?: be)?|never|neither|anything but|no longer|far from|incorrect|wrong",
    "de": "nicht|kein|keine|niemals|falsch", "es": "no es|no son|nunca|tampoco", "fr": "pas|jamais", "it": "non|mai", "pt": "não|nunca",
    "nl": "niet|geen|nooit", "sv, no, da": "inte|ikke|aldrig", "pl": "nie|nigdy", "cs": "není|ne", "ru, uk": "не|нет|не є", "id": "bukan|tidak",
    "vi": "không|không phải", "tr": "değil", "fi": "ei", "ro": "nu", "ar": "ليس|ليست", "he": "לא", "zh": "不是|并非|不等于|不为|不可能", "ja": "違", "ko": "아닌",
}  # fmt: skip
# Directly before a value: it is a bound, a guess, or another thing of which the value is only a part.
_BOUNDED = {
    "en": r"other than|different from|close to|near|(?:less|more|fewer|greater|smaller|larger|bigger|higher|lower) than|at most|at least|up to|under|over|above|below|almost|maybe|perhaps|possibly|probably|likely|presumably"
    r"|(?:may|might|could) (?:well )?be|(?:supposed|expected|thought|believed|said|claimed|used) to be|exceeds?|bounded by|(?:divisible|multiplied|divided) by"
    r"|(?:a |the )?(?:square|square root|cube|cube root|root|reciprocal|opposite|inverse|logarithm|factorial|multiple|factor|divisor|power|half|double) of|twice|double|half",
    "de": "(?:kleiner|größer|weniger|mehr) als|höchstens|mindestens|fast|vielleicht", "es": "(?:menor|mayor|menos|más) (?:que|de)|como máximo|al menos|a lo sumo|casi|quizás?",
    "fr": "(?:moins|plus) de|(?:inférieur|supérieur)e? à|au plus|au moins|presque|peut-être", "it": "(?:meno|più|minore|maggiore) (?:di|che)|al massimo|almeno|quasi|forse",
    "pt": "(?:menos|mais) (?:de|que)|(?:menor|maior) (?:do )?que|no máximo|pelo menos|quase|talvez", "nl": "(?:minder|meer|kleiner|groter) dan|hoogstens|minstens|bijna|misschien",
    "sv, no, da": "(?:mindre|mer|större|mere|større) (?:än|enn|end)|högst|minst|nästan|kanske", "pl": "(?:mniej|więcej|mniejsz[ae]|większ[ae]) (?:niż|od)|co najmniej|co najwyżej|prawie|może",
    "ru": "(?:меньше|больше|менее|более)(?: чем)?|почти|может быть|возможно", "id": "(?:kurang|lebih) dari|paling (?:banyak|sedikit)|hampir|mungkin",
    "vi": "(?:nhỏ|lớn|ít|nhiều) hơn|ít nhất|nhiều nhất|gần", "tr": "en az|en fazla|belki", "zh": "小于|大于|少于|多于|至多|至少|不超过|几乎|可能",
}  # fmt: skip
# Behind a value: it is denied, bounded, holds on a condition, or goes on as a number word.
_BEHIND = {
    "en": r"(?:is|was|are|were|would be|seems)\s+(?:(?:also|clearly|obviously|definitely|all|both)\s+)?(?:not (?:correct|right|valid|possible|allowed|true|it\b|an? (?:valid |real |possible )?(?:solution|answer|root|option)|the (?:final |correct |right )?(?:answer|solution|result))|wrong|incorrect|impossible|false|invalid|too (?:small|large|big|high|low)|extraneous|my|an? (?:common )?(?:mistake|error|guess|wrong))\b"
    r"|(?:is|was)n['’]t (?:correct|right|valid|possible|an?|the|it)\b|(?:cannot|can['’]t) be (?:right|correct|true|the)\b|(?:does not|doesn['’]t) (?:work|satisfy)\b|at (?:the very )?(?:most|least)\b"
    r"|(?:which|but (?:this|that|it))(?:\s+fails|\s+(?:does not|doesn['’]t) (?:work|satisfy|fit|hold)|(?:\s+is|\s+was|['’]s) (?:wrong|incorrect|impossible|not (?:correct|right|possible|valid|allowed|among|one of|an? option)))\b"
    r"|would (?:be|have been) (?:the |an? |my |our )?(?:\w+ )?(?:answer|solution|result|correct|right|true)\b(?=[^.!?\n]*\b(?:if|had|unless|without)\b)"
    r"|or (?:less|more|fewer|greater|so|larger|smaller|above|below)\b",
    "de": r"ist (?:falsch|nicht|keine)\b|oder (?:mehr|weniger)\b|mal (?:so|mehr|größer)\b|tausend\b|Millionen\b", "es": r"(?:no es|es (?:incorrect|fals)[oa])\b|o (?:más|menos)\b|mil\b|millones\b",
    "fr": r"(?:n['’]est pas|est (?:faux|fausse|incorrecte?))\b|ou (?:plus|moins)\b|mille\b|millions\b", "it": r"(?:non è|è (?:sbagliat|errat)[oa])\b|o (?:più|meno)\b|mila\b|milioni\b",
    "pt": r"(?:não é|está errad[oa])\b|ou (?:mais|menos)\b|mil\b|milhões\b", "sv, no, da": r"(?:är inte|är fel)\b|eller (?:mer|mindre)\b|tusen\b|miljoner\b", "nl": r"is (?:niet|fout|onjuist)\b|duizend\b|miljoen\b",
    "pl": r"tysi(?:ęcy|ące)\b|milion\w*", "ru": r"(?:не верно|неверно|тысяч\w*|миллион\w*)", "tr": r"değil\w*", "zh": r"是错|不对|不正确|万|亿", "ja": "では(?:ない|ありません)|以上|以下|未満|万|億", "ko": "(?:이|가)? ?아니|이상|이하|미만",
}  # fmt: skip
_IF = r"(?:if|unless)\b|wenn\b|falls\b|si\b|jeśli\b|если\b|jika\b|如果|若"
MINUS = r"(?:minus|negative|negativ|menos|moins|meno|минус|负)"


def _words(*tables: dict[str, str]) -> str:
    return "|".join(words for table in tables for words in table.values())


def _before(table: dict[str, str]) -> re.Pattern:
    """
    Words of the table with at most six words of the clause between them and the value: "is not equal to 5", "less than
    or equal to 5".
    """
    to_value = r"(?:\s+(?:equal|to|or|be|have|get|find|the|is|just|exactly|simply|than|value|number|es|est|è|é|son|sont|de|a|à|zu|gleich)){0,6}(?:是|为)?[^\w\n.;,?!]*\Z"
    return re.compile(
        rf"(?:(?<!\w)(?:{_words(table)})|{table['zh']}){to_value}", re.I
    )  # Chinese has no spaces between words


_DENIED_BEFORE, _BOUNDED_BEFORE = _before(_DENIED), _before(_BOUNDED)
# Directly before a value: it is the number of something, or the other side of a relation.
_LABEL = re.compile(
    r"\b(?:step|steps|case|part|example|question|problem|exercise|figure|chapter|section|page|method|equation|theorem|lemma|line|row)\s+\W*\Z|(?<![-=])[<>≤≥≠]\s*\Z",
    re.I,
)
# Anywhere before a value in its sentence: it is supposed, guessed, or what someone else believes.
_SUPPOSED = re.compile(
    r"\b(?:if|suppose|had|were|assuming)\b[^.!?\n]*(?<!there )\bwould (?:get|have|obtain|be|yield|give|become)\b(?: only| just| exactly)?[^\w\n.;!?]*\Z"
    r"|\b(?:guess|doubt|(?<!\bI )(?<!\bwe )(?:might|may|could|would|will) (?:think|say|guess|believe|expect|assume|seem)|(?:do|did|can)(?:n['’]t| not) (?:think|believe)|(?:false|not true|not the case|not clear) that|(?:people|students|others|they|many|some)\b[^.,!?\n]{0,15}\b(?:say|think|claim|believe) (?:that|it|the answer)|claims|claimed|says|thinks|believes|nobody|no one)\b[^.!?\n]*\Z"
    r"|\b(?:(?:wrong|incorrect|false)\s+(?:answer|solution|result|value)|(?:first|initial|previous|earlier)\s+answer)\b[^.!?\n]*\Z"
    r"|\b(?:(?:mistake|error|trap|pitfall) (?:is|was|would be) to|(?:common|typical|frequent|easy) (?:mistake|error|trap|pitfall)s? (?:is|are|would be))\b[^.!?\n]*\Z",
    re.I,
)
# The same before a phrase; a box is stated there all the same.
_UNSURE = re.compile(
    r"\b(?:thought|tempting|naive(?:ly)?|mistake(?:nly)?|maybe|perhaps|possibly|whether|if|unless|wenn|falls|si|если|jeśli|jika)\b(?!\s+and only if)[^.!?\n]*\Z"
    r"|\b(?:suppos(?:e|ing)|assum(?:e|ing)|imagine|according to (?-i:[A-Z])\w+,)[^.,!?\n]*\Z|(?:如果|假如|假设|若)[^。！？\n]*\Z",
    re.I,
)
_QUALIFIED_BEHIND = re.compile(rf"[^\w\n.!?]{{0,9}}?(?:{_words(_BEHIND)})|[^\w\n.!;,]{{0,9}}\?", re.I)
_ON_CONDITION = re.compile(rf"[^\w\n.!?]{{0,9}}?(?:{_IF})", re.I)
# What is counted, and is not asked for: "there are 5 cases to check", "the answer has 5 digits".
_COUNTED = re.compile(
    r"\A[^\w\n]{0,9}[\w,]{0,20}\W{0,3}(?:[a-z]+ )?(?:cases?|steps?|possibilit(?:y|ies)|options?|scenarios?|things?|conditions?|equations?|unknowns?|parts?|ways)\s+(?:to|that we|we|which we|for us|left to)\s+(?:must |need to |have to |should )?(?:check|consider|examine|solve|test|try|verify|look|analy[sz]e|distinguish|do|study)\b",
    re.I,
)
# A number word of another language behind a number, which would be taken for its unit; the verb of a sentence that
# denies it; "only", of which the sentence says behind the value when.
_SCALES = (
    r"(?:tausend|millionen?|milliarden?|mio|mrd|dutzend|mil|mill[oó]n(?:es)?|docenas?|mille|milliards?|dizaines?|centaines?|mila|milion[ei]|miliard[oi]|milh(?:ão|ões)|duizend|miljoen"
    r"|tusen|miljon(?:er)?|tysi\w+|tys|milion\w*|mln|mld|mlrd|тысяч\w*|тыс|миллион\w*|млн|миллиард\w*|млрд|nghìn|ngàn|triệu|ribu|juta|bin|milyon|milyar|ألف|آلاف|مليون|हजार|लाख|करोड"
    r"|drittel|viertel|zehntel|hundertstel|tiers|dixièmes?|centièmes?|tercios?|cuartos?|décimos?|terzi|quarti|половин\w*|трет\w*|четверт\w*|десят\w*|раз|fois|veces|vezes|volte)(?!\w)|[천만억億萬万亿千百十倍]|分之"
)
_SCALED = re.compile(
    rf"\d\W{{0,3}}(?:{_SCALES})|\b(?:does|do|did|can|could|fails?)(?:n['’]t)?\W*\Z|\bonly\W*\Z",
    re.I,
)
_PROPERTY = re.compile(
    r"\b(?:answer|solution|result|number|it)\s+(?:also\s+)?(?:has|have|had|contains?|consists? of|needs?)\s+(?:exactly |only |just )?\W*\Z",
    re.I,
)


_CLAUSE = re.compile(r".*(?:;|(?<!anything )\bbut\b)", re.S | re.I)


def stands(before: str, value: str, behind: str, kind: str) -> bool:
    """
    Whether a value with these two texts around it, the rest of its sentence and what follows, is stated: not denied,
    bounded, asked or supposed.

    A box keeps its value behind "at least" and before "if": those say which value is asked for.
    """
    before, behind = before[-200:], behind[:200]
    if clause := _CLAUSE.match(before):
        before = before[clause.end() :]
    qualified = [_DENIED_BEFORE.search(before), _SUPPOSED.search(before), _QUALIFIED_BEHIND.match(behind)]
    if kind != "box":
        qualified += [pattern.search(before) for pattern in (_BOUNDED_BEFORE, _LABEL, _UNSURE)]
        qualified += [_ON_CONDITION.match(behind), _COUNTED.search(value[-200:] + behind), _SCALED.search(value[:200])]
    if kind == "sentence":
        qualified.append(_PROPERTY.search(before))
    return not any(qualified)


_ANOTHER = re.compile(rf"(?<!\w)(?:{_SCALES})|\A(?:{_words(_DENIED)})(?!\w)", re.I)


def changes(noun: str) -> bool:
    """Whether what stands behind a number as its unit makes another number of it, or takes it back: `тысяч`, `oder mehr`."""
    return bool(_ANOTHER.search(noun) or _QUALIFIED_BEHIND.match(f" {noun}"))


# "not 4, but 5": what stands behind it is stated.
CONTRAST = re.compile(
    r"(?:(?:not|nicht|pas|niet|inte|не)\b(?! only| nur| seulement)[^.;!?\n]{1,60}?[\s,，](?:but(?: rather| instead)?|rather|sondern|mais|maar|utan|а|но)\b"
    r"|[^.;!?\n]{1,60}?[\s,，](?:sino\b|bensì\b|而是))\s*",
    re.I,
)
# What takes back the statement before it, and what announces the value in its place.
RETRACTS = re.compile(
    r"(?:(?:^|[.!?;,\n—–])[\s*]*(?:hmm+|wait|oh|oops|sorry|well|but|hold on)?[\s,.…!—–-]{0,5}\bno(?:[,.!:;—–]|\s+wait\b|,? ####)"
    r"|\b(?:I|I['’]ve|we|we['’]ve|have) made an? (?:\w+ )?(?:mistake|error)\b|\b(?:that|this|it|which|he|she)(?:['’]s| is| was) (?:wrong|incorrect|not right|not correct)\b|\bscratch that\b|\bcorrection:|\bmy mistake\b|\bI was wrong\b"
    r"|\b(?:but|actually,?|rather,?) (?:the (?:correct |right |true |real )?(?:answer|value|result|one)|it)(?: is|['’]s| should be)\b|\b(?:answer|value|result|it) (?:is|should) (?:actually|really|instead)\b"
    r"|\b(?:it|that|this) should (?:actually |really |instead )?(?:be|have been)(?=[\s:=*\ue001]{1,9}[-−$€£(\\\d\ue000])|不对|更正|应为)",
    re.I | re.M,
)
# What begins to doubt the statement before it, and what settles that in its favour.
DOUBTS = re.compile(
    r"(?:^|[.!?…\n])[\s*]*(?:(?:oh|but|uh|hmm+)[\s,.!…]+)?(?:wait|hold on|hmm+|actually,? (?:I|we|let|that|this|the|there))\b",
    re.I | re.M,
)
SETTLES = re.compile(
    r"\b(?:correct|right|indeed|confirm\w*|verifie[sd]|consistent|holds?|stands?|match\w*|same|fine|good|ok(?:ay)?|yes|yep|works?|satisf\w*|checks? out|agrees?|makes sense)\b|[✓✔✅]",
    re.I,
)
CORRECTION = re.compile(
    r"(?:\bshould (?:actually |really |instead )?(?:be|read|have been)|\b(?:correct|right|true|real|actual) (?:value|answer|result|one|number)(?: is| should be|:)|\b(?:answer|value|result|it)(?: is|['’]s)(?: actually| really| instead)?|\bno,|\bcorrection:|####|应为)[\s:=]*",
    re.I,
)
