"""Records what the first layer of a Llama receives, in any process that has this folder in PYTHONPATH.

``CLIENT_RECORD`` names the file for the records, one JSON object a line: one for each pass that reaches layer 0, and one when
``Trainer.train`` has ended. ``CLIENT_ALPHA`` is the alpha of the noise. Nothing of neft_kernels is used here.
"""

import importlib.machinery
import json
import os
import sys
from functools import wraps
from typing import Any

LLAMA, TRAINER = "transformers.models.llama.modeling_llama", "transformers.trainer"
#: A pass below one of these functions is no training pass, even if the model is in training mode.
NO_TRAINING = {"generate", "evaluate", "evaluation_loop"}


class Finder:
    """Finds the two modules as the finders behind it do, and has them watched once they are loaded."""

    @classmethod
    def find_spec(cls, name: str, *where: Any) -> importlib.machinery.ModuleSpec | None:
        if name not in WATCH:
            return None
        found = (finder.find_spec(name, *where) for finder in sys.meta_path[sys.meta_path.index(cls) + 1 :])
        spec = next((each for each in found if each is not None), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_watch(module: Any) -> None:
                load(module)
                WATCH[name](module)

            spec.loader.exec_module = load_and_watch  # type: ignore[method-assign]
        return spec


def watch_llama(module: Any) -> None:
    import inspect

    import torch

    passes: list[dict[str, Any]] = []  # the pass under way is the last one
    forward, layer = module.LlamaModel.forward, module.LlamaDecoderLayer.forward
    signature = inspect.signature(forward)

    @wraps(forward)
    def watched_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        passes.append({"model": self, "grad": torch.is_grad_enabled(), **given, **given.get("kwargs", {})})
        try:
            return forward(self, *args, **kwargs)
        finally:
            passes.pop()

    @wraps(layer)
    def watched_layer(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if passes and self.self_attn.layer_idx == 0:
            write(seen(passes[-1], hidden_states))
        return layer(self, hidden_states, *args, **kwargs)

    module.LlamaModel.forward, module.LlamaDecoderLayer.forward = watched_forward, watched_layer


def seen(now: dict[str, Any], hidden: Any) -> dict[str, Any]:
    """What layer 0 received in this pass, against the plain look-up, in units of each token's magnitude."""
    import torch

    model, ids, mask = now["model"], now.get("input_ids"), now.get("attention_mask")
    about = {"training": model.training, "grad": now["grad"], "during": sorted(NO_TRAINING & functions())}
    if ids is None:
        return {**about, "embeds": True}
    with torch.no_grad():
        table = model.get_input_embeddings()
        noise = (hidden - torch.nn.functional.embedding(ids, table.weight)).double()
        used_mask = mask if isinstance(mask, torch.Tensor) and mask.shape == ids.shape else torch.ones_like(ids)
        magnitude = magnitudes(used_mask.tolist(), now.get("position_ids"), ids.shape[1], noise.shape[-1])
        is_noisy, is_real = (noise != 0).any(-1), torch.tensor(magnitude) > 0
        units = (noise / torch.tensor(magnitude).unsqueeze(-1))[is_real]
    return {
        **about,
        "ours": type(table).__module__.startswith("neft_kernels"),
        "tokens": int(is_real.sum()),
        "noisy": int((is_noisy & is_real).sum()),
        "padding": int((~is_real).sum()),
        "noisy_padding": int((is_noisy & ~is_real).sum()),
        "largest": float(units.abs().max()),
        "rows_rms": [
            float((row[real] ** 2).mean() ** 0.5)
            for row, real in zip(noise / torch.tensor(magnitude).unsqueeze(-1), is_real, strict=True)
            if real.any()
        ],
    }


def magnitudes(mask: list[list[int]], positions: Any, columns: int, width: int) -> list[list[float]]:
    """alpha / sqrt(L d) for each token, 0 for padding. A sequence ends where the positions do not go on."""
    alpha, result = float(os.environ["CLIENT_ALPHA"]), []
    position_rows = (
        positions.expand(len(mask), columns).tolist() if positions is not None else [list(range(columns))] * len(mask)
    )
    for row, position in zip(mask, position_rows, strict=True):
        sequence, number = [], 0
        for column in range(columns):
            if column and row[column] and position[column] <= position[column - 1] and row[column - 1]:
                number += 1
            sequence.append(number if row[column] else -1)
        result.append([0.0 if each < 0 else alpha / (sequence.count(each) * width) ** 0.5 for each in sequence])
    return result


def functions() -> set[str]:
    """The names of the functions under way."""
    names, frame = set(), sys._getframe()
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return names


def watch_trainer(module: Any) -> None:
    train = module.Trainer.train

    @wraps(train)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return train(self, *args, **kwargs)
        finally:
            model = self.accelerator.unwrap_model(self.model)
            llama = next(each for each in model.modules() if type(each).__name__ == "LlamaModel")
            table = llama.get_input_embeddings()
            hooks = [*table._forward_hooks.values(), *llama._forward_pre_hooks.values()]
            names = [f"{hook.__module__}.{getattr(hook, '__qualname__', '')}" for hook in hooks]
            write({"left": type(table).__name__, "of_noise": [name for name in names if "neft" in name]})

    module.Trainer.train = watched


def write(record: dict[str, Any]) -> None:
    with open(os.environ["CLIENT_RECORD"], "a") as file:
        file.write(json.dumps(record | {"process": os.getpid()}) + "\n")


WATCH = {LLAMA: watch_llama, TRAINER: watch_trainer}
sys.meta_path.insert(0, Finder)
