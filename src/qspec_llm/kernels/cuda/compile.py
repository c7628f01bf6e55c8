"""CUDA C++ to running kernels: NVRTC at first use, cubins kept on disk, launches on torch's stream.

No nvcc and no compiler on the user's machine: NVRTC and the driver are called through NVIDIA's
Python bindings (`pip install 'qspec-llm[cuda]'`). A cubin is cached under the hash of its sources,
its options, its architecture and the compiler's version, so a changed source never runs stale code.

Nothing here knows what a kernel computes.
"""

import ctypes
import functools
import hashlib
import importlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qspec_llm.errors import QSpecError

__all__ = [
    "ARCHITECTURES",
    "Kernel",
    "addresses",
    "architecture",
    "arguments",
    "compile_source",
    "kernel",
    "num_multiprocessors",
    "tensor_map",
]

SOURCES = Path(__file__).parent
CACHE = Path.home() / ".cache" / "qspec" / "cuda"
# What is compile-checked. sm_90a has Hopper's own instructions.
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100")
LEAST_CAPABILITY = (8, 0)
INSTALL = "install them with pip install 'qspec-llm[cuda]'"


def _bindings(name: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise QSpecError(f"the cuda backend needs NVIDIA's Python bindings: {INSTALL}") from error


def _checked(result: tuple[Any, ...], doing: str) -> Any:
    """What a binding returned behind its status, or one sentence."""
    status, *values = result
    if int(status) != 0:
        raise QSpecError(f"{doing} failed: {status.name} ({int(status)})")
    return values[0] if len(values) == 1 else values


def architecture(device: torch.device | int | None = None) -> str:
    """The name that NVRTC gives a device's architecture: "sm_90a".

    Raises:
        QSpecError: there is no usable GPU or driver, or the GPU is too old.
    """
    if not torch.cuda.is_available():
        raise QSpecError(
            "no CUDA device can be used: torch finds no NVIDIA driver or was built without CUDA; "
            "use backend 'cpu'"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        raise QSpecError(
            f"a GPU of compute capability {major}.{minor} is too old for the cuda backend, which "
            "needs 8.0 or later; use backend 'cpu'"
        )
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


@functools.cache
def num_multiprocessors(device: int) -> int:
    """Multiprocessors of a device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def compile_source(source: str, arch: str, defines: Sequence[tuple[str, str]] = ()) -> bytes:
    """The cubin of one file of this package, from the cache or from NVRTC.

    Args:
        source: file name, "linear.cu".
        arch: "sm_90a".
        defines: macros and their values.

    Raises:
        QSpecError: NVRTC is missing, or it does not know the architecture or refuses the source.
    """
    nvrtc = _bindings("nvrtc")
    try:
        version = _checked(nvrtc.nvrtcVersion(), "asking NVRTC for its version")
        known = _checked(nvrtc.nvrtcGetSupportedArchs(), "asking NVRTC for its architectures")
    except RuntimeError as error:
        raise QSpecError(f"the cuda backend needs the library NVRTC: {INSTALL}") from error
    if int(arch.removeprefix("sm_").rstrip("a")) not in known:
        raise QSpecError(
            f"NVRTC {version[0]}.{version[1]} does not compile for {arch}; it knows "
            f"{', '.join(f'sm_{number}' for number in known)}"
        )
    texts = {path.name: path.read_bytes() for path in sorted(SOURCES.glob("*.cu*"))}
    headers = {name: text for name, text in texts.items() if name.endswith(".cuh")}
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--fmad=false"]
    options += [f"-D{name}={value}" for name, value in defines]
    key = hashlib.sha256(repr((version, options, source, texts[source], headers)).encode())
    cached = CACHE / f"{Path(source).stem}-{arch}-{key.hexdigest()[:32]}.cubin"
    if cached.exists():
        return cached.read_bytes()
    cubin = _compile(nvrtc, source, texts[source], headers, options)
    _write(cached, cubin)
    return cubin


def _compile(
    nvrtc: Any, name: str, text: bytes, headers: dict[str, bytes], options: Sequence[str]
) -> bytes:
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            text,
            name.encode(),
            len(headers),
            list(headers.values()),
            [header.encode() for header in headers],
        ),
        f"opening {name}",
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        if int(status) != 0:
            log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program), "reading NVRTC's log"))
            nvrtc.nvrtcGetProgramLog(program, log)
            lines = [line for line in log.decode(errors="replace").splitlines() if "error" in line]
            raise QSpecError(f"NVRTC refuses {name}: {' | '.join(lines) or status.name}")
        size = _checked(nvrtc.nvrtcGetCUBINSize(program), "measuring a cubin")
        cubin = bytearray(size)
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin), "reading a cubin")
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _write(path: Path, content: bytes) -> None:
    """Write a cache file in one step; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)
    except OSError:
        return


@dataclass
class Kernel:
    """One function of one compiled source. Loaded on a device at its first launch there."""

    source: str
    function: str
    defines: tuple[tuple[str, str], ...]
    _handles: dict[int, Any] = field(default_factory=dict)
    _configs: dict[Any, Any] = field(default_factory=dict)

    def launch(
        self,
        grid: tuple[int, ...],
        block: int,
        args: Sequence[Any],
        *,
        smem: int = 0,
        cluster: int = 1,
        pdl: bool = False,
        cooperative: bool = False,
    ) -> None:
        """Launch on torch's current stream of the current device.

        Args:
            grid: blocks, up to three dimensions.
            block: threads of a block.
            args: tensors (their address), None (a null pointer), ints (int32), floats (float32) or
                ctypes objects as they are.
            smem: bytes of dynamic shared memory.
            cluster: neighbouring blocks that form a cluster.
            pdl: the kernel may start before the stream's previous one has ended; the kernel itself
                waits where it must (programmatic dependent launch).
            cooperative: all blocks run at a time, so that they may wait for each other.
        """
        device = torch.cuda.current_device()
        driver = _bindings("driver")
        config = self._config(driver, (*grid, 1, 1)[:3], block, smem, cluster, pdl, cooperative)
        config.hStream = torch.cuda.current_stream(device).cuda_stream
        values = arguments(args)
        pointers = addresses(values)
        handle = self._handle(device, driver)
        status = driver.cuLaunchKernelEx(config, handle, ctypes.addressof(pointers), 0)
        _checked(status, f"launching {self.function}")

    def max_active_clusters(self, cluster: int, block: int, smem: int) -> int:
        """Clusters of such blocks that the current device runs at a time."""
        driver = _bindings("driver")
        config = self._config(driver, (cluster, 1, 1), block, smem, cluster, False)
        config.hStream = 0
        handle = self._handle(torch.cuda.current_device(), driver)
        return int(_checked(driver.cuOccupancyMaxActiveClusters(handle, config), "occupancy"))

    def _handle(self, device: int, driver: Any) -> Any:
        if device not in self._handles:
            torch.cuda.synchronize(device)  # makes the device's context current on this thread
            cubin = compile_source(self.source, architecture(device), self.defines)
            module = _checked(driver.cuModuleLoadData(cubin), f"loading {self.source}")
            handle = _checked(
                driver.cuModuleGetFunction(module, self.function.encode()), f"finding {self}"
            )
            opt_in = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            most = _checked(driver.cuDeviceGetAttribute(opt_in, device), "asking for shared memory")
            attribute = driver.CUfunction_attribute
            used = _checked(
                driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, handle),
                "asking for shared memory",
            )
            largest = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(handle, largest, most - used), "raising its limit")
            self._handles[device] = handle
        return self._handles[device]

    def _config(
        self,
        driver: Any,
        grid: tuple[int, ...],
        block: int,
        smem: int,
        cluster: int,
        pdl: bool,
        cooperative: bool = False,
    ) -> Any:
        key = (grid, block, smem, cluster, pdl, cooperative)
        if key not in self._configs:
            config = driver.CUlaunchConfig()
            config.gridDimX, config.gridDimY, config.gridDimZ = grid
            config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
            config.sharedMemBytes = smem
            attributes = []
            if cluster > 1:
                one = driver.CUlaunchAttribute()
                one.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
                one.value.clusterDim.x, one.value.clusterDim.y = cluster, 1
                one.value.clusterDim.z = 1
                attributes.append(one)
            if pdl:
                one = driver.CUlaunchAttribute()
                ids = driver.CUlaunchAttributeID
                one.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
                one.value.programmaticStreamSerializationAllowed = 1
                attributes.append(one)
            if cooperative:
                one = driver.CUlaunchAttribute()
                one.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
                one.value.cooperative = 1
                attributes.append(one)
            config.attrs, config.numAttrs = attributes, len(attributes)
            self._configs[key] = config
        return self._configs[key]


def arguments(args: Sequence[Any]) -> list[Any]:
    """The arguments of a launch (`Kernel.launch`) as ctypes objects."""
    return [_argument(value) for value in args]


def addresses(values: Sequence[Any]) -> Any:
    """An array of where ctypes objects lie, for as long as they live."""
    return (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(0)
    if isinstance(value, int):
        return ctypes.c_int(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return value


@functools.cache
def _kernel(source: str, function: str, defines: tuple[tuple[str, str], ...]) -> Kernel:
    return Kernel(source, function, defines)


def kernel(source: str, function: str, **defines: object) -> Kernel:
    """A kernel of this package, the same object for the same arguments.

    Args:
        source: file name, "linear.cu".
        function: its `extern "C"` name.
        defines: macros: NT=1 becomes -DNT=1.
    """
    return _kernel(source, function, tuple(sorted((k, str(v)) for k, v in defines.items())))


def tensor_map(matrix: Tensor, box: tuple[int, int]) -> Any:
    """How the copy engine reads boxes of a row-major matrix: an argument for `Kernel.launch`.

    Args:
        matrix: [rows, columns] of one- or two-byte values; rows begin at multiples of 16 bytes.
        box: rows and columns of a box; a box's row has 128 bytes and is swizzled by 128.
    """
    key = (
        matrix.data_ptr(),
        matrix.shape,
        matrix.stride(0),
        matrix.dtype,
        box,
        matrix.device.index,
    )
    return _tensor_map(key, matrix.itemsize)


@functools.lru_cache(maxsize=4096)
def _tensor_map(key: Any, itemsize: int) -> Any:
    address, shape, stride, _, box, _ = key
    driver = _bindings("driver")
    kinds = driver.CUtensorMapDataType
    kind = {
        1: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    }[itemsize]
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    found = _checked(
        driver.cuTensorMapEncodeTiled(
            kind,
            2,
            address,
            [u64(shape[1]), u64(shape[0])],
            [u64(stride * itemsize)],
            [u32(box[1]), u32(box[0])],
            [u32(1), u32(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "describing activations to the copy engine",
    )
    return (ctypes.c_uint64 * 16).from_buffer_copy(ctypes.string_at(found.getPtr(), 128))
