#!/bin/sh
# Trains a draft and publishes it under a name that a server's configuration can keep: draft = "/drafts/current".
#
#   train-draft.sh TARGET [FLAGS of paceline train-draft]
#
# $DRAFTS (/drafts) is shared by trainers and servers, $KEEP (3) drafts stay in it. A job that was interrupted goes on
# where it was, with the flags that it was started with; to begin anew, remove $DRAFTS/runs/unfinished.
# A server takes the new draft when it starts the next time.
set -eu
drafts="${DRAFTS:-/drafts}"
run="$drafts/runs/unfinished"
mkdir -p "$drafts/runs" "$drafts/published"

# What stops a container is SIGTERM to this shell; training answers SIGINT with a checkpoint and exit code 130, unless it
# was started with that signal ignored, as shells do for what runs in the background.
train() {
    env --default-signal=INT paceline train-draft "$@" -o "$run" &
    child=$!
    trap 'kill -INT "$child"' INT TERM
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, not yet the training
        code=0
        wait "$child" || code=$?
    done
    trap - INT TERM
    return "$code"
}

if [ -s "$run/recipe.json" ]; then
    train "$1" --resume
else
    rm -rf "$run"
    train "$@"
fi

name="$(date -u +%Y-%m-%dT%H-%M-%S)"
paceline export "$run/best" -o "$drafts/published/$name"
# A link made beside it and renamed over it: a server that starts now finds the old draft or the new one.
ln -s "published/$name" "$drafts/.current"
mv -T "$drafts/.current" "$drafts/current"
mv "$run" "$drafts/runs/$name"
for folder in runs published; do
    find "$drafts/$folder" -mindepth 1 -maxdepth 1 -name '2*' | sort | head -n "-${KEEP:-3}" | xargs -r rm -rf
done
echo "published $drafts/published/$name as $drafts/current"
