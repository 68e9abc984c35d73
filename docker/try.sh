#!/bin/sh
# Builds an image of docker/Dockerfile with neither a Docker daemon nor a registry of images, and trains in it as its user.
#   docker/try.sh TARGET [OPTION OF buildah build]…      (as root; needs buildah and debootstrap)
# The base is made of Debian's packages, in place of the image that the Dockerfile names. STORE keeps what is built.
# Options give what a closed network needs, as --volume "$PWD/pip.conf:/etc/pip.conf:ro".
set -eu
target=$1
shift
cd "$(dirname "$0")/.."
store=${STORE:-/tmp/nlm-images}
ours() { buildah --root "$store/images" --runroot "$store/run" --storage-driver overlay "$@"; }
took() { echo "== $1: $(($(date +%s) - since)) s"; }

mkdir -p "$store"
if ! ours inspect --type image localhost/bookworm >/dev/null 2>&1; then
    since=$(date +%s)
    [ -e "$store/base.tar" ] || {
        debootstrap --variant=minbase bookworm "$store/root"
        tar --create --one-file-system --exclude './dev/*' --directory "$store/root" --file "$store/base.tar" .
        rm --recursive --one-file-system "$store/root"
    }
    printf 'FROM scratch\nADD base.tar /\n' >"$store/Dockerfile"
    ours build --ignorefile /dev/null --tag localhost/bookworm --file "$store/Dockerfile" "$store"
    took "base"
fi

since=$(date +%s)
ours build --isolation chroot --format docker --layers --pull-never --build-arg BASE=localhost/bookworm \
    --target "$target" "$@" --file docker/Dockerfile --tag "localhost/nlm:$target" .
took "nlm:$target built"
ours images --all --format '{{.Size}} {{.ID}} {{.Name}}:{{.Tag}}'

container=$(ours from --pull-never "localhost/nlm:$target")
trap 'ours rm "$container" >/dev/null' EXIT
# `buildah run` takes the image's user, directory and environment, but not its entrypoint.
in_image() { ours run --isolation chroot "$container" -- tini -s -- entrypoint "$@"; }

since=$(date +%s)
# shellcheck disable=SC2016 # what is to be expanded in the container
in_image sh -c '[ "$(id -u)" = 1000 ] && [ ! -w /opt/nlm ] && ! which pip'
# shellcheck disable=SC2016
# A program with a verb's name would hide it.
in_image sh -c '! which $(nlm --help | sed -n "s/^    \([a-z][a-z-]*\).*/\1/p")'
in_image python -c 'print("To be, or not to be: that is the question.\n" * 400, file=open("text.txt", "w"))'
in_image tokenize text.txt --tokenizer byte --out data/plays
small() { in_image "$@" train.steps=2 optim.warmup_steps=1 model.n_layers=4 data.validation=data/plays log.every=1; }
small train configs/quickstart.toml log.dir=runs/one
port=${PORT:-29517}
small torchrun --nproc-per-node 2 --master-port "$port" -m nlm train configs/quickstart.toml log.dir=runs/two \
    parallel.dp_replicate=2
small deepspeed --num_accelerators=2 --master_port="$port" --module nlm train configs/quickstart.toml \
    log.dir=runs/zero parallel.engine=deepspeed parallel.zero=2 parallel.dp_shard=2
in_image health
in_image grep -H -o '"loss": [0-9.]*' runs/one/metrics.jsonl runs/two/metrics.jsonl runs/zero/metrics.jsonl
took "trained in it"
