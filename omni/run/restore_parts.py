"""Prepare parts of a corpus again whose files have been removed while a run trains.

Those of manifests are in the folder of the feature cache, which may be emptied at any time.
"""

from __future__ import annotations

from omni.corpus.splits import open_corpora
from omni.errors import ConfigError
from omni.run.prepare import Prepared
from omni.run.prepare_parts import prepare_corpus
from omni.run.prepared_part import Recipe


def restore_parts(prepared: Prepared) -> bool:
    """Make the files of the training split's parts that are gone; tell whether any were.

    Raises ConfigError if the corpus has changed since the run began.
    """
    reader = prepared.splits["train"].reader
    if reader is None or reader.files.are_there():
        return False
    config = prepared.config
    _, corpus = open_corpora(config)
    recipe = Recipe(config, prepared.tokenizer.to_json(), prepared.template)
    found = None if corpus is None else prepare_corpus(corpus, recipe).fingerprint
    if found != prepared.fingerprints["data.train"]:
        raise ConfigError(
            "data.train: its prepared parts were removed, and the corpus has changed since the run "
            "began; expected the same rows"
        )
    return True
