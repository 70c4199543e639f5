"""The embedded task: is this sentence acceptable English?

It has the form of CoLA (Warstadt et al., 2019, https://arxiv.org/abs/1805.12471) but none of
its sentences: a small grammar writes acceptable ones, and an unacceptable one is such a
sentence with one corruption, in the manner of minimal pairs (BLiMP, Warstadt et al., 2020,
https://arxiv.org/abs/1912.00582).

The grammar knows, while it writes a word, what would be wrong in its place. So a `Word`
carries its own corruptions, and corrupting a sentence is choosing one of them.
"""

import functools
import random
from typing import NamedTuple

from zoo.tasks import lexicon as lex

SIZES = {"train": 6000, "validation": 600, "test": 600}
PAIRED = 0.75  # How often a sentence's corruption follows it.


class Judgement(NamedTuple):
    """A sentence; `label` is 1 where acceptable, else `phenomenon` says what is broken."""

    sentence: str
    label: int
    phenomenon: str


class Word(NamedTuple):
    """A word in its place.

    Attributes:
        text: The word, or none (`""`).
        wrong: Pairs of a phenomenon and what would be unacceptable instead.
        swap: The phenomenon, where changing places with the next word is unacceptable.
    """

    text: str
    wrong: tuple[tuple[str, str], ...] = ()
    swap: str = ""


class Phrase(NamedTuple):
    """A noun phrase and what agrees with it."""

    words: list[Word]
    plural: bool
    gender: str


@functools.lru_cache(maxsize=2)
def generate(seed=0):
    """Generates the whole task.

    Args:
        seed: An integer; the same seed gives the same sentences.

    Returns:
        A dict from split to a tuple of `Judgement`. No sentence occurs twice.
    """
    rng = random.Random(seed)
    seen, splits = set(), {}
    for split, size in SIZES.items():
        rows = []
        while len(rows) < size:
            new = _judgements(rng)
            if seen.isdisjoint(row.sentence for row in new):
                rows += new
                seen.update(row.sentence for row in new)
        splits[split] = tuple(rows[:size])
    return splits


def _judgements(rng):
    """A sentence and most often its corruption too: such pairs are what teaches the rule."""
    words, mark = _sentence(rng)
    rows = [Judgement(_spell(words, mark), 1, "")]
    if _pick(rng, PAIRED):
        words, phenomenon = _corrupt(rng, words)
        rows.append(Judgement(_spell(words, mark), 0, phenomenon))
    return rows


def _corrupt(rng, words):
    """Breaks one thing; first draws what to break, so that rare phenomena are seen too."""
    edits = {}
    for i, word in enumerate(words):
        for phenomenon, text in word.wrong:
            edit = words[:i] + [Word(text)] + words[i + 1 :]
            edits.setdefault(phenomenon, []).append(edit)
        if word.swap:
            edit = words[:i] + [words[i + 1], word] + words[i + 2 :]
            edits.setdefault(word.swap, []).append(edit)
    # Agreement, the phenomenon with the long distances, is drawn as often as any three others.
    phenomena = list(edits) + ["agreement"] * (2 if "agreement" in edits else 0)
    phenomenon = rng.choice(phenomena)
    return rng.choice(edits[phenomenon]), phenomenon


def _spell(words, mark):
    """Joins the words, chooses a or an, begins with a capital and ends with the mark."""
    tokens = " ".join(word.text for word in words if word.text).split()
    for i, token in enumerate(tokens[:-1]):
        if token == "a" and tokens[i + 1][0].lower() in "aeiou":
            tokens[i] = "an"
    text = " ".join(tokens)
    return text[0].upper() + text[1:] + mark


# Noun phrases.


def _pick(rng, chance):
    return rng.random() < chance


def _determiner(rng, plural, choices=None):
    text = rng.choice(choices or (lex.PLURAL if plural else lex.SINGULAR))
    if plural:
        wrong = [("determiner", bad) for bad in ("a", "this", "every")]
    else:
        wrong = [("determiner", bad) for bad in ("these", "many", "two")]
        wrong += [("missing determiner", ""), ("double determiner", text + " the")]
    return Word(text, tuple(wrong), "noun order")


def _common(rng, nouns, plural=None, choices=None):
    """Determiner, perhaps an adjective, noun."""
    noun = rng.choice(nouns)
    plural = _pick(rng, 0.5) if plural is None else plural
    words = [_determiner(rng, plural, choices)]
    if _pick(rng, 0.2):
        adjectives = lex.GENERAL + (lex.MATERIAL if noun.gender == "t" else lex.PERSONAL)
        words.append(Word(rng.choice(adjectives), (), "noun order"))
    words.append(Word(noun.plural if plural else noun.singular))
    return Phrase(words, plural, noun.gender)


def _near(rng, nouns):
    """A prepositional phrase; in a subject its noun tempts the verb to agree with it."""
    return [Word(rng.choice(lex.NEAR)), *_common(rng, nouns).words]


def _relative(rng, head):
    """A relative clause about the head, as subject (`that admires ..`) or object."""
    thing = head.gender == "t"
    wrong = (("relative pronoun", "who"),) if thing else (("relative pronoun", "which"),)
    pronoun = Word(rng.choice(["that", "which"] if thing else ["that", "who"]), wrong)
    if thing or _pick(rng, 0.5):
        subject = _common(rng, lex.PEOPLE)
        verb = rng.choice(lex.OF_THINGS if thing else lex.LIKE_PEOPLE)
        filled = rng.choice(lex.THINGS if thing else lex.PEOPLE).singular
        finite = _finite(rng, verb, subject.plural)
        gap = (("filled gap", f"{finite.text} the {filled}"),)
        return [pronoun, *subject.words, finite._replace(wrong=finite.wrong + gap)]
    verb, target = _transitive(rng)
    return [pronoun, _finite(rng, verb, head.plural), *_common(rng, target).words]


_PRONOUNS = {  # nominative: accusative, plural, gender
    "he": ("him", False, "m"),
    "she": ("her", False, "f"),
    "they": ("them", True, "they"),
    "we": ("us", True, "we"),
}


def _subject(rng, nouns):
    """Anything that can be a subject."""
    draw = rng.random()
    if nouns is lex.PEOPLE and draw < 0.35:
        if draw < 0.12:
            text = rng.choice(list(_PRONOUNS))
            accusative, plural, gender = _PRONOUNS[text]
            return Phrase([Word(text, (("case", accusative),))], plural, gender)
        if draw < 0.25:
            name = rng.choice(lex.NAMES)
            return Phrase([Word(name.singular)], False, name.gender)
        plain = ["the", "my", "her", "a"]
        pair = [_common(rng, nouns, plural=False, choices=plain).words for _ in range(2)]
        return Phrase([*pair[0], Word("and"), *pair[1]], True, "n")
    head = _common(rng, nouns)
    if draw < 0.5:
        return head._replace(words=head.words + _near(rng, nouns))
    if draw < 0.65:
        return head._replace(words=head.words + _relative(rng, head))
    return head


def _object(rng, nouns):
    """The object of a verb that cannot do without."""
    if nouns is lex.PEOPLE and _pick(rng, 0.3):
        nominative = rng.choice(list(_PRONOUNS))
        accusative = _PRONOUNS[nominative][0]
        return [Word(accusative, (("case", nominative), ("missing object", "")))]
    if nouns is lex.PEOPLE and _pick(rng, 0.2):
        return [Word(rng.choice(lex.NAMES).singular, (("missing object", ""),))]
    return _common(rng, nouns).words


def _reflexive(rng, subject):
    forms = {"m": "himself", "f": "herself", "we": "ourselves"}
    text = "themselves" if subject.plural and subject.gender != "we" else forms[subject.gender]
    everyone = ("himself", "herself", "themselves", "ourselves")
    return Word(text, tuple(("reflexive", bad) for bad in everyone if bad != text))


# Verbs.


def _transitive(rng):
    """A verb and the nouns that can be its object."""
    if _pick(rng, 0.5):
        return rng.choice(lex.LIKE_PEOPLE), lex.PEOPLE
    return rng.choice(lex.OF_THINGS), lex.THINGS


def _finite(rng, verb, plural):
    """The present form, or sometimes the past, which agrees with everything."""
    if _pick(rng, 0.25):
        return Word(verb.past, (("verb form", verb.ing),))
    right, wrong = (verb.base, verb.third) if plural else (verb.third, verb.base)
    return Word(right, (("agreement", wrong), ("verb form", verb.ing)))


def _agreeing(singular, other, plural):
    right, wrong = (other, singular) if plural else (singular, other)
    return Word(right, (("agreement", wrong),))


def _auxiliary(rng, verb, plural):
    """An auxiliary, the form of the verb that it governs, and the time."""
    kind = rng.choice(["will", "modal", "have", "be", "do", "did"])
    bare = tuple(("verb form", bad) for bad in (verb.third, verb.past, verb.ing))
    if kind in ("will", "modal"):
        modal = "will" if kind == "will" else rng.choice(lex.MODALS)
        time = "future" if kind == "will" else ""
        return Word(modal), Word(verb.base, bare), time
    if kind == "have":
        wrong = tuple(("verb form", bad) for bad in (verb.base, verb.third, verb.ing))
        return _agreeing("has", "have", plural), Word(verb.participle, wrong), ""
    if kind == "be":
        wrong = (("verb form", verb.base), ("verb form", verb.third))
        past = _pick(rng, 0.5)
        be = _agreeing("was", "were", plural) if past else _agreeing("is", "are", plural)
        return be, Word(verb.ing, wrong), "past" if past else ""
    if kind == "did":
        return Word("did"), Word(verb.base, bare), "past"
    return _agreeing("does", "do", plural), Word(verb.base, bare), ""


def _group(rng, verb, subject):
    """The verbs of a statement and its time: plain, with an auxiliary, or negated."""
    draw = rng.random()
    if draw < 0.5:
        word = _finite(rng, verb, subject.plural)
        return [word], "past" if word.text == verb.past else ""
    auxiliary, main, time = _auxiliary(rng, verb, subject.plural)
    if draw < 0.7 or auxiliary.text in ("do", "does", "did"):
        return [auxiliary._replace(swap="verb order"), Word("not"), main], time
    swap = "verb order" if auxiliary.text in ("will", *lex.MODALS) else ""
    return [auxiliary._replace(swap=swap), main], time


def _ending(rng, time):
    """Perhaps an adverb; one of the wrong time is wrong."""
    if time and _pick(rng, 0.3):
        other = "future" if time == "past" else "past"
        wrong = tuple(("tense", bad) for bad in lex.WHEN[other])
        return [Word(rng.choice(lex.WHEN[time]), wrong)]
    return [Word(rng.choice(lex.MANNER))] if _pick(rng, 0.2) else []


# Sentences.


def _intransitive(rng):
    people = _pick(rng, 0.7)
    verb = rng.choice(lex.BY_PEOPLE if people else lex.BY_THINGS)
    subject = _subject(rng, lex.PEOPLE if people else lex.THINGS)
    group, time = _group(rng, verb, subject)
    main = group[-1]
    extra = (("extra object", f"{main.text} the {rng.choice(lex.THINGS).singular}"),)
    if len(group) == 1:
        other = rng.choice([v for v in lex.BY_PEOPLE if v.base != verb.base])
        form = other.past if main.text == verb.past else other[main.text == verb.third]
        extra += (("double verb", f"{main.text} {form}"),)
    group[-1] = main._replace(wrong=main.wrong + extra)
    return [*subject.words, *group, *_ending(rng, time)]


def _with_object(rng):
    verb, target = _transitive(rng)
    subject = _subject(rng, lex.PEOPLE)
    group, time = _group(rng, verb, subject)
    if len(group) == 1:
        group[0] = group[0]._replace(wrong=group[0].wrong + (("missing verb", ""),))
    return [*subject.words, *group, *_object(rng, target), *_ending(rng, time)]


def _of_self(rng):
    subject = _subject(rng, lex.PEOPLE)
    while subject.gender == "n" and not subject.plural:
        subject = _subject(rng, lex.PEOPLE)
    group, time = _group(rng, rng.choice(lex.OF_SELF), subject)
    return [*subject.words, *group, _reflexive(rng, subject), *_ending(rng, time)]


def _copular(rng):
    people = _pick(rng, 0.5)
    subject = _subject(rng, lex.PEOPLE if people else lex.THINGS)
    forms = rng.choice([("is", "are"), ("was", "were")])
    be = _agreeing(*forms, subject.plural)
    be = be._replace(wrong=be.wrong + (("missing verb", ""),))
    negation = [Word("not")] if _pick(rng, 0.2) else []
    adjective = rng.choice(lex.PERSONAL if people else lex.MATERIAL)
    return [*subject.words, be, *negation, Word(adjective)]


def _existential(rng):
    plural = _pick(rng, 0.5)
    nouns = rng.choice([lex.PEOPLE, lex.THINGS])
    phrase = _common(rng, nouns, plural, lex.INDEFINITE[plural])
    be = _agreeing(*rng.choice([("is", "are"), ("was", "were")]), plural)
    place = _common(rng, lex.PLACES, False, ["the", "my", "this"]).words
    return [Word("there"), be, *phrase.words, Word("in"), *place]


def _statement(rng):
    clauses = [_intransitive, _with_object, _with_object, _of_self, _copular, _existential]
    return rng.choice(clauses)(rng)


def _reported(rng):
    name = Word(rng.choice(lex.NAMES).singular)
    speech = _finite(rng, rng.choice(lex.OF_SAYING), plural=False)
    return [name, speech, Word("that"), *_statement(rng)]


def _polar_question(rng):
    subject = _subject(rng, lex.PEOPLE)
    if _pick(rng, 0.5):
        verb, rest = rng.choice(lex.BY_PEOPLE), []
    else:
        verb, target = _transitive(rng)
        rest = _object(rng, target)
    auxiliary, main, time = _auxiliary(rng, verb, subject.plural)
    return [auxiliary, *subject.words, main, *rest, *_ending(rng, time)]


def _object_question(rng):
    """`what does the girl carry?`: the verb must have a gap, and be able to have one."""
    verb, target = _transitive(rng)
    people = target is lex.PEOPLE
    question = [Word("who" if people else "what")]
    if _pick(rng, 0.5):
        noun = rng.choice(target)
        question = [Word("which"), Word(noun.plural if _pick(rng, 0.5) else noun.singular)]
    subject = _subject(rng, lex.PEOPLE)
    auxiliary, main, time = _auxiliary(rng, verb, subject.plural)
    full = (("filled gap", f"{main.text} the {rng.choice(target).singular}"),)
    main = main._replace(wrong=main.wrong + full)
    return [*question, auxiliary, *subject.words, main, *_ending(rng, time)]


def _sentence(rng):
    """An acceptable sentence and its closing mark."""
    draw = rng.random()
    if draw < 0.65:
        return _statement(rng), "."
    if draw < 0.75:
        return _reported(rng), "."
    return (_polar_question if draw < 0.88 else _object_question)(rng), "?"
