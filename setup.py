"""The native runtime is compiled when the package is installed; where that fails, everything runs in PyTorch.

It is a plain library of C functions, which needs no headers but the compiler's own. The build backend stays setuptools:
it compiles for editable installs too, in place, so that `make run` and `make test` work in a fresh clone without cmake.
"""

from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = "polyformer/native/src"


class BuildLibrary(build_ext):
    """Compiles a library that is no Python module: nothing is exported but what the source says."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Return nothing: there is no PyInit function."""
        return []


setup(
    cmdclass={"build_ext": BuildLibrary},
    ext_modules=[
        Extension(
            "polyformer.native._native",
            sources=sorted(glob(f"{SOURCES}/*.cpp")),
            depends=sorted(glob(f"{SOURCES}/*.h") + glob(f"{SOURCES}/*.inl")),
            language="c++",
            extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-pthread", "-Wno-psabi"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
)
