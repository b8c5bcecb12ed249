"""What each vendor's probe says, told from fakes of torch: no such device is here, and none is claimed to be.

A fake answers only the questions that a probe may ask of that build; any other raises AttributeError.
"""

import builtins
from types import SimpleNamespace

import pytest

from portnet.contract import Settings, Unavailable, Unsupported
from portnet_backends.accelerator import Accelerator
from portnet_backends.cpu import Cpu
from portnet_backends.cuda import Cuda
from portnet_backends.mps import Mps
from portnet_backends.rocm import Rocm
from portnet_backends.xpu import Xpu

VENDORS = {backend.name: backend for backend in (Cuda(), Rocm(), Mps(), Xpu(), Accelerator(), Cpu())}

# Fakes of devices' properties, and of builds of torch.


def fake_nvidia(name="Fake Ampere", major=8, minor=0):
    return SimpleNamespace(name=name, major=major, minor=minor, total_memory=80 * 2**30)


def fake_amd(**more):
    return SimpleNamespace(name="Fake Instinct", major=9, minor=4, total_memory=192 * 2**30, **more)


def fake_intel(*, fp64):
    return SimpleNamespace(
        name="Fake Arc",
        has_fp64=fp64,
        total_memory=16 * 2**30,
        driver_version="1.6.0",
        platform_name="Fake Level-Zero",
    )


def fake_torch(
    version="2.13.0+cpu",
    *,
    cuda=None,
    hip=None,
    gpu=None,
    bf16=True,
    mps=(False, False),
    xpu=None,
    xpu_built=False,
    accelerator=None,
):
    """A torch built for `cuda`, `hip` or neither, that finds `gpu`, `xpu`, and/or `accelerator`."""

    def properties_of(found):
        def properties(index):
            assert index == 0
            assert found is not None, "asked for the properties of a device that is not there"
            return found

        return properties

    return SimpleNamespace(
        __version__=version,
        version=SimpleNamespace(cuda=cuda, hip=hip),
        ops=SimpleNamespace(mkldnn=SimpleNamespace()),
        cuda=SimpleNamespace(
            is_available=lambda: gpu is not None,
            get_device_properties=properties_of(gpu),
            is_bf16_supported=lambda: bf16,
        ),
        backends=SimpleNamespace(
            cudnn=SimpleNamespace(version=lambda: 91002 if cuda else 3_05_00 if hip else None),
            mps=SimpleNamespace(is_built=lambda: mps[0], is_available=lambda: mps[1]),
            cpu=SimpleNamespace(get_cpu_capability=lambda: "FAKE512"),
        ),
        mps=SimpleNamespace(recommended_max_memory=lambda: 12 * 2**30),
        xpu=SimpleNamespace(
            _is_compiled=lambda: xpu_built,
            is_available=lambda: xpu is not None,
            get_device_properties=properties_of(xpu),
        ),
        accelerator=SimpleNamespace(
            is_available=lambda: accelerator is not None,
            # As torch does, it names what it was built for, also where there is no device.
            current_accelerator=lambda: SimpleNamespace(type=accelerator or "cuda"),
        ),
        get_num_threads=lambda: 3,
    )


FAKE_CPU_BUILD = fake_torch()
FAKE_CUDA_BUILD = fake_torch("2.13.0+cu130", cuda="13.0")
FAKE_ROCM_BUILD = fake_torch("2.13.0+rocm7.2", hip="7.2.53211")
FAKE_CUDA = fake_torch("2.13.0+cu130", cuda="13.0", gpu=fake_nvidia(), accelerator="cuda")
FAKE_ROCM = fake_torch(
    "2.13.0+rocm7.2", hip="7.2.53211", gpu=fake_amd(gcnArchName="gfx942:sramecc+"), accelerator="cuda"
)
FAKE_MAC = fake_torch("2.13.0", mps=(True, True), accelerator="mps")
FAKE_XPU = fake_torch("2.13.0+xpu", xpu=fake_intel(fp64=True), xpu_built=True, accelerator="xpu")
FAKE_GAUDI = fake_torch("2.13.0a0", accelerator="hpu")


def refusal(backend, torch):
    with pytest.raises(Unavailable) as caught:
        backend.find(torch)
    assert caught.value.reason
    assert caught.value.remedy
    assert str(caught.value) == f"{caught.value.reason}; {caught.value.remedy}"
    return caught.value.reason, caught.value.remedy


# NVIDIA.


@pytest.mark.parametrize("torch", [FAKE_CPU_BUILD, FAKE_ROCM_BUILD, FAKE_ROCM, FAKE_MAC, FAKE_XPU])
def test_cuda_needs_a_build_for_cuda(torch):
    reason, remedy = refusal(Cuda(), torch)
    assert reason == f"PyTorch {torch.__version__} was built without CUDA"
    assert "pip install torch --index-url https://download.pytorch.org/whl/cu" in remedy


def test_a_hip_build_is_not_cuda_even_if_it_names_a_cuda():
    torch = fake_torch(cuda="13.0", hip="7.2", gpu=fake_amd())
    assert "without CUDA" in refusal(Cuda(), torch)[0]


def test_cuda_without_a_device():
    reason, remedy = refusal(Cuda(), FAKE_CUDA_BUILD)
    assert reason == "PyTorch finds no CUDA device"
    assert "nvidia-smi" in remedy
    assert "CUDA 13.0" in remedy


def test_cuda_with_a_device():
    device = Cuda().find(FAKE_CUDA)
    assert (device.name, device.memory) == ("Fake Ampere", 80 * 2**30)
    assert device.precisions == ("float64", "float32", "tf32", "bfloat16", "float16")
    assert device.versions == {"torch": "2.13.0+cu130", "cuda": "13.0", "cudnn": "91002"}


@pytest.mark.parametrize(
    ("major", "minor", "narrow"),
    [(7, 0, ("float16",)), (7, 5, ("float16",)), (8, 6, ("tf32", "bfloat16", "float16")), (9, 0, None), (12, 0, None)],
)
def test_tf32_and_bfloat16_came_with_ampere(major, minor, narrow):
    torch = fake_torch(cuda="13.0", gpu=fake_nvidia("Fake GPU", major, minor))
    assert Cuda().find(torch).precisions == ("float64", "float32", *(narrow or ("tf32", "bfloat16", "float16")))


# AMD.


@pytest.mark.parametrize("torch", [FAKE_CPU_BUILD, FAKE_CUDA_BUILD, FAKE_CUDA, FAKE_MAC, FAKE_XPU])
def test_rocm_needs_a_build_for_rocm(torch):
    reason, remedy = refusal(Rocm(), torch)
    assert reason == f"PyTorch {torch.__version__} was built without ROCm"
    assert "pip install torch --index-url https://download.pytorch.org/whl/rocm" in remedy


def test_rocm_without_a_device():
    reason, remedy = refusal(Rocm(), FAKE_ROCM_BUILD)
    assert reason == "PyTorch finds no ROCm device"
    assert "rocminfo" in remedy
    assert "render and video" in remedy


def test_rocm_with_a_device():
    device = Rocm().find(FAKE_ROCM)
    assert (device.name, device.memory) == ("Fake Instinct", 192 * 2**30)
    # Its TF32 is not NVIDIA's: never offered, whatever the capability that torch makes up.
    assert device.precisions == ("float64", "float32", "bfloat16", "float16")
    assert device.versions == {
        "torch": "2.13.0+rocm7.2",
        "hip": "7.2.53211",
        "miopen": "30500",
        "architecture": "gfx942:sramecc+",
    }


def test_rocm_on_an_older_device():
    device = Rocm().find(fake_torch(hip="7.2", gpu=fake_amd(), bf16=False))
    assert device.precisions == ("float64", "float32", "float16")
    assert "architecture" not in device.versions


# Apple.


def test_mps_not_built():
    reason, remedy = refusal(Mps(), FAKE_CUDA)
    assert reason == "PyTorch 2.13.0+cu130 was built without MPS"
    assert "Apple silicon" in remedy


def test_mps_not_available():
    reason, remedy = refusal(Mps(), fake_torch(mps=(True, False)))
    assert reason == "PyTorch finds no MPS device"
    assert "macOS 14" in remedy


def test_mps_available():
    device = Mps().find(FAKE_MAC)
    assert (device.name, device.memory) == ("Apple GPU", 12 * 2**30)
    assert device.precisions == ("float32", "bfloat16", "float16")
    assert device.versions["torch"] == "2.13.0"
    assert set(device.versions) == {"torch", "macos"}


# Intel.


@pytest.mark.parametrize("torch", [FAKE_CPU_BUILD, FAKE_CUDA, FAKE_ROCM])
def test_xpu_not_built(torch):
    reason, remedy = refusal(Xpu(), torch)
    assert reason == f"PyTorch {torch.__version__} was built without XPU"
    assert remedy.endswith("pip install torch --index-url https://download.pytorch.org/whl/xpu")


def test_xpu_without_a_device():
    reason, remedy = refusal(Xpu(), fake_torch(xpu_built=True))
    assert reason == "PyTorch finds no XPU device"
    assert "sycl-ls" in remedy


@pytest.mark.parametrize("fp64", [True, False])
def test_xpu_with_a_device(fp64):
    device = Xpu().find(fake_torch(xpu=fake_intel(fp64=fp64), xpu_built=True))
    assert (device.name, device.memory) == ("Fake Arc", 16 * 2**30)
    assert device.precisions == ("float64",) * fp64 + ("float32", "bfloat16", "float16")
    assert device.versions == {"torch": "2.13.0+cpu", "driver": "1.6.0", "platform": "Fake Level-Zero"}


# Whatever else torch reports.


@pytest.mark.parametrize("torch", [FAKE_CPU_BUILD, FAKE_CUDA_BUILD])
def test_no_accelerator(torch):
    reason, remedy = refusal(Accelerator(), torch)
    assert reason == "torch reports no accelerator"
    assert "vendor's package" in remedy


def test_available_but_none_current():
    torch = fake_torch(accelerator="hpu")
    torch.accelerator.current_accelerator = lambda: None
    assert refusal(Accelerator(), torch)[0] == "torch reports no accelerator"


@pytest.mark.parametrize(
    ("torch", "kind", "use"),
    [
        (FAKE_CUDA, "cuda", "use backend cuda or rocm"),
        (FAKE_ROCM, "cuda", "use backend cuda or rocm"),
        (FAKE_XPU, "xpu", "use backend xpu"),
        (FAKE_MAC, "mps", "use backend mps"),
    ],
)
def test_a_claimed_accelerator(torch, kind, use):
    reason, remedy = refusal(Accelerator(), torch)
    assert reason == f"torch's accelerator is {kind}, which has a backend of its own"
    assert remedy == use


@pytest.mark.parametrize("kind", ["hpu", "npu", "mtia", "musa", "privateuseone"])
def test_an_unclaimed_accelerator(kind):
    device = Accelerator().find(fake_torch("2.13.0a0", accelerator=kind))
    assert device.name == f"{kind} device"
    assert device.precisions == ("float32", "bfloat16")
    assert device.versions == {"torch": "2.13.0a0", "type": kind}


# All against all.


@pytest.mark.parametrize(
    ("torch", "owner"),
    [
        (FAKE_CPU_BUILD, None),
        (FAKE_CUDA_BUILD, None),
        (FAKE_ROCM_BUILD, None),
        (FAKE_CUDA, "cuda"),
        (FAKE_ROCM, "rocm"),
        (FAKE_MAC, "mps"),
        (FAKE_XPU, "xpu"),
        (FAKE_GAUDI, "accelerator"),
    ],
)
def test_a_device_has_one_vendor(torch, owner):
    found = set()
    for name, backend in VENDORS.items():
        try:
            backend.find(torch)
        except Unavailable:
            continue
        found.add(name)
    assert found == {"cpu"} | ({owner} if owner else set())


def test_the_processor_is_always_there():
    device = Cpu().find(FAKE_CPU_BUILD)
    assert device.name.endswith(", FAKE512, 3 threads")
    assert len(device.name) > len(", FAKE512, 3 threads")
    assert device.precisions == ("float64", "float32", "bfloat16", "float16")
    assert device.versions == {"torch": "2.13.0+cpu"}


def test_the_order_in_which_auto_prefers_them():
    ranked = sorted(VENDORS, key=lambda name: -VENDORS[name].priority)
    assert ranked == ["cuda", "rocm", "xpu", "mps", "accelerator", "cpu"]
    assert len({backend.priority for backend in VENDORS.values()}) == len(VENDORS)
    assert min(backend.priority for backend in VENDORS.values()) > 0


def test_vendors_and_what_torch_calls_their_devices():
    assert {name: backend.vendor for name, backend in VENDORS.items()} == {
        "cuda": "NVIDIA",
        "rocm": "AMD",
        "mps": "Apple",
        "xpu": "Intel",
        "accelerator": "any that torch reports",
        "cpu": "any CPU",
    }
    types = {name: backend.device_type() for name, backend in VENDORS.items() if name != "accelerator"}
    assert types == {"cuda": "cuda", "rocm": "cuda", "mps": "mps", "xpu": "xpu", "cpu": "cpu"}
    for backend in VENDORS.values():
        assert (backend.modes, backend.formulations[:2]) == (("infer", "train"), ("portable", "stock"))


def test_without_torch(monkeypatch):
    real = builtins.__import__

    def fake_import(name, *args, **kwargs):
        if name == "torch":
            raise ImportError("libfake.so: cannot open shared object file")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake_import)
    for backend in VENDORS.values():
        with pytest.raises(Unavailable, match=r"PyTorch cannot be imported: libfake\.so") as caught:
            backend.probe()
        assert "install" in caught.value.remedy


@pytest.mark.parametrize("name", ["cuda", "rocm", "mps", "xpu", "accelerator"])
def test_opening_asks_first(name, monkeypatch):
    """`open` goes through `find`: a missing device fails as its probe does, a precision it lacks before any work."""
    backend = VENDORS[name]
    torch = {"cuda": FAKE_CUDA, "rocm": FAKE_ROCM, "mps": FAKE_MAC, "xpu": FAKE_XPU, "accelerator": FAKE_GAUDI}[name]
    device = backend.find(torch)
    monkeypatch.setattr(type(backend), "find", lambda self, torch: device)
    missing = {"cuda": "float8", "rocm": "tf32", "mps": "float64", "xpu": "tf32", "accelerator": "float16"}[name]
    with pytest.raises(Unsupported, match=rf"{name} does not compute in '{missing}' on {device.name}; it offers"):
        backend.open(None, {}, Settings(precision=missing))

    def gone(self, torch):
        raise Unavailable("it is gone", "plug it in")

    monkeypatch.setattr(type(backend), "find", gone)
    with pytest.raises(Unavailable, match="it is gone; plug it in"):
        backend.open(None, {}, Settings())
