"""Trains with the frameworks that people use, and looks at what the model's first layer receives: ``make test-clients``.

Each framework gets an environment of its own in ``.clients/``. It trains a small Llama for a few steps, by the command that
its users type, behind ``neft-kernels run`` or with our plugin. In all its processes ``tools/clients/spy`` compares the input
of layer 0 with the plain look-up. A run that passed is not repeated while the sources, the packages and the command are the
same. The results are kept in :data:`RECORD`. The table of :data:`PAGE` is written from it.
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
from pathlib import Path
from typing import Any

from benchmarks.sections import DOCS, write_section
from tools.client_runs import CLIENTS, EMPTY, NOT_RUN, PROGRAMS, REPOSITORY, Client, Run

ENVIRONMENTS = REPOSITORY / ".clients"
RECORD = REPOSITORY / "tests" / "clients.json"
PAGE = DOCS / "frameworks.md"

ALPHA = 5.0
TORCH = "torch==2.13.0"
SHOWN = ("torch", "transformers", "accelerate", "peft")
TIMEOUT = 900  # seconds, for one run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"only these: {', '.join(client.name for client in CLIENTS)}")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--plain", action="store_true", help="without the launcher: does the test see it? Not recorded")
    parser.add_argument("--page", action="store_true", help="write the table from the record, and run nothing")
    options = parser.parse_args()
    if not options.page:
        for client in CLIENTS:
            if not options.names or client.name in options.names:
                if options.plain:
                    test_plain(client)
                else:
                    test(client, options.again)
    results = recorded()
    write_section(PAGE, "clients", table(results))
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


def table(results: dict[str, Any]) -> str:
    """What was seen, a row for each training, for the page of the documentation."""
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
    return "\n".join(lines) + f"\n\n{note}"


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
