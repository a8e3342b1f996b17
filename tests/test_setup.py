"""What setup.py decides: which extensions are built, with which flags, by which CUDA toolkit; and what an extension that is
missing or old says."""

import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import neft_kernels
from neft_kernels.ops import native, registration
from neft_kernels.ops.native import load

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture
def modules_built(monkeypatch, tmp_path):
    """The extensions that setup.py would build, by name, on a machine without a CUDA toolkit but those the test makes."""
    import setuptools
    import torch
    from torch.utils import cpp_extension

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    usual = str(tmp_path / "usual")
    # What setup.py calls the usual place, as this machine may have a toolkit there.
    setup_py = (REPOSITORY / "setup.py").read_text().replace('"/usr/local/cuda"', repr(usual))
    assert usual in setup_py

    def ask(wanted, cuda="13.0"):
        asked = []
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(setuptools, "setup", lambda **options: asked.append(options))
        monkeypatch.setenv("NEFT_KERNELS_BUILD", wanted)
        exec(compile(setup_py, "setup.py", "exec"), {"__name__": "__main__"})
        ask.build_ext = asked[0].get("cmdclass", {}).get("build_ext")
        return {module.name.rpartition("_")[2]: module for module in asked[0].get("ext_modules", [])}

    return ask


def make_toolkit(home, libraries="lib64", major=13):
    """What setup.py looks for in a CUDA toolkit."""
    for name in ("bin/nvcc", f"{libraries}/libcudart.so", f"{libraries}/libcudart.so.{major}"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch(mode=0o755)


@pytest.mark.parametrize(("wanted", "built"), [("", ["cpu"]), ("1", None)])
def test_a_compiler_that_does_not_fit_nvcc_leaves_out_the_cuda_extension_alone(
    modules_built, tmp_path, monkeypatch, capsys, wanted, built
):
    import setuptools
    from torch.utils import cpp_extension

    make_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    modules = modules_built(wanted)
    assert set(modules) == {"cpu", "cuda"}
    tried = []

    def torch_builds(command):  # as torch does, which compares the compiler with nvcc before it builds anything
        tried.append([each.name.rpartition("_")[2] for each in command.extensions])
        if "cuda" in tried[-1]:
            raise RuntimeError("the compiler does not fit")

    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", torch_builds)
    build_ext = modules_built.build_ext(setuptools.Distribution())
    build_ext.extensions = list(modules.values())
    if built is None:
        with pytest.raises(RuntimeError, match="does not fit"):
            build_ext.build_extensions()
    else:
        build_ext.build_extensions()
        assert tried == [["cpu", "cuda"], built]
        assert "the CUDA extension is left out: the compiler does not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "toolkit", "cuda", "expected"),
    [
        ("", False, "13.0", ["cpu"]),
        ("", True, "13.0", ["cpu", "cuda"]),
        ("", True, None, ["cpu"]),
        ("1", True, "13.0", ["cpu", "cuda"]),
        ("1", True, None, ["cpu"]),
        ("1", False, None, ["cpu"]),
        ("cpu", True, "13.0", ["cpu"]),
        ("cpu", False, "13.0", ["cpu"]),
        ("0", True, "13.0", []),
    ],
)
def test_which_extensions_are_built(modules_built, tmp_path, capsys, wanted, toolkit, cuda, expected):
    """What was asked for must be built, the rest may fail; and what is left out unasked is said."""
    if toolkit:
        make_toolkit(tmp_path / "usual")
    modules = modules_built(wanted, cuda)
    assert list(modules) == expected
    assert all(module.optional == (not wanted) for module in modules.values())
    left_out = (wanted, toolkit, cuda) == ("", False, "13.0")
    assert ("the CUDA extension is left out: no CUDA 13 toolkit" in capsys.readouterr().err) == left_out


def cuda_home_and_libraries(modules):
    from torch.utils import cpp_extension

    return Path(cpp_extension.CUDA_HOME), Path(modules["cuda"].library_dirs[0])


@pytest.mark.parametrize("libraries", ["lib64", "lib", "targets/x86_64-linux/lib", "lib/x86_64-linux-gnu"])
def test_the_cuda_toolkit_is_the_one_that_is_named(modules_built, tmp_path, monkeypatch, libraries):
    """And its libraries lie where any of the usual packages puts them."""
    make_toolkit(tmp_path / "usual")
    make_toolkit(tmp_path / "named", libraries)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    assert cuda_home_and_libraries(modules_built("1")) == (tmp_path / "named", tmp_path / "named" / libraries)


def test_the_cuda_toolkit_is_the_one_that_a_link_to_nvcc_leads_to(modules_built, tmp_path):
    make_toolkit(tmp_path / "usual")
    make_toolkit(tmp_path / "elsewhere")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(tmp_path / "elsewhere" / "bin" / "nvcc")
    assert cuda_home_and_libraries(modules_built("1"))[0] == tmp_path / "elsewhere"


def test_the_cuda_toolkit_is_the_usual_one_where_nvcc_is_a_script(modules_built, tmp_path):
    """torch would take the folder above the script's, which has no libcudart."""
    make_toolkit(tmp_path / "usual")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    assert cuda_home_and_libraries(modules_built("1"))[0] == tmp_path / "usual"


@pytest.mark.parametrize("found", ["nothing", "nvcc alone", "another major version"])
def test_a_missing_cuda_toolkit_is_an_error_where_the_extensions_were_asked_for(
    modules_built, tmp_path, monkeypatch, found
):
    """Before anything is compiled; and a toolkit that is named is not replaced by the usual one."""
    if found != "nothing":
        make_toolkit(tmp_path / "usual")
        make_toolkit(tmp_path / "named", major=12)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "named"))
    if found == "nvcc alone":
        shutil.rmtree(tmp_path / "named" / "lib64")
    with pytest.raises(SystemExit, match=r"no CUDA 13 toolkit.*set CUDA_HOME.*NEFT_KERNELS_BUILD=cpu"):
        modules_built("1")


def test_every_extension_keeps_to_the_contract_and_to_the_stable_abi(modules_built, tmp_path):
    """No compiler may fuse a multiplication and an addition, whoever compiles; every header that changes is compiled again."""
    make_toolkit(tmp_path / "usual")
    for name, module in modules_built("1").items():
        given = module.extra_compile_args
        by_compiler = given if isinstance(given, dict) else {"cxx": given}
        for compiler, flags in by_compiler.items():
            prefix = "-Xcompiler=" if compiler == "nvcc" else ""
            assert f"{prefix}-ffp-contract=off" in flags
            assert ("-fmad=false" in flags) == (compiler == "nvcc")
            assert "-DTORCH_TARGET_VERSION=0x020A000000000000" in flags
            assert "-DPy_LIMITED_API=0x030A0000" in flags
            assert ("-DUSE_CUDA" in flags) == (name == "cuda")
        assert module.py_limited_api
        assert "csrc/glibc.cpp" in module.sources
        assert set(module.depends) >= {str(path) for path in Path("csrc").rglob("*.*h")}


@pytest.mark.parametrize("given", [None, "9.0"])
def test_the_architectures_are_those_that_one_names_or_all(modules_built, tmp_path, monkeypatch, given):
    make_toolkit(tmp_path / "usual")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given or "")
    if given is None:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    modules_built("1")
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == (given or "7.5;8.0;9.0;10.0;12.0+PTX")


def test_an_extension_that_does_not_load_says_why(monkeypatch, tmp_path):
    (tmp_path / "_C_broken.py").write_text("raise ImportError('undefined symbol: aoti_torch_no_more')")
    monkeypatch.setattr(neft_kernels.ops, "__path__", [*neft_kernels.ops.__path__, str(tmp_path)])
    assert load("broken") == (None, "the extension does not load: undefined symbol: aoti_torch_no_more")


@pytest.mark.parametrize(("name", "switch"), [("cpu", "cpu"), ("cuda", "1")])
def test_an_extension_that_was_not_built_says_how_to_build_it(monkeypatch, name, switch):
    monkeypatch.setattr(neft_kernels.ops, "__path__", [])
    monkeypatch.delitem(sys.modules, f"neft_kernels.ops._C_{name}", raising=False)
    module, reason = load.__wrapped__(name)
    assert module is None
    assert reason == (
        f"the extension was not built in {REPOSITORY / 'neft_kernels'}; build it in a checkout: "
        f"NEFT_KERNELS_BUILD={switch} pip install --no-build-isolation --editable ."
    )


def test_any_other_value_of_the_switch_is_an_error(modules_built):
    with pytest.raises(SystemExit, match="NEFT_KERNELS_BUILD must be 0, 1, cpu or unset, not 'banana'"):
        modules_built("banana")


@pytest.mark.parametrize("interface", [None, -1, 10**6])
def test_an_extension_of_another_version_is_not_used(monkeypatch, interface):
    extension = SimpleNamespace(register_kernels=lambda _: pytest.fail("its kernels have other signatures"))
    if interface is not None:
        extension.INTERFACE = interface
    monkeypatch.setattr(native.importlib, "import_module", lambda *_: extension)
    module, why = load.__wrapped__("cpu")
    assert module is None
    assert "build it again" in why


def test_the_number_of_the_interface_changes_with_the_schemas():
    """An extension that was built for other schemas must not be used. If this fails, raise both numbers, then change this."""
    in_cpp = re.search(r"kInterface = (\d+);", (REPOSITORY / "csrc" / "module.h").read_text())
    noise = "Tensor seed, Tensor? token_magnitude, float magnitude, int stream, SymInt first_token"
    kind = "int noise=0, bool symmetric=False"
    gradient = "int padding_idx=-1, bool scale_grad_by_freq=False, bool sparse=False"
    assert (native.INTERFACE, int(in_cpp[1]), registration._SCHEMAS) == (
        2,
        2,
        {
            "noisy_embedding": f"(Tensor input_ids, Tensor weight, {noise}, {gradient}, {kind}) -> Tensor",
            "add_noise": f"(Tensor embeds, {noise}, {kind}) -> Tensor",
            "token_magnitude": "(Tensor? attention_mask, Tensor? position_ids, float alpha, int embedding_dim) -> Tensor",
            "embedding_grad": "(Tensor grad, Tensor input_ids, SymInt num_embeddings, int padding_idx, "
            "bool scale_grad_by_freq) -> Tensor",
        },
    )
