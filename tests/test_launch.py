"""Contract: under `neft-kernels run` the Trainer's noise is ours in every process below; nothing else is different there."""

import json
import os
import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from neft_kernels.__main__ import main

REPOSITORY = Path(__file__).parent.parent
RUN = (sys.executable, "-m", "neft_kernels", "run")
VARIABLES = os.environ | {"PYTHONPATH": str(REPOSITORY)}

CHOSEN = [
    "--scale-by",
    "batch",
    "--noise-on",
    "prompt",
    "--noise",
    "sign",
    "--symmetric",
    "--stream",
    "3",
    "--backend",
    "reference",
]
CHOSEN += ["--under-no-grad"]
OPTIONS = {
    "scale_by": "batch",
    "noise_on": "prompt",
    "noise": "sign",
    "symmetric": True,
    "stream": 3,
    "backend": "reference",
    "under_no_grad": True,
}

#: Prints the options of the noise that the Trainer's own option puts into a model.
WORKER = """
import dataclasses, json, sys
if "package-first" in sys.argv:
    import neft_kernels.integrations.trainer
import transformers
from neft_kernels.models.replace import noisy_modules

def noise():
    config = transformers.LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1)
    model = transformers.LlamaForCausalLM(config)
    transformers.trainer.activate_neftune(model, 5.0)
    return [dataclasses.asdict(each.model_noise.options) for _, _, each in noisy_modules(model)]

if __name__ == "__main__":
    print(json.dumps(noise()))
"""

#: Starts the worker through a shell, and through multiprocessing; imports nothing itself.
PARENT = """
import json, multiprocessing, subprocess, sys
if __name__ == "__main__":
    import worker
    command = f"true && {sys.executable} worker.py package-first"
    found = {"shell": json.loads(subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout)}
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found["spawn"] = pool.apply(worker.noise)
    found["itself"] = worker.noise()
    print(json.dumps(found))
"""

#: Prints what this process has loaded, and whether it waits for transformers.trainer.
PROBE = """
import sys
print(any(getattr(each, "__name__", "") == "TrainerFinder" for each in sys.meta_path), *sorted(sys.modules))
"""


def run(*command, variables=VARIABLES, cwd=None):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=variables, cwd=cwd)


@pytest.fixture(scope="module")
def below():
    """The environment of a process below the launcher."""
    done = run(*RUN, *CHOSEN, "--", "env", "-0")
    assert done.returncode == 0, done.stderr
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if line)


def test_every_process_below_has_the_noise_with_its_options(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "parent.py").write_text(PARENT)
    done = run(*RUN, *CHOSEN, sys.executable, "parent.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = [OPTIONS | {"sequence_group": None, "sequence_layout": "contiguous", "argument_names": None}]
    assert json.loads(done.stdout) == {"itself": expected, "shell": expected, "spawn": expected}


def test_two_variables_are_all_that_is_different(below):
    startup = str(REPOSITORY / "neft_kernels" / "integrations" / "startup")
    changed = {name: value for name, value in below.items() if VARIABLES.get(name) != value}
    changed.pop("_", None)  # of the shell
    assert changed == {
        "PYTHONPATH": f"{startup}:{REPOSITORY}",
        "NEFT_KERNELS_RUN": json.dumps(OPTIONS),
    }


def test_nothing_is_imported_before_the_trainer_is(below):
    def loaded(variables):
        waits, *modules = run(sys.executable, "-c", PROBE, variables=variables).stdout.split()
        return waits == "True", set(modules)

    assert not loaded(VARIABLES)[0]
    waits, modules = loaded(below)
    assert waits
    new = {name.partition(".")[0] for name in modules - loaded(VARIABLES)[1]}
    assert new <= sys.stdlib_module_names | {"sitecustomize"}
    assert "json" not in new


@pytest.mark.parametrize("switch", ["-I", "-E", "-S"])
def test_a_python_that_ignores_its_environment_is_not_reached(below, switch):
    done = run(sys.executable, switch, "-c", PROBE, variables=below)
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, "False", "")


def test_the_sitecustomize_that_is_hidden_runs(below, tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    variables = below | {"PYTHONPATH": f"{below['PYTHONPATH']}:{folder}"}
    look = "import sys, sitecustomize; print(sitecustomize.__file__, sys.modules['sitecustomize'].found)"
    (folder / "sitecustomize.py").write_text("found = 'here'")
    done = run(sys.executable, "-c", look, variables=variables)
    assert (done.stdout.split(), done.stderr) == ([str(folder / "sitecustomize.py"), "here"], "")
    # One that fails: Python says so and goes on, as it does without the launcher; and the noise is ours all the same.
    (folder / "sitecustomize.py").write_text("raise RuntimeError('broken')")
    done = run(sys.executable, "-c", PROBE, variables=variables)
    assert done.stdout.startswith("True")
    assert "RuntimeError: broken" in done.stderr


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A virtual environment with nothing in it."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder)
    return folder


def test_a_python_with_neither_transformers_nor_this_package_is_left_alone(below, bare):
    variables = below | {"PYTHONPATH": below["PYTHONPATH"].partition(":")[0]}
    look = "import importlib.util as u; print(u.find_spec('transformers'), u.find_spec('neft_kernels'))"
    done = run(bare / "bin/python", "-c", look, variables=variables, cwd=bare)
    assert (done.stdout.split(), done.stderr) == (["None", "None"], "")
    done = run(bare / "bin/python", "-c", "import transformers.trainer", variables=variables, cwd=bare)
    assert "No module named 'transformers'" in done.stderr


def test_a_python_with_transformers_and_without_this_package_says_so(below, bare, tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").touch()
    (tmp_path / "transformers" / "trainer.py").write_text("print('loaded')")
    variables = below | {"PYTHONPATH": f"{below['PYTHONPATH'].partition(':')[0]}:{tmp_path}"}
    done = run(bare / "bin/python", "-c", "import transformers.trainer", variables=variables, cwd=bare)
    assert (done.returncode, done.stdout) == (0, "loaded\n")
    assert f"{bare}/bin/python has no neft_kernels, so transformers uses its own noise there" in done.stderr


#: Waits for transformers.trainer too, and asks every other finder.
ANOTHER_FINDER = """
import sys

class Finder:
    @classmethod
    def find_spec(cls, name, *where):
        if name == "transformers.trainer":
            return next(filter(None, (each.find_spec(name, *where) for each in sys.meta_path if each is not cls)))

sys.meta_path.insert(0, Finder)
"""


def test_another_finder_for_the_trainer_is_no_endless_loop(below, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(ANOTHER_FINDER)
    variables = below | {"PYTHONPATH": f"{below['PYTHONPATH']}:{tmp_path}"}
    look = "from transformers.trainer import activate_neftune; print(activate_neftune.__module__)"
    done = run(sys.executable, "-c", look, variables=variables)
    assert done.stdout == "neft_kernels.integrations.trainer\n", done.stderr


def test_what_goes_wrong_with_the_patch_is_an_error(below):
    """Not a training with another noise than one has asked for."""
    variables = below | {"NEFT_KERNELS_RUN": '{"scale_by": "banana"}'}
    done = run(sys.executable, "-c", "import transformers; transformers.trainer", variables=variables)
    assert done.returncode == 1
    assert "scale_by must be one of" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no-such-command", "--scale-by"], 127, "cannot run 'no-such-command': No such file or directory"),
        (["--", "/etc/passwd"], 126, "cannot run '/etc/passwd': Permission denied"),
        ([], 2, "the command is missing"),
        (["--"], 2, "the command is missing"),
        (["--scale-by", "banana", "true"], 2, "invalid choice: 'banana'"),
        (["--stream", "-1", "true"], 2, "stream must be in [0, 2**32), not -1"),
        (["--alpha", "5", "true"], 2, "unrecognized arguments: --alpha"),
    ],
)
def test_a_command_that_cannot_run_is_an_error(arguments, code, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["neft-kernels", "run", *arguments])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGPIPE, signal.SIGXFSZ)}
    try:
        returned = main()
    except SystemExit as error:
        returned = error.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert returned == code
    assert message in capsys.readouterr().err


def test_the_exit_code_is_that_of_the_command():
    """And a pipe that breaks is no error in it, although Python ignores that signal."""
    done = run(*RUN, "--", "sh", "-c", "yes | head -n 1; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "y\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_is_the_process_that_gets_signals(number):
    def heed():
        signal.signal(number, signal.SIG_DFL)  # a shell that runs the tests in the background ignores SIGINT in them

    command = [*RUN, "sh", "-c", "echo $$; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=VARIABLES, preexec_fn=heed) as process:
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(number)
        assert process.wait() == -number


def test_without_run_it_shows_the_backends():
    done = run(sys.executable, "-m", "neft_kernels")
    assert done.returncode == 0
    assert {line.split()[1] for line in done.stdout.splitlines()[1:]} == {"triton", "cuda", "cpu", "reference"}
