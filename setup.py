"""One library without a line of the Python C API, so one wheel serves every Python and every torch from 2.10 up.

csrc/cuda, once it has sources, becomes a second library: a CPU-only torch must be able to load the first one alone.
"""

from pathlib import Path

import torch.utils.cpp_extension as cpp
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the oldest torch that may load the result: 2.10
CXX = [
    "-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",  # g++ 12 says so of its own AVX-512 header
    f"-ffile-prefix-map={Path.cwd()}/=", f"-ffile-prefix-map={Path(cpp.__file__).parents[1]}/=", TARGET,
]  # fmt: skip


class Wheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        # py_limited_api keeps libtorch_python out of the link.
        cpp.CppExtension(
            "ocsquant._C",
            sorted(str(p) for room in ("core", "ops") for p in Path("csrc", room).glob("*.cpp")),
            include_dirs=[str(Path.cwd() / "csrc")],
            py_limited_api=True,
            extra_compile_args={"cxx": CXX},
            extra_link_args=["-Wl,-s"],
        )
    ],
    cmdclass={"build_ext": cpp.BuildExtension.with_options(no_python_abi_suffix=True), "bdist_wheel": Wheel},
)
