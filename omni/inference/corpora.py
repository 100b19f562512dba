"""Transcribe a corpus of any shape into a folder that is a corpus itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from omni.corpus.build import index_here
from omni.corpus.index import read_index_folder
from omni.corpus.manifest import INDEX_FILE, absolute
from omni.corpus.sources import Options
from omni.errors import ConfigError, ManifestError
from omni.inference.labels import CorpusFormat, Written, check_format, write_labels
from omni.inference.pipeline import Actors, transcribe_corpus
from omni.inference.shards import Decoder
from omni.storage.path import StoragePath
from omni.storage.uri import public_uri, report_storage_errors

CORPUS_FOLDER, SHARDS_FOLDER = "corpus", "shards"


def transcribe_to_corpus(
    spec: str,
    out: StoragePath,
    decoder: Decoder,
    options: Options,
    *,
    actors: Actors | None,
    wanted: CorpusFormat,
    min_confidence: float,
    say: Callable[[str], None],
) -> Written:
    """Index a corpus, transcribe it in shards and write the result; see `write_labels`.

    OUT/corpus is the index, OUT/shards holds what is finished. Long recordings without times
    are cut by voice activity. Raises ConfigError for a corpus that cannot be used.
    """
    out = out.expanduser().absolute()
    with report_storage_errors(f"--out {public_uri(str(out))}"):
        out.mkdir(parents=True, exist_ok=True)
        folder = _index(spec, out / CORPUS_FOLDER, decoder, options, actors, say)
        transcriber = decoder.load_on_driver()
        table, rejects = read_index_folder(folder, transcriber.prompt)
        check_format(table, wanted)
        if not len(table):
            raise ConfigError(f"{public_uri(spec)}: there are no utterances")
        decoding = str(transcriber.decoding)
        del transcriber
        pairs = transcribe_corpus(decoder, table, out / SHARDS_FOLDER, actors, say)
        made = write_labels(pairs, out, wanted, min_confidence, [public_uri(spec)], decoding)
    for reject in rejects:
        made.left_out[reject.reason] += 1
    made.unread += len(rejects)
    return made


def _index(
    spec: str,
    folder: StoragePath,
    decoder: Decoder,
    options: Options,
    actors: Actors | None,
    say: Callable[[str], None],
) -> StoragePath:
    """Return the folder of the index of a corpus: it may be one, or is made."""
    try:
        if (":" not in spec or "://" in spec) and (absolute(spec) / INDEX_FILE).is_file():
            return absolute(spec)
        if options.segment is not None:
            longest = max(2.0, decoder.load_on_driver().longest_piece)
            options = replace(options, segment=replace(options.segment, longest=longest))
        if actors is None:
            index_here(spec, folder, options, say)
        else:
            from omni.corpus.build_tasks import make_index

            make_index([spec], folder, options, say)
    except ManifestError as error:
        raise ConfigError(str(error)) from None
    return folder
