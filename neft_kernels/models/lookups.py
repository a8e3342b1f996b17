"""Finds the modules by which a model looks tokens up."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from neft_kernels.ops.checks import FLOAT_DTYPES

__all__ = ["check_model", "input_embeddings", "is_encoder_decoder", "is_plain", "token_embeddings"]


def token_embeddings(model: nn.Module) -> tuple[list[nn.Module], str]:
    """All token look-ups of `model`, and a note on those that are not known.

    They are the input embeddings that it names, those of its decoder where it has an encoder as well, and whatever else looks
    up the same tables: most encoder-decoder models keep one table and look it up through modules that are tied to it.
    """
    check_model(model)
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return token_embeddings(model.module)
    lookups = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    main, why_not = input_embeddings(model)
    if main is None:  # for transformers the text part beside a part for pictures is a decoder too
        main, _ = input_embeddings(_side(model, "decoder"))
    if main is None:
        return _embeddings_of_parts(model, lookups, why_not)
    named, note = [main], ""
    if is_encoder_decoder(model):
        encoder, _ = input_embeddings(_side(model, "encoder"))  # of a picture or a sound, where it reads those
        decoder, why_not = input_embeddings(_side(model, "decoder"))
        if encoder is not None and any(_is_tied(table, main) for table in _tables(encoder)):
            named.append(encoder)
        if decoder is not None:
            named.append(decoder)
        else:
            note = f"the decoder's tokens get no noise, because its embedding is not known: {why_not}"
    tied = [module for module in lookups if any(module.weight is getattr(each, "weight", None) for each in named)]
    # A wrapper, such as a PEFT layer, may read the table without calling it. Add the noise to the wrapper's output.
    inside = {part for module in named for part in module.modules() if part is not module}
    return [module for module in dict.fromkeys([*named, *tied]) if module not in inside], note


def _embeddings_of_parts(model: nn.Module, lookups: Sequence[nn.Module], why_not: str) -> tuple[list[nn.Module], str]:
    """:func:`token_embeddings` of a `model` that does not name its own: of the outermost parts that name theirs."""
    found: dict[nn.Module, None] = {}
    notes = []
    for part in _parts_with_tables(model):
        embeddings, note = token_embeddings(part)
        found.update(dict.fromkeys(embeddings))
        notes += [note] if note else []
    if found:
        return list(found), "; ".join(notes)
    if len(lookups) == 1 and not hasattr(model, "get_input_embeddings"):
        return list(lookups), ""
    raise ValueError(
        f"found no token embedding in model of class {type(model).__name__}: neither it nor a submodule has a usable "
        f"get_input_embeddings() ({why_not}), and it has {len(lookups)} nn.Embedding modules; define "
        "get_input_embeddings(), or pass a submodule with exactly one nn.Embedding"
    )


def _parts_with_tables(model: nn.Module) -> Iterator[nn.Module]:
    for part in model.children():
        named = input_embeddings(part)[0] if hasattr(part, "get_input_embeddings") else None
        if named is not None and any(isinstance(module, nn.Embedding) for module in named.modules()):  # not of pictures
            yield part
        else:
            yield from _parts_with_tables(part)


def check_model(model: nn.Module) -> None:
    """`model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def input_embeddings(part: nn.Module) -> tuple[nn.Module | None, str]:
    """The module by which `part` of a model looks tokens up, as it names it itself; or None, and why."""
    getter = getattr(part, "get_input_embeddings", None)
    try:
        # The default name is that of transformers, for parts that do not derive from its models.
        found = part.embed_tokens if getter is None else getter()
    except (NotImplementedError, AttributeError) as error:
        return None, str(error)
    if isinstance(found, nn.ModuleList) and found and all(isinstance(table, nn.Embedding) for table in found):
        # One table for each codebook. The model adds their rows up, and so the noise of one is the noise of the sum; noise
        # in each would be sqrt(codebooks) times too much, and no longer uniform.
        return found[0], ""
    if not isinstance(found, nn.Module) or isinstance(found, (nn.ModuleList, nn.ModuleDict)):
        return (
            None,
            f"get_input_embeddings() of {type(part).__name__} returns a {type(found).__name__}, which is not called",
        )
    return found, ""


def _side(model: nn.Module, kind: str) -> nn.Module:
    """The "encoder" or the "decoder" of `model`."""
    getter: Callable[[], nn.Module] | None = getattr(model, f"get_{kind}", None)
    return getattr(model, kind, model) if getter is None else getter()


def _tables(module: nn.Module) -> list[Tensor]:
    return [each.weight for each in module.modules() if isinstance(each, nn.Embedding)]


def _is_tied(table: Tensor, module: nn.Module) -> bool:
    return any(table is other for other in _tables(module))


def is_encoder_decoder(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def is_plain(module: nn.Module) -> bool:
    """Whether `module` does exactly what nn.Embedding does on an ordinary table, so that the fused op can stand in."""
    return (
        type(module) is nn.Embedding
        and "forward" not in module.__dict__  # accelerate's offloading replaces it on the instance
        and module.max_norm is None
        and type(module.weight) is nn.Parameter
        and module.weight.layout == torch.strided
        and module.weight.dtype in FLOAT_DTYPES
    )
