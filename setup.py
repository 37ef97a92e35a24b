"""Puts what the package ships besides its modules into a wheel; an editable install finds it in the checkout."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("conf", "assets/demo")


class BuildWithShipped(build_py):
    """Copies the folders to where ``hybridprune_megatron/config/shipped.py`` looks for them."""

    def run(self) -> None:
        """Builds, and copies unless the install is editable."""
        super().run()
        if not self.editable_mode:
            for folder in SHIPPED:
                target = Path(self.build_lib, "hybridprune_megatron", folder)
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(folder, target)


setup(cmdclass={"build_py": BuildWithShipped})
