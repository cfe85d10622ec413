"""What setuptools cannot say in pyproject.toml: rules.yaml, which stands beside the addons
folder, is installed inside the package made of it."""

import os
from pathlib import Path

from setuptools.command.build_py import build_py

RULES = "rules.yaml"


class BuildWithRules(build_py):
    """Copies rules.yaml into kimi_proxy; an editable install reads the checkout's own."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file(RULES, self._installed_rules())

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), self._installed_rules()]

    def get_output_mapping(self) -> dict[str, str]:
        return {**super().get_output_mapping(), self._installed_rules(): RULES}

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), RULES, os.path.relpath(__file__)]

    def _installed_rules(self) -> str:
        return str(Path(self.build_lib, "kimi_proxy", RULES))
