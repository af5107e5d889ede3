"""Builds lightning_attn._C from csrc/. Needs a C++17 compiler and pybind11; neither torch nor a network.

Each CPU kernel is one source, compiled once for every instruction set; csrc/cpu/dispatch.cpp chooses at run time. The CUDA
kernels go along as source, for NVRTC, and where there is nvcc also as machine code.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

KERNELS = ["chunk_forward", "chunk_backward", "chunk_state", "chunk_history", "decode", "gated_rms_norm"]
KERNELS += ["moe_route", "moe_rows", "expert_rows", "transpose", "outer", "table"]
BASELINE = ["csrc/bindings.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/runtime.cpp", "csrc/cuda/emulator.cpp"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC 12 takes the undefined lanes inside its own AVX-512 intrinsics for uninitialised variables.
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
X86_FLAGS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
CUDA_ARCHS = ["80", "90a", "100a"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-ftz=true"]  # as in lightning_attn/backends/cuda/launch.py

MSVC = sys.platform == "win32"
FLAGS = ["/O2", "/openmp"] if MSVC else ["-O3", "-fno-math-errno"]

ParallelCompile(default=os.cpu_count() or 1).install()


class build_kernels(build_ext):
    """Compiles the kernels for every instruction set into objects of their own, then builds the extension."""

    def accepts(self, flags: list[str]) -> bool:
        """Whether the compiler takes these flags and links a program with them."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("int main() { return 0; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
                self.compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=flags)
            except (CompileError, LinkError):
                return False
        return True

    def instruction_sets(self) -> dict[str, list[str]]:
        """What this compiler can build, each with its flags."""
        found: dict[str, list[str]] = {"portable": []}
        if platform.machine().lower() in ("x86_64", "amd64") and not MSVC:
            for name, flags in X86_FLAGS.items():  # each includes the one before
                if not self.accepts(flags):
                    print(
                        f"lightning_attn: this compiler does not know {name}; built without it",
                        file=sys.stderr,
                    )
                    break
                found[name] = flags
        return found

    def build_extension(self, ext: Pybind11Extension) -> None:
        if not MSVC and self.accepts(["-fopenmp"]):
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
        for name, flags in self.instruction_sets().items():
            ext.define_macros.append((f"LIGHTNING_HAVE_{name}", "1"))
            ext.extra_objects += self.compiler.compile(
                [f"csrc/cpu/{kernel}.cpp" for kernel in KERNELS],
                output_dir=str(Path(self.build_temp, name)),
                macros=[("LIGHTNING_ISA", name)],
                extra_postargs=[*ext.extra_compile_args, *flags],
                depends=ext.depends,
            )
        super().build_extension(ext)
        self.build_cuda(Path(self.build_lib, "lightning_attn", "_cuda"))

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        shutil.rmtree("lightning_attn/_cuda", ignore_errors=True)  # may be of a build that had nvcc
        shutil.copytree(Path(self.build_lib, "lightning_attn", "_cuda"), "lightning_attn/_cuda")

    def build_cuda(self, folder: Path) -> None:
        """csrc/cuda beside the extension, and each .cu as a .fatbin for as many architectures as nvcc knows."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        prelude, sources = Path("csrc/cuda/prelude.cuh"), sorted(Path("csrc/cuda").glob("*.cu"))
        for source in (prelude, *sources):
            shutil.copy(source, folder)
        homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
        places = os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ.get("PATH", os.defpath)])
        nvcc = shutil.which("nvcc", path=places)
        archs = CUDA_ARCHS if nvcc else []
        while archs:
            codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
            command = [nvcc, "-fatbin", *NVCC_FLAGS, "--threads=0", *codes, "-include", prelude, *sources]
            command += ["-odir", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
            *archs, left_out = archs  # nvcc may be older than the last
            print(
                f"lightning_attn: nvcc failed with sm_{left_out}; NVRTC will do\n{done.stderr}",
                file=sys.stderr,
            )


extension = Pybind11Extension(
    "lightning_attn._C",
    BASELINE,
    cxx_std=17,
    extra_compile_args=FLAGS,
    depends=[str(p) for p in Path("csrc").rglob("*") if p.suffix in (".h", ".cu", ".cuh")],
)
setup(ext_modules=[extension], cmdclass={"build_ext": build_kernels})
