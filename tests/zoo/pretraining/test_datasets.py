import pytest

from zoo.pretraining.mixture import mixture
from zoo.pretraining.sources import check_apart, described, documents, size, sources

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data set of 20 texts, of which one is empty, and one without texts."""
    folder = tmp_path_factory.mktemp("datasets")
    text = {"text": tfds.features.Text()}
    rows = [{"text": "" if number == 4 else f"{number} ä"} for number in range(20)]
    for name, features, examples in (
        ("few_texts", text, rows),
        ("no_texts", {"label": tfds.features.ClassLabel(num_classes=4)}, [{"label": 3}]),
    ):
        tfds.dataset_builders.store_as_tfds_dataset(
            name=name,
            version="1.0.0",
            features=tfds.features.FeaturesDict(features),
            split_datasets={
                split: list(enumerate(part))
                for split, part in (("train", examples), ("test", examples[:3]))
            },
            data_dir=folder,
        )
    return folder


def test_documents_go_on_from_any_place(data_dir):
    (source,) = sources("tfds:few_texts", data_dir=data_dir)
    found = list(documents(source))
    texts = [text for text, _ in found]
    assert sorted(texts) == sorted(f"{number} ä" for number in range(20) if number != 4)
    assert size(source)[1] == found[-1][1] == 20
    for number, (_, place) in enumerate(found):
        assert list(documents(source, place)) == found[number + 1 :]


def test_splits(data_dir, tmp_path):
    names = ["tfds:few_texts:test", "tfds:few_texts:train[:50%]"]
    found = sources(names, data_dir=data_dir)
    assert [size(name)[1] for name in found] == [3, 10]
    assert described("corpus", found) == {
        "corpus tfds:few_texts/1.0.0:test": 3,
        "corpus tfds:few_texts/1.0.0:train[:50%]": 10,
    }


@pytest.mark.parametrize(
    ("heldout", "is_apart"),
    [
        ("train[:1]", False),
        ("train[10:]", True),
        ("train[9:]", False),
        ("train[15:]+test", True),
        ("test+train", False),
        ("test", True),
    ],
)
def test_parts_of_a_data_set_that_are_trained_on_are_not_held_out(data_dir, heldout, is_apart):
    corpus = sources("tfds:few_texts:train[:50%]", data_dir=data_dir)
    heldout = sources(f"tfds:few_texts:{heldout}", data_dir=data_dir)
    if is_apart:
        check_apart(corpus, heldout)
        return
    with pytest.raises(ValueError, match="`heldout`.*few_texts"):
        check_apart(corpus, heldout)


def test_data_sets_and_files_end_together(data_dir, tmp_path):
    """19 texts of 20 examples, and 60 lines that take as many bytes."""
    (tmp_path / "a.txt").write_text("".join(f"line {number}\n" for number in range(60)))
    names = sources([tmp_path / "a.txt", "tfds:few_texts"], data_dir=data_dir)
    found = [text for _, text in mixture(names, {name: size(name) for name in names})]
    assert len(found) == 79
    assert 2 <= sum("ä" in text for text in found[-12:]) <= 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("c4/en", "`heldout`.*`tfds build c4/en`.*tfds:c4/en"),
        ("no_texts", "`heldout`.*`text`.*tfds:no_texts.*label"),
        ("few_texts:dev", "`heldout`.*train, test.*tfds:few_texts:dev"),
    ],
)
def test_bad_names(data_dir, name, message):
    with pytest.raises(ValueError, match=message):
        sources([f"tfds:{name}"], "heldout", data_dir)
