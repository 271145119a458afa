"""setuptools, except that `pip install .` builds against the torch that is already installed and downloads no other.

Build isolation hides the environment pip installs into; only headers of its torch are needed, so its site-packages is
added to the path. Where there is no torch yet, one is asked for.
"""

import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def _use_installed_torch():
    site = sysconfig.get_paths()["platlib"]
    found = Path(site, "torch", "version.py").exists()
    if found and site not in sys.path:
        sys.path.append(site)
    return found


def _requirements():
    return ["ninja"] if _use_installed_torch() else ["ninja", "torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return _requirements()


def get_requires_for_build_editable(config_settings=None):
    return _requirements()


def get_requires_for_build_sdist(config_settings=None):
    return _requirements()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _use_installed_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _use_installed_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    _use_installed_torch()
    return build_meta.build_sdist(sdist_directory, config_settings)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _use_installed_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    _use_installed_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)
