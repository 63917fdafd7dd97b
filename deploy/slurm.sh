#!/bin/bash
# 4 nodes of 8 GPUs: sbatch deploy/slurm.sh MODEL_DIR. The coordinator runs on the first node, beside its ranks.
#SBATCH --job-name=moe-jax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --no-kill
#SBATCH --signal=B:TERM@90
set -eu

MODEL=${1:?usage: sbatch deploy/slurm.sh MODEL_DIR}
STATE=${MOE_JAX_STATE:-$HOME/.moe-jax/$SLURM_JOB_ID}
export MOE_JAX_CACHE=${MOE_JAX_CACHE:-$HOME/.cache/moe-jax}
mkdir -p "$STATE"
umask 077
[ -s "$STATE/cluster-token" ] || head -c 24 /dev/urandom | base64 > "$STATE/cluster-token"
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ADDRESS=$(getent hosts "$FIRST" | awk '{print $1; exit}'):50051

# Killed, it is started again, and takes its workers over.
(
  while :; do
    moe-jax serve --model "$MODEL" --hosts "$SLURM_NNODES" --ranks-per-host 8 --workers none --platform cuda \
      --address "$ADDRESS" --journal "$STATE" --cluster-token "$STATE/cluster-token" --insecure --grace 60 && break
    sleep 1
  done
) &
COORDINATOR=$!
trap 'pkill -TERM -P $COORDINATOR; wait $COORDINATOR' TERM

export ADDRESS STATE
# --kill-on-bad-exit=0: a node that is lost takes nobody along.
srun --kill-on-bad-exit=0 --ntasks-per-node=1 bash -c '
  for gpu in 0 1 2 3 4 5 6 7; do
    ( while kill -0 $$; do
        moe-jax worker --coordinator "$ADDRESS" --platform cuda --gpu $gpu \
          --rank $((SLURM_NODEID * 8 + gpu)) --host host$SLURM_NODEID --patience 120 \
          --cluster-token "$STATE/cluster-token"
        sleep 1
      done ) &
  done
  wait' &
wait $COORDINATOR
