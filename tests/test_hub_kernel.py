"""Contract: the ops work as a kernel repository of Hugging Face's `kernels` package, which loads the layout itself here.

Every build has a namespace of its own in torch.ops, so two versions run side by side, and beside the installed package.
"""

import ast
import importlib.util
import json
import sys
from pathlib import Path

import kernels
import pytest
import torch
from kernels._rust import Digest, DigestAlgorithm, Metadata
from torch import nn

import neft_kernels
from helpers.devices import DTYPES
from neft_kernels.ops import native
from tools import hub_kernel

IDS = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Two versions: the first without the C++ extension, the second with it where it was built."""
    folder = tmp_path_factory.mktemp("hub")
    built = hub_kernel.OPS / hub_kernel.EXTENSION
    extensions = {hub_kernel.platform.machine(): built.read_bytes()} if native.load("cpu")[0] is not None else {}
    hub_kernel.lay_out(folder / "one", {}, number=1)
    hub_kernel.lay_out(folder / "two", extensions, number=2)
    return folder / "one", folder / "two"


@pytest.fixture(scope="module")
def versions(repositories):
    return [kernels.get_local_kernel(repository) for repository in repositories]


def test_two_versions_and_the_installed_package_have_ops_of_their_own(versions):
    one, two = versions
    assert one.__name__ != two.__name__
    namespaces = {sys.modules[f"{each}.native"].NAMESPACE for each in (one.__name__, two.__name__, "neft_kernels.ops")}
    assert namespaces == {one.__name__, two.__name__, "neft_kernels"}
    assert all(hasattr(getattr(torch.ops, namespace).noisy_embedding, "reference") for namespace in namespaces)
    backends = [next(b.name for b in each.available_backends() if "cpu" in b.chosen_for) for each in versions]
    # With a torch that has CUDA, the kernels package chooses the variant for GPUs, which has no kernels for CPUs.
    has_cpu_kernels = torch.version.cuda is None and native.load("cpu")[0] is not None
    assert backends == ["reference", "cpu" if has_cpu_kernels else "reference"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_the_installed_package(versions, dtype):
    weight = torch.randn(50, 24, dtype=torch.float64).to(dtype)
    for kernel in versions:
        magnitude = kernel.noise_magnitude(IDS, 24, 5.0, attention_mask=MASK)
        assert torch.equal(magnitude, neft_kernels.noise_magnitude(IDS, 24, 5.0, attention_mask=MASK))
        grads = []
        for each in (kernel, neft_kernels):
            table = weight.clone().requires_grad_()
            out = each.noisy_embedding(IDS, table, magnitude, seed=7, stream=2)
            out.sum().backward()
            grads.append((out.detach(), table.grad))
        assert torch.equal(grads[0][0], grads[1][0])
        assert torch.equal(grads[0][1], grads[1][1])
        embeds = weight[IDS]
        assert torch.equal(
            kernel.add_noise(embeds, 0.5, seed=3), neft_kernels.add_noise(embeds, 0.5, seed=3, backend="reference")
        )


def test_both_versions_compile_in_one_graph(versions):
    weight = torch.randn(50, 24)

    def both(ids, weight):
        first, second = (kernel.noisy_embedding(ids, weight, 0.5, seed=9) for kernel in versions)
        return first, second

    first, second = torch.compile(both, backend="aot_eager", fullgraph=True)(IDS, weight)
    expected = neft_kernels.noisy_embedding(IDS, weight, 0.5, seed=9)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def test_the_layer_replaces_a_forward(repositories):
    @kernels.use_kernel_forward_from_hub("NEFTuneEmbedding")
    class Table(nn.Embedding):
        alpha = 5.0

    model = nn.Sequential(Table(50, 24)).train()
    layer = kernels.LocalLayerRepository(repositories[1], layer_name="NEFTuneEmbedding")
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping({"NEFTuneEmbedding": {"cpu": layer}}, inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    torch.manual_seed(1)
    noisy = model(IDS)
    torch.manual_seed(1)
    expected = neft_kernels.NEFTuneEmbedding.from_pretrained(model[0].weight.detach(), freeze=False).train()
    assert torch.equal(noisy, expected(IDS))
    assert torch.equal(model.eval()(IDS), nn.functional.embedding(IDS, model[0].weight))


def test_every_variant_has_valid_metadata_and_its_digest(repositories):
    for repository in repositories:
        for variant in (repository / "build").iterdir():
            metadata = Metadata.read_from_file(variant / "metadata.json")
            assert metadata.version == (1 if repository.name == "one" else 2)
            assert metadata.id.isidentifier()
            metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    ids = [json.loads(path.read_text())["id"] for each in repositories for path in each.glob("build/*/metadata.json")]
    assert len(ids) == len(set(ids))


def test_a_kernel_imports_torch_triton_the_standard_library_and_itself_alone(repositories):
    """And the last by relative imports: two versions of one name would otherwise share modules."""
    for path in (repositories[1] / "build" / "torch-cuda").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            top = {name.partition(".")[0] for name in names}
            assert top <= {"torch", "triton", *sys.stdlib_module_names}, path.name


def test_old_versions_of_kernels_find_a_package_in_the_variant(versions, repositories):
    variant = Path(versions[1].__file__).parent
    spec = importlib.util.spec_from_file_location("old", variant / "neft_kernels" / "__init__.py")
    old = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(old)
    assert old.noisy_embedding is versions[1].noisy_embedding
    assert set(old.__all__) == set(versions[1].__all__)
