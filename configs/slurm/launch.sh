# shellcheck shell=bash
# What train_llm.sbatch and train_imagenet.sbatch have in common: one launcher a node, and the way back into the queue.
# It is read by them with PROGRAM, CONFIG and RUN_DIR set; "$@" are settings of the run. The environment may set
#   CONFIG, RUN_DIR   other ones
#   ENGINE        a file of configs/accelerate without its ending (fsdp2; ddp, zero1, zero2, zero3, hsdp, cpu_zero2, ...)
#   PROCESSES_PER_NODE   as many as the node has GPUs, if Slurm says how many
#   MAX_RESTARTS  how often the launchers start their processes again in place (1)
#   MASTER_PORT   where process 0's node listens (a port that follows from the job's number)
set -euo pipefail

ENGINE=${ENGINE:-fsdp2}
PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
MAX_RESTARTS=${MAX_RESTARTS:-1}
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))} # two jobs may share a node
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # all of them; `| head` may end scontrol, and the job with it
MASTER_ADDR=${MASTER_ADDR%%$'\n'*}

job=$SLURM_JOB_ID
seed=()
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then # a run for each seed, side by side
  job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
  seed=(--seed "$SLURM_ARRAY_TASK_ID")
  RUN_DIR=$RUN_DIR/seed_$SLURM_ARRAY_TASK_ID
fi

# Processes that were told to stop get the time to save that --signal leaves them; torch's own 30 s may not do. Before
# torch 2.12, launchers do not read it.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-170}
export PROGRAM ENGINE PROCESSES_PER_NODE MAX_RESTARTS MASTER_PORT MASTER_ADDR

MESH='' # of HSDP: a copy of the weights on each node
if [[ $ENGINE == hsdp ]]; then
  MESH="--parallelism_config_dp_replicate_size $SLURM_NNODES --parallelism_config_dp_shard_size $PROCESSES_PER_NODE"
fi
export MESH

# Quoted for the shell of each node, which alone knows its rank.
# shellcheck disable=SC2016
launch='exec accelerate launch --config_file "configs/accelerate/$ENGINE.yaml" \
  --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * PROCESSES_PER_NODE))" \
  --machine_rank "$SLURM_PROCID" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" \
  --max_restarts "$MAX_RESTARTS" $MESH "$PROGRAM" "$@"'

# The time is nearly over, or another job is to have the nodes: the processes are told to stop, and the run saves. Not
# through srun, which kills them when it gets SIGTERM. Not at SIGTERM: a job that is cancelled gets that, and must not
# come back. $job, not $SLURM_JOB_ID: one element of an array has the number of the whole array for that.
step='' stopped=''
trap 'stopped=1; [[ -z $step ]] || scancel --signal=TERM "$job" || true' USR1

echo "job $job on $SLURM_JOB_NODELIST: $PROGRAM with $ENGINE in $RUN_DIR, start ${SLURM_RESTART_COUNT:-0}"
# Since Slurm 22.05, srun no longer takes the number of cores from sbatch.
srun --ntasks-per-node=1 --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  bash -c "$launch" launch --config "$CONFIG" --run_dir "$RUN_DIR" "${seed[@]}" "$@" &
step=$!

status=0
wait "$step" || status=$?
if [[ -n $stopped ]]; then # the signal has ended the wait, not the step
  status=0
  wait "$step" || status=$?
  if ((status != 0)); then
    echo "job $job: stopped before its end, back into the queue"
    scontrol requeue "$job"
  fi
fi
exit "$status"
