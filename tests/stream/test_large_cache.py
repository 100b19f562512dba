"""A cache of 30 million keys in a bucket is opened and read in few requests and little memory."""

from __future__ import annotations

import pytest

from omni.bench.cache_speed import add_features, feature_keys, open_index, write_index
from omni.bench.process_alone import alone
from omni.stream.feature_cache import FeatureCache
from tests.helpers.loopback_s3 import s3_bucket, server_requests

KEYS, READ = 30_000_000, 1_000


@pytest.mark.slow  # Writes 1.3 GB of keys.
def test_thirty_million_keys_in_a_bucket() -> None:
    with s3_bucket("large") as uri:
        alone(write_index, uri, KEYS)
        with server_requests() as requests:
            opened = alone(open_index, uri, KEYS)
        assert 40 < len(requests) < 100
        assert opened.value.megabytes < 200
        with server_requests() as requests:
            again = alone(open_index, uri, KEYS)
        assert len(requests) < 5, "one copy for all processes of a node"
        assert again.value.megabytes < 200
        add_features(uri, READ)
        cache = FeatureCache(uri)
        keys = feature_keys(READ)
        cache.get(keys[:1])
        with server_requests() as requests:
            read = {
                k: v for n in range(0, READ, 64) for k, v in cache.get(keys[n : n + 64]).items()
            }
        assert list(read) == keys and len({*read.values()}) == READ
        opened = [request for request in requests if request.startswith("HEAD")]
        assert len(opened) == len(set(opened)) < READ / 50, "of a shard, once in a process"
        assert len(requests) - len(opened) == READ
