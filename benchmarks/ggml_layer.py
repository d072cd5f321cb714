"""One matrix product of ggml, the arithmetic of llama.cpp, called through its C interface: for benchmarks/decode.py.

The weight lies where llama.cpp would put it: in the order of ggml's fastest CPU kernels for the type.
"""

import ctypes
from pathlib import Path

import torch

TYPES = {"q4_0": 2, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12}  # enum ggml_type
F32, WEIGHTS = 0, 1  # WEIGHTS: enum ggml_backend_buffer_usage
PATTERN = 64  # rows that are quantized; the others repeat them

POINTER, SIZE, I64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", SIZE), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool))


SIGNATURES = {
    "ggml_init": (POINTER, (InitParams,)),
    "ggml_free": (None, (POINTER,)),
    "ggml_new_tensor_2d": (POINTER, (POINTER, ctypes.c_int, I64, I64)),
    "ggml_mul_mat": (POINTER, (POINTER, POINTER, POINTER)),
    "ggml_new_graph": (POINTER, (POINTER,)),
    "ggml_build_forward_expand": (None, (POINTER, POINTER)),
    "ggml_quantize_chunk": (SIZE, (ctypes.c_int, POINTER, POINTER, I64, I64, I64, POINTER)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, (POINTER, POINTER)),
    "ggml_backend_buffer_set_usage": (None, (POINTER, ctypes.c_int)),
    "ggml_backend_buffer_free": (None, (POINTER,)),
    "ggml_backend_tensor_set": (None, (POINTER, POINTER, SIZE, SIZE)),
    "ggml_backend_tensor_get": (None, (POINTER, POINTER, SIZE, SIZE)),
    "ggml_backend_graph_compute": (ctypes.c_int, (POINTER, POINTER)),
    "ggml_backend_get_default_buffer_type": (POINTER, (POINTER,)),
    "ggml_backend_reg_dev_get": (POINTER, (POINTER, SIZE)),
    "ggml_backend_reg_get_proc_address": (POINTER, (POINTER, ctypes.c_char_p)),
    "ggml_backend_cpu_init": (POINTER, ()),
    "ggml_backend_cpu_reg": (POINTER, ()),
    "ggml_backend_cpu_set_n_threads": (None, (POINTER, ctypes.c_int)),
}


class Ggml:
    """The two libraries of ggml in `folder`, with the signatures of what is used of them."""

    def __init__(self, folder: Path) -> None:
        libraries = [
            ctypes.CDLL(str(folder / f"libggml-{part}.so"), ctypes.RTLD_GLOBAL) for part in ("base", "cpu")
        ]
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(libraries["cpu" in name], name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.backend = self.backend_cpu_init()
        registry = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(address)(
            self.backend_reg_dev_get(registry, 0)
        )
        found = []
        while extra[len(found)]:
            found.append(extra[len(found)])
        self.repacked, self.plain = found[-1], self.backend_get_default_buffer_type(self.backend)


class GgmlLayer:
    """y = x W' with a random W (rows, columns) of type `kind`, for `batch` rows of float32 inputs."""

    def __init__(self, ggml: Ggml, kind: str, shape: tuple[int, int], batch: int, threads: int) -> None:
        self.ggml, self.threads, (rows, columns) = ggml, threads, shape
        space = InitParams(1 << 20, None, True)  # of descriptions; the data lies in buffers
        self.contexts = [ggml.init(space), ggml.init(space)]
        weight = ggml.new_tensor_2d(self.contexts[0], TYPES[kind], columns, rows)
        self.x = ggml.new_tensor_2d(self.contexts[1], F32, columns, batch)
        self.y = ggml.mul_mat(self.contexts[1], weight, self.x)
        self.graph = ggml.new_graph(self.contexts[1])
        ggml.build_forward_expand(self.graph, self.y)
        # K-quants of 2 and 3 bits have no repacked order on every processor; ggml then refuses the buffer's kernels.
        place = ggml.repacked if kind in ("q4_0", "q4_k") else ggml.plain
        self.buffers = [
            ggml.backend_alloc_ctx_tensors_from_buft(self.contexts[0], place),
            ggml.backend_alloc_ctx_tensors_from_buft(self.contexts[1], ggml.plain),
        ]
        ggml.backend_buffer_set_usage(self.buffers[0], WEIGHTS)
        self.pattern = torch.randn(PATTERN, columns) * 0.02
        packed = torch.empty(PATTERN * columns * 2, dtype=torch.uint8)
        size = ggml.quantize_chunk(
            TYPES[kind], self.pattern.data_ptr(), packed.data_ptr(), 0, PATTERN, columns, None
        )
        whole = packed[:size].repeat(rows // PATTERN)
        self.bytes = whole.numel()
        ggml.backend_tensor_set(weight, whole.data_ptr(), 0, self.bytes)
        self.set(torch.randn(batch, columns))
        self.shape = (batch, rows)

    def set(self, x: torch.Tensor) -> None:
        """Take new inputs, float32."""
        self.ggml.backend_tensor_set(self.x, x.data_ptr(), 0, 4 * x.numel())

    def __call__(self) -> None:
        """Multiply once."""
        self.ggml.backend_cpu_set_n_threads(self.ggml.backend, self.threads)
        assert self.ggml.backend_graph_compute(self.ggml.backend, self.graph) == 0, "ggml computes"

    def result(self) -> torch.Tensor:
        """What the last call gave."""
        y = torch.empty(self.shape)
        self.ggml.backend_tensor_get(self.y, y.data_ptr(), 0, 4 * y.numel())
        return y

    def close(self) -> None:
        """Give the memory back."""
        for buffer in self.buffers:
            self.ggml.backend_buffer_free(buffer)
        for context in self.contexts:
            self.ggml.free(context)
