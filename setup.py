"""Compile the native engine; without a compiler the installation succeeds, and the dense engine runs.

``GMMKEOPS_REQUIRE_NATIVE=1`` makes a failed compilation an error, as for wheels and continuous integration.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
PACKAGE = Path("gmmkeops", "reductions", "native")
SOURCE = PACKAGE / "source"

FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-pthread"]
# Options of the user, for example those of sanitizers.
EXTRA = os.environ.get("CXXFLAGS", "").split()
X86 = platform.machine().lower() in ("x86_64", "amd64")

# One compilation of the kernels for each instruction set.
KERNELS = {"base": []}
if X86:
    KERNELS["avx2"] = ["-mavx2", "-mfma"]
    KERNELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]


def compile_library(target: Path, work: Path) -> None:
    """Compile the library; raises OSError or subprocess.CalledProcessError where that fails."""
    compiler = os.environ.get("CXX", "c++").split()
    work.mkdir(parents=True, exist_ok=True)
    sources = {name: ["kernel.cpp", f"-DKERNELS={name}", *flags] for name, flags in KERNELS.items()}
    # The order of a kd-tree has the same bits on every machine.
    sources["driver"] = ["native.cpp", "-ffp-contract=off"]

    def compile_one(name: str) -> str:
        file, *flags = sources[name]
        result = str(work / f"{name}.o")
        run([*compiler, *FLAGS, *EXTRA, *flags, "-c", str(HERE / SOURCE / file), "-o", result])
        return result

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    target.parent.mkdir(parents=True, exist_ok=True)
    # The C++ library is linked statically, so that wheels run with older ones.
    static = ["-static-libstdc++", "-static-libgcc"] if sys.platform == "linux" else []
    made = work / "_native.so"
    run([*compiler, "-shared", "-pthread", *EXTRA, *static, *objects, "-o", str(made)])
    # A library that is in use must not be overwritten in place.
    shutil.copy2(made, target.with_suffix(".new"))
    os.replace(target.with_suffix(".new"), target)


def run(command: list[str]) -> None:
    """Run a compiler; its messages become the text of the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command[0], stderr=done.stderr)


class BuildNative(build_ext):
    """Compiles the library, or writes a file that says why that failed."""

    def run(self) -> None:
        folder = HERE / PACKAGE if self.inplace or self.editable_mode else Path(self.build_lib) / PACKAGE
        self.outputs = []
        note, target = folder / "unbuilt.txt", folder / "_native.so"
        note.unlink(missing_ok=True)
        try:
            if sys.platform == "win32":
                raise OSError("the kernels are not compiled on Windows yet")
            compile_library(target, Path(self.build_temp))
            self.outputs = [str(target)]
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("GMMKEOPS_REQUIRE_NATIVE") == "1":
                raise
            why = getattr(error, "stderr", None) or str(error)
            folder.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            note.write_text(why.strip().splitlines()[0][:300] + "\n", encoding="utf-8")
            self.outputs = [str(note)]
            self.warn(f"The native engine has not been compiled: {why}")

    def get_outputs(self) -> list[str]:
        return self.outputs

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_ext_fullpath(self, ext_name: str) -> str:
        return str(HERE / PACKAGE / "_native.so")


class Wheel(bdist_wheel):
    """A wheel for any Python of one platform, since the library does not use Python's headers."""

    def get_tag(self) -> tuple[str, str, str]:
        built = (Path(self.bdist_dir) / PACKAGE / "_native.so").exists() if self.bdist_dir else True
        if not built:
            return "py3", "none", "any"
        return "py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_")


setup(
    ext_modules=[Extension("gmmkeops.reductions.native._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
