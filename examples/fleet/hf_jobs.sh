#!/bin/bash
# The same with Jobs of the Hugging Face Hub: bash hf_jobs.sh IMAGE ROOT SHARDS. The jobs file lies in ROOT's bucket.
#   The secrets are read from your environment; none is in a command.
set -euo pipefail
image=${1:?an image with lora-export[fleet]} root=${2:?s3://BUCKET/PATH} shards=${3:-4}
for ((shard = 0; shard < shards; shard++)); do
    hf jobs run --detach --name "fleet-$shard" --flavor cpu-upgrade --timeout 6h --attempts 3 \
        --secrets HF_TOKEN --secrets AWS_ACCESS_KEY_ID --secrets AWS_SECRET_ACCESS_KEY \
        --volume "${JOBS_FOLDER:-.}:/jobs:ro" \
        "$image" lora-export fleet /jobs/jobs.toml --output "$root" --shard "$shard/$shards" --workers 2
done
