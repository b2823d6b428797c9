"""The same as program.c, with ctypes and PTX text: python3 program.py kernel.ptx"""

import ctypes
import struct
import sys

cuda = ctypes.CDLL("libcuda.so.1")
N = 1000


def check(result, name):
    if result != 0:
        text = ctypes.c_char_p()
        cuda.cuGetErrorString(result, ctypes.byref(text))
        sys.exit(f"{name}: {text.value.decode()}")


def call(name, *args):
    check(getattr(cuda, name)(*args), name)


device, context = ctypes.c_int(), ctypes.c_void_p()
module, saxpy = ctypes.c_void_p(), ctypes.c_void_p()
call("cuInit", 0)
call("cuDeviceGet", ctypes.byref(device), 0)
call("cuCtxCreate_v2", ctypes.byref(context), 0, device)
with open(sys.argv[1], "rb") as file:
    call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(file.read()))
call("cuModuleGetFunction", ctypes.byref(saxpy), module, b"saxpy")

x, y = ctypes.c_uint64(), ctypes.c_uint64()
values = (ctypes.c_float * N)(*range(N))
size = ctypes.c_size_t(ctypes.sizeof(values))
for at in (x, y):
    call("cuMemAlloc_v2", ctypes.byref(at), size)
    call("cuMemcpyHtoD_v2", at, values, size)

a, n = ctypes.c_float(2.0), ctypes.c_int(N)
params = (ctypes.c_void_p * 4)(*(ctypes.addressof(p) for p in (a, x, y, n)))
call("cuLaunchKernel", saxpy, (N + 127) // 128, 1, 1, 128, 1, 1, 0, None, params, None)
result = (ctypes.c_float * N)()
call("cuMemcpyDtoH_v2", result, y, size)
if list(result) != [3.0 * i for i in range(N)]:
    sys.exit(f"wrong: {list(result)[:8]} ...")

# What a program gets wrong comes back as an error.
bad = cuda.cuMemcpyDtoH_v2(result, y, ctypes.c_size_t(size.value + 1))
if bad != 1:
    sys.exit(f"a copy of too many bytes gave {bad}")
call("cuCtxDestroy_v2", context)
print(f"{N} values are right")
