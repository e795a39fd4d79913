# Functions for a study on a machine that is lent for some minutes at a time and has no network (docs/mini.md): source this file
# at the root of the copy of the repository that came with the call. The study lives in $LENT, which no later call touches.
# What `study` starts goes on between calls, as long as the machine is there.

LENT=/tmp/lent
STUDY=${STUDY:-mini}
OFFLINE=/tmp/offline # what workflow/envs/offline.sh packed
export PATH="$OFFLINE/bin:$PATH" PYTHONPATH="$OFFLINE/site:$LENT:$LENT/kernels:$LENT/eval" PYTHONUNBUFFERED=1
export SLA2_JOBS_PER_GPU=${SLA2_JOBS_PER_GPU:-4}
SLA2_COMMIT=$(cat "$LENT/.commit" 2> /dev/null) # the copy has no git
export SLA2_COMMIT

# settle COMMIT: on a bare machine, unpack .device/offline.tar.xz and copy the repository to $LENT.
settle() {
    mkdir -p "$LENT" "$OFFLINE" && tar xJf .device/offline.tar.xz -C "$OFFLINE" && cp -a . "$LENT" && echo "$1" > "$LENT/.commit" && SLA2_COMMIT=$1
}

# study TARGETS AND OPTIONS: start Snakemake on them, beside nothing else that runs in $LENT.
study() {
    (cd "$LENT" && setsid nohup snakemake "$@" --scheduler greedy \
        --resources gpu=$((SLA2_JOBS_PER_GPU * $(nvidia-smi -L | wc -l))) > /tmp/study.log 2>&1 < /dev/null &)
}

# look SECONDS [FILE]: wait that long since the call began, or until Snakemake ends or the file in $LENT is there; say how far it is.
look() {
    sleep 10
    while [ $SECONDS -lt "$1" ] && [ ! -e "$LENT/${2:-.none}" ] && pgrep -f "m snakemake" > /dev/null; do sleep 1; done
    echo "after $SECONDS s:" && grep -aE "of [0-9]+ steps|[Ee]rror in rule" /tmp/study.log | tail -n 3
    (cd "$LENT/results/$STUDY" && ls stage1/*/adapter.safetensors stage2/*/seed*/adapter.safetensors generate/*/seed*/manifest.jsonl score/*.csv \
        2> /dev/null | cut -d/ -f1 | sort | uniq -c)
    nvidia-smi --query-gpu=utilization.gpu,memory.used --format=csv,noheader | tr '\n' ';' && uptime
}

# records FOLDER [PROMPT ...]: what a study leaves but for weights and latents, in files of 15 MB; of the first sampling and training seed
# also these prompts' videos, the first prompt's without loss.
records() {
    cp /tmp/study.log "$1"
    (
        cd "$LENT/results/$STUDY" && out=$1 && shift
        find data/data.json base_model stage1 stage2 generate score latency logs -type f \( -name '*.json' -o -name '*.csv' -o -name '*.jsonl' \
            -o -name 'adapter.safetensors' -o -name '*.log' -o -path 'score/judge/*' \) ! -path '*/finished/*' ! -path '*/latents-*' ! -path '*/pipeline/*' \
            ! -path '*/transformer/*' ! -name trained.json 2> /dev/null | tar c -T - | xz -3 -T0 | split -b 15000000 - "$out/records."
        if [ $# -gt 0 ]; then
            {
                find generate -path "*seed0/lossless/$1-s0.mkv"
                for prompt in "$@"; do find generate -path "*seed0/videos/$prompt-s0.mp4"; done
            } | tar c -T - | split -b 15000000 - "$out/videos."
        fi
    )
}
