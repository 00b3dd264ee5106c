"""A linear bag of words on a data set: `python scripts/bag_of_words.py dataset=synthetic`.

What no meaning is needed for. Logistic regression on TF-IDF of words and of character n-grams, C
chosen on the validation share of the training data; arguments are the overrides of simulate.py.
"""

import sys
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hafl_app.config.compose import SettingsError, compose  # noqa: E402
from hafl_app.data.sources import DataError, load_text  # noqa: E402

_FEATURES = {
    "words, 1-2-grams": {"analyzer": "word", "ngram_range": (1, 2)},
    "characters, 2-5-grams": {"analyzer": "char_wb", "ngram_range": (2, 5)},
}
_INVERSE_REGULARIZATIONS = (0.1, 1.0, 10.0, 100.0)
_REFUSED = 2


def main() -> int:
    """Fit, choose and print."""
    try:
        settings = compose(sys.argv[1:])
        text = load_text(settings.dataset)
    except (SettingsError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _REFUSED
    texts, labels = list(text.train["text"]), list(text.train["label"])
    share = settings.dataset.validation_fraction or 0.1
    fit, held_out, fit_labels, held_out_labels = train_test_split(
        texts, labels, test_size=share, random_state=settings.seed, stratify=labels
    )
    for name, options in _FEATURES.items():
        models = [
            make_pipeline(
                TfidfVectorizer(min_df=1, sublinear_tf=True, **options),
                LogisticRegression(C=inverse, max_iter=1000),
            ).fit(fit, fit_labels)
            for inverse in _INVERSE_REGULARIZATIONS
        ]
        best = max(models, key=lambda model: model.score(held_out, held_out_labels))
        validation = best.score(held_out, held_out_labels)
        test = best.score(list(text.test["text"]), list(text.test["label"]))
        print(f"{name}: validation {validation:.1%}, test {test:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
