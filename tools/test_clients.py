"""Trains with the frameworks that people use, and looks at what the model's first layer receives: ``make test-clients``.

Each framework gets an environment of its own in ``.clients/``. It trains a small Llama for a few steps, by the command that
its users type, behind ``neft-kernels run`` or with our plugin. In all its processes ``tools/clients/spy`` compares the input
of layer 0 with the plain look-up. A run that passed is not repeated while the sources, the packages and the command are the
same. The results are kept in :data:`RECORD`. The page :data:`PAGE` is written from it.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENTS = REPOSITORY / ".clients"
PROGRAMS = REPOSITORY / "tools" / "clients"
RECORD = REPOSITORY / "tests" / "clients.json"
PAGE = REPOSITORY / "docs" / "frameworks.md"

ALPHA = 5.0
TORCH = "torch==2.13.0"
SHOWN = ("torch", "transformers", "accelerate", "peft")
TIMEOUT = 900  # seconds, for one run


#: Left out, because its wheels need CUDA, and yet imported: an empty module stands in.
EMPTY = ("torchaudio",)


@dataclass(frozen=True)
class Run:
    """One training. `command` is what users type. In it and in `files` {work} is the run's folder, {data} that of the data."""

    name: str
    command: str
    files: dict[str, str]
    variables: dict[str, str]
    launcher: str | None = "neft-kernels run"
    under_no_grad: bool = False


@dataclass(frozen=True)
class Client:
    """One framework, and what of its requirements is not installed."""

    name: str
    packages: tuple[str, ...]
    runs: tuple[Run, ...]
    without: tuple[str, ...] = ()


TRL_ARGUMENTS = """
--model_name_or_path {data}/model --output_dir {work}/out --neftune_noise_alpha 5 --max_steps 3 --eval_strategy steps
--eval_steps 3 --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --use_cpu --bf16 False --report_to none
--save_strategy no --dtype float32
"""
TRL_REWARD = "--reward_model_name_or_path {data}/model --num_generations 2 --max_completion_length 12"
TRL_RUNS = {
    "sft": "--dataset_name {data}/messages",
    "dpo": "--dataset_name {data}/pairs",
    "kto": "--dataset_name {data}/judged",
    "reward": "--dataset_name {data}/pairs",
    "grpo": "--dataset_name {data}/prompts " + TRL_REWARD,
    "rloo": "--dataset_name {data}/prompts " + TRL_REWARD,
}

LLAMAFACTORY = """
stage: sft
do_train: true
model_name_or_path: {data}/model
finetuning_type: full
dataset: tiny
dataset_dir: {data}/alpaca
template: default
cutoff_len: 256
val_size: 0.25
output_dir: {work}/out
max_steps: 3
eval_strategy: steps
eval_steps: 3
per_device_train_batch_size: 2
per_device_eval_batch_size: 2
neftune_noise_alpha: 5
use_cpu: true
report_to: none
save_strategy: "no"
"""

AXOLOTL = """
base_model: {data}/model
datasets:
  - path: {data}/alpaca/train.jsonl
    ds_type: json
    type: alpaca
val_set_size: 0.25
dataset_prepared_path: {work}/prepared
output_dir: {work}/out
sequence_len: 512
attn_implementation: sdpa
micro_batch_size: 2
gradient_accumulation_steps: 1
max_steps: 3
eval_steps: 3
save_strategy: "no"
learning_rate: 0.0001
optimizer: adamw_torch
neftune_noise_alpha: 5
bf16: false
fp16: false
tf32: false
use_tensorboard: false
"""
AXOLOTL_VARIABLES = {"ACCELERATE_USE_CPU": "true", "AXOLOTL_DO_NOT_TRACK": "1"}

SWIFT = """
--model {data}/model --model_type llama --template dummy --dataset {data}/messages/train.jsonl --split_dataset_ratio 0.25
--tuner_type full --torch_dtype float32 --attn_impl sdpa --output_dir {work}/out --max_steps 3 --eval_strategy steps
--eval_steps 3 --save_strategy no --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --neftune_noise_alpha 5
--use_cpu true --report_to none
"""

CLIENTS = (
    Client(
        "TRL",
        ("trl==1.16.0", "peft"),
        tuple(Run(name, f"trl {name} {TRL_ARGUMENTS} {arguments}", {}, {}) for name, arguments in TRL_RUNS.items()),
    ),
    Client(
        "sentence-transformers",
        ("sentence-transformers==6.2.0", "accelerate", "datasets"),
        (
            Run(
                "cached loss",
                f"python {PROGRAMS}/cached_loss.py {{data}}/model {{work}}/out",
                {},
                {},
                launcher="neft-kernels run --under-no-grad",
                under_no_grad=True,
            ),
        ),
    ),
    Client(
        "LLaMA-Factory",
        ("llamafactory==0.9.5",),
        (
            Run("sft", "llamafactory-cli train {work}/config.yaml", {"config.yaml": LLAMAFACTORY}, {}),
            Run(
                "sft, torchrun",
                "llamafactory-cli train {work}/config.yaml",
                {"config.yaml": LLAMAFACTORY + "ddp_backend: gloo\n"},
                {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1"},
            ),
        ),
        without=("torchvision", "torchaudio"),
    ),
    Client(
        "axolotl",
        ("axolotl==0.19.0",),
        (
            Run("sft", "axolotl train {work}/config.yaml", {"config.yaml": AXOLOTL}, AXOLOTL_VARIABLES),
            Run(
                "sft, plugin",
                "axolotl train {work}/config.yaml",
                {"config.yaml": AXOLOTL + "plugins:\n  - neft_kernels.integrations.axolotl.NEFTunePlugin\n"},
                AXOLOTL_VARIABLES,
                launcher=None,
            ),
        ),
        without=("xformers",),
    ),
    Client(
        "ms-swift",
        ("ms-swift==4.6.0",),
        (
            Run("sft", f"swift sft {SWIFT}", {}, {}),
            Run(
                "sft, plugin",
                f"swift sft {SWIFT} --external_plugins {REPOSITORY}/neft_kernels/integrations/swift/neftune.py",
                {},
                {},
                launcher=None,
            ),
        ),
    ),
)

#: Frameworks that were not run: what to do there, and why they were not.
NOT_RUN = {
    "unsloth": (
        "`NEFTuneCallback`, with `neftune_noise_alpha` unset",
        "Not run: unsloth cannot be imported without a GPU. By its source (2026.10.9) its trainers put a hook of their own on "
        "the embedding if `neftune_noise_alpha` is set. The launcher does not reach that hook.",
    ),
    "NeMo Automodel": (
        "`replace_embeddings(model)` in the recipe, with `neftune` unset",
        "Not run: its recipes are for GPUs. By its source (0.7.0) they have a training loop and a NEFTune hook of their own "
        "instead of the Trainer's. The launcher does not reach that hook.",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"only these: {', '.join(client.name for client in CLIENTS)}")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--plain", action="store_true", help="without the launcher: does the test see it? Not recorded")
    parser.add_argument("--page", action="store_true", help="write the page from the record, and run nothing")
    options = parser.parse_args()
    if not options.page:
        for client in CLIENTS:
            if not options.names or client.name in options.names:
                if options.plain:
                    test_plain(client)
                else:
                    test(client, options.again)
    results = recorded()
    PAGE.write_text(page(results))
    failed = [name for name, result in results.items() if result["problems"]]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def test(client: Client, again: bool) -> None:
    """Runs all trainings of one framework but those that passed, and puts the results into the record."""
    environment = ENVIRONMENTS / client.name
    for run in client.runs:
        name = f"{client.name}, {run.name}"
        settings = repr((client.packages, client.without, run)).replace(str(REPOSITORY), "")
        inputs = hashlib.sha256(settings.encode())
        for path in sorted((*(REPOSITORY / "neft_kernels").rglob("*.py"), *PROGRAMS.rglob("*.py"))):
            inputs.update(path.read_bytes())
        before = recorded().get(name)
        if before and not before["problems"] and before["inputs"] == inputs.hexdigest() and not again:
            print(f"{name}: has passed", flush=True)
            continue
        install(environment, (TORCH, *client.packages), client.without)
        print(f"{name}: running", flush=True)
        code, passes = train(environment, run)
        found, problems = judge(passes, run.under_no_grad)
        if code:
            problems.insert(0, f"exit code {code}")
        result = {
            "versions": versions(environment, (client.packages[0].partition("==")[0], *SHOWN)),
            "without": list(client.without),
            "found": found,
            "problems": problems,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "inputs": inputs.hexdigest(),
        }
        RECORD.write_text(json.dumps(dict(sorted((recorded() | {name: result}).items())), indent=1) + "\n")
        print(f"{name}: {'; '.join(problems) or 'as it should be'}; {found}", flush=True)


def test_plain(client: Client) -> None:
    """Runs the first training of one framework with the noise of transformers, which must be found out."""
    environment, run = ENVIRONMENTS / client.name, dataclasses.replace(client.runs[0], launcher=None)
    install(environment, (TORCH, *client.packages), client.without)
    found, problems = judge(train(environment, run)[1], run.under_no_grad)
    print(f"{client.name}, {run.name}, plain: {'; '.join(problems)}; {found}", flush=True)
    if "the noise of transformers" not in problems:
        sys.exit("the noise of transformers was not found out")


def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def install(environment: Path, packages: Sequence[str], without: Sequence[str]) -> None:
    """Makes a virtual environment with `packages`, and with this package, unless it is there already.

    uv installs, because pip takes ten times as long for so many packages. `without` are requirements that are left out.
    """
    done, wanted = environment / "packages.txt", "\n".join((*packages, *(f"without {name}" for name in without)))
    if done.is_file() and done.read_text() == wanted:
        return
    print(f"installing {' '.join(packages)}", flush=True)
    installer = ENVIRONMENTS / "uv"
    if not installer.is_dir():
        subprocess.run([sys.executable, "-m", "venv", installer], check=True)
        subprocess.run([installer / "bin/python", "-m", "pip", "install", "--quiet", "uv"], check=True)
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    left_out = environment / "left_out.txt"
    left_out.write_text("".join(f"{name} ; sys_platform == 'none'\n" for name in without))
    variables = {"UV_CACHE_DIR": str(ENVIRONMENTS / "cache"), "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")}
    uv = [str(installer / "bin" / "uv"), "pip", "install", "--quiet", "--python", str(environment / "bin" / "python")]
    subprocess.run([*uv, "--override", left_out, *packages], check=True, env=os.environ | variables)
    site_packages = next(environment.glob("lib/python*/site-packages"))
    (site_packages / "neft_kernels.pth").write_text(f"{REPOSITORY}\n")
    for name in set(EMPTY) & set(without):
        (site_packages / f"{name}.py").touch()
    done.write_text(wanted)


def versions(environment: Path, names: Sequence[str]) -> dict[str, str]:
    program = "import importlib.metadata as m, sys; print(*(m.version(name) for name in sys.argv[1:]))"
    there = [
        name for name in names if list(environment.glob(f"lib/*/site-packages/{name.replace('-', '_')}-*.dist-info"))
    ]
    printed = subprocess.run(
        [environment / "bin/python", "-c", program, *there], check=True, capture_output=True, text=True
    )
    return dict(zip(there, printed.stdout.split(), strict=True))


def train(environment: Path, run: Run) -> tuple[int, list[dict[str, Any]]]:
    """Runs the command in a fresh folder. Returns its exit code, and what the spy saw."""
    data, work = environment / "data", environment / "runs" / run.name.replace(", ", "-").replace(" ", "-")
    shutil.rmtree(work, ignore_errors=True)
    (work / "home").mkdir(parents=True)
    python = environment / "bin" / "python"
    if not data.is_dir():
        data.mkdir()
        subprocess.run([python, PROGRAMS / "tiny_model.py", data], check=True)
    for name, text in run.files.items():
        (work / name).write_text(text.format(data=data, work=work))
    record = work / "record.jsonl"
    record.touch()
    variables = {
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(PROGRAMS / "spy"),
        "CLIENT_RECORD": str(record),
        "CLIENT_ALPHA": str(ALPHA),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "home"),
        "OMP_NUM_THREADS": "1",
        **run.variables,
    }
    launcher = [str(python), "-m", "neft_kernels", *run.launcher.split()[1:]] if run.launcher else []
    command = [*launcher, *run.command.format(data=data, work=work).split()]
    with (work / "log.txt").open("w") as log:
        done = subprocess.run(
            command, cwd=work, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT, timeout=TIMEOUT
        )
    if done.returncode:
        print("".join((work / "log.txt").read_text().splitlines(keepends=True)[-30:]))
    return done.returncode, [json.loads(line) for line in record.read_text().splitlines()]


def judge(records: list[dict[str, Any]], under_no_grad: bool) -> tuple[dict[str, int], list[str]]:
    """What was seen, in numbers, and what of it is wrong."""
    looked = [each for each in records if "tokens" in each]
    trained = [each for each in looked if each["training"] and not each["during"] and (each["grad"] or under_no_grad)]
    quiet = [each for each in looked if each not in trained]
    ends = [each for each in records if "left" in each]
    found = {
        "training passes": len(trained),
        "tokens": sum(each["tokens"] for each in trained),
        "padding": sum(each["padding"] for each in trained),
        "other passes": len(quiet),
        "generation passes": sum("generate" in each["during"] for each in quiet),
        "passes without gradients in training mode": sum(each["training"] for each in quiet),
        "processes": len({each["process"] for each in looked}),
    }
    rms = [value * math.sqrt(3) for each in trained for value in each["rows_rms"]]
    wrong = {
        "too few passes to tell": len(trained) < 3 or not quiet or not found["padding"],
        "passes with embeddings from elsewhere": any("embeds" in each for each in records),
        "the noise of transformers": not all(each["ours"] for each in trained),
        "tokens without noise": any(each["noisy"] != each["tokens"] for each in trained),
        "noise on padding": any(each["noisy_padding"] for each in trained),
        "noise beyond its bound": any(each["largest"] > 1 + 1e-5 for each in trained),
        # In a row of 10 tokens, 640 values, the root of the mean square deviates by 1.8 % from that of the distribution.
        "noise of another strength": any(not 0.92 < value < 1.08 for value in rms),
        "noise outside of training": any(each["noisy"] or each["noisy_padding"] for each in quiet),
        "noise left behind": any(each["left"] != "Embedding" or each["of_noise"] for each in ends) or not ends,
    }
    return found, [problem for problem, is_so in wrong.items() if is_so]


PAGE_TEXT = """# Frameworks

One block to copy for each. Programs that run are in the [examples](../examples/README.md).

## Trainer

```python
from transformers import Trainer
from neft_kernels import NEFTuneCallback

trainer = Trainer(model, args, train_dataset=dataset, callbacks=[NEFTuneCallback(alpha=5.0)])
trainer.train()
```

## TRL

```py
# DPO, KTO, GRPO ... alike
trainer = SFTTrainer(model, args=args, train_dataset=dataset, callbacks=[NEFTuneCallback(alpha=5.0)])
```

Or from the command line:

```sh
neft-kernels run trl sft --config config.yaml --neftune_noise_alpha 5
```

## axolotl

```yaml
plugins:
  - neft_kernels.integrations.axolotl.NEFTunePlugin
neftune_noise_alpha: 5
neft_kernels:            # optional: options of replace_embeddings
  noise_on: completion
```

## LLaMA-Factory

With `neftune_noise_alpha: 5` in its configuration:

```sh
neft-kernels run llamafactory-cli train config.yaml
```

## ms-swift

The plugin is a file of the package:

```bash
NEFT=$(python -c "import neft_kernels; print(neft_kernels.__path__[0])")
swift sft --external_plugins $NEFT/integrations/swift/neftune.py --neftune_noise_alpha 5 ...
```

## sentence-transformers

```py
callbacks = [NEFTuneCallback(alpha=5.0)]
callbacks = [NEFTuneCallback(alpha=5.0, under_no_grad=True)]  # with a cached loss
trainer = SentenceTransformerTrainer(model, args, train_dataset=dataset, loss=loss, callbacks=callbacks)
```

## Your own loop

```python
from neft_kernels import replace_embeddings

replace_embeddings(model, alpha=5.0)  # before or after accelerate's prepare(); then train
```

A model that is not of transformers: [without Hugging Face](other-frameworks.md).

## The launcher

Frameworks that train with the Trainer of transformers have its option `neftune_noise_alpha`. It runs on our kernels behind
the launcher, which reaches every process that a command starts:

```sh
neft-kernels run axolotl train config.yaml
neft-kernels run --noise-on completion -- swift sft ...
python -m neft_kernels run llamafactory-cli train config.yaml
```

`neft-kernels run --help` lists the options, which are those of `replace_embeddings`. The exit code and signals are those of
the command. A process is not reached if it

- ignores its environment (`python -I`, `-E`, `-S`),
- was running before, such as a worker of a Ray cluster, or runs on another machine that does not get `PYTHONPATH` and
  `NEFT_KERNELS_RUN` from here,
- uses another Python, in which neft_kernels is not installed. A message says so when transformers is imported there.

The launcher sets two variables. `PYTHONPATH` begins with a folder that has a `sitecustomize.py`, which waits for
`transformers.trainer`, patches it, and imports nothing else; it also runs the `sitecustomize.py` that it hides.
`NEFT_KERNELS_RUN` has the options as JSON.

The plugins of axolotl and ms-swift do the same without the launcher.

## What was run

A Llama of two layers was trained for a few steps on a CPU, by each of these lines. The input of its first layer was compared
with the plain look-up. "Right" means: in every training pass every token has noise, once, scaled by the length of its own
sequence; padding has none; evaluation, generation, reference and other passes have none; and after training there is none.
"Other passes" counts all of these. With sentence-transformers the gradients of the cached loss were also compared with those
of the same loss without a cache: they are equal within 1e-5 of the largest. `make test-clients` runs this again and writes
this page.

"""


def page(results: dict[str, Any]) -> str:
    """The page of the documentation."""
    rows = []
    for client in CLIENTS:
        for run in client.runs:
            result = results.get(f"{client.name}, {run.name}")
            if result is not None:
                versions = ", ".join(map(" ".join, result["versions"].items()))
                rows.append((f"{client.name}: {run.name}", f"`{typed(run)}`", seen(result), versions, result["date"]))
    rows += [(name, *row, "", "") for name, row in NOT_RUN.items()]
    titles = ("framework", "what to type", "what was seen", "versions", "date")
    lines = [f"| {' | '.join(row)} |" for row in (titles, ("---",) * len(titles), *rows)]
    left_out = [f"{client.name} without {', '.join(client.without)}" for client in CLIENTS if client.without]
    note = f"What needs CUDA was left out: {'; '.join(left_out)}. An empty module stood in for {', '.join(EMPTY)}."
    return PAGE_TEXT + "\n".join(lines) + f"\n\n{note}\n"


def typed(run: Run) -> str:
    """The command without what is of this test only."""
    words = run.command.replace("{work}/", "").replace(f"{PROGRAMS}/cached_loss.py", "train.py").split()
    options = [words.index(word) for word in words if word.startswith(("--", "{"))]
    shown = [*words[: options[0]], "..."] if options else words
    if "--external_plugins" in words:
        shown += ["--external_plugins", ".../neft_kernels/integrations/swift/neftune.py"]
    switches = [f"{name}={value}" for name, value in run.variables.items() if name == "FORCE_TORCHRUN"]
    return " ".join((*switches, *(run.launcher or "").split(), *shown))


def seen(result: dict[str, Any]) -> str:
    found = result["found"]
    tokens = f"{found['tokens']} tokens and {found['padding']} of padding"
    parts = [f"{found['training passes']} training passes with {tokens}"]
    for kind in ("other passes", "generation passes", "passes without gradients in training mode"):
        if found[kind]:
            parts.append(f"{found[kind]} {kind}")
    return f"{'; '.join(result['problems']) or 'right'}: {', '.join(parts)}"


if __name__ == "__main__":
    main()
