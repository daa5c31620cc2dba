import pytest

from hf_thinkingvit.conversion.labels import imagenet_1k_classes
from hf_thinkingvit.training.labels import first_difference, match_labels


SAME = ["cat", "dog", "owl"]


@pytest.mark.parametrize(
    "names, other, order, by_number",
    [
        (SAME, SAME, (0, 1, 2), False),
        (SAME, ["Cat, true cat", "DOG", " owl"], (0, 1, 2), False),
        (["snow_owl", "cat"], ["snow owl", "cat"], (0, 1), False),
        (SAME, ["dog", "owl", "cat"], (2, 0, 1), False),
        (["crane", "crane", "cat"], ["crane", "crane", "cat"], (0, 1, 2), False),
        # Whole names take precedence over synonyms, which several classes may share.
        (["crane, bird", "crane, machine"], ["crane, machine", "crane, bird"], (1, 0), False),
        (["crane", "crane, machine"], ["crane, machine", "crane"], (1, 0), False),
        (["maillot", "maillot, tank suit"], ["maillot", "tank suit"], (0, 1), False),
        (["crane", "tench, Tinca tinca", "crane"], ["crane", "tench", "crane"], (0, 1, 2), False),
        (SAME, ["hound, dog", "true owl, owl", "cat, pet"], (2, 0, 1), False),
        # Default names are matched by their numbers.
        (SAME, ["LABEL_0", "LABEL_1", "LABEL_2"], (0, 1, 2), True),
        # Numeric folder names, sorted as text: each is the class of that number.
        (["0", "10", "2", *"3456789", "1"], [f"LABEL_{i}" for i in range(11)], (0, 10, 2, *range(3, 10), 1), True),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["2", "0", "1"], (1, 2, 0), True),
        (["0", "10", "2", *"3456789", "1"], list(map(str, range(11))), (0, 10, 2, *range(3, 10), 1), False),
        (["0", "2", "1"], ["LABEL_0", "LABEL_1", "LABEL_2"], (0, 2, 1), True),
    ],
)
def test_finds_the_class_of_each_label(names, other, order, by_number):
    assert match_labels(names, other) == (order, by_number)


@pytest.mark.parametrize(
    "names, other",
    [
        (SAME, ["cat", "dog"]),
        (SAME, ["cat", "dog", "fish"]),
        (["crane", "crane", "cat"], ["cat", "crane", "crane"]),  # the cranes cannot be told apart
        (["LABEL_1", "LABEL_0"], ["cat", "dog"]),
        (["crane, bird", "crane, machine"], ["crane", "crane, device"]),
        (["crane", "crane"], ["crane, bird", "crane, machine"]),
        (["crane", "cat, dog", "crane"], ["crane", "crane", "dog"]),
        # Numbers do not match named classes.
        (["0", "1", "2"], SAME),
        (SAME, ["0", "1", "2"]),
    ],
)
def test_says_where_they_are_not_the_same(names, other):
    assert match_labels(names, other) is None
    if len(names) == len(other):
        index, name, found = first_difference(names, other)
        assert (name, found) == (names[index], other[index])
        assert name != found


def test_imagenet_by_the_first_of_its_names():
    """Two classes are "maillot". They are matched by index, because all others are in the same order."""
    classes = imagenet_1k_classes()
    short = [name.split(",")[0] for name in classes]
    assert short.count("maillot") == 2
    for names, other in ((short, classes), (classes, short)):
        assert match_labels(names, other) == (tuple(range(1000)), False)
    assert match_labels(short, [*classes[1:], classes[0]]) is None


def test_by_index_a_number_is_still_its_class():
    """Folders 0 to 10 sorted as text: "10" is label 2 and class 10."""
    folders, animals = ["0", "1", "10", *"23456789"], list("abcdefghijk")
    assert match_labels(folders, animals) is None
    assert match_labels(folders, animals, "index") == ((0, 1, 10, *range(2, 10)), True)
    assert match_labels(animals, folders, "index") == ((0, 1, *range(3, 11), 2), True)
    assert match_labels(folders, list(map(str, range(11))), "index") == ((0, 1, 10, *range(2, 10)), True)


def test_by_index_whatever_the_names():
    assert match_labels(SAME, ["a", "b", "c"], "index") == ((0, 1, 2), True)
    assert match_labels(SAME, ["a", "b"], "index") is None
    assert first_difference(SAME, ["cat", "hound", "owl"]) == (1, "dog", "hound")
