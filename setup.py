"""How the kernels are compiled: sources side by side. All else stands in pyproject.toml."""

import os
from concurrent.futures import ThreadPoolExecutor

from setuptools import setup
from setuptools.command.build_ext import build_ext


class BuildSideBySide(build_ext):
    """setuptools compiles whole extensions side by side, but the sources of one after each other."""

    def build_extensions(self) -> None:
        """Builds each extension with as many compilers at a time as there are cores."""
        compile_all = self.compiler.compile

        def side_by_side(sources: list[str], *arguments: object, **options: object) -> list[str]:
            longest_first = sorted(sources, key=os.path.getsize, reverse=True)  # none is left over when others are done
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_all([source], *arguments, **options), longest_first)
                return [name for names in objects for name in names]

        self.compiler.compile = side_by_side
        super().build_extensions()


setup(cmdclass={"build_ext": BuildSideBySide})
