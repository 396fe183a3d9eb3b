#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Start a program on this node with torchrun: alone, or as one of several nodes. Run it on every node.
#
#   launch/torchrun.sh examples/pretrain_gpt.py --config examples/configs/gpt_1.3b_8k_1gpu.yaml ...
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh examples/pretrain_gpt.py ...     (the other: NODE_RANK=1)
#
# Settings, by environment variable:
#   NNODES          nodes of the job (1); MIN:MAX lets the job go on with fewer, if --global-batch-size allows it
#   NODE_RANK       0 on the node that hosts the rendezvous (0); the other nodes only have to differ from 0
#   MASTER_ADDR     address of that node, as the others reach it (localhost)
#   MASTER_PORT     port of the rendezvous there (29500)
#   NPROC_PER_NODE  processes on this node (its GPUs, or 1)
#   RDZV_ID         name of the job, the same on all nodes; a new one for a new job on the same port (sparsek)
#   MAX_RESTARTS    times that all processes are started again after one has failed (3)
#   NET_INTERFACE   network interface for NCCL's bootstrap and gloo, where a node has several (chosen by them)
#   NODE_ADDR       this node's own address, where its host name does not resolve to it
#
# SIGUSR1 or SIGTERM to this script: a checkpoint after the step under way, then a clean exit with code 0; while the
# processes are starting, the exit alone.
#
# Exit code 2, from here or from a process, is the user's to fix: one line says what, and nothing is started again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# No command substitution from here on: bash 5.2 parses it again as it runs, and a trap's command with it if the signal
# comes at that moment. A pipe into `read` does the same (lastpipe: in this shell).
shopt -s lastpipe
stopping=false
trap 'stopping=true' USR1 TERM

fail() {
    echo "error: $*" >&2
    exit 2
}

# whole NAME VALUE LEAST MOST MEANING: the variable must be a whole number within these bounds.
whole() {
    if ! [[ "$2" =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3 || $2 > $4)); then
        fail "$1=$2: must be a whole number from $3 to $4, $5"
    fi
}

case "${1:-}" in
"" | -h | --help)
    sed -n '3,22s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    [ -n "${1:-}" ] || exit 2
    exit 0
    ;;
-*) fail "$1: the first argument is the program to start, its flags come after it" ;;
esac
[ -f "$1" ] || fail "$1: no such program; give a Python file by its path from $PWD or from /"

nodes="${NNODES:-1}"
rank="${NODE_RANK:-0}"
port="${MASTER_PORT:-29500}"
restarts="${MAX_RESTARTS:-3}"
if ! [[ "$nodes" =~ ^[1-9][0-9]{0,5}(:[1-9][0-9]{0,5})?$ ]] || ((${nodes%:*} > ${nodes#*:})); then
    fail "NNODES=$nodes: must be the number of nodes, or MIN:MAX, such as 4 or 2:4"
fi
whole NODE_RANK "$rank" 0 100000 "0 on the node of MASTER_ADDR"
whole MASTER_PORT "$port" 1 65535 "a free port of the node with NODE_RANK=0"
whole MAX_RESTARTS "$restarts" 0 100000 "how often all processes are started again after one has failed"
if [ -n "${NPROC_PER_NODE:-}" ]; then whole NPROC_PER_NODE "$NPROC_PER_NODE" 1 100000 "the processes of this node"; fi
if [ "$nodes" != 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
    fail "NNODES=$nodes without MASTER_ADDR: give the address of the node with NODE_RANK=0"
fi
count='import torch; print(torch.cuda.device_count() or 1)'
processes="${NPROC_PER_NODE:-}"
if [ -z "$processes" ]; then
    (trap '' USR1 TERM && exec python -W ignore -c "$count" 2>/dev/null) | read -r processes ||
        fail "python cannot import torch; activate the virtual environment that has it"
fi

# A failing link is named by NCCL's warnings and by nothing else.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
if [ -n "${NET_INTERFACE:-}" ]; then
    # Both otherwise take the first interface that is up, which may be a container bridge that other nodes cannot reach.
    export NCCL_SOCKET_IFNAME="$NET_INTERFACE" GLOO_SOCKET_IFNAME="$NET_INTERFACE"
fi
# Sequences of one length leave few holes, validation and checkpoints more: let the allocator grow segments in place.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# torchrun would set 1; the data loader and CPU offload use what there is.
(trap '' USR1 TERM && exec nproc) | read -r cores
cores=$((cores / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}"

arguments=(--nproc-per-node="$processes" --max-restarts="$restarts")
if [ "$nodes" = 1 ]; then
    arguments+=(--standalone)
else
    # The nodes that were there keep a shared store and tell a node that joins later nothing of it (torch 2.13): its
    # rendezvous would time out. Without sharing, rank 0 opens a store of its own for every round.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # The rendezvous node is told and not guessed: a host name often does not resolve to the address that others use.
    [ "$rank" = 0 ] && is_host=1 || is_host=0
    arguments+=(
        --nnodes="$nodes" --rdzv-backend=c10d --rdzv-id="${RDZV_ID:-sparsek}"
        --rdzv-endpoint="$MASTER_ADDR:$port"
        # A node that died is noticed after three missed keep-alives, and its replacement has ten minutes to join.
        --rdzv-conf="is_host=$is_host,join_timeout=600,keep_alive_interval=5,keep_alive_max_attempt=3"
    )
fi
if [ -n "${NODE_ADDR:-}" ]; then arguments+=(--local-addr="$NODE_ADDR"); fi

# torchrun itself must outlive the signals that end a run: it would give its processes half a minute and kill them.
(
    trap '' USR1 TERM
    exec python launch/agent.py --signals-to-handle=SIGINT,SIGHUP,SIGQUIT "${arguments[@]}" "$@"
) &
agent=$!
trap 'kill -INT "$agent" 2>/dev/null' INT

while kill -0 "$agent" 2>/dev/null; do
    if $stopping; then
        # Again and again: a process that is still starting ignores it, and others may be started later.
        cat /proc/"$agent"/task/*/children 2>/dev/null | xargs -r kill -USR1 2>/dev/null || true
        sleep 1 || true
    else
        wait "$agent" || true # a trapped signal ends the wait as well
    fi
done
code=0
wait "$agent" || code=$?
exit "$code"
