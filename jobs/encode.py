"""Fill the feature cache ahead of training; the same command continues an interrupted one."""

from __future__ import annotations

import sys

from jobs.cli import parse_config, run


def main(argv: list[str] | None = None) -> int:
    def job() -> None:
        config, _ = parse_config("encode", __doc__ or "", argv)
        from omni.run.fill_cache import fill_cache
        from omni.stream.feature_cache import more_room

        done = fill_cache(config, lambda line: print(f"  {line}", flush=True))
        rate = done["audio_seconds"] / done["seconds"] if done["seconds"] else 0.0
        print(
            f"encoded {done['encoded']:,} utterances ({done['audio_seconds'] / 3600:.2f} h at "
            f"{rate:,.0f} audio-s/s); the cache holds {done['kept']:,} of {done['utterances']:,}, "
            f"{done['gigabytes']:.3f} GB"
        )
        for reason, count in done["rejects"].items():
            print(f"left out: {count} {reason}")
        if done["full"]:
            advice = more_room(config.encoder.format)
            raise RuntimeError(f"the feature cache is full ({done['full']}); {advice}")

    return run(job)


if __name__ == "__main__":
    sys.exit(main())
