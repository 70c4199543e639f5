"""What words alone tell: the baseline that a model of text must beat to have learnt anything.

Logistic regression, or ridge regression of a score, on which words and pairs of neighbouring words
a text has (tf-idf). Of two texts: on those of the first and those of the second. With `overlap`, a
much stronger baseline for pairs, also on those that both have, and on how many they are. How strong
the regularization is, cross-validation on the training data says, by the metric that chooses the
best epoch of a model.
"""

import numpy as np

from zoo.extras import require
from zoo.tasks import evaluate, load, validation_splits

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
FOLDS = 5


def scores(task, data_dir=None, overlap=False):
    """Trains the baseline on a task and scores it on its validation splits.

    Args:
        task: a `zoo.tasks.Task`.
        data_dir: TensorFlow Datasets directory.
        overlap: whether pairs are compared.

    Returns:
        Dictionary of `<split>_<metric>` -> score, as `zoo.finetune` names them: the first split is
        `val`.
    """
    train = load(task, "train", data_dir)
    words = Words(train.texts, overlap)
    model = fitted(words(train.texts), train.labels, task)
    found = {}
    for number, split in enumerate(validation_splits(task, data_dir)[0]):
        examples = load(task, split, data_dir)
        outputs = _outputs(model, words(examples.texts), task)
        name = "val" if number == 0 else split
        for metric, score in evaluate(task, examples, outputs).items():
            found[f"{name}_{metric}"] = score
    return found


class Words:
    """Texts, or pairs of them, as sparse rows of words.

    Args:
        texts: one or two lists of strings, whose words are the vocabulary.
        overlap: whether the rows of pairs say what they have in common.
    """

    def __init__(self, texts, overlap=False):
        self.overlap = overlap
        vectorizer = require("sklearn.feature_extraction.text").TfidfVectorizer
        self.vectorizer = vectorizer(
            token_pattern=r"(?u)\b\w+\b|[^\w\s]", ngram_range=(1, 2), min_df=2, sublinear_tf=True
        )
        self.vectorizer.fit([text for column in texts for text in column])

    def __call__(self, texts):
        columns = [self.vectorizer.transform(column) for column in texts]
        if len(columns) == 1 or not self.overlap:
            return require("scipy.sparse").hstack(columns).tocsr()
        first, second = columns
        shared = first.minimum(second)
        alike = np.stack(
            [
                np.asarray(first.multiply(second).sum(axis=1)).ravel(),  # cosine: rows have norm 1
                _share(shared, first),
                _share(shared, second),
            ],
            axis=1,
        )
        return require("scipy.sparse").hstack([first, second, shared, alike]).tocsr()


def _share(part, whole):
    """How many of the words of each row there are in the part."""
    return part.getnnz(axis=1) / np.maximum(whole.getnnz(axis=1), 1)


def fitted(x, labels, task):
    """A linear model of rows, of that strength which does best on parts of them held out.

    Args:
        x: `[examples, features]` sparse rows.
        labels: `[examples]` classes or scores.
        task: a `zoo.tasks.Task`, whose primary metric decides; where one row is not one example
            (MultiRC, COPA, ReCoRD), the accuracy of rows.

    Returns:
        Model of scikit-learn.
    """
    linear = require("sklearn.linear_model")
    selection = require("sklearn.model_selection")
    if task.labels is None:
        model = linear.Ridge(solver="lsqr")
        grid = {"alpha": [1 / strength for strength in STRENGTHS]}
        folds = selection.KFold(FOLDS, shuffle=True, random_state=0)
    else:
        # It finds what the default does, of rows so sparse in a tenth of the time.
        model = linear.LogisticRegression(max_iter=1000, solver="newton-cg")
        grid = {"C": list(STRENGTHS)}
        folds = selection.StratifiedKFold(FOLDS, shuffle=True, random_state=0)

    def primary(model, x, labels):
        return evaluate(task, labels, _outputs(model, x, task))[task.primary]

    if task.grouped:  # rows of one question follow each other, and stay together
        folds, primary = selection.KFold(FOLDS), None
    return selection.GridSearchCV(model, grid, scoring=primary, cv=folds).fit(x, labels)


def _outputs(model, x, task):
    """What a classifier of the zoo would put out: a column per class, or one of scores."""
    if task.labels is None:
        return model.predict(x)[:, None]
    outputs = np.full((x.shape[0], task.num_classes), -np.inf)
    outputs[:, model.classes_] = model.predict_log_proba(x)
    return np.maximum(outputs, -1e9)
