"""Accuracy of answers to questions about images, equal to the official VQA evaluation.

https://visualqa.org/evaluation.html, https://github.com/GT-Vision-Lab/VQA
"""

import re
from collections.abc import Sequence

PEOPLE = 4  # answers to a question that the official rule needs: all but one must be able to give full marks
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
DIGITS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
# Maps a contraction that lacks one of its apostrophes to the full form; one entry of the official table is reversed.
REPAIRED = {text[:i] + text[i + 1 :]: text for text in CONTRACTIONS.split() for i in range(len(text)) if text[i] == "'"}
REPAIRED["somebody'd"] = "somebodyd"


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official accuracy of one answer: the mean of min(1, number who agree / 3) over all ways to leave one person out."""
    prediction, answers = plain(prediction), [plain(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
    return agreement(prediction, answers)


def vqa_accuracy_normalised(prediction: str, answers: Sequence[str]) -> float:
    """The same with normalised texts, also where all people agree."""
    return agreement(normalise_answer(prediction), [normalise_answer(answer) for answer in answers])


def is_answer(prediction: str, references: Sequence[str]) -> bool:
    """Whether `prediction` is one of the references, ignoring case, punctuation, articles and number words."""
    return normalise_answer(prediction) in map(normalise_answer, references)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    same = answers.count(prediction)
    others = [same - (answer == prediction) for answer in answers]
    return sum(min(1, count / 3) for count in others) / len(answers)


def plain(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_answer(text: str) -> str:
    """An answer as EvalAI and mmf compare it: commas and question marks are removed first, 's is a word of its own."""
    return normalise(plain(text.lower().replace(",", "").replace("?", "").replace("'s", " 's")))


def normalise(text: str) -> str:
    """An answer as the official code compares it: no punctuation, no articles, digits for number words."""
    has_thousands = re.search(r"\d,\d", text) is not None
    bare = text
    for mark in PUNCTUATION:
        is_at_space = mark + " " in text or " " + mark in text
        bare = bare.replace(mark, "" if is_at_space or has_thousands else " ")
    bare = re.sub(r"\.(?!\d)", "", bare, count=32)  # 32: the official code passes a flag where the count belongs
    kept = [DIGITS.get(word, word) for word in bare.lower().split()]
    return " ".join(REPAIRED.get(word, word) for word in kept if word not in ("a", "an", "the"))
