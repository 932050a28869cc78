"""What the help of a command says below its options and its example."""

EVAL_HELP = """\
  osler eval runs/mine task=medqa:test.jsonl     (or medmcqa, pubmedqa, gsm8k; task.type=medqa task.path=test.jsonl is the same)
  osler eval runs/mine task=medqa:test.jsonl,gsm8k:test.parquet,clinic subset=200     (200 random questions of each)
  osler eval runs/mine --needle task.lengths=[512,2048] task.limit=50     (a needle in a haystack, by length and depth)
  osler eval runs/mine --harness "--tasks hellaswag --limit 100"     (lm-evaluation-harness asks; `--harness --help`)
  osler eval runs/mine text=notes/     (bits per byte; text that it was not trained on)

With neither task nor text a model is examined on what it was trained for. Other fields are method=likelihood, permutations=4
(orders of the options), samples=8 temperature=0.7 (pass@k, majority vote) and more: `osler show eval --explain` has them all.

After an interruption the same command goes on, if checkpoint, questions and settings are the same. `osler report` shows answers,
the wrong ones first, and `osler compare` tests two models question by question."""

ABLATE_HELP = """\
  osler ablate text-10min data.path=notes/ 'model.vocab_size=4096 tokenizer.vocab_size=4096|optim.lr=0.01' --tokens 4000000

A field with | between its values is a change for each of them that the recipe does not have already; fields that go together
stand in one change, as in the second example. All other fields are those of every run. The interval is of the mean difference
over the seeds (Student's t). Runs by the clock also pay for slower steps, so let nothing else run beside them, and for compiling:
each has an empty cache of compiled code, as the first run of a model has, so none is ahead because another ran before it.

Each run is an ordinary run folder inside --run DIR, and DIR/ablation.json has all values. After Ctrl-C or a kill the same command
goes on, also with more --seeds and with further changes."""

DISTILL_HELP = """\
  osler sft init_from=runs/small data.type=turns data.path=rows.jsonl data.thinking_field=thinking     (learns them)

It draws samples=8 answers to each question and keeps those that an exam counts as right, each reasoning once and keep=2 of a
question at most. After an interruption the same command goes on. `osler show distill --explain` says what each field means.

A model may also learn from a teacher's probabilities, as a run like any other, if both have the same tokenizer:
  osler sft init_from=runs/small teacher.path=runs/quickstart/sft     (or osler pretrain; teacher.weight, teacher.temperature)"""

EXPORT_HELP = """\
--to         what                                                                    --dtype
hf           a folder as Hugging Face's Qwen3, with a model card                     fp32, bf16
gguf         one file for llama.cpp                                                  f16, f32, bf16, q8_0, q4_0
onnx         a folder for ONNX Runtime, with a KV cache                              fp32, int8, int4
safetensors  one file: the model as it is, config and tokenizer in its metadata      fp32, bf16"""

PLAN_HELP = """\
  osler plan osler-20usd parallel.type=ddp --gpu h100 --gpus 8 --price 2.50     (eight GPUs, at a price of your own)
  osler plan grpo-medqa init_from=pure-medium-large --gpu my-card.yaml          (a model family for a run that is not there yet)

It needs neither the device nor torch. Numbers have intervals, and say what was assumed, computed or measured. --probe trains here
for a minute or two and measures. A pipeline has a plan for each stage that trains; exams are not planned. A device of your own is
a file such as
  {title: My card, tflops: 100, memory_gib: 24, bandwidth_gb: 900, usd: [0.4, 0.6]}"""

QUANTIZE_HELP = """\
  osler eval runs/sft-int8 && osler eval runs/quickstart/sft && osler compare runs/quickstart/sft runs/sft-int8

Weights are rounded; where the model runs they are in full again, so the file is smaller and nothing is faster. What is
quantised cannot be trained: train first. bf16 can."""

PRUNE_HELP = """\
  osler prune runs/notes --intermediate-size 256 --data more-notes/ --out runs/notes-256     (both may be given)

A pruned model has forgotten something. It trains like any other, and the command that heals it is printed at the end."""

WATCH_HELP = """\
  osler watch runs/mine --once | less     (also where no terminal is: a log, a cron job)

Ctrl-C leaves; the run goes on. A run that is finished or was stopped can be watched as well."""

SERVE_HELP = """\
  osler serve runs/quickstart/grpo before=runs/quickstart/sft --port 9000     (several; a request chooses by name)
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{"messages": [{"role": "user", "content": "A girl aged 17 has deep breathing, intense thirst and dry tongue. \
What is the best test? blood ketones (A) serum TSH (B) spirometry (C) IGF-1 level (D)"}]}'

It needs the extra `serve`. SIGTERM or Ctrl-C: no new requests, and those that run have --drain-seconds to end."""

TOKENIZER_HELP = """\
  osler tokenizer train notes/ --type superbpe tokenizer.vocab_size=32768 --out tokenizer.json     (tokens of up to four words)"""

SHORTER = """\
a shorter one, that learns less:
  osler quickstart pretrain.total_tokens=400000 sft.total_tokens=200000 grpo.steps=5 exam.task.limit=50 --run runs/short
  osler show quickstart --explain     every field, and what it means"""

DEPLOY_HELP = """\
  osler deploy apply usmle-2day root=data --target k8s-job --image example.org/osler:cuda --token HF_TOKEN
  osler deploy status usmle-2day --target k8s-job     (then logs, with --follow, and stop)

target      what it is
k8s-job     one machine: a Job of Kubernetes
jobset      several: a JobSet
trainjob    several: a TrainJob of Kubeflow's Trainer
k8s-server  the trained model behind OpenAI's API, at /v1 of a Service
slurm       a batch script, for a folder that the machines share; call it there
skypilot    a managed job on spot machines, with a bucket as volume
dstack      a task on spot machines, with a volume that has to be there

The recipe travels in the manifest. Its relative paths begin at the top of the volume, where the run folder is runs/NAME. What was
evicted is started again and goes on; what has to be mended (exit code 2) stays ended. stop keeps the volume."""
