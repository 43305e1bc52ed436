#!/bin/bash
# What a schedule runs: answers the rows that are new since the last time, and prints one line about it.
#
#   jobs/nightly.sh model=llama7b quant=bnb data.path=inbox output.dir=labelled ...
#
# From cron (nightly.crontab), systemd (nightly.service and nightly.timer) or Slurm (nightly.scron). Ends with the
# pipeline's exit code; 75 also means that the run of an earlier date is still at work, which is left alone.
#
# PIPELINE_LOG is a file that is appended to, or a folder: then every run has its own log in it, and the latest
# PIPELINE_KEEP_LOGS (30) stay.
set -u
python=${PIPELINE_PYTHON:-python}
log=${PIPELINE_LOG:-}
begun=$(date +%s)
folder=
if [ -n "$log" ] && [ -d "$log" ]; then
    folder=$log
    log=$folder/nightly-$(date +%Y%m%dT%H%M%S)-$$.log
fi
if [ -n "$log" ]; then
    exec 3>>"$log"
else
    exec 3>&2 # not /dev/stderr, which cannot be opened where it is systemd's journal
fi

"$python" -m pipeline launcher.lock=true "$@" >&3 2>&1
code=$?
"$python" -m pipeline.status --registered --since "$begun" "$@" 2>&1 | sed "s/^/nightly (exit code $code): /"

if [ -n "$folder" ]; then
    logs=("$folder"/nightly-*.log)
    extra=$((${#logs[@]} - ${PIPELINE_KEEP_LOGS:-30}))
    if [ "$extra" -gt 0 ]; then
        rm -f -- "${logs[@]:0:extra}"
    fi
fi
exit "$code"
