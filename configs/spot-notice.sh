#!/bin/bash
# Drain this Ray node when AWS announces that its spot instance will be taken away, two minutes ahead:
# the run writes a checkpoint and leaves the node. Start it in the background beside `ray start`.
# METADATA is another address for tests; POLL_SECONDS is 5 as AWS advises.
metadata=${METADATA:-http://169.254.169.254}/latest
while sleep "${POLL_SECONDS:-5}"; do
  token=$(curl -sf -m 2 -X PUT "$metadata/api/token" -H "X-aws-ec2-metadata-token-ttl-seconds: 60")
  if curl -sf -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/spot/instance-action"
  then
    exec ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "spot notice" \
      --deadline-remaining-seconds 110
  fi
done
