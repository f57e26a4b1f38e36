"""What the captions of a store talk about: `python -m train.data.nouns STORE` counts nouns into its manifest.

PixArt-α chose its data by these numbers (section 2.4, table 1): distinct nouns, those of them that occur more than ten
times ("valid"), all occurrences, and nouns per picture. It needs spaCy and an English model.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from train.data.store import MANIFEST, FeatureStore, Nouns, write_aside
from train.settings import UserError

VALID = 10  # a noun has to occur more often than that
Tagger = Callable[[Iterable[str]], Iterator[list[str]]]


def tagger(model: str, processes: int) -> Tagger:
    """What gives the nouns of captions, lower-case and in the singular. Raises UserError."""
    try:
        import spacy

        pipeline = spacy.load(model, exclude=["parser", "ner"])
    except (ImportError, OSError) as error:
        raise UserError(
            f"nouns are counted by spaCy and its model {model}: `pip install spacy` and "
            f"`python -m spacy download {model}`, or name another by --model."
        ) from error

    def nouns(captions: Iterable[str]) -> Iterator[list[str]]:
        for document in pipeline.pipe(captions, n_process=processes, batch_size=256):
            yield [(token.lemma_ or token.text).lower() for token in document if token.pos_ in ("NOUN", "PROPN")]

    return nouns


def count(store: FeatureStore, tag: Tagger, *, quiet: bool = False) -> Nouns:
    """The statistics of a store's captions. Raises UserError for a store of classes."""
    if store.manifest.caption_channels is None:
        raise UserError(f"{store.folder} holds classes, which have no captions to count nouns in.")
    captions = (store.caption(index) or "" for index in range(len(store)))
    seen: Counter[str] = Counter()
    for nouns in tqdm(tag(captions), total=len(store), unit="caption", disable=quiet):
        seen.update(nouns)
    total = seen.total()
    valid = sum(times > VALID for times in seen.values())
    return Nouns(distinct=len(seen), valid=valid, total=total, per_picture=total / len(store))


def write(store: FeatureStore, nouns: Nouns) -> None:
    """Add them to the manifest. Raises OSError."""
    manifest = store.manifest.model_copy(update={"nouns": nouns})
    write_aside(store.folder / MANIFEST, lambda partial: partial.write_text(manifest.model_dump_json(indent=1) + "\n"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.data.nouns", description="Count the nouns of a store's captions into its manifest."
    )
    parser.add_argument("store", type=Path, metavar="STORE", help="a folder of train.data.extract")
    parser.add_argument("--model", default="en_core_web_sm", help="spaCy's, by name or folder (%(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that tag captions (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        store = FeatureStore(options.store)
        nouns = count(store, tagger(options.model, options.processes))
        write(store, nouns)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{nouns.distinct} distinct nouns, {nouns.valid} of them more than {VALID} times; {nouns.total} in all, "
        f"{nouns.per_picture:.1f} a picture"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
