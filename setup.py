"""Builds the native kernels: every room's Cython binding, and its C compiled once for each rung.

A room is a folder of `pace/_kernels` with `NAME.pyx` and `NAME_kernel.c`. The C is compiled once per entry of
`RUNGS`; the objects are linked into the room's one extension, and the binding chooses among them at run time.
`PACE_NO_NATIVE=1`, a machine that is not x86-64, or the absence of any C compiler leave the package pure Python
(the NumPy reference is all there is). A compiler that is there and fails stops the build.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
KERNELS = Path("pace/_kernels")

AVX2 = "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt".split()
AVX512 = (
    "-mavx512f -mavx512cd -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mprefer-vector-width=512"
).split()
RUNGS = {"avx2": AVX2, "avx512": AVX2 + AVX512}

# One arithmetic everywhere: a product and a sum are fused where the source says so and nowhere else, or the same
# inline function could round differently in two places that inline it.
C_FLAGS = ["-std=gnu11", "-fvisibility=hidden", "-Wall", "-Wextra"]
if os.environ.get("PACE_WERROR") == "1":
    C_FLAGS.append("-Werror")
KERNEL_FLAGS = [*C_FLAGS, "-O3", "-ffp-contract=off", "-fno-math-errno"]
# A worker is machine code that calls nothing: no stack protector, and a loop stays a loop where gcc would call memset.
KERNEL_FLAGS += ["-fno-stack-protector", "-fno-tree-loop-distribute-patterns"]
PARALLEL_FLAGS = [*C_FLAGS, "-O2", "-pthread"]
BINDING_FLAGS = ["-O2", "-fvisibility=hidden", "-pthread", "-Wno-unused-function"]
LINK_FLAGS = ["-pthread"]
BUILD = Path("build")
if os.environ.get("PACE_SANITIZE") == "1":
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    KERNEL_FLAGS += ["-g", "-fno-omit-frame-pointer", "-fno-wrapv", *sanitizers]
    BINDING_FLAGS += sanitizers
    PARALLEL_FLAGS += sanitizers
    LINK_FLAGS += sanitizers
    BUILD /= "sanitized"

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "binding": True,  # so that inspect.signature sees the parameters
    "embedsignature": True,
}


def native_wanted() -> bool:
    """Whether to build the kernels here; says on stderr why not."""
    if os.environ.get("PACE_NO_NATIVE") == "1":
        reason = "PACE_NO_NATIVE=1"
    elif platform.machine().lower() not in ("x86_64", "amd64"):
        reason = f"this machine is {platform.machine()}, the kernels are for x86-64"
    elif not shutil.which(shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]):
        reason = "no C compiler found (install gcc for the fast kernels)"
    else:
        return True
    print(f"pace: building without native kernels: {reason}", file=sys.stderr)
    return False


def extensions() -> list[Extension]:
    import numpy

    headers = sorted(str(path) for path in KERNELS.rglob("*.h"))
    shared = sorted(str(path) for path in KERNELS.glob("*.pxd"))
    return [
        Extension(
            ".".join(pyx.with_suffix("").parts),
            [str(pyx)],
            include_dirs=[str(KERNELS), numpy.get_include()],
            depends=headers + shared + [str(path) for path in pyx.parent.glob("*.c")],
            define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
            extra_compile_args=BINDING_FLAGS,
            extra_link_args=LINK_FLAGS,
        )
        for pyx in sorted([*KERNELS.glob("*.pyx"), *KERNELS.glob("*/*.pyx")])
    ]


def compile_rung(kernel: Path, rung: str, compiler: list[str], *, force: bool = False) -> Path:
    """Compile one kernel for one rung into a folder of build/rungs."""
    flags = [*KERNEL_FLAGS, *RUNGS[rung], f"-DRUNG={rung}", f"-DRUNG_{rung.upper()}=1"]
    return compile_c(kernel, BUILD / "rungs" / rung, flags, compiler, force=force)


def compile_c(source: Path, folder: Path, flags: list[str], compiler: list[str], *, force: bool = False) -> Path:
    """Compile one file into a folder of these flags' own, unless it is there and newer than its sources."""
    flags = [*flags, f"-I{KERNELS}"]
    digest = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:8]
    target = folder.with_name(f"{folder.name}-{digest}") / source.with_suffix(".o").name
    newest = max(path.stat().st_mtime for path in [source, Path(__file__), *KERNELS.rglob("*.h")])
    if target.exists() and target.stat().st_mtime > newest and not force:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(target)], check=True)
    return target


class BuildRooms(build_ext):
    """Adds to each room's extension the objects of its kernel, one per rung, and to the runtime's the driver."""

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = str(BUILD / "objects")
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, ext):
        from Cython.Build import cythonize

        (cythonized,) = cythonize(ext, compiler_directives=DIRECTIVES, build_dir=str(BUILD / "cython"), quiet=True)
        ext.sources = cythonized.sources
        room = KERNELS.joinpath(*ext.name.split(".")[2:-1])
        compiler = {"compiler": self.compiler.compiler_so, "force": self.force}
        try:
            for source in sorted(room.glob("*.c")):
                if source.name == "parallel.c":
                    objects = [compile_c(source, Path(self.build_temp, "parallel"), PARALLEL_FLAGS, **compiler)]
                else:
                    objects = [compile_rung(source, rung, **compiler) for rung in RUNGS]
                ext.extra_objects += map(str, objects)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"{source} does not compile: {shlex.join(error.cmd)}") from error
        super().build_extension(ext)


if __name__ == "__main__":
    os.chdir(ROOT)
    native = native_wanted()
    setup(ext_modules=extensions() if native else [], cmdclass={"build_ext": BuildRooms} if native else {})
