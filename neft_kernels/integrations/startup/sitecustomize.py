"""Python runs this file as it starts, because ``neft-kernels run`` has put its folder in front of PYTHONPATH.

It waits for ``transformers.trainer`` and patches it then. It also runs the ``sitecustomize`` that it hides. It is cheap, and
has no annotations, so that any Python 3 can run it, with or without neft_kernels and transformers.
"""

import importlib.machinery
import importlib.util
import os
import sys

TRAINER = "transformers.trainer"


class TrainerFinder:
    """Finds ``transformers.trainer`` as the finders behind it do, and has it patched once it is loaded."""

    @classmethod
    def find_spec(cls, name, *where):
        if name != TRAINER:
            return None
        others = sys.meta_path[sys.meta_path.index(cls) + 1 :]  # one before may have asked this one
        found = (finder.find_spec(name, *where) for finder in others if hasattr(finder, "find_spec"))
        spec = next((each for each in found if each is not None), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_patch(module):
            load(module)
            if module.__name__ == TRAINER:  # the loader of a zip file loads other modules as well
                patch()

        spec.loader.exec_module = load_and_patch
        return spec


def patch():
    try:
        from neft_kernels.integrations.launch import patch_this_process
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "neft_kernels":
            raise
        print(
            f"neft-kernels run: {sys.executable} has no neft_kernels, so transformers uses its own noise there. "
            "Install neft_kernels in it.",
            file=sys.stderr,
        )
    else:
        patch_this_process()


def run_hidden_sitecustomize():
    here = os.path.dirname(os.path.abspath(__file__))
    others = [folder for folder in sys.path if os.path.abspath(folder) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        sys.modules["sitecustomize"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


sys.meta_path.insert(0, TrainerFinder)
run_hidden_sitecustomize()
