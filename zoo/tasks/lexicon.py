"""The words of the `acceptability` task: few enough to be learned from its 6,000 sentences.

Every entry is chosen so that a corruption stays a corruption: nouns can be counted (`*dog
barks`), transitive verbs cannot do without their object nor intransitive ones with one, no
verb's past is its base form (`the boy hurt` would be acceptable), none is a state (`is
owning`), none has an -ing that is an adjective (`the boy is amusing`), and none takes a clause
in its bare form (`insists that he leave`).
"""

from typing import NamedTuple


class Noun(NamedTuple):
    """A noun; `gender` is `m`, `f`, `n` (a person of either) or `t` (a thing)."""

    singular: str
    plural: str
    gender: str


class Verb(NamedTuple):
    """The forms of a verb."""

    base: str
    third: str
    past: str
    participle: str
    ing: str


def _plural(noun):
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun[-1] == "y" and noun[-2] not in "aeiou" else noun + "s"


def _nouns(gender, words):
    """Reads `boy`, or `man/men` where the plural is irregular."""
    pairs = [word.split("/") if "/" in word else (word, _plural(word)) for word in words.split()]
    return [Noun(singular, plural, gender) for singular, plural in pairs]


def _verb(word):
    """Reads `laugh`, or `take/takes/took/taken/taking` where the verb is irregular."""
    if "/" in word:
        return Verb(*word.split("/"))
    if word.endswith("e"):
        return Verb(word, word + "s", word + "d", word + "d", word[:-1] + "ing")
    if word.endswith("y") and word[-2] not in "aeiou":
        stem = word[:-1]
        return Verb(word, stem + "ies", stem + "ied", stem + "ied", word + "ing")
    third = word + "es" if word.endswith(("x", "sh", "ss")) else word + "s"
    return Verb(word, third, word + "ed", word + "ed", word + "ing")


def _verbs(words):
    return [_verb(word) for word in words.split()]


def _words(words):
    return words.split()


PEOPLE = (
    _nouns("m", "boy man/men prince")
    + _nouns("f", "girl woman/women princess")
    + _nouns("n", "student artist farmer pilot child/children engineer")
)
THINGS = _nouns("t", "box letter table bicycle boat guitar hat shelf/shelves umbrella knife/knives")
NAMES = _nouns("m", "John Omar") + _nouns("f", "Mary Leila")
PLACES = _nouns("t", "garden kitchen library")

LIKE_PEOPLE = _verbs("admire blame thank praise protect")
OF_SELF = _verbs("admire blame praise protect")
OF_THINGS = _verbs(
    "carry repair polish find/finds/found/found/finding take/takes/took/taken/taking"
)
BY_PEOPLE = _verbs("laugh smile yawn vanish sleep/sleeps/slept/slept/sleeping")
BY_THINGS = _verbs("vanish fall/falls/fell/fallen/falling")
OF_SAYING = _verbs("say/says/said/said/saying think/thinks/thought/thought/thinking")

PERSONAL = _words("happy tired polite angry")
MATERIAL = _words("heavy broken cheap green")
GENERAL = _words("old small strange")

SINGULAR = _words("the the a a this every each my his her")
PLURAL = _words("the the these those some many several two three my his her")
INDEFINITE = {False: ["a"], True: _words("some many several two three")}
NEAR = ["near", "behind", "beside", "with", "in front of"]
MANNER = _words("quietly slowly often again")
WHEN = {"past": ["yesterday", "last week"], "future": ["tomorrow", "next week"]}
MODALS = _words("can must should might")
