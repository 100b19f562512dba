"""Fill the feature cache ahead of training, or continue to; --compact joins its files."""

from __future__ import annotations

import sys

from jobs.cli import (
    parse_settings,
    run_job,
    say,
    settings_parser,
)
from omni.errors import counted


def main(argv: list[str] | None = None) -> int:
    parser = settings_parser("encode", __doc__, "run", "data", "augment", "encoder")

    parser.add_argument(
        "--compact",
        action="store_true",
        help="encode nothing: join small shards and tables of keys, also of version 0.1",
    )

    def job() -> None:
        arguments, config = parse_settings(parser, argv)
        from omni.run.fill_cache import compact_cache, fill_cache
        from omni.stream.feature_cache import advice_when_full

        if arguments.compact:
            compact_cache(config, lambda line: say(f"  {line}"))
            return
        done = fill_cache(config, lambda line: say(f"  {line}"))
        rate = done["audio_seconds"] / done["seconds"] if done["seconds"] else 0.0
        hours = done["audio_seconds"] / 3600
        print(
            f"encoded {counted(done['encoded'], 'utterance')} ({hours:.2f} h at {rate:,.0f} "
            f"audio-s/s); the cache holds {done['kept']:,} of {done['utterances']:,}, "
            f"{done['gigabytes']:.3f} GB"
        )
        for reason, count in done["rejects"].items():
            say(f"left out: {count} {reason}")
        if done["full"]:
            advice = advice_when_full(config.encoder.format)
            raise RuntimeError(f"the feature cache is full ({done['full']}); {advice}")

    return run_job(job, "interrupted; the same command continues")


if __name__ == "__main__":
    sys.exit(main())
